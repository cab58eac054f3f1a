"""Ray: ``ray:NAME`` is an address of any sender and receiver. Here is what else one may want to know or to do there.

A sender at ``ray:NAME`` makes an actor that tells receivers where it is and hands them keys. For each other node on
which a receiver asks, it starts an actor that is a relay. All of them end with the sender.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ..arguments import check_seconds, nbytes_from
from ..errors import TransferError, TransferTimeout, UsageError
from ..transfer.ray.endpoint import actor_of
from ..transfer.ray.rendezvous import RayDirections, SenderPlace

_ANSWER = 60.0
_LOOK = 0.1


@dataclass(frozen=True)
class Whereabouts:
    """Where a sender and its relays are.

    Attributes:
        node: the sender's node, by its id in Ray.
        process: the sender, for people.
        network: the address at which relays connect to it.
        relays: where workers of other nodes connect, by node.
    """

    node: str
    process: str
    network: str
    relays: dict[str, str]


def whereabouts(address: str) -> Whereabouts | None:
    """Where the sender at ``ray:NAME`` is; ``None`` while there is none.

    Raises:
        UsageError: it is no such address, or this process is in no cluster.
    """
    actor = actor_of(address)
    place: SenderPlace | None = None if actor is None else _asked(address, actor.place.remote())
    if actor is None or place is None:
        return None
    return Whereabouts(place.node, place.process, place.network, _asked(address, actor.relays.remote()))


def start_relays(address: str, *, timeout: float = 60.0, keep: int | str | None = None) -> dict[str, str]:
    """Start the relays of all nodes but the sender's now, and not when the first worker of a node asks.

    Args:
        address: the sender's, ``ray:NAME``.
        timeout: seconds for all of them.
        keep: bytes of memory, or such as ``"40GB"``, in which each keeps the last version for workers that come later;
            also those of nodes that join after this. See ``hotweights.transfer.Relay``.

    Returns:
        Where they are, by node.

    Raises:
        TransferError: there is no sender, or a relay did not start.
        TransferTimeout: they did not start in time.
        UsageError: with ``keep``: relays run already, and were started without it.
    """
    import ray

    check_seconds(timeout=timeout)
    nbytes = None if keep is None else nbytes_from(keep=keep)
    found = whereabouts(address)
    actor = actor_of(address)
    if found is None or actor is None:
        raise TransferError(f"no sender is at {address}; make one first")
    if nbytes is not None and not _asked(address, actor.keep.remote(nbytes)):
        raise UsageError(f"relays of {address} run already, without keep={keep!r}; start them before any worker asks")
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != found.node]
    deadline, started = time.monotonic() + timeout, dict[str, str]()
    while waiting := [node for node in nodes if node not in started]:
        for node in waiting:
            told: RayDirections = _asked(address, actor.relay.remote(node))
            if told.problem:
                raise TransferError(f"{address}: {told.problem}")
            if told.address:
                started[node] = told.address
        if time.monotonic() > deadline:
            raise TransferTimeout(f"{address}: {len(started)} of {len(nodes)} relays have started in {timeout:g} s")
        time.sleep(_LOOK)
    return started


def _asked(address: str, answer: Any) -> Any:
    import ray

    try:
        return ray.get(answer, timeout=_ANSWER)
    except ray.exceptions.RayError as error:
        raise TransferError(f"the sender at {address} is gone, or Ray does not answer: {error}") from error
