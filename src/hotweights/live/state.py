"""State: what a live model is in, for everybody. Current: what of a live model changes, for the update that runs."""

from __future__ import annotations

import enum
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from .. import signals
from ..errors import UsageError
from .hooks import Hooks
from .lock import ReadWriteLock
from .record import Record


class State(enum.Enum):
    """What a live model is in. Only one update runs at a time."""

    EMPTY = "empty"  # nothing was loaded yet
    SERVING = "serving"  # all of one version
    UPDATING = "updating"  # an update runs; version N is what an abort leaves
    PREPARED = "prepared"  # it can be committed; version N still
    IN_DOUBT = "in doubt"  # version N, and the group may have M: this member voted, and could not hear the decision
    TORN = "torn"  # tensors of two versions: an update with atomic=False failed


class Current:
    """What of a live model changes. The model shows it; only the update that runs changes it.

    Attributes:
        holds: what the model's tensors are: ``EMPTY``, ``SERVING`` or ``TORN``.
        version: which version is live; ``None`` before the first load. While TORN, the last whole one.
        commits: how many versions were committed.
        running: what identifies the update that runs; ``None`` where none does.
        prepared: whether that update is prepared.
        deciding: the source whose group decides about that update, once it is prepared.
        doubted: whether the last update ended in doubt; until the next commit.
        previous: what makes the version before live again; ``None`` where it is not kept.
        gone: why it is not kept, and what brings it back; for messages.
        keeps_previous: whether commits keep the version before.
        checking: whether a check looks at its version now, and nobody else at the model.
        warned: whether the one warning of open layers was given.
        names: for tensors of the live version that came under other names than the model's: from those to these.
        guard: lets readers of the model in while no update writes it.
        record: what happened so far.
        hooks: what is called after each commit.
    """

    def __init__(self) -> None:
        self.holds = State.EMPTY
        self.version: str | int | None = None
        self.commits = 0
        self.running: object = None
        self.prepared = False
        self.deciding: object = None
        self.doubted = False
        self.checking = False
        self.previous: object = None
        self.gone = "only one version was live so far"
        self.keeps_previous = False
        self.warned = False
        self.names: Mapping[str, str] = {}
        self.guard = ReadWriteLock()
        self.record = Record()
        self.hooks = Hooks()
        self._reserved = threading.Lock()  # held while an update runs

    @property
    def state(self) -> State:
        """See ``State``."""
        if self.running is None:
            return State.IN_DOUBT if self.doubted and self.holds is State.SERVING else self.holds
        if getattr(self.deciding, "in_doubt", False):
            return State.IN_DOUBT
        return State.PREPARED if self.prepared else State.UPDATING

    @property
    def default_name(self) -> str | int:
        """The number of commits, as text where the live version's name is text: hooks meet one type of name."""
        return str(self.commits) if isinstance(self.version, str) else self.commits

    def __str__(self) -> str:
        if self.holds is State.TORN:
            return "the model is torn"
        return f"version {self.version!r} is live" if self.version is not None else "nothing was loaded"

    @contextmanager
    @signals.held
    def reserved(self) -> Iterator[None]:
        """Nobody else updates from now on, unless what is inside fails; until then, whoever ends the update lets go.

        Raises:
            UsageError: another update runs.
        """
        if not self._reserved.acquire(blocking=False):
            raise UsageError(
                "another update runs. Wait for its end, or let one lock of yours hold for each update and rollback; an "
                "update by hand ends by its commit() or abort(). A hook or a check is within one"
            )
        try:
            yield
        except BaseException:
            self._reserved.release()
            raise

    @signals.held
    def begin(self, running: object) -> None:
        """An update runs from now on. Only while the model is reserved."""
        self.running, self.prepared, self.deciding = running, False, None

    @signals.whole
    def end(self) -> None:
        """The update that ran is over; the next may begin."""
        self.running = self.deciding = None
        self._reserved.release()
