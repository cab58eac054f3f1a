"""LiveModel: a model that takes new weights while it serves, all or nothing. The parts beside this file do the work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import SupportsIndex

import torch
from torch import nn

from ..arguments import check_model, check_version
from ..dtypes import Cast
from ..errors import HotweightsError, UnknownName, UpdateAborted, UsageError
from ..gc_pause import without_collection
from ..manifest import Manifest
from ..memory.pool import Pool
from ..model.digests import Digest, digest_of
from ..model.materialise import materialise
from ..model.places import Place, places
from ..plan.patterns import Patterns, matches
from ..progress import progress
from ..sources.contracts import Addressed, InMemory, IOMode, Participant, Source, refusing
from ..sources.opening import AnySource, opened, version_of
from .atomic import Atomic, InPlace, Strategy
from .attempt import Attempt
from .baseline import Baseline
from .compiled import refuse_frozen
from .hooks import Hooks
from .job import Job
from .lock import ReadWriteLock, WriteTurn
from .open_layers import OpenLayers
from .plans import Options
from .report import UpdateReport
from .state import State
from .update import Update

Process = Callable[[nn.Module], object]


def process_by_quant_method(layer: nn.Module) -> None:
    """What engines do after loading: ``layer.quant_method.process_weights_after_loading(layer)`` where there is one."""
    layer.quant_method.process_weights_after_loading(layer)  # type: ignore[union-attr, operator]


def _has_quant_method(layer: nn.Module) -> bool:
    return hasattr(getattr(layer, "quant_method", None), "process_weights_after_loading")


def _has_tensors(layer: nn.Module) -> bool:
    return any(one is not None for store in (layer._parameters, layer._buffers) for one in store.values())


class LiveModel:
    """A model and what is known of it, so that new weights can be put into it in place, all or nothing.

    One thread updates at a time; any number may read the model within ``serving()``. Addresses of live tensors do not
    change from the first load on, so that captured graphs stay valid.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        process: Process | None = None,
        layers: Callable[[nn.Module], bool] | None = None,
        deferred: Patterns = (),
        atomic: Atomic = "staged",
        memory_limit: int | None = None,
    ) -> None:
        """Take a model in checkpoint format: as its own loading code expects it. Nothing is read or changed.

        Args:
            model: stays the caller's; it is kept alive.
            process: turns one layer's tensors into what its kernels use, once for each load or update, in place. It is
                called for every module that has tensors of its own. By default those with a ``quant_method`` are
                processed, by that.
            layers: says of a module whether it is processed, where ``process`` is not for all of them.
            deferred: qualified names of layers that are processed after all others, because they read them.
            atomic: how updates are all or nothing, unless they say otherwise, see ``live.atomic.Atomic``.
            memory_limit: bytes of device memory that open layers may take together, when tensors come in an order that
                keeps several open. Over it, tensors wait on the host.
        """
        check_model(model)
        _check_atomic(atomic)
        self.model = model
        self._process: Process = process or process_by_quant_method
        self._is_processed = layers or (_has_tensors if process is not None else _has_quant_method)
        self._deferred = matches(deferred)
        self._atomic: Atomic = atomic
        self._limit = memory_limit
        self._state = State.EMPTY
        self._was = State.EMPTY  # before the running update
        self._version: str | int | None = None
        self._commits = 0
        self._hooks = Hooks()
        self._serving = ReadWriteLock()
        self._busy = threading.Lock()  # held while an update runs
        self._work: Attempt | None = None  # of that update
        self._warned = False
        self._known: Baseline | None = None

    def __repr__(self) -> str:
        return f"<LiveModel of {type(self.model).__name__}: version {self._version!r}, {self._state.value}>"

    def __reduce_ex__(self, protocol: SupportsIndex) -> str:
        raise UsageError("a live model is bound to addresses; copy its model, and make a live model of the copy")

    @property
    def version(self) -> str | int | None:
        """Which version is live; ``None`` before the first load. While TORN, the last whole one."""
        return self._version

    @property
    def state(self) -> State:
        """See ``State``."""
        return self._state

    def on_commit(self, hook: Callable[[str | int], object]) -> None:
        """Call ``hook(version)`` after each commit, never after an abort: to drop caches that hold the old weights.

        Nobody else reads the model until all hooks have run; a hook may. All of them run, also when one fails; then
        ``CommitHookError`` is raised, with the new version in place. A hook must not wait for a thread that reads the
        model within ``serving()``.
        """
        self._hooks.add(hook)

    @contextmanager
    def serving(self, timeout: float | None = None) -> Iterator[str | int | None]:
        """Read the model as it is of one version, whose name is given. Updates wait until all readers are gone.

        Raises:
            TimeoutError: an update did not let go within ``timeout`` seconds.
            HotweightsError: the model is TORN, or nothing was loaded yet.
        """
        with self._serving.reading(timeout):
            if self._state in (State.TORN, State.EMPTY):
                raise HotweightsError(f"the model is {self._state.value}; load or update it first")
            yield self._version

    def digest(self) -> Digest:
        """Digests of all parameters and buffers, as they are now. Reads every byte of the model."""
        return digest_of(self.model)

    # The first load.

    def load(
        self,
        source: AnySource,
        *,
        version: str | int | None = None,
        device: torch.device | str | None = None,
        allow_missing: Patterns = (),
        allow_partial: Patterns = (),
        allow_unexpected: Patterns = (),
        cast: Cast | None = None,
        io: IOMode = "auto",
        threads: int | None = None,
        pool: Pool | None = None,
        show_progress: bool | None = None,
    ) -> UpdateReport:
        """Load for the first time, layer by layer; each is processed when it is complete.

        The arguments are those of ``hotweights.load``; what is allowed here is allowed to every update too.

        Raises:
            PlanError, CheckpointError: as ``hotweights.load``; nothing was changed.
            Exception: what failed while loading. The model is in checkpoint format again, its values are undefined.
        """
        check_version(version)
        options = Options(allow_missing, allow_partial, allow_unexpected, cast)
        where = None if device is None else torch.device(device)
        with without_collection(), ExitStack() as stack:
            stack.enter_context(refusing(source))
            found = stack.enter_context(opened(source))
            with self._reserved():
                if self._state is not State.EMPTY:
                    raise UsageError(f"the model holds version {self._version!r}; use update")
                plan = options.traced(self.model, found.manifest, where)
                replaced = [] if where is None else materialise(places(self.model), set(plan.targets), where)
                stack.callback(self._put_back, replaced)
                self._known = Baseline(self.model, plan, options, self._is_processed, self._deferred)
                update = self._started(self._known.first_job(self._process), InPlace(self._known.live))
            with update:
                return self._run(update, found, version_of(found, version), io, threads, pool, show_progress)

    def _put_back(self, replaced: list[tuple[Place, torch.Tensor]]) -> None:
        """Tensors that were on meta are so again after a first load that failed."""
        if self._state is State.EMPTY:
            self._known = None
            for place, old in replaced:
                place.put(old)

    # Updates.

    def update(
        self,
        source: AnySource,
        *,
        version: str | int | None = None,
        atomic: Atomic | None = None,
        only: Patterns | None = None,
        io: IOMode = "auto",
        threads: int | None = None,
        pool: Pool | None = None,
        show_progress: bool | None = None,
    ) -> UpdateReport:
        """Take new weights for every tensor that the first load wrote, in place, all or nothing.

        Args:
            source: whatever ``hotweights.open`` takes, or an open source; of any names, dtypes and shapes that the
                model's own loading code takes.
            version: the new version's name; by default the source's, or else the number of commits.
            atomic: how it is all or nothing; by default the live model's way.
            only: names of the model's tensors that are to be updated, and no others: a declared partial update.
            io: how files are read, see ``IOMode``.
            threads: how many read at once.
            pool: memory for what cannot be read in place.
            show_progress: whether to draw a progress bar; by default on a terminal.

        Raises:
            UpdateAborted: it failed; its cause says why. Version N is live, byte for byte; with ``atomic=False`` the
                model may be TORN, and says so in ``state``.
            CommitHookError: the new version is live, and a hook failed.
        """
        check_version(version)
        with without_collection(), ExitStack() as stack:
            stack.enter_context(refusing(source))
            try:
                found = stack.enter_context(opened(source))
            except UsageError:
                raise
            except HotweightsError as error:
                raise UpdateAborted(f"{self._left()}; the source cannot be opened: {error}") from error
            update = stack.enter_context(self.begin(found.manifest, atomic=atomic, only=only))
            assert self._known is not None
            found = self._known.apart(found)
            return self._run(update, found, version_of(found, version), io, threads, pool, show_progress)

    def begin(
        self, manifest: Manifest | None = None, *, atomic: Atomic | None = None, only: Patterns | None = None
    ) -> Update:
        """Begin an update that is fed by hand. Use it in a ``with``: leaving it without a commit aborts.

        Args:
            manifest: what will come; by default what the live version came by. What does not fit is found here.
            atomic: see ``update``.
            only: see ``update``.

        Raises:
            UpdateAborted: the manifest does not fit, or the host cannot hold the copy; nothing was changed.
        """
        atomic = self._atomic if atomic is None else atomic
        _check_atomic(atomic)
        with self._reserved():
            if self._state is State.EMPTY:
                raise UsageError("nothing was loaded yet; the first time, use load")
            if self._state is State.TORN and only is not None:
                raise UsageError("the model is torn; only a complete update mends it")
            assert self._known is not None
            try:
                refuse_frozen()
                self._known.prove()
                with self._serving.writing():
                    found = self._known.plans.find(manifest, only, self._known.live)
                job = self._known.job(self._process, *found)
                return self._started(job, self._known.way(atomic, job))
            except UsageError:
                raise
            except HotweightsError as error:
                raise UpdateAborted(f"{self._left()}; nothing was changed: {error}") from error

    @contextmanager
    def _reserved(self) -> Iterator[None]:
        """Nobody else updates from now on, unless what is inside fails; until then, who commits or aborts lets go."""
        if not self._busy.acquire(blocking=False):
            raise UsageError("another update runs; commit or abort it first")
        try:
            yield
        except BaseException:
            self._busy.release()
            raise

    def _started(self, job: Job, way: Strategy) -> Update:
        self._was, self._state = self._state, State.UPDATING
        layers = OpenLayers(self._limit, warned=self._warned)
        self._work = Attempt(job, way, layers, WriteTurn(self._serving))
        return Update(_Owner(self), self._work)

    def _run(
        self,
        update: Update,
        source: Source,
        version: str | int | None,
        io: IOMode,
        threads: int | None,
        pool: Pool | None,
        show_progress: bool | None,
    ) -> UpdateReport:
        work = self._work
        assert work is not None
        with ExitStack() as stack:
            pool = pool or stack.enter_context(Pool())
            nbytes = sum(spec.nbytes for spec in source.manifest.values())
            advance = stack.enter_context(progress("loading", nbytes, show=show_progress))
            options = {"io": io, "threads": threads} if isinstance(source, Addressed) else {}
            with self._failing(work):
                if isinstance(source, Participant) and not isinstance(source, (Addressed, InMemory)):
                    source.wanted(work.requests())  # Of the others it is asked for what is wanted, tensor by tensor.
                work.run(source, pool=pool, advance=advance, **options)
            work.peak_buffer = pool.stats().peak * pool.slot_nbytes
            if isinstance(source, Participant):
                update.prepare()
                with self._failing(work):
                    stack.enter_context(source.decision())
            return update.commit(version)

    # What updates call.

    @contextmanager
    def _failing(self, work: Attempt) -> Iterator[None]:
        """Any failure inside aborts the update, and is told as such."""
        try:
            yield
        except BaseException as error:
            self._abort(work)
            if work.job.first or not isinstance(error, Exception):
                raise
            raise UpdateAborted(f"{self._left()}; the update failed: {error}") from error

    def _left(self) -> str:
        return "the model is torn" if self._state is State.TORN else f"version {self._version!r} is live"

    def _prepare(self, work: Attempt) -> None:
        assert self._known is not None
        with self._failing(work), work.timeline.event("prepare", ""):
            work.finish()
            self._known.prove()
        self._state = State.PREPARED

    def _commit(self, work: Attempt, version: str | int | None) -> UpdateReport:
        assert self._known is not None
        work.turn.take()
        # From here on version M comes, whatever interrupts: not every way has kept what N was.
        failures: list[BaseException] = []
        try:
            with work.timeline.event("commit", ""):
                written = self._written(work, failures)
            previous, self._version = self._version, self._commits + 1 if version is None else version
            self._commits += 1
            self._state, self._work, self._warned = State.SERVING, None, work.warned
            self._known.committed(work.job)
            report = work.report(previous, self._version, written, self._known.copy_nbytes)
            self._serving.let_writer_read()
            self._hooks.call(self._version, failures)
            if failures:
                raise failures[0]
            return report
        finally:
            failures.clear()  # Their tracebacks hold this frame.
            self._end(work)

    def _written(self, work: Attempt, failures: list[BaseException]) -> int:
        try:
            return work.way.commit()
        except BaseException as error:
            if not isinstance(error, Exception):
                failures.append(error)
        try:
            return work.way.commit()  # It copies what lies beside the model: that can be done again.
        except BaseException:
            self._state, self._work = State.TORN, None
            raise

    def _abort(self, work: Attempt) -> None:
        if self._work is not work:
            return
        self._work, self._warned = None, work.warned
        torn = type(work.way) is InPlace and work.way.wrote
        try:
            _twice(work.way.abort)
            if work.job.first:
                assert self._known is not None
                self._known.reset(work.processing.begun)
        except BaseException:
            torn = True
            raise
        finally:
            if work.job.first:
                self._state = State.EMPTY
            else:
                self._state = State.TORN if torn else self._was
            self._end(work)

    def _end(self, work: Attempt) -> None:
        work.forget()
        self._busy.release()

    def _is_over(self, work: Attempt) -> bool:
        return self._work is not work


class _Owner:
    """What an update may do with its live model."""

    def __init__(self, live: LiveModel) -> None:
        self.failing = live._failing
        self.prepare = live._prepare
        self.commit = live._commit
        self.abort = live._abort
        self.over = live._is_over


def _twice(act: Callable[[], object]) -> None:
    """An interruption (Ctrl-C, say) does not keep it from being done; it is raised when it is."""
    try:
        act()
    except BaseException:
        act()
        raise


def _check_atomic(atomic: object) -> None:
    if atomic is not False and atomic not in ("staged", "journal"):
        raise UnknownName("atomic", atomic, ("staged", "journal", "False"))
