"""Wrappers are looked into: torchao's, nested ones, and what is none."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing

from hotweights.memory.wrappers import attributes_of, context, is_wrapper, leaves, rebuilt


class Pair(torch.Tensor):
    """Two tensors in one, as quantised ones are."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype)

    def __init__(self, data, scale):
        self.data_, self.scale = data, scale

    def __tensor_flatten__(self):
        return ["data_", "scale"], "what the class says"

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["data_"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return return_and_correct_aliasing(func, args, kwargs, Pair(args[0].data_, args[0].scale))
        raise NotImplementedError(func)


def pair():
    return Pair(torch.zeros(2, dtype=torch.int8), torch.ones(2))


@pytest.mark.parametrize(
    "tensor", [torch.ones(1), nn.Parameter(torch.ones(1)), nn.UninitializedParameter(), torch.eye(2).to_sparse()]
)
def test_plain_tensors_are_none(tensor):
    assert not is_wrapper(tensor)
    assert [name for name, _ in leaves("w", tensor)] == ["w"]
    assert context(tensor) is None


def test_leaves_name_what_is_inside_at_any_depth():
    inner = pair()
    outer = Pair(torch.zeros(2), inner)
    assert [name for name, _ in leaves("w", outer)] == ["w", "w.data_", "w.scale", "w.scale.data_", "w.scale.scale"]
    assert dict(leaves("w", outer))["w.scale.scale"] is inner.scale


def test_context_is_all_but_the_tensors():
    assert context(pair()) == context(pair()) == (["data_", "scale"], "what the class says")


def test_attributes_are_those_that_are_no_part():
    tensor = pair()
    tensor.loader = "its own"
    assert attributes_of(tensor) == {"loader": "its own"}


def test_rebuilt_around_new_parts():
    tensor, scale = nn.Parameter(pair(), requires_grad=False), torch.full((2,), 3.0)
    tensor.loader = "its own"
    new = rebuilt("w", tensor, {"w.scale": scale})
    assert isinstance(new, nn.Parameter)
    assert is_wrapper(new)
    assert new.scale is scale
    assert new.data_ is tensor.data_
    assert new.loader == "its own"


def test_nothing_is_rebuilt_where_nothing_is_new():
    tensor = pair()
    assert rebuilt("w", tensor, {"v.scale": torch.ones(2)}) is tensor
    whole = torch.ones(2)
    assert rebuilt("w", tensor, {"w": whole}) is whole
