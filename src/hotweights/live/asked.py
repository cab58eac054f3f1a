"""Asked: what the caller of one update asked for, checked before anything begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..arguments import check_choices, check_timeout
from ..dtypes import Cast
from ..errors import UnknownName, UsageError
from ..plan.patterns import Patterns
from .strategy import Atomic


@dataclass(frozen=True)
class Asked:
    """What ``LiveModel.update`` and ``begin`` were given, see there."""

    atomic: Atomic
    only: Patterns | None
    cast: Cast | None
    timeout: float | None
    check: Callable[[], object] | None
    version: str | int | None = None

    def __post_init__(self) -> None:
        check_atomic(self.atomic)
        check_choices(cast=("error" if self.cast is None else self.cast, Cast))
        check_timeout(self.timeout)
        if self.check is not None and self.atomic is False:
            raise UsageError(
                "atomic=False keeps nothing that a version could go back to when check= refuses it; use "
                'atomic="staged" or "journal"'
            )


def check_atomic(atomic: object) -> None:
    """See that it is one of the ways to be all or nothing.

    Raises:
        UnknownName: it is not.
    """
    if atomic is not False and atomic not in ("staged", "journal"):
        raise UnknownName("atomic", atomic, ("staged", "journal", "False"))
