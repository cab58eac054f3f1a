"""Hosts that are network namespaces of this one, on a switch. Root makes them; ``apart`` runs a child in one."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000


def why_not():
    """Why there can be none here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces are made by root"
    if shutil.which("ip") is None:
        return "network namespaces are made by the program ip"
    probe = f"hw{os.getpid()}probe"
    try:
        if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode != 0:
            return "this machine lets nobody make network namespaces"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return ""


def _ip(*words):
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, timeout=20)


class Hosts:
    """Three hosts and the switch between them.

    Attributes:
        names: of the hosts' namespaces.
        addresses: theirs, in the same order.
    """

    def __init__(self):
        mark = f"hw{os.getpid()}"
        self._switch = f"{mark}s"
        self.names = [f"{mark}{letter}" for letter in "abc"]
        self.addresses = [f"10.77.0.{number}" for number in (1, 2, 3)]

    def __enter__(self):
        try:
            self._make()
        except BaseException:  # Ctrl-C, say.
            self.__exit__()
            raise
        return self

    def _make(self):
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for name, address in zip(self.names, self.addresses, strict=True):
            _ip("netns", "add", name)
            _ip("link", "add", name, "netns", self._switch, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", self._switch, "link", "set", name, "master", "br0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")

    def link(self, number, state):
        """Cut a host off the switch, ``"down"``, or connect it again, ``"up"``."""
        _ip("-n", self._switch, "link", "set", self.names[number], state)

    def limit(self, number, mbit):
        """Let so many Mbit/s into a host, and as many out of it; with ``None`` what comes."""
        shape = ("tbf", "rate", f"{mbit}mbit", "burst", "512k", "latency", "100ms") if mbit else ()
        for namespace, device in ((self.names[number], "eth0"), (self._switch, self.names[number])):
            words = ("tc", "-n", namespace, "qdisc", "replace" if mbit else "del", "dev", device, "root", *shape)
            subprocess.run(words, check=True, capture_output=True, timeout=20)

    @contextlib.contextmanager
    def apart(self, number, other, kind):
        """Two hosts do not reach each other: one is told so, ``"unreachable"``, or hears nothing, ``"blackhole"``."""
        words = "-n", self.names[number], "route", "{}", kind, f"{self.addresses[other]}/32"
        _ip(*(word.format("add") for word in words))
        try:
            yield
        finally:
            _ip(*(word.format("del") for word in words))

    def carried(self, number):
        """Bytes that a host's interface has taken and sent until now."""
        words = ["ip", "-n", self.names[number], "-s", "-j", "link", "show", "eth0"]
        said = subprocess.run(words, check=True, capture_output=True, timeout=20).stdout
        counts = json.loads(said)[0]["stats64"]
        return counts["rx"]["bytes"], counts["tx"]["bytes"]

    def __exit__(self, *error):
        for name in (*self.names, self._switch):
            with contextlib.suppress(subprocess.SubprocessError):
                _ip("netns", "del", name)


def end_once(number, frame):
    """A handler of signals: the first ends this program, and none after it disturbs what cleans up."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def enter(name):
    """Have this process be on another host, for the connections that it makes from here on."""
    with open(f"/run/netns/{name}") as namespace:
        if _libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
