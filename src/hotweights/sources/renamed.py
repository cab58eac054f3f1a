"""RenamedSource: a source whose tensors have other names. It can do what the source can do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from msgspec.structs import replace

from ..manifest import Manifest
from ..memory.digest import Digest
from ..memory.guards import Guard
from ..memory.lease import Lease
from ..memory.pool import Pool
from ..timeline import Timeline
from .contracts import Addressed, InMemory, IOMode, OnDisk, Participant, Read, Request, Source, Stream, Timed
from .streams import digest_of_leases


def renamed(source: Source, names: Mapping[str, str]) -> Source:
    """``source`` under new names; closing it closes ``source``.

    Args:
        source: any, open.
        names: the new names of those tensors that get one. No two tensors have the same.
    """
    changed = {name: new for name, new in names.items() if new != name}
    if not changed:
        return source
    abilities = tuple(kind for contract, kind in _ABILITIES if isinstance(source, contract))
    return _kind(abilities)(source, changed)


class RenamedSource:
    """What every source can do, under new names. Made by ``renamed``."""

    def __init__(self, source: Any, names: Mapping[str, str]) -> None:
        self._source = source
        self._names = names
        self._manifest: Manifest = source.manifest.renamed(names)
        self._origins = {new: old for old, new in names.items()}

    @property
    def manifest(self) -> Manifest:
        """Name, dtype and shape of every tensor; ``origins`` has the old names."""
        return self._manifest

    @property
    def version(self) -> str | int | None:
        """The name of the version, where the source gives one."""
        return getattr(self._source, "version", None)

    def leases(self, *, guard: Guard = "off") -> Stream:
        """Stream every tensor as the source does, see there."""
        return _RenamedStream(self._source.leases(guard=guard), self._manifest, self._names)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor, owned by the caller."""
        return ((self._names.get(name, name), tensor) for name, tensor in self._source.tensors())

    def close(self) -> None:
        """Close the source. May be called twice."""
        self._source.close()

    def __enter__(self) -> RenamedSource:
        return self

    def __exit__(self, *error: object) -> None:
        self._source.__exit__(*error)

    def __repr__(self) -> str:
        return f"<RenamedSource of {self._source!r}: {len(self._names)} new names>"


class _RenamedStream:
    def __init__(self, stream: Stream, manifest: Manifest, names: Mapping[str, str]) -> None:
        self._stream, self._manifest, self._names = stream, manifest, names

    def __iter__(self) -> Iterator[Lease]:
        return self

    def __next__(self) -> Lease:
        lease = next(self._stream)
        if lease.name in self._names:
            lease.name = self._names[lease.name]
            lease.spec = self._manifest[lease.name]
        return lease

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> _RenamedStream:
        self._stream.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.__exit__(*error)


class _RenamedLasting(RenamedSource):
    """What can be read again and again."""

    def digest(self) -> Digest:
        """The digest of every tensor under its new name. Reads every byte."""
        with self.leases() as stream:
            return digest_of_leases(stream)


class _RenamedAddressed(_RenamedLasting):
    def position(self, name: str) -> tuple[int, int]:
        """Where the tensor lies."""
        where: tuple[int, int] = self._source.position(self._origins.get(name, name))
        return where

    def read(
        self,
        reads: Iterable[Read],
        *,
        pool: Pool,
        io: IOMode = "auto",
        threads: int | None = None,
        advance: Callable[[int], None] | None = None,
        stop: threading.Event | None = None,
    ) -> dict[str, int]:
        """Let the source do all the reads, see ``contracts.Addressed``."""
        origins = self._origins
        theirs = (Read(origins.get(read.name, read.name), read.start, read.nbytes, read.into) for read in reads)
        done: dict[str, int] = self._source.read(theirs, pool=pool, io=io, threads=threads, advance=advance, stop=stop)
        return done


class _RenamedInMemory(_RenamedLasting):
    def borrow(self, name: str) -> torch.Tensor:
        """The tensor itself, to read while the source is open."""
        tensor: torch.Tensor = self._source.borrow(self._origins.get(name, name))
        return tensor


class _RenamedOnDisk(_RenamedLasting):
    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should read."""
        warnings: tuple[str, ...] = self._source.warnings
        return warnings

    def check(self) -> None:
        """See that no file changed."""
        self._source.check()

    def file_of(self, name: str) -> str:
        """The path of the file that the tensor lies in."""
        path: str = self._source.file_of(self._origins.get(name, name))
        return path


class _RenamedParticipant(RenamedSource):
    def wanted(self, requests: Iterable[str | Request]) -> None:
        """Say what is wanted, see ``contracts.Participant``."""
        self._source.wanted(map(self._theirs, requests))

    def _theirs(self, request: str | Request) -> str | Request:
        if isinstance(request, str):
            return self._origins.get(request, request)
        return replace(request, name=self._origins.get(request.name, request.name))

    def decision(self) -> AbstractContextManager[None]:
        """Wait for the group, see ``contracts.Participant``."""
        decision: AbstractContextManager[None] = self._source.decision()
        return decision

    @property
    def in_doubt(self) -> bool:
        """Whether it has voted, and waits for somebody who knows the decision."""
        return bool(getattr(self._source, "in_doubt", False))

    def refuse(self, error: BaseException) -> None:
        """Tell the group that this version cannot be taken."""
        self._source.refuse(error)


class _RenamedTimed(RenamedSource):
    def time_into(self, timeline: Timeline) -> None:
        """Note what takes time, see ``contracts.Timed``."""
        self._source.time_into(timeline)


_ABILITIES: tuple[tuple[type, type[RenamedSource]], ...] = (
    (Addressed, _RenamedAddressed),
    (InMemory, _RenamedInMemory),
    (OnDisk, _RenamedOnDisk),
    (Participant, _RenamedParticipant),
    (Timed, _RenamedTimed),
)


@cache
def _kind(abilities: tuple[type[RenamedSource], ...]) -> type[RenamedSource]:
    """The class with these abilities: what a source can do is told by its class."""
    return type("RenamedSource", abilities or (RenamedSource,), {})
