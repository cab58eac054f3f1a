"""LoadReport: what one load did, as a frozen fact that prints as a short table; and Tally, what it did so far."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from ..plan.steps import Fate
from ..text import as_html, counts, rate, size, some, summary, table


@dataclass(slots=True)
class Tally:
    """What has been done so far. ``execute`` keeps it up to date, so that an error's note can say it."""

    bytes_read: int = 0
    bytes_written: int = 0
    writing: bool = False  # From the first write on, an error leaves tensors of two versions.
    scratch: int = 0
    peak_scratch: int = 0
    proven: int = 0
    bytes_by_io: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def arrive(self, nbytes: int) -> None:
        """Count bytes as they arrive, from any thread."""
        with self.lock:
            self.bytes_read += nbytes

    def count(self, bytes_by_io: Mapping[str, int]) -> None:
        """Add bytes that arrived, by I/O path."""
        with self.lock:
            for path, nbytes in bytes_by_io.items():
                self.bytes_by_io[path] = self.bytes_by_io.get(path, 0) + nbytes

    def hold_scratch(self, nbytes: int) -> None:
        """Count scratch memory that is taken (or, negative, given back)."""
        with self.lock:
            self.scratch += nbytes
            self.peak_scratch = max(self.peak_scratch, self.scratch)


def fates(tensors: Mapping[Fate, tuple[str, ...]], casts: Mapping[str, str]) -> list[tuple[str, str]]:
    """The rows of a report that say what became of the tensors. Those that were not used are named."""
    return [
        (fate.value, f"{len(names)}: {some(names, 3)}" if fate is Fate.SKIPPED else summary(names, casts))
        for fate, names in tensors.items()
        if names
    ]


def given(tensors: Mapping[Fate, tuple[str, ...]], planned: int) -> list[tuple[str, str]]:
    """The row of a report that says how many tensors the model's own code got. What it did with each is not known."""
    used = sum(len(tensors.get(fate, ())) for fate in (Fate.WRITTEN, Fate.CAST, Fate.TIED))
    if used <= planned:
        return []
    some_of = f"all {used}" if not planned else f"{used - planned} of these {used}"
    return [
        ("by code", f"{some_of} tensors were given to the model's own loading code, which may have passed over some")
    ]


def proven(tensors: int) -> list[tuple[str, str]]:
    """The row of a report that says what ``verify="loader"`` proved."""
    return (
        [("proven", f"{tensors} tensors of the model, bit for bit, by the model's own loading code")] if tensors else []
    )


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What one load did.

    Attributes:
        bytes_read: bytes that came from the source. From files, those compared for ties are among them.
        bytes_written: bytes of the model that were written.
        seconds: from opening the source to the last byte.
        peak_buffer_bytes: the most memory that the pool held at once.
        peak_scratch_bytes: the most memory that was held at once outside the pool, to assemble sources of programs.
        tensors: names by fate.
        casts: by source name, "from -> to" dtypes.
        bytes_by_io: bytes read by I/O path: ``"buffered"``, ``"direct"``, or ``"memory"``.
        steps: how many ``"copies"`` the plan had, how many ``"slices"`` among them, and how many ``"programs"``.
        planned: how many source tensors the plan moved; the model's own code loaded the others.
        fell_back: why the model's own code did: what it asked for, of which tensor, at which line.
        side_effects: attributes that the model's loading code would have changed, and the plan did not.
        warnings: what a person should read.
        mismatched: by name of the model, both shapes, of what was not loaded because they differ.
        proven: how many tensors of the model ``verify="loader"`` found to be what the model's own loading code makes.
    """

    bytes_read: int
    bytes_written: int
    seconds: float
    peak_buffer_bytes: int
    peak_scratch_bytes: int
    tensors: Mapping[Fate, tuple[str, ...]]
    casts: Mapping[str, str]
    bytes_by_io: Mapping[str, int]
    steps: Mapping[str, int]
    planned: int
    fell_back: tuple[str, ...] = ()
    side_effects: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    mismatched: Mapping[str, str] = field(default_factory=dict)
    proven: int = 0

    def as_dict(self) -> dict[str, object]:
        """The same facts for machines: only names, numbers, lists and dictionaries."""
        facts: dict[str, object] = msgspec.json.decode(msgspec.json.encode(self))
        return facts

    def __repr__(self) -> str:
        numbers = {fate.value: len(names) for fate, names in self.tensors.items()}
        more = {"fell back": len(self.fell_back), "warnings": len(self.warnings)}
        found = counts(numbers | more)
        return f"<LoadReport {size(self.bytes_read)} in {self.seconds:.3f} s: {found or 'no tensors'}>"

    def _repr_html_(self) -> str:
        return as_html(self)

    def __str__(self) -> str:
        speed = rate(self.bytes_read, self.seconds)
        paths = ", ".join(f"{size(nbytes)} {path}" for path, nbytes in self.bytes_by_io.items() if nbytes) or "nothing"
        rows = [
            (
                "read",
                f"{size(self.bytes_read)} in {self.seconds:.3f} s ({speed}): {paths}",
            ),
            (
                "written",
                f"{size(self.bytes_written)} by {self.steps['copies']} copies, {self.steps['programs']} programs",
            ),
            ("memory", f"buffers {size(self.peak_buffer_bytes)}, scratch {size(self.peak_scratch_bytes)} at peak"),
        ]
        rows += fates(self.tensors, self.casts)
        rows += given(self.tensors, self.planned)
        rows += proven(self.proven)
        rows += [("not loaded", f"{name}: {shapes}") for name, shapes in self.mismatched.items()]
        rows += [("fell back", reason) for reason in self.fell_back]
        rows += [("not done", f"change of {effect}") for effect in self.side_effects]
        rows += [("warning", warning) for warning in self.warnings]
        return table(rows)
