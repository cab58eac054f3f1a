"""LoadReport and RouteReport: what one load, or one routing, did. Frozen facts that print as a short table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .plan import Fate

__all__ = ["LoadReport", "RouteReport"]

_SHOWN = 3  # names a line; the report holds all of them


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What one load did.

    Attributes:
        bytes_read: bytes that came from the source, those compared for ties included.
        bytes_written: bytes of the model that were written.
        seconds: from opening the source to the last byte.
        peak_buffer_bytes: the most memory that the pool held at once.
        peak_scratch_bytes: the most memory that programs held at once to assemble their sources.
        tensors: names by fate.
        casts: by source name, "from -> to" dtypes.
        roads: bytes read by road: ``"buffered"``, ``"direct"``, or ``"memory"``.
        steps: how many copies (of them slices) and programs the plan had.
        planned: how many source tensors the plan moved; the model's own code loaded the others.
        fell_back: why it did: what it asked for, of which tensor, at which line of code.
        side_effects: attributes that the model's loading code would have changed, and the plan did not.
        warnings: what a person should read.
    """

    bytes_read: int
    bytes_written: int
    seconds: float
    peak_buffer_bytes: int
    peak_scratch_bytes: int
    tensors: Mapping[Fate, tuple[str, ...]]
    casts: Mapping[str, str]
    roads: Mapping[str, int]
    steps: Mapping[str, int]
    planned: int
    fell_back: tuple[str, ...] = ()
    side_effects: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """The same facts for machines: only names, numbers, lists and dictionaries."""
        return {
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "seconds": self.seconds,
            "peak_buffer_bytes": self.peak_buffer_bytes,
            "peak_scratch_bytes": self.peak_scratch_bytes,
            "tensors": {fate.value: list(names) for fate, names in self.tensors.items()},
            "casts": dict(self.casts),
            "roads": dict(self.roads),
            "steps": dict(self.steps),
            "planned": self.planned,
            "fell_back": list(self.fell_back),
            "side_effects": list(self.side_effects),
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        rate = self.bytes_read / max(self.seconds, 1e-9) / 1e9
        roads = ", ".join(f"{size(nbytes)} {road}" for road, nbytes in self.roads.items() if nbytes) or "nothing"
        rows = [
            ("read", f"{size(self.bytes_read)} in {self.seconds:.3f} s ({rate:.2f} GB/s): {roads}"),
            (
                "written",
                f"{size(self.bytes_written)} by {self.steps['copies']} copies, {self.steps['programs']} programs",
            ),
            ("memory", f"buffers {size(self.peak_buffer_bytes)}, scratch {size(self.peak_scratch_bytes)} at peak"),
        ]
        rows += [(fate.value, _summary(names, self.casts)) for fate, names in self.tensors.items() if names]
        rows += [("fell back", reason) for reason in self.fell_back]
        rows += [("not done", f"change of {effect}") for effect in self.side_effects]
        rows += [("warning", warning) for warning in self.warnings]
        return "\n".join(f"{label:>10}  {text}" for label, text in rows)


@dataclass(frozen=True, slots=True)
class RouteReport:
    """What one routing did. Components stand by name, in the order in which they were given.

    Attributes:
        tensors: by component that was loaded, the source's names of its tensors.
        nbytes: bytes of those, by component.
        returned: what each ``load_weights`` returned; the ``LoadReport`` of a module that was loaded by name.
        untaken: by component, the source's names of tensors that its loading code stopped before.
        disabled: by component that was left alone, the source's names of its tensors.
        streamed: the component that was loaded while the stream passed; ``None`` where none had to wait for it.
        peak_waiting_bytes: the most memory that tensors of the others held at once, waiting for the end of the stream.
        seconds: from opening the source to the end of the last component.
    """

    tensors: Mapping[str, tuple[str, ...]]
    nbytes: Mapping[str, int]
    returned: Mapping[str, object]
    untaken: Mapping[str, tuple[str, ...]]
    disabled: Mapping[str, tuple[str, ...]]
    streamed: str | None
    peak_waiting_bytes: int
    seconds: float

    def __str__(self) -> str:
        rows = [(name, self._loaded(name)) for name in self.tensors]
        rows += [(name, f"disabled, {len(names)} tensors left alone") for name, names in self.disabled.items()]
        rows.append(("memory", f"{size(self.peak_waiting_bytes)} waiting at peak"))
        total = sum(self.nbytes.values())
        rows.append(
            ("all", f"{size(total)} in {self.seconds:.3f} s ({total / max(self.seconds, 1e-9) / 1e9:.2f} GB/s)")
        )
        width = max(10, *(len(label) for label, _ in rows))
        return "\n".join(f"{label:>{width}}  {text}" for label, text in rows)

    def _loaded(self, name: str) -> str:
        text = f"{size(self.nbytes[name])} in {len(self.tensors[name])} tensors"
        if name == self.streamed:
            text += ", streamed"
        return text + (f"; stopped before {_summary(self.untaken[name], {})}" if name in self.untaken else "")


def size(nbytes: int) -> str:
    """Bytes for people: ``90.9 MB``."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _summary(names: tuple[str, ...], casts: Mapping[str, str]) -> str:
    if len(names) > _SHOWN and not any(name in casts for name in names):
        return f"{len(names)} tensors"
    shown = [f"{name} ({casts[name]})" if name in casts else name for name in names[:_SHOWN]]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)}: {', '.join(shown)}{more}"
