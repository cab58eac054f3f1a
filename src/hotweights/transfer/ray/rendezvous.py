"""The actors behind ``ray:NAME``: one knows where the sender is, and starts a relay on each other host.

Methods of actors run in processes of Ray. What they return says what went wrong, in words: an exception would come
back wrapped in Ray's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import HotweightsError
from ..handed_keys import HandedKeys, KeyChest

NAMESPACE = "hotweights"
"""Of the actors' names: so that processes of several of Ray's jobs find them."""
_PATIENCE = 3.0  # seconds that relays may take to end
_LONGEST = 100  # bytes of a path that a socket can have


@dataclass(frozen=True)
class SenderPlace:
    """Where a sender is.

    Attributes:
        node: its node's id in Ray.
        process: for people.
        network: its address for other hosts.
        local: its address on its own host.
    """

    node: str
    process: str
    network: str
    local: str


@dataclass(frozen=True)
class RayDirections:
    """What somebody who looks for the sender is told.

    Attributes:
        address: where to connect; empty while there is nothing yet, or for good if there is a ``problem``.
        keys: for it.
        problem: why it cannot be told.
    """

    address: str = ""
    keys: HandedKeys | None = None
    problem: str = ""


class RayRendezvous:
    """Knows where the sender is, and hands out keys. It ends with the process that made it, and relays end with it."""

    def __init__(self, address: str, files: Mapping[str, bytes] | None, insecure: bool) -> None:
        """``files`` of the sender's directory of keys. Without any it makes them, unless it is ``insecure``."""
        self._address = address
        self._chest = None if insecure else KeyChest(files)
        self._place: SenderPlace | None = None
        self._relays: dict[str, tuple[Any, Any]] = {}  # by node: the actor, and its answer to where it is
        self._keep: int | None = None  # bytes in which they keep versions

    def keys_for(self, host: str) -> RayDirections:
        """Keys, for the sender itself."""
        try:
            return RayDirections(keys=None if self._chest is None else self._chest.keys_for(host))
        except HotweightsError as error:
            return RayDirections(problem=str(error))

    def settle(self, place: SenderPlace) -> None:
        """The sender listens there."""
        self._place = place

    def place(self) -> SenderPlace | None:
        """Where the sender is, once it listens."""
        return self._place

    def find(self, node: str, host: str, direct: bool) -> RayDirections:
        """Where a process on a node connects: the sender on its own host, or that node's relay.

        Args:
            node: its id.
            host: its address.
            direct: past the relay.
        """
        if self._place is None:
            return RayDirections()
        if direct:
            told = self.keys_for(host)
            return told if told.problem else RayDirections(self._place.network, told.keys)
        return RayDirections(self._place.local) if node == self._place.node else self.relay(node)

    def keep(self, nbytes: int) -> bool:
        """Relays keep versions from now on, in so many bytes. Returns whether those that run already do."""
        if not self._relays:
            self._keep = nbytes
        return self._keep == nbytes

    def relay(self, node: str) -> RayDirections:
        """Where a node's relay is; the first to ask has it started."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if node not in self._relays:
            where = NodeAffinitySchedulingStrategy(node, soft=False)
            kind = ray.remote(_relays()).options(num_cpus=0, max_restarts=-1, scheduling_strategy=where)
            actor = kind.remote(self._address, self._keep)
            self._relays[node] = actor, actor.where.remote()
        actor, answer = self._relays[node]
        if not ray.wait([answer], timeout=0)[0]:
            return RayDirections()
        try:
            told: RayDirections = ray.get(answer)
        except ray.exceptions.ActorUnavailableError:  # Ray starts it again.
            self._relays[node] = actor, actor.where.remote()
            return RayDirections()
        except ray.exceptions.RayError as error:
            del self._relays[node]  # Who asks next has another one started.
            return RayDirections(problem=f"the relay on this host's node of Ray did not start: {error}")
        if told.problem:
            del self._relays[node]
            ray.kill(actor)
        return told

    def relays(self) -> dict[str, str]:
        """Where the relays are, by node."""
        return {node: self.relay(node).address for node in list(self._relays)}

    def end(self) -> None:
        """End the relays."""
        import ray

        actors = [actor for actor, _ in self._relays.values()]
        self._relays.clear()
        if actors:
            ending = [actor.end.remote() for actor in actors]
            ray.wait(ending, num_returns=len(ending), timeout=_PATIENCE)
        for actor in actors:
            ray.kill(actor)


def _relays() -> type:
    """The actors that are relays, by name: they stand on all addresses, of which this is one."""
    found: type = importlib.import_module(".relay", __package__).RayRelay
    return found


def folder_on(context: Any, purpose: str) -> Path:
    """A folder for a socket on this node, by its purpose always the same; it is not made. ``context`` is Ray's.

    It lies in the folder of Ray's session, where nobody looks for what a killed process has left.
    """
    from ray._private import worker

    session = Path(worker._global_node.get_session_dir_path())
    mark = hashlib.sha256(f"{context.get_node_id()} {purpose}".encode()).hexdigest()[:16]
    folder = session / f"hotweights-{mark}"
    if len(os.fsencode(folder / "socket")) > _LONGEST:
        folder = Path(tempfile.gettempdir()) / f"hotweights-{mark}"
    return folder


def remove(folder: Path) -> None:
    """Remove an empty folder; one that is not is somebody else's by now."""
    with contextlib.suppress(OSError):
        folder.rmdir()
