"""Process groups: a flow over ``torch.distributed``: a group of gloo for each two ends, beside all others.

Point-to-point: of a broadcast the slowest sets the pace. The ends meet over the connection that showed the token, not
in a store: nobody else can take a place in the group.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import msgspec
import torch
import torch.distributed

from ...errors import PeerLost
from ..flow import Carrier
from .threads import ThreadInflow, ThreadOutflow
from .wire import Wire

MEETING = 20.0
"""Seconds in which the ends of a new group connect. Both have their own deadlines, and these are for the thread."""

_LONGEST = timedelta(seconds=3600)  # of one piece. Whoever waits for it has a deadline, and stops this end at that.
_SENDER, _RECEIVER = 0, 1  # ranks
_PIECE, _MARK = 0, 1  # tags
_FAMILIES = {4: socket.AF_INET, 16: socket.AF_INET6}
_PORT = {4: 2, 16: 6}  # bytes by which a port stands before an address, in a sockaddr


class GroupEnd:
    """A group of two. See ``LibraryEnd``."""

    def __init__(self, wire: Wire, sends: bool) -> None:
        self._wire = wire
        self._sends = sends
        self._group: Any = None
        self._mark = torch.zeros(1, dtype=torch.uint8)
        self._stopped = False
        self._begun: deque[tuple[list[Any], torch.Tensor]] = deque()  # what gloo does, and the piece, in their order
        self._ends: set[tuple[str, int]] = set()  # where the group listens, at both ends

    def open(self) -> None:
        """Make the group."""
        gloo: Any = torch.distributed.ProcessGroupGloo
        options = gloo._Options()
        options._threads = 1
        options._timeout = timedelta(seconds=MEETING)
        hosts = self._wire.hosts
        options._devices = [gloo.create_device(hostname=hosts[0])]
        store = _Meeting(self._wire)
        try:
            self._group = gloo(store, _SENDER if self._sends else _RECEIVER, 2, options)
        except RuntimeError as error:
            raise PeerLost(
                f"no group of gloo came about between {hosts[0]} and {hosts[1]}, which needs free ports at both: "
                f"{_first_line(error)}"
            ) from error
        self._ends = {end for value in store.said.values() for host in hosts for end in _ends(value, host)}

    def can_begin(self) -> bool:
        """Gloo never waits there."""
        return True

    def begin(self, piece: torch.Tensor, memory: torch.Tensor) -> None:
        """Have gloo send a piece, or receive it into its place, and a mark behind it."""
        move, other = (self._group.send, _RECEIVER) if self._sends else (self._group.recv, _SENDER)
        try:
            works = [move([part], other, tag) for tag, part in ((_PIECE, piece), (_MARK, torch.zeros_like(self._mark)))]
        except RuntimeError as error:
            raise PeerLost(_first_line(error)) from error
        self._begun.append((works, piece))

    def finish(self) -> None:
        """Wait until the receiver has the first of these pieces."""
        works, _ = self._begun[0]
        try:
            self._sent(*works) if self._sends else self._received(*works)
        except RuntimeError as error:
            raise PeerLost(_first_line(error)) from error
        self._begun.popleft()

    def _sent(self, work: Any, mark: Any) -> None:
        # Kept until the other end has the piece: that is said over the wire, where ``stop`` ends the wait.
        self._wire.hear()
        work.wait(_LONGEST)
        mark.wait(_LONGEST)

    def _received(self, work: Any, mark: Any) -> None:
        # Gloo never ends the wait for what has begun to come when its connection ends: a killed sender, or ``stop``.
        # It does end one for what has not begun. Things come one after another: when the mark is there, the piece is.
        if self._stopped:  # From here on ``stop`` ends the wait; before, there may have been nothing to end.
            self._shut()
        mark.wait(_LONGEST)
        work.wait(_LONGEST)
        self._wire.say(b"")

    def stop(self) -> None:
        """Gloo has nothing that ends a wait but the end of its connection."""
        self._stopped = True
        self._shut()

    def close(self) -> None:
        """End the group, and with it its connection."""
        self._begun.clear()  # What gloo does keeps its connection, too.
        self._group = None

    def _shut(self) -> None:
        """Shut the group's own connections down, known by where it listens: nobody else has these ports."""
        if not self._ends:
            return
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                # The process has the original open for as long as it likes, and another thread may close it now.
                if (copy := os.dup(int(name))) >= 0:
                    _shut_down(copy, self._ends)


class _Meeting(torch.distributed.Store):  # type: ignore[misc,name-defined]
    """What two ends of a group read of each other: each says what it sets to the other one."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self._wire = wire
        self.said: dict[str, bytes] = {}

    def set(self, key: str, value: bytes | str) -> None:
        """Tell it, too."""
        self.said[key] = value.encode() if isinstance(value, str) else bytes(value)
        self._wire.say(msgspec.msgpack.encode((key, self.said[key])))

    def get(self, key: str) -> bytes:
        """What either end has set. Waits for it."""
        self.wait([key])
        return self.said[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Until all of these are set."""
        while not set(keys) <= self.said.keys():
            key, value = msgspec.msgpack.decode(self._wire.hear(MEETING), type=tuple[str, bytes])
            self.said[key] = value


def _shut_down(descriptor: int, ends: set[tuple[str, int]]) -> None:
    """Shut a connection down if it has one of these ends. Closes the descriptor, whatever it is."""
    try:
        connected = socket.socket(fileno=descriptor)
    except OSError:
        os.close(descriptor)
        return
    with connected:
        if ends & {connected.getsockname()[:2], connected.getpeername()[:2]}:
            connected.shutdown(socket.SHUT_RDWR)


def _ends(told: bytes, host: str) -> list[tuple[str, int]]:
    """Address and port wherever a socket address on this host stands in what gloo tells of itself."""
    packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    family, before = _FAMILIES[len(packed)].to_bytes(2, "little"), _PORT[len(packed)]
    found = re.finditer(re.escape(family) + rb"(..)" + rb"." * (before - 2) + re.escape(packed), told, re.DOTALL)
    return [(host, int.from_bytes(match[1], "big")) for match in found]


def _first_line(error: BaseException) -> str:
    """What gloo says, without where in its source."""
    return re.sub(r"^\[[^]]*\] ", "", str(error).partition("\n")[0])


CARRIER = Carrier("pg", partial(ThreadOutflow, GroupEnd), partial(ThreadInflow, GroupEnd))
