"""Casts: which of them lose nothing. Facts about dtypes; nothing is converted here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec
import torch

Cast = Literal["error", "loader"]
"""What a cast that loses information is: a problem, or what the loader means to do."""


def is_float(dtype: torch.dtype) -> bool:
    """Whether it has fractions."""
    return dtype.is_floating_point or dtype.is_complex


# Of each float: bits of its significand, its smallest and largest exponent, and whether it has infinities, NaN, signs
# and zero. finfo does not say all of it. Sources: IEEE 754, the OCP 8-bit and microscaling formats, arXiv:2206.02915.
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


def is_lossless(found: torch.dtype, expected: torch.dtype) -> bool:
    """Whether every value of ``found`` is a value of ``expected``, so that a cast loses nothing."""
    if found == expected:
        return True
    if found.is_complex or expected.is_complex:
        return expected.is_complex and is_lossless(_real(found), expected.to_real())
    if found == torch.bool:
        return not expected.is_floating_point or "zero" in _float(expected)[3]
    if expected == torch.bool:
        return False
    if not found.is_floating_point and not expected.is_floating_point:
        here, there = torch.iinfo(found), torch.iinfo(expected)
        return there.min <= here.min and here.max <= there.max
    if not expected.is_floating_point:
        return False
    bits, low, high, has = _float(expected)
    if not found.is_floating_point:
        info = torch.iinfo(found)
        # The most negative integer is a power of two: it needs range, not significant bits.
        return info.max.bit_length() <= bits and max(-info.min, info.max).bit_length() - 1 <= high and "zero" in has
    found_bits, found_low, found_high, found_has = _float(found)
    return found_bits <= bits and low <= found_low and found_high <= high and found_has <= has


def _float(dtype: torch.dtype) -> tuple[int, int, int, frozenset[str]]:
    # A float we do not know (packed ones) fits nowhere and holds nothing.
    return _FLOATS.get(str(dtype).removeprefix("torch."), (0, 10**6, -(10**6), frozenset()))


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


class OpaqueDtype(msgspec.Struct, frozen=True):
    """A dtype of the file format for which the installed torch has no type.

    Tensors of such a dtype are listed, verified and carried as bytes; they cannot become a
    ``torch.Tensor``.

    Attributes:
        name: the format's own name, for example ``"F6_E2M3"``.
        bits: size of one element in bits.
    """

    name: str
    bits: int

    def __str__(self) -> str:
        return self.name


DType = torch.dtype | OpaqueDtype

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

_NAMES = {
    getattr(torch, attribute): name
    for name, (_, attribute) in FORMAT_DTYPES.items()
    if attribute and hasattr(torch, attribute)
}


def format_name(dtype: DType) -> str:
    """The name a reader of checkpoints knows a dtype by: ``BF16``; torch's own where the format has none."""
    if isinstance(dtype, OpaqueDtype):
        return dtype.name
    return _NAMES.get(dtype) or str(dtype).removeprefix("torch.")
