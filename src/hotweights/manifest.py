"""TensorSpec and Manifest: frozen facts about tensors. No I/O, no memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import msgspec
from msgspec.structs import force_setattr

from .dtypes import DType, OpaqueDtype, format_name
from .errors import UsageError


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
