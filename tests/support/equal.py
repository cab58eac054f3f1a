"""Whether two models hold the same: bits, dtypes, devices and ties, of every parameter and buffer."""

from __future__ import annotations

import torch


def everything(model):
    """All tensors of a model by name, tied ones under each of their names, non-persistent buffers too."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def ties(tensors):
    together = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            together.setdefault(tensor.data_ptr(), set()).add(name)
    return {frozenset(several) for several in together.values() if len(several) > 1}


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_equal(ours, theirs):
    ours, theirs = everything(ours), everything(theirs)
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    differing = [
        name
        for name, tensor in theirs.items()
        if (ours[name].dtype, ours[name].shape, ours[name].device) != (tensor.dtype, tensor.shape, tensor.device)
        or not torch.equal(bits(ours[name]), bits(tensor))
    ]
    assert not differing, differing
    assert ties(ours) == ties(theirs), ties(ours) ^ ties(theirs)
