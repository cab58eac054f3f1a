"""Checkpoints to measure with: made, digested, pushed out of the page cache. No timing here."""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors.torch import save_file
from torch import nn

from hotweights.sources.files.shards import open_checkpoint

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Place:
    """Where one tensor's bytes lie."""

    name: str
    path: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """Safetensors files of bfloat16 tensors, and the digest of each tensor."""

    directory: Path
    places: tuple[Place, ...]
    digests: dict[str, str]

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(place.path for place in self.places))

    @property
    def nbytes(self) -> int:
        return sum(place.nbytes for place in self.places)


def make(directory: Path, *, nbytes: int, tensors: int, shards: int) -> Checkpoint:
    """Write ``tensors`` equal bfloat16 tensors of random bits, ``nbytes`` in all, in ``shards`` files."""
    directory.mkdir(parents=True, exist_ok=True)
    columns = 1024 if nbytes // tensors >= 1024 * 1024 else 64
    rows = max(1, nbytes // tensors // 2 // columns)
    names = [f"model.layers.{i // 8}.experts.{i % 8}.weight" for i in range(tensors)]
    generator = torch.Generator().manual_seed(0)
    digests = {}
    for shard in range(shards):
        state = {}
        for name in names[shard * tensors // shards : (shard + 1) * tensors // shards]:
            bits = torch.randint(-(2**63), 2**63 - 1, (rows * columns // 4,), generator=generator)
            state[name] = bits.view(torch.bfloat16).view(rows, columns)
            digests[name] = digest(state[name])
        path = directory / f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(state, path)
        del state
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # Dirty pages cannot be dropped from the cache.
    return Checkpoint(directory, _layout(directory), digests)


def _layout(directory: Path) -> tuple[Place, ...]:
    places = []
    with closing(open_checkpoint(directory)) as checkpoint:
        for shard in checkpoint.shards:
            for entry in shard.header.entries:
                spec = entry.spec
                places.append(Place(spec.name, shard.file.path, entry.offset, spec.nbytes, spec.shape))
    return tuple(places)


def digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return xxhash.xxh3_64_hexdigest(memoryview((ctypes.c_char * raw.numel()).from_address(raw.data_ptr())))


def module(checkpoint: Checkpoint, *, touched: bool) -> nn.Module:
    """A module with one submodule for each tensor. Untouched parameters have no memory behind their addresses yet."""
    root = nn.Module()
    for place in checkpoint.places:
        *path, key = place.name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        tensor = torch.empty(place.shape, dtype=torch.bfloat16)
        owner.register_parameter(key, nn.Parameter(tensor.fill_(-1) if touched else tensor, requires_grad=False))
    return root


def warm_up(files: list[str]) -> None:
    """Bring the files into the page cache."""
    for path in files:
        if cached(path) == 1:
            continue
        with open(path, "rb", buffering=0) as file:
            block = bytearray(16 * 1024 * 1024)
            while file.readinto(block):
                pass


def cool_down(files: list[str]) -> None:
    """Push the files out of the page cache, and prove it."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if cached(path) > 0.01:
            raise RuntimeError(f"{path}: {cached(path):.0%} of it stay in the page cache; is another process using it?")


def cached(path: str) -> float:
    """Which part of the file lies in the page cache, by ``mincore``."""
    size = os.path.getsize(path)
    pages = -(-size // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * pages)()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as mapping:
        address = ctypes.addressof(hold := ctypes.c_char.from_buffer(mapping))
        failed = _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), flags)
        del hold
    if failed:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return bytes(flags).count(1) / pages
