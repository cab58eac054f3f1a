"""A cluster of Ray whose three hosts are network namespaces; each has Ray's token in a file of its own."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from namespaces import Hosts

import hotweights as hw

HERE = Path(__file__).parent
PORT = 6379


def pids_in(name):
    """The processes on a host."""
    said = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=20)
    return [int(pid) for pid in said.stdout.split()]


def kill_host(name):
    """Kill all that runs on a host, at once. Returns how many there were."""
    count = 0
    while found := pids_in(name):  # Some are born meanwhile.
        count += len(found)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return count


def named(name, title):
    """The processes on a host whose command line begins so."""
    found = []
    for pid in pids_in(name):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").startswith(title):
                found.append(pid)
    return found


class Cluster:
    """Three hosts; the last one is Ray's head. A context manager.

    Attributes:
        hosts: they.
        folder: where each has its files.
    """

    def __init__(self):
        self.hosts = Hosts()
        self.folder = Path(tempfile.mkdtemp(prefix="hwr", dir="/tmp"))  # Paths of sockets are short.
        self._nodes = []

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        with self._stack:
            self._stack.enter_context(self.hosts)
            self._stack.callback(self._end)
            token = secrets.token_hex(16)
            for host in self.hosts.names:
                (self.folder / host).mkdir()
                (self.folder / f"{host}.token").write_text(token)
            head = f"{self.hosts.addresses[2]}:{PORT}"
            self._start(2, "--head", f"--port={PORT}", "--include-dashboard=false")
            for number in (0, 1):
                self._start(number, f"--address={head}")
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error):
        self._stack.close()

    def _environment(self, host):
        ours = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / f"{host}.token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (Path(hw.__file__).parents[1], HERE, HERE.parent / "support"))),
        }
        return {**os.environ, **ours}

    def _start(self, number, *options):
        host = self.hosts.names[number]
        command = ["ip", "netns", "exec", host, sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        command += [f"--node-ip-address={self.hosts.addresses[number]}", "--num-cpus=8", *options]
        command += ["--object-store-memory=80000000", f"--temp-dir={self.folder / host}"]
        log = self.folder / f"{host}.log"
        with log.open("wb") as out:
            node = subprocess.Popen(command, env=self._environment(host), stdout=out, stderr=subprocess.STDOUT)
        self._nodes.append(node)
        until = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)

    def _end(self):
        for host in self.hosts.names:
            kill_host(host)
        for node in self._nodes:
            node.wait(30)

    def run(self, scenario, number=2, timeout=800):
        """Run a scenario of ``scenarios.py`` in a driver on a host. Returns what it has found."""
        host = self.hosts.names[number]
        about = {
            "head": f"{self.hosts.addresses[2]}:{PORT}",
            "address": self.hosts.addresses[number],
            "hosts": dict(zip(self.hosts.addresses, self.hosts.names, strict=True)),
        }
        command = ["ip", "netns", "exec", host, sys.executable, str(HERE / "scenarios.py"), scenario, json.dumps(about)]
        done = subprocess.run(
            command, env=self._environment(host), capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def left(self):
        """Sockets of ours that lie on the hosts."""
        return [str(path) for host in self.hosts.names for path in (self.folder / host).glob("session_2*/hotweights-*")]
