"""TensorSpec and Manifest: frozen facts about tensors. No I/O, no memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import msgspec
import torch
from msgspec.structs import force_setattr

from .errors import UsageError

__all__ = ["FORMAT_DTYPES", "DType", "Manifest", "OpaqueDtype", "TensorSpec", "format_name"]


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


class TensorSpec(msgspec.Struct, frozen=True, gc=False):
    """What a source promises about one tensor.

    Attributes:
        name: as the source spells it.
        dtype: a ``torch.dtype``, or an ``OpaqueDtype`` where torch has none.
        shape: as torch counts it (packed dtypes in packs); as the format counts it for an ``OpaqueDtype``.
        nbytes: size in bytes, without padding; follows from the others.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int = -1

    def __post_init__(self) -> None:
        # Asked for again and again on the way of every tensor, so it is worked out once.
        bits = self.dtype.bits if isinstance(self.dtype, OpaqueDtype) else 8 * self.dtype.itemsize
        force_setattr(self, "nbytes", math.prod(self.shape) * bits // 8)

    def __str__(self) -> str:
        return f"{self.name}: {format_name(self.dtype)} {list(self.shape)}"


class Manifest(Mapping[str, TensorSpec]):
    """A source's promise: an ordered, frozen mapping from name to spec.

    The order is the source's own and promises nothing about the order in which tensors arrive.
    """

    __slots__ = ("_specs", "nbytes")

    def __init__(self, specs: Iterable[TensorSpec]) -> None:
        self._specs: dict[str, TensorSpec] = {}
        count = 0
        for spec in specs:
            self._specs[spec.name] = spec
            count += 1
        if count != len(self._specs):
            raise UsageError(f"a manifest names {count - len(self._specs)} tensors twice")
        self.nbytes = sum(spec.nbytes for spec in self._specs.values())
        """Bytes of all tensors together."""

    def __getitem__(self, name: str) -> TensorSpec:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __repr__(self) -> str:
        return f"<Manifest {len(self)} tensors, {self.nbytes} bytes>"
