"""UpdateReport: what one update did, as frozen facts that print as a short table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from ..loading.report import fates, given, proven
from ..plan.steps import Fate
from ..text import as_html, counts, rate, short, size, some, table
from ..timeline import TimelineEvent, breakdown, save_events


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What one update did.

    Attributes:
        version: which version is live now.
        previous: which was before; ``None`` if none.
        atomic: how it was all or nothing; ``None`` for the first load.
        bytes_read: bytes that came from the source.
        bytes_written: bytes of the model, and of copies beside it, that were written.
        seconds: from its beginning to the commit, with the waits for readers, without hooks.
        stall_seconds: how long nobody might read the model.
        wait_seconds: how long it waited for readers to leave.
        peak_buffer_bytes: the most memory that the pool held at once.
        peak_scratch_bytes: the most memory that open layers and waiting tensors of programs took at once.
        peak_host_bytes: the most memory of tensors that waited on the host because of ``memory_limit``.
        copy_bytes: memory of the copy of the model that is kept on the host between updates.
        open_layers: the most layers that were open at once.
        open_bytes: the most device memory that they took.
        tensors: names by fate.
        casts: by name of the source, what was cast: ``"F32 -> BF16"``.
        restored: names of the model that this version does not bring and an earlier one did: they hold again what they
            held before the first load.
        kept: names of the model that ``only=`` left alone; they are not missing.
        planned: how many source tensors the plan moved.
        fell_back: why the model's own code loaded the others.
        replaced: objects of layers in which no tensor is seen (closures, prepacked weights), and which are others now:
            memory in them has moved, for all that is known.
        bytes_by_io: bytes read by I/O path.
        warnings: what a person should read.
        events: what the time was spent on.
        mismatched: by name of the model, both shapes, of what was not loaded because they differ.
        proven: how many tensors of the model ``verify="loader"`` found to be what the model's own loading code makes.
        since_epoch: when it began, in seconds since 1970; ``events`` count from there.
        receiver: the ``name=`` of the ``Receiver`` that it came by.
    """

    version: str | int
    previous: str | int | None
    atomic: str | bool | None
    bytes_read: int
    bytes_written: int
    seconds: float
    stall_seconds: float
    wait_seconds: float
    peak_buffer_bytes: int
    peak_scratch_bytes: int
    peak_host_bytes: int
    copy_bytes: int
    open_layers: int
    open_bytes: int
    tensors: Mapping[Fate, tuple[str, ...]]
    casts: Mapping[str, str]
    restored: tuple[str, ...]
    kept: tuple[str, ...]
    planned: int
    fell_back: tuple[str, ...]
    replaced: tuple[str, ...]
    bytes_by_io: Mapping[str, int]
    warnings: tuple[str, ...]
    events: tuple[TimelineEvent, ...]
    mismatched: Mapping[str, str] = field(default_factory=dict)
    proven: int = 0
    since_epoch: float = 0.0
    receiver: str = ""

    def as_dict(self) -> dict[str, object]:
        """The same facts for machines: only names, numbers, lists and dictionaries."""
        facts: dict[str, object] = msgspec.json.decode(msgspec.json.encode(self))
        return facts | {"events": [event._asdict() for event in self.events]}

    def save_timeline(self, path: str | os.PathLike[str]) -> None:
        """Write what the time was spent on in the Chrome trace format, for ``chrome://tracing`` or ui.perfetto.dev.

        It lines up with those of other processes of the host, as the trainer's, by the clock that they share.
        """
        version = str(self.version)
        save_events(path, self.events, deed="update", of=version, who=self.receiver, since_epoch=self.since_epoch)

    def __repr__(self) -> str:
        numbers = {fate.value: len(names) for fate, names in self.tensors.items()}
        more = {"fell back": len(self.fell_back), "replaced": len(self.replaced), "warnings": len(self.warnings)}
        found = counts(numbers | more)
        versions = f"{short(self.previous)} -> {short(self.version)}"
        return f"<UpdateReport {versions}, {size(self.bytes_read)} in {self.seconds:.3f} s: {found or 'no tensors'}>"

    def _repr_html_(self) -> str:
        return as_html(self)

    def __str__(self) -> str:
        speed = rate(self.bytes_read, self.seconds)
        paths = ", ".join(f"{size(nbytes)} {path}" for path, nbytes in self.bytes_by_io.items() if nbytes) or "nothing"
        twice = ", into the copy and from there into the model" if self.copy_bytes and self.atomic == "staged" else ""
        rows = [
            ("version", f"{self.previous} -> {self.version}" if self.previous is not None else str(self.version)),
            (
                "read",
                f"{size(self.bytes_read)} in {self.seconds:.3f} s ({speed}): {paths}",
            ),
            ("written", f"{size(self.bytes_written)}{twice}; nobody could read it for {self.stall_seconds:.3f} s"),
            ("waited", f"{self.wait_seconds:.3f} s for readers"),
            ("memory", f"scratch {size(self.peak_scratch_bytes)} at peak, copy of the model {size(self.copy_bytes)}"),
        ]
        rows += breakdown(self.events)
        if self.open_bytes:
            rows.append(("open", f"{self.open_layers} layers, {size(self.open_bytes)} of device memory at peak"))
        rows += fates(self.tensors, self.casts)
        rows += given(self.tensors, self.planned)
        rows += proven(self.proven)
        rows += [("not loaded", f"{name}: {shapes}") for name, shapes in self.mismatched.items()]
        if self.kept:
            rows.append(("kept", f"left alone by only=: {some(self.kept, 3)}"))
        if self.restored:
            rows.append(("restored", f"as before the first load: {some(self.restored, 3)}"))
        rows += [("fell back", reason) for reason in self.fell_back]
        if self.replaced:
            rows.append(("replaced", f"not known to be where it was: {some(self.replaced, 3)}"))
        rows += [("warning", warning) for warning in self.warnings]
        return table(rows)
