"""Roll: what a sender notes behind its slots for all to read: which fill each slot bears, and who is a member."""

from __future__ import annotations

from ..memory.addresses import PAGE

PLACES = 1024  # receivers of one sender at a time
_WORD = 8  # bytes; one store for the processor, so nobody reads half of a word


def roll_nbytes(slots: int) -> int:
    """Bytes of the roll of so many slots: whole pages."""
    return -(-(slots + PLACES) * _WORD // PAGE) * PAGE


class Roll:
    """A word for each slot, and one for each place that a receiver can have at the sender.

    A receiver that stood still may find in its socket what was said long ago, and slots that were filled again, and a
    decision that is not about it any more. The roll tells it so, whatever it has heard.
    """

    def __init__(self, memory: memoryview, slots: int) -> None:
        """``memory``: ``roll_nbytes`` bytes that both ends map; read-only in receivers."""
        self._words = memory.cast("q")
        self._slots = slots

    def note_fill(self, slot: int, fill: int) -> None:
        """The slot bears this fill from now on; 0 while it is written."""
        self._words[slot] = fill

    def bears(self, slot: int, fill: int) -> bool:
        """Whether the slot still bears this fill; if so, what was read from it before was of this fill."""
        return self._words[slot] == fill

    def enlist(self, place: int, update: int) -> None:
        """The decision about this update is about who has this place."""
        self._words[self._slots + place] = update

    def strike(self, place: int, update: int) -> None:
        """The group goes on without who has this place."""
        self._words[self._slots + place] = -update

    def lists(self, place: int, update: int) -> bool:
        """Whether the decision is about who has this place. It can be asked when the decision has fallen."""
        return self._words[self._slots + place] == update

    def struck(self, place: int, update: int) -> bool:
        """Whether the group went on without who has this place."""
        return self._words[self._slots + place] == -update

    def close(self) -> None:
        """Let go of the memory. May be called twice."""
        self._words.release()
