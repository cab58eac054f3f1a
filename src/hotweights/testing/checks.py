"""Assertions that the contracts are made of: same bits, memory apart, an error raised."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

import torch

Tensors = Mapping[str, torch.Tensor]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, ``uint8 [nbytes]``, a copy: NaN equals itself and -0.0 differs from 0.0."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).clone()


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    """Same names, dtypes, shapes and bytes."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, f"{name}: {found[name].dtype}, expected {tensor.dtype}"
        assert found[name].shape == tensor.shape, f"{name}: {found[name].shape}, expected {tensor.shape}"
        assert torch.equal(bits(found[name]), bits(tensor)), f"{name}: other bytes"


def raised(kind: type[BaseException], act: Callable[[], object]) -> BaseException:
    """The error of this kind that ``act`` raises; it is an error if it raises none."""
    try:
        act()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


def assert_apart(tensors: Iterable[torch.Tensor]) -> None:
    """No two of them share a byte."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors if t.numel())
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans)), "tensors share memory"
