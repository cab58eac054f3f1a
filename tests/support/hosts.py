"""Addresses on the network for tests, and the keys of two jobs. Hosts are this one, by loopback."""

from __future__ import annotations

import socket

from ends import TIMEOUT, Thread, receiver
from processes import Killer, Tiny, value_of

import hotweights as hw
from hotweights.transfer.relay import Relay


def free_address():
    """An address that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"tcps://127.0.0.1:{server.getsockname()[1]}"


def where(address):
    """Host and port of an address."""
    host, _, port = address.removeprefix("tcps://").rpartition(":")
    return host, int(port)


def connected(address):
    """A plain connection to whoever listens there."""
    return socket.create_connection(where(address), timeout=10)


def follow(pipe, address, at=None, atomic="journal", **options):
    """Take versions until the third; after each attempt, say what is live and whether it is in doubt."""
    live = hw.LiveModel(Tiny(), atomic=atomic)
    with receiver(address, **options) as source, Killer(-1 if at is None else at) as killer:
        while live.version != 3:
            doubt = False
            try:
                live.load(source) if live.version is None else live.update(source)
            except hw.UpdateAborted as error:
                doubt = isinstance(error.__cause__, hw.TransferInDoubt)
            pipe.send((live.version, value_of(live.model), doubt))
            killer.arm(at is not None and source.version == 1)
        killer.arm(False)


def history(child):
    """Which versions it had, and whether it was in doubt ever; never torn."""
    versions, doubted = [], False
    while 3 not in versions:
        heard = child.heard()
        assert heard is not None, "a survivor died"
        version, value, doubt = heard
        assert version == value
        versions.append(version)
        doubted |= doubt
    return versions, doubted


def relay_process(pipe, trainer, worker, at=None, **options):
    """A relay; it dies at its ``at``-th point, from its second version on."""
    with Relay(trainer, worker, timeout=TIMEOUT, **options) as relay, Killer(-1 if at is None else at) as killer:
        hand_on, versions = relay._hand_on, []

        def counting(group, workers, frame):
            versions.append(frame.message.version)
            killer.arm(at is not None and versions[-1] == 2)
            hand_on(group, workers, frame)
            killer.arm(False)

        relay._hand_on = counting
        thread = Thread(lambda: (pipe.recv(), relay.close()))
        relay.run()
        thread.result()
        pipe.send(versions)
