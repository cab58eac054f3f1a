"""Digest: what tensors hold, as a few characters that tell whether values have changed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import xxhash

from ..manifest import TensorSpec


@dataclass(frozen=True, slots=True)
class Digest:
    """What a model or a source holds. Two that hold the same names, dtypes, shapes and bytes have equal ones.

    Attributes:
        whole: xxh3 of all tensors, names included.
        tensors: xxh3 of each tensor, by name; of a model's wrapper, of the tensors inside.
    """

    whole: str
    tensors: Mapping[str, str]

    @classmethod
    def of(cls, tensors: Mapping[str, str]) -> Digest:
        """The digest of tensors whose own are these."""
        whole = xxhash.xxh3_128("".join(f"{name} {digest}\n" for name, digest in sorted(tensors.items())).encode())
        return cls(whole.hexdigest(), tensors)

    def as_dict(self) -> dict[str, object]:
        """All of it, for JSON. A file with this is what ``digests=`` takes."""
        return {"whole": self.whole, "tensors": dict(self.tensors)}

    def __repr__(self) -> str:
        return f"<Digest {self.whole} of {len(self.tensors)} tensors>"

    def __str__(self) -> str:
        return self.whole


def digests(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> dict[str, str]:
    """xxh3 of the values, dtype and shape of each named tensor. Names that ``tensors`` does not have are left out."""
    return {name: _digest(tensors[name]) for name in names if name in tensors}


def _digest(tensor: torch.Tensor) -> str:
    digest = _begun(tensor.dtype, tuple(tensor.shape))
    if not tensor.is_meta and tensor.numel():
        _add(digest, tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
    return digest.hexdigest()


def digest_of_bytes(spec: TensorSpec, raw: torch.Tensor) -> str:
    """The same of a tensor whose bytes are ``raw``, ``uint8 [nbytes]``."""
    digest = _begun(spec.dtype, spec.shape)
    if raw.numel():
        _add(digest, raw.cpu().contiguous())
    return digest.hexdigest()


def _begun(dtype: object, shape: tuple[int, ...]) -> xxhash.xxh3_128:
    return xxhash.xxh3_128(f"{dtype} {shape}".encode())


def _add(digest: xxhash.xxh3_128, values: torch.Tensor) -> None:
    digest.update((ctypes.c_char * values.numel()).from_address(values.data_ptr()))
