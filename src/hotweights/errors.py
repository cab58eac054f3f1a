"""Every error we raise, drawn as one tree with two trunks. Nothing else lives here.

::

    HotweightsError             a correct program may meet it
    ├── CheckpointError         a checkpoint is not what it says it is
    │   └── CheckpointChanged   it changed between open and the end of reading
    ├── UnsupportedDtype        the installed torch has no type for these bytes
    ├── PlanError               source and model do not fit; nothing was read or written
    ├── PlanFileError           a saved plan is damaged or forged, or a plan cannot be saved
    ├── RoutingError            a stream without a manifest carried what its components do not take
    ├── IncompleteLoad          the model's own loading code left something unwritten
    ├── PlanDiffers             verify="loader" found what the model's own code makes otherwise
    ├── TiedWeightsDiffer       two names of one tensor carry different bytes; nothing was written
    └── PoolTimeout             no slot came free in time

    UsageError                  fix the program
    ├── StaleLease              a tensor was used after its lease ended
    ├── BorrowedTensor          a borrowed tensor was about to be written, or its address to escape
    ├── Closed                  something was used after close()
    ├── UnknownName             an option or a kind nobody knows; the message lists the known ones
    └── MissingPackage          an optional package is needed; the message says what to install
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "BorrowedTensor",
    "CheckpointChanged",
    "CheckpointError",
    "Closed",
    "HotweightsError",
    "IncompleteLoad",
    "MissingPackage",
    "PlanDiffers",
    "PlanError",
    "PlanFileError",
    "PoolTimeout",
    "RoutingError",
    "StaleLease",
    "TiedWeightsDiffer",
    "UnknownName",
    "UnsupportedDtype",
    "UsageError",
]

_SHOWN = 50  # A 20,000-tensor mismatch must not bury the terminal; `problems` holds all of them.


class HotweightsError(Exception):
    """A correct program may meet this: bad files, lost peers, exhausted bounds."""


class UsageError(Exception):
    """The calling program is wrong and should be fixed."""


class _Problems(HotweightsError):
    """An error that lists several problems at once, sorted.

    Attributes:
        problems: every problem found, one line each.
    """

    def __init__(self, title: str, problems: Iterable[str] = ()) -> None:
        self.title = title
        self.problems: tuple[str, ...] = tuple(sorted(problems))
        super().__init__(title, self.problems)

    def __str__(self) -> str:
        if not self.problems:
            return self.title
        if len(self.problems) == 1:
            return f"{self.title}: {self.problems[0]}"
        lines = [f"{self.title}: {len(self.problems)} problems"]
        lines += [f"  - {problem}" for problem in self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"  ... and {len(self.problems) - _SHOWN} more (see .problems)")
        return "\n".join(lines)


class CheckpointError(_Problems):
    """A checkpoint is not what it says it is. Names file and tensor; nothing was written."""


class CheckpointChanged(CheckpointError):
    """A file shrank, was replaced or rewritten between open and the end of reading.

    The message says what had been written by then, if anything.
    """


class UnsupportedDtype(HotweightsError):
    """The format knows this dtype, the installed torch does not. The bytes can still be had."""


class PlanError(_Problems):
    """Source and model do not fit. Raised before the first byte is read; the model is unharmed."""


class PlanFileError(_Problems):
    """A saved plan is damaged, forged or of another version; or a plan holds what no file may. Nothing was written."""


class RoutingError(_Problems):
    """A stream without a manifest carried what its components do not take, or more than may wait.

    The component that is loaded from the passing stream may have been loaded by then; the others are unharmed.
    """


class IncompleteLoad(_Problems):
    """Loading fell back to the model's own code, which left parameters unwritten. They are named."""


class PlanDiffers(_Problems):
    """The model's own loading code makes other bytes than the plan did. The tensors are named; they hold its bytes."""


class TiedWeightsDiffer(_Problems):
    """Names that share one tensor in the model carry different bytes. Raised before the first write."""


class PoolTimeout(HotweightsError, TimeoutError):
    """No slot of a pool came free before the deadline. The message says who holds the slots."""


class StaleLease(UsageError):
    """A tensor, or a view made from it, was used after its lease had ended."""


class BorrowedTensor(UsageError):
    """A borrowed tensor was about to be written, or its address to leave the guard's sight."""


class Closed(UsageError):
    """A source, stream or pool was used after it was closed."""


class UnknownName(UsageError, ValueError):
    """An option has a value nobody knows. The message lists the known ones."""

    def __init__(self, what: str, found: object, known: Iterable[str]) -> None:
        super().__init__(f"unknown {what} {found!r}; known are: {', '.join(sorted(known))}")


class MissingPackage(UsageError, ImportError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package {package!r}: pip install 'hotweights[{extra}]'")
