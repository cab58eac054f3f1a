"""Ways to wrap a model that people have: each changes the names of its tensors."""

from torch import compile as compiled
from torch import device, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel


class Named(nn.Module):
    """A model whose own parts are called as wrappers call theirs."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.model = nn.Linear(2, 3)


def fsdp(module):
    return FullyShardedDataParallel(module, use_orig_params=True, device_id=device("cpu"))


def inside(wrap):
    """Wrap parts of the model, in place."""

    def wrapped(model):
        model.first, model.module = wrap(model.first), wrap(model.module)
        return model

    return wrapped


def in_place(model):
    model.compile()
    return model


WRAPPED = {
    "bare": lambda model: model,
    "compiled": compiled,
    "compiled in place": in_place,
    "data parallel": nn.DataParallel,
    "checkpointed": checkpoint_wrapper,
    "parts compiled": inside(compiled),
    "parts checkpointed": inside(checkpoint_wrapper),
    "compiled, parts checkpointed": lambda model: compiled(inside(checkpoint_wrapper)(model)),
    "data parallel of compiled": lambda model: nn.DataParallel(compiled(model)),
    "compiled data parallel": lambda model: compiled(nn.DataParallel(model)),
}

DISTRIBUTED = {  # These need a process group.
    "ddp": DistributedDataParallel,
    "ddp of compiled": lambda model: DistributedDataParallel(compiled(model)),
    "fsdp": fsdp,
    "fsdp of fsdp": lambda model: fsdp(inside(fsdp)(model)),
}
