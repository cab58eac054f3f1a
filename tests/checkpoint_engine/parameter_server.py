"""checkpoint-engine's parameter server on a CPU, in a process of its own, which may die on the way."""

from __future__ import annotations

import os
from multiprocessing.shared_memory import SharedMemory
from types import SimpleNamespace
from typing import Any

import torch


class CPU:
    """What checkpoint-engine asks of CUDA, on a machine without."""

    device_type = "cpu"
    backend = "gloo"
    device_module = SimpleNamespace(
        **dict.fromkeys(("synchronize", "ipc_collect", "empty_cache", "set_device"), lambda *_: None),
        **dict.fromkeys(("memory_allocated", "memory_reserved"), lambda *_: 0),
        device_count=lambda: 1,
        get_device_properties=lambda _: SimpleNamespace(uuid=f"cpu-of-{os.getpid()}"),
    )

    def __getattr__(self, name: str) -> Any:
        raise ImportError(name)  # No direct reads of other machines.


shared: dict[str, SharedMemory] = {}


def rebuilt(name: str) -> torch.Tensor:
    """The buffer, in the worker."""
    shared.clear()  # What was before is read by nobody.
    memory = shared[name] = SharedMemory(name)
    return torch.frombuffer(memory.buf, dtype=torch.uint8)


def reduced(buffer: torch.Tensor) -> Any:
    """As ``reduce_tensor`` of CUDA: the memory of ``buffer`` becomes one that others find."""
    memory = SharedMemory(create=True, size=buffer.nbytes)
    shared[memory.name] = memory
    buffer.set_(torch.frombuffer(memory.buf, dtype=torch.uint8))
    return rebuilt, (memory.name,)


def serve(state: dict[str, torch.Tensor], pipe: Any, dies_at: int | None, buckets: int = 2) -> None:
    """Update whoever connects to the address that is sent through the pipe; then send how that ended.

    Args:
        state: the weights.
        pipe: for the address, and for ``None`` or the words of an error. Waits for a word before it ends.
        dies_at: before which of its messages it is killed.
        buckets: how many there are, about.
    """
    import zmq

    sent = 0
    plain_send = zmq.Socket.send_pyobj

    def send(socket: Any, thing: Any, *how: Any) -> Any:
        nonlocal sent
        sent += 1
        if sent - 1 == dies_at:
            os.kill(os.getpid(), 9)
        return plain_send(socket, thing, *how)

    zmq.Socket.send_pyobj = send
    server = prepared({"weights": state}, buckets)
    words = None
    try:
        server.update("weights", lambda paths: pipe.send(paths))
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
    pipe.send((words, sent))
    pipe.recv()


def prepared(states: dict[str, dict[str, torch.Tensor]], buckets: int) -> Any:
    """A server that has checkpoints by name, all of the same size; an update goes in about so many ``buckets``."""
    from checkpoint_engine import pin_memory, ps

    ps.DeviceManager = CPU
    aligned = sum(256 + tensor.nbytes for tensor in next(iter(states.values())).values())
    CPU.device_module.mem_get_info = lambda: (4 * aligned // buckets, 1 << 40)  # It takes a third of nine tenths.
    ps.reduce_tensor = reduced
    plain_empty = torch.empty
    pin_memory.torch = SimpleNamespace(
        **{**vars(torch), "empty": lambda *shape, pin_memory=False, **how: plain_empty(*shape, **how)}
    )
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0", GLOO_SOCKET_IFNAME="lo")
    server = ps.ParameterServer(auto_pg=True, master_port=_free_port())
    for name, state in states.items():
        server.register_checkpoint(name, named_tensors=state)
        server.gather_metas(name)
    return server


def _free_port() -> int:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
