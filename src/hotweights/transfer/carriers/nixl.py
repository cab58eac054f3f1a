"""NIXL: a flow by writes from slot to slot, over whatever fabric there is: RDMA, or TCP.

The receiver says over the connection that showed the token where a piece is to lie; the sender writes it there. Of TCP,
reads take twice as long.
"""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
import struct
import threading
from collections import deque
from functools import partial
from typing import Any

import torch

from ...errors import MissingPackage, PeerLost
from ..flow import Carrier
from .threads import ThreadInflow, ThreadOutflow
from .wire import Wire

_LOOK = 0.0002  # seconds between two looks at a write: NIXL has nothing that can be waited for
_PLACE = struct.Struct("<QQ")  # address and bytes
# How words begin: an agent's description of itself, a place, and that it was written.
_AGENT, _WHERE, _THERE = b"a", b"w", b"t"
_DEVICE = 0  # host memory
_PACKAGES = ("nixl", "nixl_cu12", "nixl_cu13")  # The first one names one of the others.


def library() -> Any:
    """The package that is installed, which it imports."""
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is not None:
            return importlib.import_module(f"{package}._api")
    raise MissingPackage("nixl", "nixl")


class AgentEnd:
    """An agent for one flow: what becomes of it is nothing to others. See ``LibraryEnd``."""

    def __init__(self, wire: Wire, sends: bool) -> None:
        self._wire = wire
        self._sends = sends
        self._agent: Any = None
        self._peer = ""
        self._registered: dict[int, tuple[Any, torch.Tensor]] = {}  # by address
        self._writes: deque[Any] = deque()  # what is under way, in its order
        self._stopped = threading.Event()

    def open(self) -> None:
        """Make the agent. The ends know of each other with the first piece."""
        api = library()
        config = api.nixl_agent_config(True, False, 0, backends=["UCX"])
        self._agent = api.nixl_agent(secrets.token_hex(16), config)

    def can_begin(self) -> bool:
        """Whether the receiver has said where the next piece is to lie; it waits for nothing there itself."""
        return not self._sends or self._wire.has_come

    def begin(self, piece: torch.Tensor, memory: torch.Tensor) -> None:
        """Begin to write a piece into the receiver's slot, or say where it is to be written in this one."""
        fresh = self._register(memory)
        if self._sends:
            self._write(piece)
            return
        if fresh:
            self._wire.say(_AGENT + self._agent.get_agent_metadata())
        self._wire.say(_WHERE + _PLACE.pack(piece.data_ptr(), piece.numel()))

    def finish(self) -> None:
        """Wait until the first of these pieces is written."""
        if self._sends:
            self._written(self._writes.popleft())
        elif self._wire.hear() != _THERE:
            raise PeerLost("the sender's end of NIXL said something else than that it has written")

    def _register(self, memory: torch.Tensor) -> bool:
        """Have the library know a slot. Returns whether it did not."""
        if memory.data_ptr() in self._registered:
            return False
        self._registered[memory.data_ptr()] = self._agent.register_memory([memory]), memory
        return True

    def _write(self, piece: torch.Tensor) -> None:
        agent = self._agent
        address, nbytes = self._where()
        if nbytes != piece.numel():
            raise PeerLost(f"the receiver expects {nbytes} bytes, and {piece.numel()} are to be sent")
        local = agent.get_xfer_descs([(piece.data_ptr(), nbytes, _DEVICE)], "cpu")
        remote = agent.get_xfer_descs([(address, nbytes, _DEVICE)], "cpu")
        handle = agent.initialize_xfer("WRITE", local, remote, self._peer, b"")
        self._writes.append(handle)
        agent.transfer(handle)

    def _written(self, handle: Any) -> None:
        try:
            self._wait(handle)
        finally:
            with contextlib.suppress(Exception):  # One that is under way cannot be let go of; the agent's end ends it.
                self._agent.release_xfer_handle(handle)
        self._wire.say(_THERE)

    def _wait(self, handle: Any) -> None:
        """Return when a write is through."""
        while (state := self._agent.check_xfer_state(handle)) != "DONE":
            if state == "ERR":
                raise PeerLost("NIXL could not write to the receiver")
            # NIXL goes on for minutes when a link is cut. Whoever waits has a deadline, and stops this.
            if self._stopped.wait(_LOOK):
                raise PeerLost("the flow was closed")

    def _where(self) -> tuple[int, int]:
        """Where the receiver wants the next piece."""
        while (word := self._wire.hear())[:1] == _AGENT:
            for handle in self._writes:  # They go to an agent as it was.
                self._wait(handle)
            if self._peer:
                self._agent.remove_remote_agent(self._peer)
            self._peer = self._agent.add_remote_agent(word[1:]).decode()
        if word[:1] != _WHERE or len(word) != 1 + _PLACE.size or not self._peer:
            raise PeerLost("the receiver's end of NIXL did not say where a piece is to lie")
        address, nbytes = _PLACE.unpack(word[1:])
        return address, nbytes

    def stop(self) -> None:
        """End the running wait. What is under way may still write until ``close`` has ended."""
        self._stopped.set()

    def close(self) -> None:
        """End the agent and its connections; after that nothing is written, and slots may go."""
        agent, self._agent = self._agent, None
        if agent is None:
            return
        if self._peer:
            with contextlib.suppress(Exception):
                agent.remove_remote_agent(self._peer)
        for registered, _ in self._registered.values():
            with contextlib.suppress(Exception):
                agent.deregister_memory(registered)
        del agent
        self._registered.clear()


library()
CARRIER = Carrier("nixl", partial(ThreadOutflow, AgentEnd), partial(ThreadInflow, AgentEnd))
