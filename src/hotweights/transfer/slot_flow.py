"""Slot flows: bytes of slots from a rank of a sharded trainer, each with the number of what it is before it."""

from __future__ import annotations

import math
import secrets
import socket
import struct
from collections import deque
from collections.abc import Sequence

import torch

from .. import signals
from ..boxes import Box, contiguous, view
from ..errors import PeerLost, ProtocolError
from .carriers.sockets import SocketOutflow
from .channel import close_in_children
from .flow import TOKEN, bytes_of
from .network_channel import keep_alive, keep_open, seconds_cut

_HEADER = struct.Struct("<QIQ")  # number, slot, bytes that follow
_STRAIGHT = 64 * 1024  # bytes that are worth a call of their own into the slot
_SCRAP = 1024 * 1024  # bytes thrown away at once


@signals.held_throughout
class SlotOutflow(SocketOutflow):
    """The rank's end. It never blocks."""

    def attach(self, connected: socket.socket) -> None:
        """Take over the connection."""
        keep_alive(connected)  # What is short must not wait for what comes after it.
        keep_open(connected)
        super().attach(connected)

    def give(self, number: int, slot: int, memory: torch.Tensor, stretches: Sequence[tuple[int, int]]) -> None:
        """Send these parts of a slot, first byte and end, which must not change before the other end has them."""
        self._views.append(memoryview(_HEADER.pack(number, slot, sum(stop - start for start, stop in stretches))))
        self._views.extend(bytes_of(memory, start, stop) for start, stop in stretches if stop > start)

    def look(self) -> None:
        """See whether the other end's kernel acknowledges what was sent.

        Raises:
            PeerLost: it does not.
        """
        if self._views and self._socket is not None and (seconds := seconds_cut(self._socket)):
            raise PeerLost(f"the link is cut: for {seconds:.1f} s nothing came back")


class _Coming:
    """A slot's bytes that are expected."""

    def __init__(self, memory: torch.Tensor, landings: Sequence[Box]) -> None:
        self.views: deque[memoryview] = deque()
        self._memory = memory
        self._scattered = [part for part in landings if not self._goes_straight(part)]
        self._scratch = torch.empty(sum(part.nbytes for part in self._scattered), dtype=torch.uint8)
        begin = end = 0  # of what comes into the scratch in one run
        for part in landings:
            if not self._goes_straight(part):
                end += part.nbytes
                continue
            self._run(begin, end)
            begin = end
            self.views.append(bytes_of(self._memory, part.offset, part.offset + part.nbytes))
        self._run(begin, end)
        self.nbytes = sum(part.nbytes for part in landings)

    @staticmethod
    def _goes_straight(part: Box) -> bool:
        return part.nbytes >= _STRAIGHT and contiguous(part)

    def _run(self, begin: int, end: int) -> None:
        if end > begin:
            self.views.append(bytes_of(self._scratch, begin, end))

    def settle(self) -> None:
        """Everything came: put what did not come straight into its place."""
        start = 0
        for part in self._scattered:
            own = self._scratch[start : start + part.nbytes]
            view(self._memory, part).copy_(own.view(part.shape))
            start += part.nbytes


@signals.held_throughout
class SlotInflow:
    """The end that takes them. It never blocks.

    Attributes:
        token: for the rank, or from it: the end that connects shows it.
    """

    def __init__(self) -> None:
        self.token = secrets.token_bytes(TOKEN)
        self._socket: socket.socket | None = None
        self._header = bytearray()
        self._expected: dict[tuple[int, int], _Coming] = {}
        self._last = math.inf  # What has a larger number comes too early: it is left where it is.
        self._coming: _Coming | None = None
        self._number = self._slot = 0  # of what is coming
        self._scrap = 0  # bytes that nobody wants any more
        self._bin = bytearray(_SCRAP)
        close_in_children(self)

    @property
    def connection(self) -> socket.socket | None:
        """The connection, if there is one."""
        return self._socket

    def attach(self, connected: socket.socket) -> None:
        """Take over the connection."""
        connected.setblocking(False)
        self._socket = connected

    def expect(self, number: int, slot: int, memory: torch.Tensor, landings: Sequence[Box]) -> None:
        """What comes of this slot with this number goes there."""
        self._expected[number, slot] = _Coming(memory, landings)

    def drop(self) -> None:
        """Whatever still comes of what is expected is thrown away, and no slot is written."""
        if self._coming is not None:
            self._scrap = sum(len(part) for part in self._coming.views)
        self._coming = None
        self._expected.clear()

    @signals.whole
    def fill(self) -> list[tuple[int, int]]:
        """Take what has come; the numbers and slots of what is whole now.

        Raises:
            PeerLost: the connection is gone.
            ProtocolError: it brought what was not asked for.
        """
        whole: list[tuple[int, int]] = []
        if self._socket is None:
            return whole
        try:
            while True:
                if self._scrap:
                    self._scrap -= self._took(self._socket.recv_into(self._bin, min(self._scrap, _SCRAP)))
                elif self._coming is not None:
                    self._go_on(self._socket, self._coming, whole)
                elif not self._begin(self._socket):
                    return whole
        except BlockingIOError:
            return whole
        except OSError as error:
            raise PeerLost(f"the connection for its bytes is gone: {error}") from error

    def _begin(self, connected: socket.socket) -> bool:
        """Read what comes next. Returns false if that is too early."""
        if missing := _HEADER.size - len(self._header):
            raw = connected.recv(missing)
            self._took(len(raw))
            self._header += raw
            if len(raw) < missing:
                return True
        number, slot, nbytes = _HEADER.unpack(self._header)
        if number > self._last:
            return False
        self._header.clear()
        coming = self._expected.pop((number, slot), None)
        if coming is None:
            self._scrap = nbytes
        elif coming.nbytes != nbytes:
            raise ProtocolError(f"it gave {nbytes} bytes of slot {slot}, where {coming.nbytes} were asked for")
        else:
            self._coming, self._number, self._slot = coming, number, slot
        return True

    def _go_on(self, connected: socket.socket, coming: _Coming, whole: list[tuple[int, int]]) -> None:
        if coming.views:
            first = coming.views[0]
            count = self._took(connected.recv_into(first))
            if count < len(first):
                coming.views[0] = first[count:]
                return
            coming.views.popleft()
        if not coming.views:
            coming.settle()
            self._coming = None
            whole.append((self._number, self._slot))

    def _took(self, count: int) -> int:
        if not count:
            raise PeerLost("the connection for its bytes ended")
        return count

    def close(self) -> None:
        """Let go. May be called twice."""
        self.drop()
        if self._socket is not None:
            self._socket.close()

    def forget(self) -> None:
        """In a forked child: close the copy."""
        if self._socket is not None:
            self._socket.close()
