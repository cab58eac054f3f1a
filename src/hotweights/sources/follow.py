"""``follow``: begins to look for the checkpoints that appear in a directory or in a store."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from ..arguments import check_kind, check_path
from ..errors import UsageError
from .files.shards import neighbour
from .objects.address import check_store, is_store, no_address, with_options
from .objects.run import is_run, open_run
from .objects.store import DEADLINE
from .remote_versions import RemoteVersions
from .versions import Versions


def follow(
    directory: str | os.PathLike[str],
    *,
    interval: float = 1.0,
    timeout: float | None = None,
    latest: bool = False,
    marker: str | None = None,
    pattern: str = "*",
    store: object = None,
    deadline: float | None = None,
) -> Versions:
    """Iterate over the checkpoints that appear in a directory, or in a store, each when its writer is done with it.

    A version is a directory within this one, or this one itself when its files are written anew. It is given when all
    of its files are there and none has changed for one interval; one that is there already is given first. It is
    never given twice. What is broken is logged once and passed over until it changes.
    docs/ci.md says what cannot be seen. Where a ``Sender`` publishes, it is what that has published.

    Args:
        directory: where to look. It must be there. Or an address in a store, such as ``s3://bucket/runs``.
        interval: seconds between two looks, and for which no file may have changed.
        timeout: seconds to wait for the next version; the iteration ends after that. ``None`` waits until ``close``.
        latest: give the newest of those that are ready, by the time of its writing, and none of the others, now or
            later, also if the newest turns out to be unfit: a server that comes back after a night takes the last
            version, not each of the night's. Without it every version is given, the oldest first.
        marker: name of a file that the writer writes last into each version, such as ``"DONE"``.
        pattern: which directories within this one are versions: ``"step-*"``.
        store: of an address: options, or a store of obstore, or a file system of fsspec, see ``hotweights.open``.
        deadline: of an address: seconds in which a store must answer a look, all tries together; 60 by default. One
            that has answered before is waited for, and a warning says so.

    Raises:
        UsageError: there is no such directory, or the arguments make no sense.
    """
    for name, seconds in (("interval", interval), ("timeout", timeout if timeout is not None else 1.0)):
        if (
            isinstance(seconds, bool)
            or not isinstance(seconds, int | float)
            or not 0 < seconds <= threading.TIMEOUT_MAX
        ):
            raise UsageError(f"{name}= is a number of seconds above zero; found {seconds!r}")
    check_kind("marker", marker, str, 'the name of a file within each version, such as "DONE"')
    if marker is not None and (not marker or os.path.basename(marker) != marker):
        raise UsageError(f"marker= is the name of a file within each version, such as 'DONE'; found {marker!r}")
    check_kind("pattern", pattern, str, 'a pattern of names, such as "step-*"')
    if store is None:
        check_path(directory)
    check_store(store)
    options = (interval, timeout, latest, marker, pattern)
    if store is not None or is_run(os.fsdecode(directory)):
        if not is_store(store):
            with_options(store, deadline=deadline)  # It refuses what makes no sense.
        seconds = DEADLINE if deadline is None else deadline
        run = open_run(os.fsdecode(directory), store, seconds, said_by="deadline")
        if isinstance(run.where, Path):
            no_address(deadline=deadline)
            return Versions(_there(run.where), *options)
        return RemoteVersions(run, *options)
    no_address(deadline=deadline)
    return Versions(_there(Path(directory).expanduser()), *options)


def _there(place: Path) -> Path:
    if not os.path.isdir(place):
        is_file = os.path.exists(place)
        if is_file:
            raise UsageError(f"{place}: there is a file; name the directory that it lies in")
        near = neighbour(place)
        cure = near or f"; where it is still to come, make it first: mkdir -p {place}"
        raise UsageError(f"{place}: there is no such directory{cure}")
    return place
