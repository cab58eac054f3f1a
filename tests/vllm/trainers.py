"""Trainers as users make them by vLLM's factory, and sources that are wrong."""

from drive import OURS

BACKEND = {**OURS, "weight_transfer_config": {"backend": "hotweights"}}
DUMMY = {"model_loader_extra_config": {"dummy": True}}


def trained(path):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


def trainer_of(client, source, **options):
    """As a user makes one."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from hotweights.engines.vllm import TrainerInit

    init = TrainerInit(rank=0, **{"timeout": 20, **options})
    return WeightTransferTrainerFactory.trainer_init(init, client=client, source=source)


def caught(act):
    """What it raised, in words."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')}"
    return "nothing was raised"


def without_last(model):
    """A source that lacks a tensor."""
    from vllm.distributed.weight_transfer.base import ModuleSource

    class Short(ModuleSource):
        def metadata(self):
            return super().metadata()[:-1]

        def __iter__(self):
            return iter([*super().__iter__()][:-1])

    return Short(model)


def narrower(model, name):
    """A source in which one tensor lacks its last column."""
    from vllm.distributed.weight_transfer.base import ModuleSource, ParamMeta

    class Narrower(ModuleSource):
        def metadata(self):
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

        def __iter__(self):
            return ((each, tensor[..., :-1] if each == name else tensor) for each, tensor in super().__iter__())

    return Narrower(model)


def with_biases(model):
    """A source that has two tensors more, for which the engine's model has no place."""
    import torch
    from vllm.distributed.weight_transfer.base import ModuleSource, ParamMeta

    class Longer(ModuleSource):
        def metadata(self):
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

        def __iter__(self):
            yield from super().__iter__()
            yield "lm_head.bias", torch.ones(1000, dtype=torch.bfloat16)
            yield "model.layers.0.self_attn.q_proj.bias", torch.ones(256, dtype=torch.bfloat16)

    return Longer(model)


def failing(model):
    """A source that fails in the middle."""
    from vllm.distributed.weight_transfer.base import ModuleSource

    class Failing(ModuleSource):
        def __iter__(self):
            for number, pair in enumerate(super().__iter__()):
                if number == 5:
                    raise RuntimeError("the gather failed")
                yield pair

    return Failing(model)
