"""A platform for verl without an accelerator. ``VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=verl_on_cpu``."""

import types
from contextlib import nullcontext

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def gives(value):
    return lambda *_, **__: value


nothing = gives(None)
module = types.ModuleType("device_of_verl")
vars(module).update({name: getattr(torch.cpu, name) for name in dir(torch.cpu)})
vars(module).update(dict.fromkeys(("empty_cache", "synchronize", "ipc_collect", "set_device"), nothing))
vars(module).update(dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_allocated"), gives(0)))
vars(module).update(max_memory_reserved=gives(0), mem_get_info=gives((0, 0)), device_count=gives(1))

ANSWERS = {
    **dict.fromkeys(("is_available", "is_platform_available"), True),
    **dict.fromkeys(("set_device", "synchronize", "set_allocator_settings", "empty_cache", "cudart"), None),
    **dict.fromkeys(("profiler_start", "profiler_stop", "manual_seed", "manual_seed_all"), None),
    "current_device": torch.device("cpu"),  # What is sent to it stays.
    "device_count": 1,
    "get_device_capability": (None, None),
    "communication_backend_name": "gloo",
    "visible_devices_envvar": "NO_VISIBLE_DEVICES",
    "nvtx_range": nullcontext(),
    "ray_resource_name": "GPU",  # Of which Ray is told that there are some: it counts them and touches none.
    "ray_noset_envvars": [],
    "is_ipc_supported": False,
}
properties = {"device_name": "cpu", "vendor_name": "cpu", "device_module": module}

PlatformRegistry.register(platform="cpu")(
    type(
        "CPUPlatform",
        (PlatformBase,),
        {name: gives(answer) for name, answer in ANSWERS.items()}
        | {name: property(gives(value)) for name, value in properties.items()}
        | {"ray_resource_options": lambda self, num_gpus: {"num_gpus": num_gpus}},
    )
)

# verl asks for a backend of CPUs and one of its device: here they are one.
init = torch.distributed.init_process_group


def init_process_group(backend=None, *given, **named):
    init("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *given, **named)


torch.distributed.init_process_group = init_process_group
