"""Tries: how often a store is asked for one thing, how long that goes on, and what is said then. It asks nobody."""

from __future__ import annotations

import random
import time

from ...errors import CheckpointChanged, StoreError
from .service import NOTHING, Refusal

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0  # seconds between two tries; each is about twice the one before
_LOGINS = 3  # tries after which credentials that worked before count as expired


class Tries:
    """How often one thing was asked for, how long that may go on, and what is said when it may not."""

    def __init__(self, what: str, deadline: float, login: str, longer: str) -> None:
        """``login`` and ``longer`` say what to do about refused credentials and about a deadline that is too short."""
        self._what, self._deadline = what, deadline
        self._login, self._longer = login, longer
        self._count = 0
        self._answer = ""
        self._since: float | None = None  # the first try, or the last bytes that came

    def progress(self) -> None:
        """Something came."""
        self._count, self._since = 0, _now()

    def left(self) -> float:
        """Seconds of the deadline that are left."""
        if self._since is None:
            self._since = _now()
        return max(0.001, self._since + self._deadline - _now())

    def patience(self) -> float:
        """Seconds for which the next step may bring nothing: half of the deadline, so that there is a second try."""
        return min(self._deadline / 2, self.left())

    @property
    def told(self) -> str:
        """The last answer, and how often there was none that helped."""
        return f"{self._answer} ({self._count} tries)" if self._count > 1 else self._answer

    def pause(self, refusal: Refusal, answered: bool) -> float | None:
        """Seconds to wait before the next try; ``None`` if there is none."""
        self._count += refusal.tries
        if refusal != NOTHING or not self._answer:  # The last try may have had no time for an answer.
            self._answer = refusal.answer
        if not (answered and self._count < _LOGINS if refusal.login else refusal.again):
            return None
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(self._count - 1, 10))
        pause *= random.uniform(0.5, 1)  # Without chance all readers would come back at once.
        return None if pause >= self.left() else float(pause)

    def pause_or_raise(self, refusal: Refusal, answered: bool) -> float:
        """Seconds to wait before the next try of reading. Raises ``CheckpointError`` if there is none."""
        pause = self.pause(refusal, answered)
        if pause is not None:
            return pause
        what, said = self._what, self.told
        if refusal.replaced or refusal.gone or refusal.beyond:
            how = "went away while it was open" if refusal.gone else "was replaced after it was opened"
            how += ", and ends before these bytes" if refusal.beyond else ""
            raise CheckpointChanged(f"{what}: the object {how}; the store said {said}")
        if refusal.ignores_ranges:
            raise StoreError(
                f"{what}: this store sends {said}, so parts cannot be read; download it, and give the folder"
            )
        if refusal.login:
            cure = "they have expired, perhaps" if answered else self._login
            raise StoreError(f"{what}: the store refused the credentials, or asks for some: {said}; {cure}")
        if not refusal.again:
            raise StoreError(f"{what}: the store refused: {said}")
        raise StoreError(
            f"{what}: not to be had within {self._deadline:g} s; {self._count} tries, the last answer: {self._answer}. "
            f"{self._longer}"
        )


def _now() -> float:
    return time.monotonic()
