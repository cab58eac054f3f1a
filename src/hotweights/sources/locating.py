"""Locating: in which file the tensor lies that a problem is about. Only whoever has the source knows that."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Protocol

from typing_extensions import runtime_checkable

from ..errors import LiveModelError, PlanError, UpdateAborted
from ..manifest import Manifest
from ..signals import held


@runtime_checkable
class _InFiles(Protocol):
    manifest: Manifest

    def file_of(self, name: str) -> str: ...


@contextmanager
@held
def naming_files(source: object) -> Iterator[None]:
    """Inside, each problem of a tensor of the source says which file the tensor lies in, if it lies in one."""
    try:
        yield
    except (PlanError, UpdateAborted) as error:
        of_model = isinstance(error.__cause__, LiveModelError)  # Its tensors are the live ones, not the file's.
        if not of_model and hasattr(type(source), "file_of") and isinstance(source, _InFiles):
            there, file_of = source.manifest, source.file_of
            for told in (error, error.__cause__):
                if isinstance(told, (PlanError, UpdateAborted)):
                    told.explain(lambda problem: _in_file(problem, there, file_of))
        raise


_FROM = re.compile(r" \(from (.+)\)(?:;|$)")


def _in_file(problem: str, there: Container[str], file_of: Callable[[str], str]) -> str:
    source = _FROM.search(problem)
    name = source[1] if source else next((name for name in _beginnings(problem) if name in there), "")
    if name not in there:
        return problem
    # Without its folder, which the caller named: a path in the cache of the hub is longer than the problem.
    file = os.path.basename(file_of(name))
    if source:
        return f"{problem[: source.end(1)]} in {file}{problem[source.end(1) :]}"
    return f"{problem} (in {file})"


def _beginnings(problem: str) -> Iterator[str]:
    """What stands before a colon; the longest first: names may have colons."""
    for colon in reversed(list(re.finditer(": ", problem))):
        yield problem[: colon.start()]
