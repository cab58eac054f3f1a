"""Every error we raise, drawn as one tree. ``except HotweightsError`` catches all of them (docs/decisions/0009).

::

    HotweightsError             whatever hotweights raises; raised itself by nothing
    ├── CheckpointError         a checkpoint is not what it says it is
    │   ├── CheckpointChanged   it changed between open and the end of reading
    │   └── StoreError          an object store did not give it, or not in time
    ├── UnsupportedDtype        the installed torch has no type for these bytes
    ├── PlanError               source and model do not fit; nothing was read or written
    ├── PlanFileError           a saved plan is damaged or forged, or a plan cannot be saved
    ├── RoutingError            a stream without a manifest carried what its components do not take
    ├── IncompleteLoad          the model's own loading code left something unwritten
    ├── PlanDiffers             verify="loader" found what the model's own code makes otherwise
    ├── LiveModelError          a live model is torn, was changed by somebody else, or finds no room
    ├── UpdateAborted           an update failed; what is live is as it was, or torn and says so
    ├── CommitHookError         the new version is live, and a hook that ran after the commit failed
    ├── TiedWeightsDiffer       two names of one tensor carry different bytes; nothing was written
    ├── SaveError               nothing was saved; what was there before is as it was
    ├── SourceError             a source failed, or streamed something else than its manifest promises
    ├── TransferError           a transfer between processes failed
    │   ├── TransferAborted     this update was given up; every member holds what it held before
    │   ├── TransferIncomplete  the group took the version, and some members were lost on the way
    │   ├── TransferInDoubt     this member lost its sender and cannot tell whether the group took the version
    │   ├── TransferTimeout     nobody answered in time
    │   ├── PeerLost            the process on the other end is gone
    │   ├── ProtocolError       the other end broke the protocol
    │   └── AddressTaken        another sender listens there; the message says which process
    ├── PoolTimeout             memory that is used again did not come free in time
    └── UsageError              the calling program is wrong; fix it
        ├── StaleLease              a tensor was used after its lease ended
        ├── BorrowedTensor          a borrowed tensor was about to be written, or its address to escape
        ├── Closed                  something was used after close()
        ├── NoManifest              an iterator came without a manifest; the message says what to pass
        ├── UnknownName             an option has an unknown value; the message lists the known ones
        └── MissingPackage          an optional package is needed; the message says what to install
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .failure import FailureReport

__all__ = [
    "AddressTaken",
    "BorrowedTensor",
    "CheckpointChanged",
    "CheckpointError",
    "Closed",
    "CommitHookError",
    "HotweightsError",
    "IncompleteLoad",
    "LiveModelError",
    "MissingPackage",
    "NoManifest",
    "PeerLost",
    "PlanDiffers",
    "PlanError",
    "PlanFileError",
    "PoolTimeout",
    "ProtocolError",
    "RoutingError",
    "SaveError",
    "SourceError",
    "StaleLease",
    "StoreError",
    "TiedWeightsDiffer",
    "TransferAborted",
    "TransferError",
    "TransferInDoubt",
    "TransferIncomplete",
    "TransferTimeout",
    "UnknownName",
    "UnsupportedDtype",
    "UpdateAborted",
    "UsageError",
]

_MANY = 6  # From this many names on, what is said of all of them in the same words is said once.
_SAME = 3  # From this many lines on, a hint at their end is said once,
_HINT = 40  # if it is of so many letters: a dtype and a shape are none.
_SHOWN = 50  # A 20,000-tensor mismatch must not bury the terminal; `problems` holds all of them.


class HotweightsError(Exception):
    """Any error of hotweights. Unless it is a ``UsageError``, a correct program may meet it: bad files, lost peers."""


class UsageError(HotweightsError):
    """The calling program is wrong and should be fixed."""


class _Problems(HotweightsError):
    """An error that lists several problems at once, sorted.

    Attributes:
        problems: every problem found, one line each.
        advice: which arguments would allow some of them; empty if none would.
    """

    def __init__(self, title: str, problems: Iterable[str] = (), *, advice: str = "") -> None:
        self.title = title
        self.problems: tuple[str, ...] = tuple(sorted(_once(title, problems)))
        self.advice = advice
        super().__init__(title, self.problems)

    def explain(self, more: Callable[[str], str]) -> None:
        """Let ``more(problem)`` stand for each problem: whoever catches it may know more than whoever raised it."""
        self.problems = tuple(map(more, self.problems))
        self.args = (self.title, self.problems)

    def __str__(self) -> str:
        return "\n".join(dict.fromkeys(filter(None, (self._listed(), *self.advice.splitlines()))))

    def _listed(self) -> str:
        if not self.problems:
            return self.title
        if len(self.problems) == 1:
            return f"{self.title}: {self.problems[0]}"
        shown = grouped(self.problems)
        if len(shown) == 1:
            return f"{self.title}: {shown[0]}"
        shown, hints = hints_once(shown)
        lines = [f"{self.title}: {len(self.problems)} problems"]
        lines += [f"  - {problem}" for problem in shown[:_SHOWN]]
        if len(shown) > _SHOWN:
            lines.append(f"  ... and {len(shown) - _SHOWN} more (see .problems)")
        return "\n".join([*lines, *hints])


def _once(title: str, problems: Iterable[str]) -> Iterator[str]:
    """The problems without the title's words, which a problem brings where it is the text of an error of this kind."""
    for problem in problems:
        said = problem.removeprefix(f"{title}: ").replace(f": {title}: ", ": ")
        if said != title:
            yield said


def grouped(problems: Sequence[str]) -> list[str]:
    """The problems, those of many names in one line with their count: ``a, b, c and 98 more: lies on meta``."""
    names: dict[str, list[str]] = {}
    for problem in problems:
        name, _, reason = problem.partition(": ")
        names.setdefault(reason, []).append(name)
    lines: dict[str, None] = {}
    for problem in problems:
        reason = problem.partition(": ")[2]
        same = names[reason]
        many = reason and len(same) >= _MANY
        lines[f"{', '.join(same[:3])} and {len(same) - 3} more: {reason}" if many else problem] = None
    return list(lines)


def hints_once(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """The lines without what several of them say at their end in the same words, and that: ``12 of them: ...``."""
    ends = Counter(line.partition("; ")[2] for line in lines)
    often = {end for end, count in ends.items() if count >= _SAME and len(end) >= _HINT}
    kept = [line.removesuffix(f"; {end}") if (end := line.partition("; ")[2]) in often else line for line in lines]
    return kept, [f"{ends[end]} of them: {end}" for end in ends if end in often]


class Problem(str):
    """A problem, and its cause in a word, for programs."""

    __slots__ = ("cause",)

    def __new__(cls, text: str, cause: str) -> Problem:
        """The text, with its cause."""
        problem = super().__new__(cls, text)
        problem.cause = cause
        return problem

    cause: str


class CheckpointError(_Problems):
    """A checkpoint is not what it says it is. Names file and tensor; nothing was written.

    Attributes:
        cause: why in a word, for programs; docs/ci.md lists them.
        causes: all of them, where it is ``"several"``; else that one.
    """

    cause = "invalid"
    causes: tuple[str, ...] = ()

    def __init__(self, title: str, problems: Iterable[str] = (), *, advice: str = "", cause: str | None = None) -> None:
        several = [*problems]
        super().__init__(title, several, advice=advice)
        causes = {problem.cause if isinstance(problem, Problem) else cause or self.cause for problem in several}
        if cause is not None or causes:
            self.cause = (cause or self.cause) if not causes else min(causes) if len(causes) == 1 else "several"
        self.causes = tuple(sorted(causes)) or (self.cause,)


class CheckpointChanged(CheckpointError):
    """A file shrank, was replaced or rewritten between open and the end of reading.

    The message says what had been written by then, if anything.
    """

    cause = "changed"


class StoreError(CheckpointError):
    """An object store, or a server, did not give what was asked for: it refused, or the deadline passed.

    The message says of which object which bytes, how often they were asked for, and the last answer. It holds no
    credentials.
    """

    cause = "store"


class UnsupportedDtype(HotweightsError):
    """The installed torch has no type for this dtype of the format. The bytes can be had: ``lease.raw``."""


class PlanError(_Problems):
    """Source and model do not fit. Raised before the first byte is read; the model is unharmed."""


class PlanFileError(_Problems):
    """A saved plan is damaged, forged or of another version; or a plan cannot be saved. Nothing was written."""


class RoutingError(_Problems):
    """A stream without a manifest carried what its components do not take, or more than may wait.

    The component that was loaded while the stream passed is loaded by then; the others are unharmed.
    """


class IncompleteLoad(_Problems):
    """Loading fell back to the model's own code, which left parameters unwritten. They are named."""


class PlanDiffers(_Problems):
    """The model's own loading code makes other bytes than the plan did. The tensors are named; they hold its bytes."""


class TiedWeightsDiffer(_Problems):
    """Names that share one tensor in the model carry different bytes. Raised before the first write,
    or, where they come in a stream, at its end.
    """


class SaveError(_Problems):
    """Tensors could not be saved: the disk is full, or the format cannot hold them. What was there is untouched."""


class SourceError(_Problems):
    """A source failed while it streamed, or streamed something else than its manifest promises. Tensors are named.

    What it had streamed by then is in the hands of whoever took it.
    """


class TransferError(_Problems):
    """A transfer between processes failed. Its subclasses say what that leaves behind.

    Attributes:
        report: where ``send`` failed, what its time was spent on.
    """

    report: FailureReport | None = None


class TransferAborted(TransferError):
    """The update was given up before the group decided to take it: every member holds what it held before.

    At a sender, each problem names a receiver and what it said.
    """


class TransferIncomplete(TransferError):
    """The group took the version, but members that are named did not confirm it: they were lost, or failed.

    Attributes:
        committed: the members that confirmed it.
    """

    def __init__(self, title: str, problems: Iterable[str] = (), *, committed: tuple[str, ...] = ()) -> None:
        super().__init__(title, problems)
        self.committed = committed


class TransferInDoubt(TransferError):
    """This member voted for the version, and lost its sender on another host before it heard the decision.

    It waited for the next sender, and nobody told it. It does not take the version; others may have it. The next
    version that is sent ends the doubt.
    """


class TransferTimeout(TransferError, TimeoutError):
    """Nobody came, or answered, before the deadline. The message says who was waited for."""


class PeerLost(TransferError):
    """The process on the other end is gone, or ended the connection; its last words are in the message."""


class ProtocolError(TransferError):
    """The other end broke the protocol: its message is damaged, stale, of another version or of another user."""


class AddressTaken(TransferError):
    """Another sender listens at this address. The message says which process."""


class UpdateAborted(_Problems):
    """An update of a live model failed. Version N is live, byte for byte; with ``atomic=False`` it may be torn.

    The cause is the error that ended it; its problems are those of the cause, where it lists any.

    Attributes:
        report: what the time of the update was spent on; ``None`` if it ended before it began, as where a source
            cannot be opened.
    """

    report: FailureReport | None = None


class LiveModelError(_Problems):
    """A live model cannot do what was asked: it is torn, somebody else changed it, or there is no room."""


class CommitHookError(_Problems):
    """A hook failed after a commit. The new version is live and whole; caches may hold what the old one made."""


class PoolTimeout(HotweightsError, TimeoutError):
    """Memory that is used again did not come free before the deadline. The message says who holds it."""


class StaleLease(UsageError):
    """A tensor, or a view made from it, was used after its lease had ended."""


class BorrowedTensor(UsageError):
    """A borrowed tensor was about to be written, or its address was about to be handed to code that no guard sees."""


class Closed(UsageError):
    """A source, stream or pool was used after it was closed."""


class NoManifest(UsageError, AttributeError):
    """An iterator came without a manifest, and one is needed. The message says what to pass."""


class UnknownName(UsageError, ValueError):
    """An option has an unknown value. The message lists the known ones."""

    def __init__(self, what: str, value: object, known: Iterable[str]) -> None:
        super().__init__(f"unknown {what} {value!r}; known are: {', '.join(sorted(known))}")


class MissingPackage(UsageError, ImportError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package {package!r}: pip install 'hotweights[{extra}]'")
