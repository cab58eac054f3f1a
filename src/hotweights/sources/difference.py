"""Difference: which tensors of two checkpoints differ, in how many elements, and by how much at most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from ..dtypes import format_name
from ..manifest import TensorSpec
from ..memory.host import host_empty
from ..memory.pool import Pool
from .contracts import Read
from .dcp.source import DcpSource
from .files.source import FileSource

_ELEMENTS = 4 * 1024 * 1024  # that are compared at once: as float64 they take memory of their own


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor that differs.

    Attributes:
        name: its name.
        what: ``"only in the first"``, ``"only in the second"``, ``"dtype or shape"`` or ``"values"``.
        detail: both, where dtype or shape differ.
        elements: how many elements have other bytes; 0 where values were not compared.
        of: how many elements it has.
        largest: the largest change of a finite value; ``None`` where there is none.
    """

    name: str
    what: str
    detail: str = ""
    elements: int = 0
    of: int = 0
    largest: float | None = None

    def as_dict(self) -> dict[str, object]:
        """All of it, for JSON."""
        return asdict(self)


def differences(left: FileSource | DcpSource, right: FileSource | DcpSource) -> Iterator[TensorDifference]:
    """Every tensor that differs, in the order of the first. Two tensors are in memory at a time."""
    with Pool() as pool:
        for name, spec in left.manifest.items():
            other = right.manifest.get(name)
            if other is None:
                yield TensorDifference(name, "only in the first")
            elif (spec.dtype, spec.shape) != (other.dtype, other.shape):
                yield TensorDifference(name, "dtype or shape", f"{_kind(spec)} and {_kind(other)}")
            elif (found := _compared(spec, _raw(left, spec, pool), _raw(right, other, pool))) is not None:
                yield found
    for name in right.manifest:
        if name not in left.manifest:
            yield TensorDifference(name, "only in the second")
    left.check()
    right.check()


def _kind(spec: TensorSpec) -> str:
    return f"{format_name(spec.dtype)} {list(spec.shape)}"


def _raw(source: FileSource | DcpSource, spec: TensorSpec, pool: Pool) -> torch.Tensor:
    raw = host_empty((spec.nbytes,), torch.uint8)
    source.read([Read(spec.name, 0, spec.nbytes, raw)], pool=pool)
    return raw


def _compared(spec: TensorSpec, left: torch.Tensor, right: torch.Tensor) -> TensorDifference | None:
    if torch.equal(left, right):
        return None
    numbers = isinstance(spec.dtype, torch.dtype) and spec.dtype != getattr(torch, "float4_e2m1fn_x2", None)
    itemsize = spec.dtype.itemsize if isinstance(spec.dtype, torch.dtype) else 1  # Opaque ones are compared as bytes.
    count, largest = 0, None
    for start in range(0, len(left), _ELEMENTS * itemsize):
        pair = [raw[start : start + _ELEMENTS * itemsize] for raw in (left, right)]
        count += int((pair[0] != pair[1]).reshape(-1, itemsize).any(1).sum())
        if numbers:
            assert isinstance(spec.dtype, torch.dtype)
            wide = torch.complex128 if spec.dtype.is_complex else torch.float64
            change = (pair[0].view(spec.dtype).to(wide) - pair[1].view(spec.dtype).to(wide)).abs()
            change = change[change.isfinite()]
            if change.numel():
                largest = max(largest or 0.0, float(change.max()))
    return TensorDifference(spec.name, "values", "", count, len(left) // itemsize, largest)
