"""Address: ``unix:PATH``, on this host. One process holds the socket, and only its user can enter the directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import socket
import stat
import struct
import threading

from .. import signals
from ..errors import AddressTaken, ProtocolError, TransferError, UsageError
from .channel import Channel
from .door import BACKLOG, Door, Guest
from .flow import Inflow
from .states import Side

LONGEST = 107  # bytes of a path in sockaddr_un, without its NUL
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

# The kernel's record locks belong to a process and do not exclude two senders of one: so those are listed here.
_held: set[str] = set()
_held_lock = threading.Lock()


def path_of(address: str) -> str:
    """The path of ``unix:PATH``.

    Raises:
        UsageError: it is no such address, or its path is too long for the kernel.
    """
    kind, colon, path = address.partition(":") if isinstance(address, str) else ("", "", "")
    if kind != "unix" or not colon or not path:
        raise UsageError(f"an address looks like unix:/tmp/trainer/socket; this is {address!r}")
    if len(os.fsencode(path)) > LONGEST:
        raise UsageError(f"the path of a socket has {LONGEST} bytes at most; {path} has {len(os.fsencode(path))}")
    return path


@signals.held_throughout
class UnixEndpoint:
    """A path, for either end.

    Attributes:
        retry: seconds between two tries to connect; the kernel does not tell when somebody begins to listen.
    """

    retry = 0.02

    def __init__(self, address: str, keys: object = None, insecure: bool = False) -> None:
        """Nothing is looked up yet.

        Raises:
            UsageError: as ``path_of``; or it came with keys, for which there is no use.
        """
        self.address = address
        self._path = path_of(address)
        if keys is not None or insecure:
            raise UsageError(
                f"keys= and insecure= are for addresses on the network, tcps://host:port; this is {address}, "
                "which only this user's processes reach"
            )

    def listen(self, carrier: str = "") -> Door:
        """As ``Listener``. Nothing has to be carried."""
        return Listener(self._path)

    def connect(self) -> Channel | None:
        """A channel to whoever listens at the path; ``None`` while nobody does.

        Raises:
            TransferError: as ``connect``.
            ProtocolError: the process there belongs to another user.
            UsageError: nobody listens there, and no sender would: others may enter the directory.
        """
        connected = connect(self._path)
        if connected is None:
            with contextlib.suppress(FileNotFoundError):  # A sender makes it.
                _check_own(os.path.dirname(os.path.realpath(self._path)))
            return None
        try:
            check_peer(connected)
            return Channel(connected, Side.RECEIVER)
        except BaseException:
            connected.close()
            raise

    def flow(self, token: bytes, carrier: str) -> Inflow:
        """There is none: both ends share memory."""
        raise ProtocolError("the sender gave a token for bytes, which lie in memory that both ends share")


def check_peer(peer: socket.socket) -> int:
    """The pid of the process on the other end.

    Raises:
        ProtocolError: the process belongs to another user.
    """
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    if uid != os.geteuid():
        raise ProtocolError(f"the process {pid} on the other end belongs to user {uid}, this one to {os.geteuid()}")
    return int(pid)


def connect(path: str) -> socket.socket | None:
    """A connection to whoever listens at the path; ``None`` while nobody does. The caller closes it.

    Raises:
        TransferError: waiting does not help: a part of the path is no directory, or this user may not enter it.
    """
    connected = _socket()
    try:
        connected.connect(path)
    except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
        connected.close()
        return None
    except OSError as error:
        connected.close()
        raise TransferError(f"nobody can connect to {path}: {error}") from error
    except BaseException:
        connected.close()
        raise
    return connected


def _socket() -> socket.socket:
    try:
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise TransferError(f"no socket can be had: {error}") from error


class Listener:
    """A listening socket at a path. Its lock file is held until ``close``, or until the process dies.

    Attributes:
        socket: it never blocks.
        address: as receivers name it.
    """

    def __init__(self, path: str) -> None:
        """Take the path; a socket that a dead process left there is replaced.

        Raises:
            AddressTaken: another sender holds it; the message says which process.
            TransferError: this process may open no more files.
            UsageError: others may enter the directory, it cannot be made, or the path is that of something else.
        """
        self.address = f"unix:{path}"
        self._path = os.path.realpath(path)
        self._lock = -1
        self._ours: list[str] = []  # what close removes
        self.socket = _socket()
        try:
            check_directory(os.path.dirname(self._path))
            self._lock = _lock(self._path)
            self._ours.append(_lock_path(self._path))
            _remove_stale(self._path)
            # The absolute path may be too long for the kernel where the given, relative one is not.
            self.socket.bind(self._path if len(os.fsencode(self._path)) <= LONGEST else path)
            self._ours.append(self._path)
            os.chmod(self._path, 0o600)
            self.socket.listen(BACKLOG)
        except OSError as error:
            self.close()
            raise UsageError(f"nobody can listen at {path}: {error}") from error
        except BaseException:
            self.close()
            raise

    def accept(self) -> socket.socket | None:
        """The next connection, if one waits. The caller closes it."""
        try:
            accepted, _ = self.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        return accepted

    def sockets(self) -> list[socket.socket]:
        """What to wait for."""
        return [self.socket]

    def admit(self) -> Guest | None:
        """The next connection, if one waits. The caller closes its channel.

        Raises:
            ProtocolError: the process there belongs to another user. It was told so.
        """
        accepted = self.accept()
        if accepted is None:
            return None
        channel = Channel(accepted, Side.SENDER)
        try:
            return Guest(channel, f"process {check_peer(accepted)}", None)
        except ProtocolError as error:
            channel.say_goodbye(str(error))
            raise

    def refused(self, reason: str) -> None:
        """Nothing: whoever it was belongs to this user."""

    def close(self) -> None:
        """Stop listening and remove the socket and its lock. May be called twice."""
        self.socket.close()
        lock, self._lock = self._lock, -1
        if lock < 0:
            return
        with _held_lock:  # Files are removed before the lock is let go: after that they may be another sender's.
            for path in self._ours:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            os.close(lock)
            _held.discard(self._path)

    def forget(self) -> None:
        """In a forked child: close the copies, and leave the parent's files alone."""
        self.socket.close()
        if self._lock >= 0:
            os.close(self._lock)
            _held.discard(self._path)  # The parent holds it, by the kernel's lock; this process does not.
        self._lock = -1


def _lock_path(path: str) -> str:
    return f"{path}.lock"


def check_directory(directory: str) -> None:
    """See that a directory is there, and this user's alone; make it if need be.

    Raises:
        UsageError: it is not, or cannot be made.
    """
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        pass
    except FileNotFoundError as error:
        raise UsageError(
            f"the directory {directory} does not exist, nor does the one in which it would lie; make it with: "
            f"mkdir -p -m 700 {shlex.quote(directory)}"
        ) from error
    _check_own(directory)


def _check_own(directory: str) -> None:
    status = os.stat(directory)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise UsageError(
            f"the directory {directory} is not this user's alone (mode {stat.S_IMODE(status.st_mode):o}); put the "
            "socket into one of mode 700. One that does not exist is made so"
        )


def _lock(path: str) -> int:
    """A descriptor of the lock file, locked; the caller closes it."""
    with _held_lock:
        if path in _held:
            raise AddressTaken(f"{path} is held by another sender in this process, {os.getpid()}")
        while True:
            descriptor = os.open(_lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "one that just started"
                os.close(descriptor)
                raise AddressTaken(f"{path} is held by another sender, process {holder}") from None
            if same_file(descriptor, _lock_path(path)):
                break
            os.close(descriptor)  # Its holder removed it between our open and our lock: a lock on it excludes nobody.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        _held.add(path)
        return descriptor


def same_file(descriptor: int, path: str) -> bool:
    """Whether the descriptor is of the file that lies at the path now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _remove_stale(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(f"{path} is no socket, and is left alone; name a path at which nothing lies")
        os.unlink(path)
