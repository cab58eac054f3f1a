"""Addresses on the network for tests, and the keys of two jobs. Hosts are this one, by loopback."""

from __future__ import annotations

import socket


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
