"""Resolve: end the doubts of a group whose sender does not come back: a lead that has nothing to send."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

from .. import signals
from ..arguments import check_choices, check_flags, check_seconds
from .decision import Decision
from .doubts import Decided, Doubt, doubts_of, tell
from .endpoint import check_known, endpoints_of
from .peers import Peer, PeerGroup
from .shared_memory import WriteSlots
from .waits import left

_PATIENCE = 60.0  # what receivers are told that a single wait may take
_LOOK = 0.2  # seconds between two looks at who has come


Word = Literal["commit", "abort"]


class Resolution(NamedTuple):
    """What was found about one update.

    Attributes:
        doubt: the facts.
        decision: what those in doubt were told; ``None`` where they wait on.
        by_hand: whether somebody said so, and it does not follow from the facts.
    """

    doubt: Doubt
    decision: Decision | None
    by_hand: bool


@signals.held_throughout
class Resolver:
    """Listens where the sender did, hears those that are in doubt, and tells them what follows. A context manager.

    Attributes:
        came: names of all that came and told of the last update, in doubt or not.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        keys: str | os.PathLike[str] | None = None,
        insecure: bool = False,
    ) -> None:
        """Take the sender's address.

        Raises:
            AddressTaken: a sender is there. It ends doubts itself, with the next version that it sends.
            UsageError: nobody can come there.
        """
        check_known(address)
        check_flags(insecure=insecure)
        endpoints = endpoints_of(address, keys=keys, insecure=insecure)
        self.came: tuple[str, ...] = ()
        self._slots = WriteSlots(1, 4096)  # Receivers want to see some; nothing is sent.
        try:
            self._group = PeerGroup(endpoints, self._slots, _PATIENCE)
        except BaseException:
            self._slots.close()
            raise

    def run(self, seconds: float, *, decision: Word | None = None) -> list[Resolution]:
        """Hear who comes for so many seconds, or until no doubt is left that somebody who is here has.

        Args:
            seconds: how long others are waited for.
            decision: ``"commit"`` or ``"abort"``: what those are told at the end of whom nobody knows it.
        """
        check_seconds(seconds=seconds)
        if decision is not None:
            check_choices(decision=(decision, Word))
        deadline, found = time.monotonic() + seconds, dict[int, Resolution]()
        while True:
            ready = self._group.connected()
            for doubt in doubts_of(ready):
                found[doubt.update] = Resolution(doubt, doubt.decision, by_hand=False)
            still = tell(ready, {})
            all_told = found and not still and not any(resolution.doubt.absent for resolution in found.values())
            if all_told or not left(deadline):
                break
            self._group.wait(self._group.peers, min(_LOOK, left(deadline)), listen=True)
        if decision is not None:
            for doubt in still:
                said = Decision[decision.upper()]
                tell(ready, {doubt.update: Decided(said, frozenset(seat.place for seat in doubt.members))})
                found[doubt.update] = Resolution(doubt, said, by_hand=True)
        self._flush(ready)
        self.came = tuple(peer.shown for peer in ready)
        return list(found.values())

    def _flush(self, peers: list[Peer]) -> None:
        """See that what was said is on its way: this end may be closed next."""
        deadline = time.monotonic() + 1.0
        while left(deadline) and any(peer.channel.unsent for peer in peers):
            self._group.wait(peers, left(deadline))

    def close(self) -> None:
        """Let go of the address. May be called twice."""
        self._group.close()
        self._slots.close()

    def __enter__(self) -> Resolver:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
