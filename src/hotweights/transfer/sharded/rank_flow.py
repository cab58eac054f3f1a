"""Rank flows: bytes of slots on their way from a rank on another host to the one that leads, beside their link."""

from __future__ import annotations

import math
import secrets
import socket
import struct
from collections import deque
from collections.abc import Sequence

import torch
from msgspec.structs import replace

from ... import signals
from ...boxes import Box, contiguous, row_major, view
from ...errors import PeerLost, ProtocolError
from ..carriers.sockets import SocketOutflow
from ..channel import close_in_children
from ..flow import GREETING, TOKEN, bytes_of
from .words import Task

_HEADER = struct.Struct("<QIQ")  # round, slot, bytes that follow
_STRAIGHT = 64 * 1024  # bytes that are worth a call of their own into the slot
_SCRAP = 1024 * 1024  # bytes thrown away at once


def packed(tasks: Sequence[Task]) -> tuple[tuple[Task, ...], list[Box]]:
    """The tasks for a rank on another host, whose parts of each chunk lie there side by side; and where they go here.

    A chunk has room for all parts of it.
    """
    theirs, landings = [], []
    for task in tasks:
        patches, into = [], 0
        for patch in task.patches:
            patches.append(replace(patch, into=into, strides=row_major(patch.lengths)))
            landings.append(Box(torch.uint8, patch.lengths, patch.strides, task.start + patch.into))
            into += landings[-1].nbytes
        theirs.append(replace(task, patches=tuple(patches)))
    return tuple(theirs), landings


def stretch_of(task: Task) -> tuple[int, int]:
    """First byte and end of what a packed task makes of a slot."""
    first, last = task.patches[0], task.patches[-1]
    return task.start + first.into, task.start + last.into + math.prod(last.lengths)


@signals.held_throughout
class RankOutflow(SocketOutflow):
    """The rank's end. It never blocks."""

    def __init__(self, connecting: socket.socket, token: bytes) -> None:
        """Takes over a socket that is on its way to the lead, which gave the token."""
        super().__init__()
        self.attach(connecting)
        self._views.append(memoryview(GREETING + token))

    def give(self, round: int, slot: int, memory: torch.Tensor, tasks: Sequence[Task]) -> None:
        """Send what packed tasks have made of a slot, which must not change before the lead has it."""
        stretches = [stretch_of(task) for task in tasks]
        self._views.append(memoryview(_HEADER.pack(round, slot, sum(stop - start for start, stop in stretches))))
        self._views.extend(bytes_of(memory, start, stop) for start, stop in stretches if stop > start)


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
            self.views.append(bytes_of(memory, part.offset, part.offset + part.nbytes))
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
class RankInflow:
    """The lead's end. It never blocks.

    Attributes:
        token: for the rank, which shows it.
    """

    def __init__(self) -> None:
        self.token = secrets.token_bytes(TOKEN)
        self._socket: socket.socket | None = None
        self._header = bytearray()
        self._expected: dict[tuple[int, int], _Coming] = {}
        self._coming: _Coming | None = None
        self._slot = 0
        self._scrap = 0  # bytes that nobody wants any more
        self._bin = bytearray(_SCRAP)
        close_in_children(self)

    @property
    def connection(self) -> socket.socket | None:
        """The connection, if there is one."""
        return self._socket

    def attach(self, connected: socket.socket) -> None:
        """Take over the connection that showed the token."""
        connected.setblocking(False)
        self._socket = connected

    def expect(self, round: int, slot: int, memory: torch.Tensor, landings: Sequence[Box]) -> None:
        """What comes of this slot in this round goes there."""
        self._expected[round, slot] = _Coming(memory, landings)

    def drop(self) -> None:
        """The round is over: whatever still comes of it is thrown away, and no slot is written."""
        if self._coming is not None:
            self._scrap = sum(len(part) for part in self._coming.views)
        self._coming = None
        self._expected.clear()

    @signals.whole
    def fill(self) -> list[int]:
        """Take what has come; the slots that are whole now.

        Raises:
            PeerLost: the connection is gone.
            ProtocolError: it brought what was not asked for.
        """
        whole: list[int] = []
        if self._socket is None:
            return whole
        try:
            while True:
                if self._scrap:
                    self._scrap -= self._took(self._socket.recv_into(self._bin, min(self._scrap, _SCRAP)))
                elif self._coming is not None:
                    self._go_on(self._socket, self._coming, whole)
                else:
                    self._begin(self._socket)
        except BlockingIOError:
            return whole
        except OSError as error:
            raise PeerLost(f"the connection for its bytes is gone: {error}") from error

    def _begin(self, connected: socket.socket) -> None:
        raw = connected.recv(_HEADER.size - len(self._header))
        self._took(len(raw))
        self._header += raw
        if len(self._header) < _HEADER.size:
            return
        round, slot, nbytes = _HEADER.unpack(self._header)
        self._header.clear()
        coming = self._expected.pop((round, slot), None)
        if coming is None:
            self._scrap = nbytes
        elif coming.nbytes != nbytes:
            raise ProtocolError(f"it gave {nbytes} bytes of slot {slot}, where {coming.nbytes} were asked for")
        else:
            self._coming, self._slot = coming, slot

    def _go_on(self, connected: socket.socket, coming: _Coming, whole: list[int]) -> None:
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
            whole.append(self._slot)

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
