"""Register: where the decision about an update is written once, so that all hosts can read it."""

from __future__ import annotations

import abc
import contextlib
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import msgspec

from ... import signals
from ...errors import TransferError, UsageError
from ..decision import Decision

NAME = "hotweights-{:016x}.json"
"""Under what a decision lies, by the number of its update."""

_MARK = "hotweights-sender-{}"  # what a sender leaves there
_OURS, _NOBODYS = b"a sender was here", b"no sender was here"
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
        mark: of the sender that has probed it, which members look for: their host may have another place of that URL.
    """

    def __init__(self, url: str) -> None:
        """Nothing is looked up yet."""
        self.url = url
        self.mark = ""

    @property
    def told(self) -> str:
        """What members are told of it: the URL and the mark."""
        return f"{self.url}#{self.mark}"

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
        """See that of several writers one wins, one after the other and at the same time. Leaves a new ``mark`` there.

        Raises:
            UsageError: it cannot be reached, or nobody may write there, or it lets several write.
        """
        names = [f"hotweights-probe-{secrets.token_hex(8)}" for _ in range(2)]
        try:
            in_turn = [self.written(names[0], content) for content in (b"first", b"second")]
            with ThreadPoolExecutor(_RACERS) as pool:
                wanted = [str(number).encode() for number in range(_RACERS)]
                at_once = list(pool.map(lambda content: self.written(names[1], content), wanted))
            self.mark = secrets.token_hex(8)
            self.written(_MARK.format(self.mark), _OURS)
        except OSError as error:
            cure = "; make the directory, where all hosts see it" if isinstance(error, FileNotFoundError) else ""
            raise UsageError(f"{self.url} cannot hold decisions: {error}{cure}") from error
        finally:
            for name in names:
                with contextlib.suppress(OSError):
                    self.remove(name)
        if in_turn != [b"first", b"first"] or len(set(at_once)) != 1:
            raise UsageError(f"{self.url} cannot hold decisions: it let two writers write one of them")

    def is_shared(self) -> bool:
        """Whether the sender's mark is there.

        Raises:
            OSError: it cannot be reached.
        """
        name = _MARK.format(self.mark)
        # Written, not looked for: NFS may remember for a while that there was no such file.
        if not self.mark or self.written(name, _NOBODYS) == _OURS:
            return True
        with contextlib.suppress(OSError):
            self.remove(name)
        return False

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


_CHECKED: set[str] = set()  # what was told of registers that this process has looked at


class SharedRecord(NamedTuple):
    """The decision about one update, for the member with one place."""

    register: Register
    update: int
    place: int

    def check(self) -> None:
        """See, once for each sender, that this member reads where the sender writes; before it votes.

        What cannot be reached now may be there when it is needed.

        Raises:
            UsageError: the sender has written nothing there.
        """
        if self.register.told not in _CHECKED:
            with contextlib.suppress(OSError):
                if not self.register.is_shared():
                    raise UsageError(self._elsewhere())
            _CHECKED.add(self.register.told)

    def _elsewhere(self) -> str:
        return (
            f"decision={self.register.url!r} is another place on this host, {socket.gethostname()}, than on the "
            "sender's; name one that all hosts see"
        )

    def is_commit(self) -> bool:
        """Whether this member is to take the version. If nothing is decided yet, it is decided now that nobody does.

        Raises:
            TransferError: the register cannot be reached, or is not the sender's.
        """
        try:
            # Else this would decide for itself alone, in a place that only its host sees.
            if not self.register.is_shared():
                raise TransferError(self._elsewhere())
        except OSError as error:
            raise TransferError(f"{self.register.url} cannot be reached: {error}") from error
        record = self.register.decide(self.update, DecisionRecord(Decision.ABORT, ()))
        return record.decision is Decision.COMMIT and self.place in record.places
