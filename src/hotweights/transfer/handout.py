"""Handout: the version that a relay keeps, on its way to workers that came later. Each takes it for itself."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence

import msgspec

from .. import signals
from ..errors import TransferAborted, TransferError
from ..notices import log
from ..text import some
from ..timeline import Timeline
from .connection import Connection
from .flow import Waitable
from .keeper import KeptVersion
from .messages import Offer
from .onward import SHARE
from .outbound import Outbound
from .peers import Peer, PeerGroup
from .shared_memory import WriteSlots

UPDATE = 1  # Before any of a sender, which begin at random: who took this is offered those as they come.
_LOOK = 1.0  # seconds between two looks at what nobody wakes for
_NEWER = 0.2  # of it, that a sender with a newer version waits until this one is given up
_ENDING = 0.05  # of it, for those that put everything back then


@signals.held_throughout
class Handout(Outbound):
    """One kept version for some workers. The group has taken it before, so nobody decides together; ``give`` it once.

    A sender that offers the next version waits meanwhile, but not for a worker that stands still.
    """

    _role = "the relay"

    def __init__(
        self,
        group: PeerGroup,
        late: Sequence[Peer],
        slots: WriteSlots,
        kept: KeptVersion,
        *,
        connection: Connection,
    ) -> None:
        """``connection``: to the sender, if it is there."""
        super().__init__(
            group,
            late,
            slots,
            update=UPDATE,
            timeout=SHARE * connection.patience,
            digests=kept.digests,
            drop=True,
            epoch=kept.epoch,
            advance=lambda nbytes: None,
            timeline=Timeline(),
        )
        self._kept = kept
        self._connection = connection
        self._newer: float | None = None  # since when a word of the sender waits

    def give(self) -> None:
        """Offer and send it. Who cannot take it is told why, and waits for the next version."""
        names = some([peer.name for peer in self._members])
        try:
            with self._kept.source() as source:
                report = self.run(source, self._kept.version)
        except TransferError as error:
            log(
                logging.WARNING,
                "version %r, which is kept, was not given to %s: %s",
                self._kept.version,
                names,
                str(error),
            )
        else:
            for name, reason in report.lost.items():
                log(logging.WARNING, "version %r, which is kept, was not given to %s: %s", report.version, name, reason)

    def _own(self, offer: Offer, peer: Peer) -> Offer:
        return msgspec.structs.replace(super()._own(offer, peer), kept=self._kept.update)

    def _look(self, seconds: float = 0.0) -> None:
        super()._look(min(seconds, _LOOK))

    def _also(self) -> list[tuple[Waitable, bool]]:
        return [] if self._over or self._newer is not None else self._connection.awaited()

    def _looked(self) -> None:
        if self._over:
            return
        if self._newer is None and self._connection.connected:
            with contextlib.suppress(TransferError):  # It is gone; this goes on.
                self._newer = time.monotonic() if self._connection.peek() else None
        patience = self._connection.patience
        if self._newer is not None and time.monotonic() - self._newer > _NEWER * patience:
            self._timeout = _ENDING * patience
            raise TransferAborted("the update was aborted", ["the sender has a newer version; it comes next"])
