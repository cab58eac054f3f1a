"""Guarded: a source that is streamed through guarded leases, whatever else it could do. It reads nothing itself."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ...manifest import Manifest
from ...memory.guards import Guard
from ...sources.contracts import Source, Stream


class _Guarded:
    """A source as a stream of guarded leases, whatever else it can do."""

    def __init__(self, source: Source, guard: Guard) -> None:
        self._source = source
        self._guard: Guard = guard

    @property
    def manifest(self) -> Manifest:
        return self._source.manifest

    def leases(self, *, guard: Guard = "off") -> Stream:
        return self._source.leases(guard=self._guard)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return self._source.tensors()

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> _Guarded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def guarded(source: Source, guard: Guard) -> Source:
    """The source; with a guard one that can only be streamed, and whose leases bear it."""
    return source if guard == "off" else _Guarded(source, guard)
