"""Register: where the decision about an update is written once, so that all hosts can read it."""

from __future__ import annotations

import abc
import contextlib
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import msgspec

from ... import signals
from ...errors import TransferError, UsageError
from ..decision import Decision

NAME = "hotweights-{:016x}.json"
"""Under what a decision lies, by the number of its update."""

_RACERS = 8  # writers at a time that a probe lets try


class DecisionRecord(NamedTuple):
    """What was decided about an update, and for which places of the sender's."""

    decision: Decision
    places: tuple[int, ...]


@signals.held_throughout
class Register(abc.ABC):
    """Where something is written once for each update: whoever is first decides, and all others read that.

    Nothing is removed: a member that stood still for an hour must find what was decided.

    Attributes:
        url: as its user wrote it.
    """

    def __init__(self, url: str) -> None:
        """Nothing is looked up yet."""
        self.url = url

    @abc.abstractmethod
    def written(self, name: str, content: bytes) -> bytes:
        """What lies under the name, which is ``content`` if nothing lay there before.

        Raises:
            OSError: it cannot be reached; the text says why, and holds no secret.
        """

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Take away what a probe wrote.

        Raises:
            OSError: it cannot be reached.
        """

    def probe(self) -> None:
        """See that of several writers one wins, one after the other and at the same time.

        Raises:
            UsageError: it cannot be reached, or nobody may write there, or it lets several write.
        """
        names = [f"hotweights-probe-{secrets.token_hex(8)}" for _ in range(2)]
        try:
            in_turn = [self.written(names[0], content) for content in (b"first", b"second")]
            with ThreadPoolExecutor(_RACERS) as pool:
                wanted = [str(number).encode() for number in range(_RACERS)]
                at_once = list(pool.map(lambda content: self.written(names[1], content), wanted))
        except OSError as error:
            raise UsageError(f"{self.url} cannot hold decisions: {error}") from error
        finally:
            for name in names:
                with contextlib.suppress(OSError):
                    self.remove(name)
        if in_turn != [b"first", b"first"] or len(set(at_once)) != 1:
            raise UsageError(f"{self.url} cannot hold decisions: it let two writers write one of them")

    def decide(self, update: int, record: DecisionRecord) -> DecisionRecord:
        """Write ``record`` if nothing is written about this update. Returns what is written then.

        Raises:
            TransferError: it cannot be reached, or what is there is no record.
        """
        content = msgspec.json.encode({"decision": record.decision.name, "places": record.places})
        try:
            found = msgspec.json.decode(self.written(NAME.format(update), content), type=_Content)
            return DecisionRecord(Decision[found.decision], found.places)
        except (OSError, msgspec.MsgspecError, KeyError) as error:
            raise TransferError(f"the decision about update {update} cannot be had from {self.url}: {error}") from error


class _Content(msgspec.Struct, forbid_unknown_fields=True):
    decision: str
    places: tuple[int, ...]


class SharedRecord(NamedTuple):
    """The decision about one update, for the member with one place."""

    register: Register
    update: int
    place: int

    def is_commit(self) -> bool:
        """Whether this member is to take the version. If nothing is decided yet, it is decided now that nobody does.

        Raises:
            TransferError: the register cannot be reached.
        """
        record = self.register.decide(self.update, DecisionRecord(Decision.ABORT, ()))
        return record.decision is Decision.COMMIT and self.place in record.places
