"""Shard: a box of a tensor that a rank holds, as its trainer declares it where no DTensor says so."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...arguments import shown
from ...errors import UsageError
from ...sharding import Block, is_dtensor
from ...sources.state_dict import unfit


class Shard:
    """A box of the tensor ``name``, for ``Sender.send``: ``[hw.Shard("w", rows, offset=(4, 0), shape=(8, 16)), ...]``.

    The boxes that all ranks give of one tensor are all of it, and none overlaps another; the same box on several ranks
    is taken from one of them.

    Attributes:
        name: of the whole tensor.
        tensor: what lies here; a view will do. It is read while it is sent.
        block: which elements these are.
        shape: of the whole tensor.
    """

    __slots__ = ("block", "name", "shape", "tensor")

    def __init__(self, name: str, tensor: torch.Tensor, *, offset: Sequence[int], shape: Sequence[int]) -> None:
        """Nothing is copied.

        Args:
            name: of the whole tensor.
            tensor: the box.
            offset: index of its first element in the whole tensor, one number for each dimension.
            shape: of the whole tensor.

        Raises:
            UsageError: the box does not lie in the tensor, or is no plain tensor.
        """
        if (problem := unfit(name, tensor)) or (is_dtensor(tensor) and (problem := f"{name!r} is a DTensor")):
            raise UsageError(f"a Shard has the name of a tensor, and a plain tensor: {problem}")
        starts, lengths, whole = _numbers("offset", offset), tuple(tensor.shape), _numbers("shape", shape)
        inside = len(starts) == len(lengths) == len(whole) and all(
            start >= 0 and start + length <= most for start, length, most in zip(starts, lengths, whole, strict=True)
        )
        if not inside:
            raise UsageError(
                f"{name!r}: a box of {list(lengths)} at offset {list(starts)} does not lie in a tensor of {list(whole)}"
            )
        self.name, self.tensor, self.shape = name, tensor, whole
        self.block = Block(starts, (0,) * len(lengths), lengths)

    def __repr__(self) -> str:
        return f"<Shard {list(self.block.shape)} at {list(self.block.start)} of {self.name!r} {list(self.shape)}>"


def _numbers(option: str, values: object) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or not all(isinstance(value, int) for value in values):
        raise UsageError(f"{option}= is a number for each dimension, such as (4, 0); found {shown(values)}")
    return tuple(int(value) for value in values)
