"""Dtypes: those of the file format and their names in torch, and which casts lose nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

if TYPE_CHECKING:  # Whoever only lists the tensors of files does not wait for torch.
    import torch

Cast = Literal["error", "floats", "loader"]
"""Which casts that lose information are done.

``"error"``: none. ``"floats"``: from one float of 16 bits or more to another. ``"loader"``: all that the model's own
loading code would do. From floats to integers none is ever done.
"""


def is_float(dtype: torch.dtype) -> bool:
    """Whether its values can have fractions; complex ones can."""
    return dtype.is_floating_point or dtype.is_complex


# Of each float: bits of its significand, smallest and largest exponent, and which special values it has. torch.finfo
# does not say all of it. Sources: IEEE 754, the OCP 8-bit and microscaling formats, arXiv:2206.02915.
_FLOATS: Mapping[str, tuple[int, int, int, frozenset[str]]] = {
    "float64": (53, -1074, 1023, frozenset({"inf", "nan", "sign", "zero", "-0"})),
    "float32": (24, -149, 127, frozenset({"inf", "nan", "sign", "zero", "-0"})),
    "float16": (11, -24, 15, frozenset({"inf", "nan", "sign", "zero", "-0"})),
    "bfloat16": (8, -133, 127, frozenset({"inf", "nan", "sign", "zero", "-0"})),
    "float8_e4m3fn": (4, -9, 8, frozenset({"nan", "sign", "zero", "-0"})),
    "float8_e5m2": (3, -16, 15, frozenset({"inf", "nan", "sign", "zero", "-0"})),
    "float8_e4m3fnuz": (4, -10, 7, frozenset({"nan", "sign", "zero"})),
    "float8_e5m2fnuz": (3, -17, 15, frozenset({"nan", "sign", "zero"})),
    "float8_e8m0fnu": (1, -127, 127, frozenset({"nan"})),
}


def is_lossless(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether every value of ``source`` is a value of ``target``, so that a cast loses nothing."""
    import torch

    if source == target:
        return True
    if source.is_complex or target.is_complex:
        return target.is_complex and is_lossless(_real(source), target.to_real())
    if source == torch.bool:
        return not target.is_floating_point or "zero" in _float(target)[3]
    if target == torch.bool:
        return False
    if not source.is_floating_point and not target.is_floating_point:
        inner, outer = torch.iinfo(source), torch.iinfo(target)
        return outer.min <= inner.min and inner.max <= outer.max
    if not target.is_floating_point:
        return False
    bits, low, high, special = _float(target)
    if not source.is_floating_point:
        info = torch.iinfo(source)
        # The most negative integer is a power of two: it needs range, not significant bits.
        return info.max.bit_length() <= bits and max(-info.min, info.max).bit_length() - 1 <= high and "zero" in special
    source_bits, source_low, source_high, source_special = _float(source)
    return source_bits <= bits and low <= source_low and source_high <= high and source_special <= special


def may_cast(source: torch.dtype, target: torch.dtype, cast: Cast) -> bool:
    """Whether ``cast`` allows to make ``target`` of ``source``."""
    if is_lossless(source, target):
        return True
    if is_float(source) and not is_float(target):
        return False
    return cast == "loader" or (cast == "floats" and _is_wide(source) and _is_wide(target))


def narrowest_cast(source: torch.dtype, target: torch.dtype) -> Cast:
    """The choice of ``cast=`` that allows it and does least besides, where a cast loses information."""
    return "floats" if may_cast(source, target, "floats") else "loader"


def _is_wide(dtype: torch.dtype) -> bool:
    # Floats of fewer bits come with a scale: a cast alone would put most weights out of their range.
    return dtype.is_floating_point and dtype.itemsize >= 2


def _float(dtype: torch.dtype) -> tuple[int, int, int, frozenset[str]]:
    # A float that is not listed, such as a packed one, is taken to lose everything.
    return _FLOATS.get(str(dtype).removeprefix("torch."), (0, 10**6, -(10**6), frozenset()))


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


class OpaqueDtype(msgspec.Struct, frozen=True):
    """A dtype of the file format for which the installed torch has no type.

    Tensors of such a dtype are listed, checked and carried as bytes. They cannot become a ``torch.Tensor``.

    Attributes:
        name: the format's own name, for example ``"F6_E2M3"``.
        bits: size of one element in bits.
    """

    name: str
    bits: int

    def __str__(self) -> str:
        return self.name


DType: TypeAlias = "torch.dtype | OpaqueDtype"

# Every dtype of the safetensors format: bits per element, and the name torch may know it by. Source: `Dtype` in
# safetensors/src/tensor.rs, 0.8. F4 is packed: torch counts pairs, the format counts elements.
FORMAT_DTYPES: Mapping[str, tuple[int, str]] = {
    "BOOL": (8, "bool"),
    "F4": (4, "float4_e2m1fn_x2"),
    "F6_E2M3": (6, ""),
    "F6_E3M2": (6, ""),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
}


@cache
def _names() -> dict[torch.dtype, str]:
    import torch

    return {
        getattr(torch, attribute): name
        for name, (_, attribute) in FORMAT_DTYPES.items()
        if attribute and hasattr(torch, attribute)
    }


def format_name(dtype: DType) -> str:
    """The format's name of a dtype, such as ``BF16``; torch's own where the format has none."""
    if isinstance(dtype, OpaqueDtype):
        return dtype.name
    return _names().get(dtype) or str(dtype).removeprefix("torch.")
