"""Narrowing: a cast of weights to floats that hold less, and the count of what that lost."""

from __future__ import annotations

import math
from typing import Literal

import torch

from ..dtypes import OpaqueDtype, format_name, is_lossless
from ..manifest import TensorSpec

Overflow = Literal["error", "saturate"]
"""What becomes of values beyond the largest of the new dtype: an error, or that largest value."""

_ELEMENTS = 1024 * 1024  # that are looked at once: they stay in the processor's cache


class Narrowing:
    """The casts of one save to ``dtype``.

    Attributes:
        problems: of each tensor that holds values out of range, how many; none if they may be saturated.
    """

    def __init__(self, dtype: torch.dtype, overflow: Overflow) -> None:
        self.problems: list[str] = []
        self._dtype = dtype
        self._saturates = overflow == "saturate"
        self._tensors = self._of = self._saturated = self._zeroed = 0
        self._most_zeroed = (0, "")

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """The spec after the cast. Floats of 8 bits and less stay: without their scales they are not the weights."""
        if isinstance(spec.dtype, OpaqueDtype) or not spec.dtype.is_floating_point or spec.dtype.itemsize < 2:
            return spec
        return TensorSpec(spec.name, self._dtype, spec.shape)

    def cast(self, tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
        """The values of ``tensor`` as ``dtype``, as bytes on the host."""
        tensor = tensor.detach().cpu().contiguous()
        self._tensors += 1
        if tensor.numel() == 0 or self._dtype.is_complex or is_lossless(tensor.dtype, self._dtype):
            return tensor.to(self._dtype).reshape(-1).view(torch.uint8)
        cast = torch.empty(tensor.numel(), dtype=self._dtype)
        beyond, zeroed, largest = 0, 0, 0.0
        for values, into in zip(*(torch.split(flat, _ELEMENTS) for flat in (tensor.reshape(-1), cast)), strict=True):
            found = self._cast(values if values.dtype == torch.float64 else values.to(torch.float32), into)
            beyond, zeroed, largest = beyond + found[0], zeroed + found[1], max(largest, found[2])
        self._of += tensor.numel()
        self._zeroed += zeroed
        self._most_zeroed = max(self._most_zeroed, (zeroed, spec.name))
        if self._saturates:
            self._saturated += beyond
        elif beyond:
            self.problems.append(
                f"tensor {spec.name!r}: {beyond} of {tensor.numel()} values are beyond {self._name}, whose largest is "
                f"{self._max:g}; the largest is {largest:g}"
            )
        return cast.view(torch.uint8)

    def _cast(self, values: torch.Tensor, into: torch.Tensor) -> tuple[int, int, float]:
        """Cast some values. Returns how many are out of range, how many became 0, and the largest out of range."""
        into.copy_(values)
        size = values.abs()
        zeroed = int(torch.count_nonzero(size)) - _count_nonzero(into)
        if bool(size.max() < self._max + self._half_step):  # False if there is a NaN.
            return 0, zeroed, 0.0
        # By hand: some versions of torch make NaN of what 8 bits cannot hold, others the largest value.
        wide = into.to(torch.float64)
        beyond = (size > self._max + self._half_step) | (size.isfinite() & ~wide.isfinite())
        beyond &= ~(size.isinf() & wide.isinf())
        if not (count := int(beyond.sum())):
            return 0, zeroed, 0.0
        if self._saturates:
            into.copy_(torch.where(beyond, values.clamp(-self._max, self._max), values))
        return count, zeroed, float(size[beyond].max())

    @property
    def _max(self) -> float:
        return torch.finfo(self._dtype).max

    @property
    def _half_step(self) -> float:
        """What may be added to the largest value and be rounded off again."""
        info = torch.finfo(self._dtype)
        return math.ldexp(info.eps, math.frexp(info.max)[1] - 2)

    @property
    def _name(self) -> str:
        return format_name(self._dtype)

    def advice(self) -> str:
        """What to do about ``problems``."""
        wider = "F32" if self._dtype == torch.bfloat16 else "BF16"
        return (
            f"values that {self._name} cannot hold; leave the cast out, or choose a dtype with a wider range such as "
            f'{wider}; overflow="saturate" makes them the largest value that it has'
        )

    def warnings(self) -> list[str]:
        """What was lost, for people."""
        found = []
        if self._tensors and self._dtype.itemsize < 2:
            found.append(
                f"{self._name} is written without scales: {self._tensors} tensors keep {self._significant} significant "
                f"bits, and only of values up to {self._max:g}; a tool that quantises, such as torchao, writes scales"
            )
        if self._saturated:
            found.append(
                f"{self._saturated} of {self._of} values were beyond {self._name} and are {self._max:g} now, or minus "
                "that"
            )
        if self._zeroed:
            count, name = self._most_zeroed
            found.append(
                f"{self._zeroed} of {self._of} values became 0, too small for {self._name}; most, {count}, in {name!r}"
            )
        return found

    @property
    def _significant(self) -> int:
        return 1 - round(math.log2(torch.finfo(self._dtype).eps))


def _count_nonzero(values: torch.Tensor) -> int:
    if values.element_size() > 1:
        return int(torch.count_nonzero(values))
    raw = values.view(torch.uint8)  # torch compares no floats of 8 bits.
    if values.dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):  # They have one zero; -0 would be their NaN.
        return int(torch.count_nonzero(raw))
    return int(torch.count_nonzero(raw & 0x7F))
