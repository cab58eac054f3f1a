"""SendReport: what one ``send`` did."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from ..text import as_html, counts, rate, short, size, some, table
from ..timeline import TimelineEvent, breakdown, save_events
from .host_report import HostReport

WAIT = "wait for receivers"
"""The event before the offer, which the report's ``seconds`` leave out."""

_SHORT = 0.1  # seconds of waiting that need no word


@dataclass(frozen=True, slots=True)
class SendReport:
    """What one ``send`` did.

    Attributes:
        version: what was sent.
        committed: receivers that have it, and said so.
        lost: receivers that were dropped on the way, and why. None of them takes this version, unless the reason says
            that this is not known: who was on another host and had voted is in doubt, and takes it if it is told so by
            the next sender, by ``hotweights resolve`` or through a relay's next one.
        problems: by receiver that has it, what failed there after its commit: a hook, say.
        tensors: how many were sent; nobody wanted the others.
        unwanted: names of these others: models have no place for them, or compute what they hold. A name that is meant
            for a model and stands here has changed nothing.
        nbytes: bytes that were sent, each counted once, however many receivers took it.
        network_nbytes: bytes that went to other hosts, counted for each receiver there; for a relay once.
        hosts: the same for each host, and the seconds of each phase there. The sender's own has no name.
        published: the address of the version, where it was published for whoever comes; nobody is asked who has it.
        seconds: from the offer to the last answer.
        waited: seconds of those, by receiver that was waited for; several may be waited for at once.
        warnings: what a person should read.
        events: what the time of ``send`` was spent on, the wait for receivers before the offer too.
        since_epoch: when that began, in seconds since 1970; ``events`` count from there.
    """

    version: str | int
    committed: tuple[str, ...]
    lost: Mapping[str, str]
    problems: Mapping[str, str]
    tensors: int
    nbytes: int
    seconds: float
    waited: Mapping[str, float]
    warnings: tuple[str, ...] = ()
    events: tuple[TimelineEvent, ...] = ()
    network_nbytes: int = 0
    since_epoch: float = 0.0
    published: str | None = None
    hosts: tuple[HostReport, ...] = ()
    unwanted: tuple[str, ...] = ()

    @property
    def shared_nbytes(self) -> int:
        """Bytes that workers read in memory which they share with the sender or a relay, counted for each worker."""
        return sum(host.shared_nbytes for host in self.hosts)

    @property
    def slowest(self) -> str | None:
        """The receiver that was waited for longest; ``None`` if none was."""
        return max(self.waited, key=self.waited.__getitem__, default=None)

    def as_dict(self) -> dict[str, object]:
        """The attributes as numbers, text, lists and dicts: what JSON can hold."""
        facts = {"committed": list(self.committed), "warnings": list(self.warnings), "unwanted": list(self.unwanted)}
        events = [event._asdict() for event in self.events]
        hosts = [host.as_dict() for host in self.hosts]
        return {**msgspec.to_builtins(self), **facts, "events": events, "hosts": hosts}

    def save_timeline(self, path: str | os.PathLike[str]) -> None:
        """Write what the time was spent on in the Chrome trace format, for ``chrome://tracing`` or ui.perfetto.dev.

        It lines up with those of the workers of the host, by the clock that they share. Each host that took part has a
        track, with a row for each of its members: when it had answered, released the last slot, prepared, committed.
        """
        save_events(
            path,
            self.events,
            deed="send",
            of=str(self.version),
            who="sender",
            since_epoch=self.since_epoch,
            tracks={f"host {host.host or 'of the sender'}": host.events for host in self.hosts},
        )

    def __repr__(self) -> str:
        sent = f"{size(self.nbytes)} in {self.tensors} tensors in {self.seconds:.3f} s"
        more = {"lost": len(self.lost), "problems": len(self.problems), "warnings": len(self.warnings)}
        found = counts({"committed": len(self.committed)} | more)
        return f"<SendReport {short(self.version)}, {sent}: {found or ('published' if self.published else 'nobody')}>"

    def _repr_html_(self) -> str:
        return as_html(self)

    def __str__(self) -> str:
        speed = rate(self.nbytes, self.seconds)
        waited = sum(event.seconds for event in self.events if event.what == WAIT)
        after = f", after {waited:.3f} s of waiting for receivers" if waited >= _SHORT else ""
        sent = f"{size(self.nbytes)} in {self.tensors} tensors in {self.seconds:.3f} s ({speed}){after}"
        rows = (
            ("sent", sent),
            *((("network", f"{size(self.network_nbytes)} over the network"),) if self.network_nbytes else ()),
            ("version", f"{self.version!r}, {self._whereabouts()}"),
            *((("unwanted", f"{len(self.unwanted)}: {some(self.unwanted, 3)}"),) if self.unwanted else ()),
            *breakdown(self.events),
            *(("host", str(host)) for host in self.hosts if self.network_nbytes),
            *(("waited", f"{seconds:.3f} s for {name}") for name, seconds in self.waited.items()),
            *(("lost", f"{name}: {reason}") for name, reason in self.lost.items()),
            *(("warning", warning) for warning in self.warnings),
            *(("problem", f"{name}: {reason}") for name, reason in self.problems.items()),
        )
        return table(rows)

    def _whereabouts(self) -> str:
        return (
            f"published at {self.published}" if self.published else f"taken by {', '.join(self.committed) or 'nobody'}"
        )
