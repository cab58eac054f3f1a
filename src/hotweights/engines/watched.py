"""WatchedContext: sockets of ZeroMQ that wait for messages only while somebody is there to send them."""

from __future__ import annotations

from typing import Any

import zmq

from ..errors import PeerLost, TransferError, TransferTimeout


class WatchedSocket(zmq.Socket):  # type: ignore[misc]  # ZeroMQ is not installed where types are checked.
    """Waits for the first message ``first_seconds``, and for each other one as long as the other end is connected."""

    first_seconds = 600.0
    _events: Any = None
    _heard = False
    _lost: TransferError | None = None
    _address = ""

    def connect(self, addr: str) -> Any:
        """Connect, and watch the connection."""
        if self.type == zmq.PAIR:  # It tells of another's connection, and is of this class because that one is.
            return super().connect(addr)
        self._events = self.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._address = addr
        return super().connect(addr)

    def recv(self, *how: Any, **else_how: Any) -> Any:
        """The next message.

        Raises:
            TransferTimeout: there was no first one in time.
            PeerLost: the other end is gone; its last message was received before.
        """
        poller = zmq.Poller()
        for socket in (self, self._events):
            poller.register(socket, zmq.POLLIN)
        ready = dict(poller.poll(None if self._heard else self.first_seconds * 1000))
        # Its last message may have come between the looks at both sockets.
        if self not in ready and not self.poll(0):
            if ready:
                self._lost = PeerLost(f"whoever sent at {self._address} is gone, and had not sent all")
            else:
                within = f"within {self.first_seconds:g} s"
                self._lost = TransferTimeout(f"nobody has sent anything at {self._address} {within}")
            self.close(0)
            raise self._lost
        self._heard = True
        return super().recv(*how, **else_how)

    def send(self, *what: Any, **how: Any) -> Any:
        """Send; where nobody is left who would read it, raise what ``recv`` has raised."""
        if self._lost is not None:
            raise self._lost
        return super().send(*what, **how)

    def close(self, linger: int | None = None) -> None:
        """Let go of both. May be called twice."""
        events, self._events = self._events, None
        if events is not None:
            self.disable_monitor()
            events.close(0)
        super().close(linger)


class WatchedContext(zmq.Context):  # type: ignore[misc]
    """Makes such sockets."""

    _socket_class = WatchedSocket


def watched_context() -> WatchedContext:
    """One that lives as long as the process does."""
    context: WatchedContext = WatchedContext.shadow(zmq.Context.instance())
    return context
