"""HostRelay: an address on the network, reached through this host's relay, which the first receiver starts."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from .. import signals
from ..arguments import nbytes_from
from ..errors import HotweightsError, ProtocolError, TransferError, UsageError
from ..notices import log
from .address import LONGEST, UnixEndpoint, check_directory, same_file
from .channel import Channel, close_in_children
from .door import Door
from .endpoint import endpoint_of, is_local, settled
from .flow import Inflow
from .relay import Relay

IDLE = 10.0
"""Seconds without any receiver after which a relay ends that one of them has started."""

_PACKAGE = Path(__file__).parents[2]
# Of this very hotweights: another one may be installed, or lie on the path before it.
_START = (
    "import sys, importlib.machinery as m, importlib.util as u; sys.path.append(sys.argv[1]); "
    "s = m.PathFinder.find_spec('hotweights', [sys.argv[1]]); "
    "h = sys.modules['hotweights'] = u.module_from_spec(s); s.loader.exec_module(h); "
    "from hotweights.transfer.host_relay import serve; serve(*sys.argv[2:])"
)
_FILES = ("socket", "socket.lock", "said", "users")
_WARNING = "relay from "  # what a relay says of a sender that is not there; it goes on trying


def folder_of(address: str, keys: str | os.PathLike[str] | None, insecure: bool) -> Path:
    """Where the relay's socket lies: one for each user, network namespace, address and directory of keys."""
    network = os.stat("/proc/self/ns/net")  # Sockets of paths do not know network namespaces.
    owner = "" if keys is None else os.path.realpath(keys)
    key = "\n".join(map(str, (network.st_dev, network.st_ino, address, owner, insecure)))
    name = f"hotweights-{os.geteuid()}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"
    place = Path(tempfile.gettempdir()) / name
    return place if len(os.fsencode(place / "socket")) <= LONGEST else Path("/tmp") / name


@signals.held_throughout
class HostRelay:
    """An ``Endpoint`` for receivers. Close it: while it is open the relay stays, and after the last one it ends.

    Two locks of the kernel, which go with their holders, say everything. The folder's is held by the relay that runs,
    or is being started. That of ``users`` is shared by all receivers; a relay that can have it alone is not needed.

    Attributes:
        address: the sender's.
        retry: seconds between two tries to connect.
    """

    retry = 0.1

    def __init__(
        self,
        address: str,
        *,
        keys: str | os.PathLike[str] | None = None,
        insecure: bool = False,
        keep: int | str | None = None,
    ) -> None:
        """Nothing is started yet. ``keep``: as of ``Relay``; what the one says counts that starts it.

        Raises:
            UsageError: it is no address on the network, or the keys do not fit it; or ``keep`` is no number of bytes.
        """
        self._keep = "" if keep is None else str(nbytes_from(keep=keep))
        if is_local(address):
            raise UsageError(f"relay= is for senders on other hosts, tcps://host:port; this is {address}; leave it out")
        where, found = settled(address, keys)
        if where.startswith("ray:"):
            raise UsageError(f"relay= is for tcps://host:port: at {where} each node has a relay already; leave it out")
        endpoint_of(address, keys=keys, insecure=insecure)  # Better here than in another process.
        # What the environment says from here on: two jobs on this host both say ``env:``, and must not share a relay.
        self.address = address = where
        keys = found
        self._keys, self._insecure = keys, insecure
        self._folder = folder_of(address, keys, insecure)
        self._unix = UnixEndpoint(f"unix:{self._folder / 'socket'}")
        self._used = -1
        self._waiting = False  # for a relay that somebody started
        self._told = ""  # what was logged of the relay last
        self._closed = False
        close_in_children(self)

    def listen(self, carrier: str = "") -> Door:
        """It is for receivers."""
        raise UsageError(f"nobody listens through a relay; listen at {self.address}")

    def flow(self, token: bytes, carrier: str = "") -> Inflow:
        """There is none: the relay shares its memory."""
        raise ProtocolError("the relay gave a token for bytes, which lie in memory that both share")

    def connect(self) -> Channel | None:
        """A channel to the relay; ``None`` while it is being started, or waits for the sender itself.

        Raises:
            UsageError: the relay's folder belongs to somebody else.
            TransferError: the relay cannot be started, or it ended, and why.
            ProtocolError: the process there belongs to another user.
        """
        if self._closed or not self._use():
            return None
        channel = self._unix.connect()
        if channel is not None:
            self._waiting = False
        else:
            self._start()
        return channel

    def close(self) -> None:
        """The relay may end, as far as this one is concerned. May be called twice."""
        self._closed = True
        used, self._used = self._used, -1
        if used < 0:
            return
        if _locked(
            used, fcntl.LOCK_EX
        ):  # It was the last. A relay that runs removes the folder; one that died does not.
            self._remove()
        os.close(used)

    def forget(self) -> None:
        """In a forked child: close the copy, which holds the parent's lock."""
        used, self._used, self._closed = self._used, -1, True
        if used >= 0:
            os.close(used)

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if _locked(lock, fcntl.LOCK_EX):
                _remove(self._folder)
            os.close(lock)

    def _use(self) -> bool:
        """Hold the folder in use. Returns whether it is; if not, a relay has just decided to end."""
        if self._used >= 0:
            return True
        if self._folder.is_symlink():  # Somebody else's, who wants this user's files to be changed.
            raise UsageError(f"{self._folder} is a link, where this host's relay would lie; remove it")
        check_directory(str(self._folder))
        path = self._folder / "users"
        try:
            used = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # A relay that ends has just removed the folder.
            return False
        except OSError as error:
            raise TransferError(f"this host's relay cannot be used: {error}") from error
        if not _locked(used, fcntl.LOCK_SH) or not same_file(used, str(path)):
            os.close(used)
            return False
        self._used = used
        return True

    def _start(self) -> None:
        try:
            lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise TransferError(f"this host's relay cannot be started: {error}") from error
        try:
            if not _locked(lock, fcntl.LOCK_EX):  # Somebody else's is being started, or it waits for the sender.
                self._waiting = True
                self._tell()
                return
            waited, self._waiting = self._waiting, False
            if waited and (said := self._said()):
                raise TransferError(f"this host's relay ended, from {self.address}: {said}")
            self._spawn(lock)
            self._waiting = True
        finally:
            os.close(lock)  # The relay has a copy, and with it the lock.

    def _spawn(self, lock: int) -> None:
        if not sys.executable:
            raise UsageError(f"no Python can be started here; run one by hand: hotweights relay --from {self.address}")
        keys = "" if self._keys is None else os.path.abspath(self._keys)
        words = [
            str(_PACKAGE),
            self.address,
            str(self._folder),
            keys,
            "insecure" * self._insecure,
            str(IDLE),
            self._keep,
        ]
        try:
            with open(self._folder / "said", "wb") as said:
                # Through a shell that ends at once: a child of this process would be left to it when it has ended.
                subprocess.run(
                    ["/bin/sh", "-c", '"$@" &', "sh", sys.executable, "-c", _START, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    pass_fds=(lock,),
                    start_new_session=True,  # Ctrl-C is not for it.
                    check=True,
                )
        except (OSError, subprocess.SubprocessError) as error:
            raise TransferError(f"this host's relay cannot be started: {error}") from error

    def _tell(self) -> None:
        """Log what the relay says of the sender, but that it is not there yet."""
        with contextlib.suppress(OSError):
            *_, line = ["", *(self._folder / "said").read_text(errors="replace").splitlines()]
            if line.startswith(_WARNING) and line != self._told and os.strerror(errno.ECONNREFUSED) not in line:
                self._told = line
                log(logging.WARNING, "this host's %s", line)

    def _said(self) -> str:
        """Why the relay ended; empty if it did not say so."""
        with contextlib.suppress(OSError):
            lines = (self._folder / "said").read_text(errors="replace").splitlines()
            return next((line for line in reversed(lines) if line and not line.startswith(_WARNING)), "")
        return ""


def serve(address: str, folder: str, keys: str, insecure: str, idle: str, keep: str) -> None:
    """Be the relay of a host until no receiver has used it for ``idle`` seconds. Errors go to standard error."""
    logging.basicConfig(format="%(message)s")
    done = threading.Event()
    try:
        with Relay(
            address,
            f"unix:{folder}/socket",
            keys=keys or None,
            insecure=bool(insecure),
            retry_refused=False,
            keep=keep or None,
        ) as relay:
            watch = threading.Thread(
                target=_close_when_unused, args=(relay, Path(folder), float(idle), done), daemon=True
            )
            watch.start()
            try:
                relay.run()
            finally:
                done.set()
                watch.join(2 * float(idle))
    except HotweightsError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _close_when_unused(relay: Relay, folder: Path, idle: float, done: threading.Event) -> None:
    """Nobody begins to use the folder while this process looks, or removes it."""
    tick, unused = min(1.0, idle / 4), 0.0
    used = os.open(folder / "users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not done.wait(tick):
            if not _locked(used, fcntl.LOCK_EX):
                unused = 0.0
                continue
            unused += tick
            if unused >= idle:
                relay.close()
                done.wait(idle)
                _remove(folder)
                return
            fcntl.flock(used, fcntl.LOCK_UN)
    finally:
        os.close(used)


def _remove(folder: Path) -> None:
    """A folder that nobody uses, and nothing but what was put there."""
    with contextlib.suppress(OSError):
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
