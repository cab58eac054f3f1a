"""``ray:NAME``: a sender that a named actor of Ray knows: where it is, its keys, and the relays of other hosts."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ... import signals
from ...errors import AddressTaken, MissingPackage, TransferError, UsageError
from ..address import UnixEndpoint
from ..carriers.table import DEFAULT
from ..channel import Channel
from ..door import Door, Endpoint, Guest
from ..flow import Inflow
from ..handed_keys import HandedKeys, files_of
from ..network import NetworkEndpoint
from .rendezvous import NAMESPACE, RayDirections, RayRendezvous, SenderPlace, folder_on, remove

_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,99}")
_ANSWER = 60.0  # seconds for an answer of Ray: an actor is started within them, on a busy machine too
_REACHED = 3.0  # seconds in which a sender that is alive answers a connection
_AGAIN = 0.3  # seconds between two questions, where there is no sender yet
_ENDING = 5.0


@signals.held_throughout
class RayEndpoint:
    """A name in a cluster of Ray, for either end. Each connection asks anew where the sender is.

    Attributes:
        retry: seconds between two tries to connect.
    """

    retry = 0.05

    def __init__(
        self, address: str, keys: str | os.PathLike[str] | None, insecure: bool, *, direct: bool = False
    ) -> None:
        """Nothing is looked up yet.

        Args:
            address: ``ray:NAME``.
            keys: of a sender: those that it hands out; by default it makes some. Receivers are handed theirs.
            insecure: of a sender: go without.
            direct: connect to the sender itself, past a relay on this host.

        Raises:
            UsageError: it is no name.
            MissingPackage: Ray is not installed.
        """
        self.address = address
        self._name = _name_of(address)
        self._keys, self._insecure, self._direct = keys, insecure, direct
        self._inner: Endpoint | None = None  # where the last connection led
        self._question: _Question | None = None

    def listen(self, carrier: str = DEFAULT) -> Door:
        """Make the actor, listen on this host's own memory and on its network, and have the actor tell so.

        Raises:
            AddressTaken: another sender is there.
            TransferError: Ray does not answer.
            MissingPackage: ``cryptography``, which makes the keys, is not installed.
        """
        ray = _joined(self.address)
        actor = self._actor(ray)
        try:
            return _RayDoor(self.address, ray, actor, self._insecure, carrier)
        except BaseException as error:
            with contextlib.suppress(Exception):
                ray.kill(actor)
            if isinstance(error, ray.exceptions.RayError):
                raise TransferError(f"Ray failed while {self.address} was made: {error}") from error
            raise

    def connect(self) -> Channel | None:
        """A channel to where the actor says; ``None`` while there is none.

        Raises:
            TransferError: the actor says that none can be had.
        """
        question = self._question
        if question is None:
            ray = _joined(self.address)
            question = self._question = _Question(ray, self._name, self._direct)
        if not question.over:
            return None
        told, late = question.told, question.asked + _AGAIN < time.monotonic()
        if told.problem or told.address or late:
            self._question = None  # Who was led somewhere once may be led elsewhere the next time.
        if told.problem:
            raise TransferError(f"{self.address}: {told.problem}")
        if not told.address:
            return None
        self._inner = self._led(told)
        return self._inner.connect()

    def flow(self, token: bytes, carrier: str) -> Inflow:
        """A flow from where the last channel led."""
        assert self._inner is not None, "nobody was told a token before there was a channel"
        return self._inner.flow(token, carrier)

    def _led(self, told: RayDirections) -> Endpoint:
        if told.address.startswith("unix:"):
            return UnixEndpoint(told.address)
        return NetworkEndpoint(told.address, told.keys, insecure=told.keys is None)

    def _actor(self, ray: Any) -> Any:
        """A new actor of this name.

        Raises:
            AddressTaken: one is there, and so is its sender.
            TransferError: the one before does not end.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        files = None if self._keys is None else files_of(self._keys)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        kind = ray.remote(RayRendezvous).options(
            name=self._name, namespace=NAMESPACE, num_cpus=0, scheduling_strategy=here
        )
        deadline = time.monotonic() + _ANSWER
        while True:
            try:
                return kind.remote(self.address, files, self._insecure)
            except ValueError:  # The name is taken.
                if time.monotonic() > deadline:
                    raise TransferError(f"{self.address}: the actor of the sender before does not end") from None
            self._end_dead(ray)
            time.sleep(_AGAIN)

    def _end_dead(self, ray: Any) -> None:
        """End the actor of this name if its sender is dead: Ray has not noticed yet.

        Raises:
            AddressTaken: it is alive.
        """
        try:
            actor = ray.get_actor(self._name, namespace=NAMESPACE)
            place = ray.get(actor.place.remote(), timeout=_REACHED)
        except ValueError:
            return
        except ray.exceptions.RayError:
            place = None
        if place is not None:
            if _reached(place):
                raise AddressTaken(f"{self.address} is held by another sender, {place.process}")
            ray.kill(actor)


class _Question:
    """Asks where to connect, in a thread: Ray may take its time, and who polls must not wait."""

    def __init__(self, ray: Any, name: str, direct: bool) -> None:
        self.told = RayDirections()
        self.asked = time.monotonic()
        self._thread = threading.Thread(target=self._ask, args=(ray, name, direct), daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether ``told`` is what was told."""
        return not self._thread.is_alive()

    def _ask(self, ray: Any, name: str, direct: bool) -> None:
        # Whatever fails here, the next question may be answered: a dead actor is replaced with its sender.
        with contextlib.suppress(Exception):
            actor = ray.get_actor(name, namespace=NAMESPACE)
            node = ray.get_runtime_context().get_node_id()
            self.told = ray.get(actor.find.remote(node, ray.util.get_node_ip_address(), direct), timeout=_ANSWER)


@signals.held_throughout
class _RayDoor:
    """Where a sender listens for its own host and for others, and the actor that tells where. As ``Door``."""

    def __init__(self, address: str, ray: Any, actor: Any, insecure: bool, carrier: str) -> None:
        self.address = address
        self._ray, self._actor = ray, actor
        self._process = os.getpid()
        host = ray.util.get_node_ip_address()
        told = ray.get(actor.keys_for.remote(host), timeout=_ANSWER)
        if told.problem:
            raise UsageError(f"{address}: {told.problem}")
        self._doors: list[Door] = []
        self._folder: Path = folder_on(ray.get_runtime_context(), f"sender {address}")
        try:
            self._doors.append(UnixEndpoint(f"unix:{self._folder / 'socket'}").listen())
            self._doors.append(self._on_network(host, told.keys, insecure, carrier))
            local, network = (door.address for door in self._doors)
            node = ray.get_runtime_context().get_node_id()
            place = SenderPlace(node, f"process {os.getpid()} on {host}", network, local)
            ray.get(actor.settle.remote(place), timeout=_ANSWER)
        except BaseException:
            for door in self._doors:
                door.close()
            remove(self._folder)
            raise

    def _on_network(self, host: str, keys: HandedKeys | None, insecure: bool, carrier: str) -> Door:
        shown = f"[{host}]" if ":" in host else host
        return NetworkEndpoint(f"tcps://{shown}:0", keys, insecure).listen(carrier)

    def sockets(self) -> list[socket.socket]:
        return [each for door in self._doors for each in door.sockets()]

    def admit(self) -> Guest | None:
        for door in self._doors:
            if (guest := door.admit()) is not None:
                return guest
        return None

    def refused(self, reason: str) -> None:
        self._doors[-1].refused(reason)

    def close(self) -> None:
        for door in self._doors:
            door.close()
        actor, self._actor = self._actor, None
        remove(self._folder)
        if actor is not None and self._ray.is_initialized():
            with contextlib.suppress(Exception):  # What is left ends with this process.
                self._ray.get(actor.end.remote(), timeout=_ENDING)
            with contextlib.suppress(Exception):
                self._ray.kill(actor)

    def forget(self) -> None:
        for door in self._doors:
            door.forget()
        self._actor = None


def actor_of(address: str) -> Any | None:
    """The actor of ``ray:NAME``; ``None`` while there is none.

    Raises:
        UsageError: it is no such address, or this process is in no cluster.
    """
    name, ray = _name_of(address), _joined(address)
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def _name_of(address: str) -> str:
    kind, _, name = address.partition(":")
    if kind != "ray" or not _NAME.fullmatch(name):
        raise UsageError(f"an address in Ray is ray:NAME, of letters, digits, dots and dashes; this is {address!r}")
    if find_spec("ray") is None:
        raise MissingPackage("ray", "ray")
    return name


def _joined(address: str) -> Any:
    """Ray, of whose cluster this process is a part. One that is none joins the cluster on its host.

    Raises:
        UsageError: there is none.
    """
    import ray

    if not ray.is_initialized():
        try:
            ray.init("auto", namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
        except Exception as error:
            raise UsageError(
                f"{address} is in a cluster of Ray, and this process is in none: call ray.init() first, or run it on a "
                f"host of the cluster: {error}"
            ) from error
    return ray


def _reached(place: SenderPlace) -> bool:
    """Whether somebody listens there still."""
    parts = urlsplit(place.network)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), timeout=_REACHED).close()
    except OSError:
        return False
    return True
