"""LiveModel: a model that takes new weights while it serves, all or nothing. ``update.py`` is the life of an update."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, SupportsIndex

import torch
from torch import nn

from .. import signals
from ..arguments import (
    check_callable,
    check_choices,
    check_count,
    check_flags,
    check_kind,
    check_model,
    check_takes_one,
    check_timeout,
    check_version,
    device_from,
    patterns_from,
)
from ..dtypes import Cast
from ..errors import LiveModelError, UsageError
from ..forked import alone_in_a_fork
from ..gc_pause import without_collection
from ..loading.apart import apart
from ..loading.initialise import InitMissing, check_init_missing, initialise, left_on_meta
from ..loading.verify import Verify, unprovable, verifier
from ..manifest import Manifest
from ..memory.digest import Digest
from ..memory.pool import Pool
from ..model.digests import digest_of
from ..model.matching import KnownNames, meant_by, other_names
from ..model.materialise import materialise, put_back
from ..model.offloading import refuse_offloaded
from ..model.places import Place, places
from ..model.reachable import reachable
from ..model.survey import By, own_loader, survey
from ..names import outer_prefix, unwrapped
from ..plan.patterns import Patterns, widened
from ..plan.plan import LoadPlan
from ..rename import Rename, renamer
from ..sources.contracts import IOMode, refusing
from ..sources.iterator import IteratorSource
from ..sources.locating import naming_files
from ..sources.opening import AnySource, name_of, opened, version_of
from ..sources.reading import check_reading
from ..sources.renamed import renamed
from ..text import some
from ..tracing.naming import Match, as_they_are, names_for
from .aborted import aborted
from .asked import Asked, check_atomic
from .background import in_background, takes_what
from .baseline import Baseline
from .check import Check, ask
from .fed_names import FedNames
from .kernels import own_of, processes, refuse_kernels
from .layers import Selection, selected
from .once import Once, Process
from .owners import own
from .plans import Options
from .previous import may_roll_back_to, roll_back
from .report import UpdateReport
from .serving import Serving
from .state import Current, State
from .strategy import Atomic
from .update import Update


def _has_tensors(layer: nn.Module) -> bool:
    return any(tensor is not None for store in (layer._parameters, layer._buffers) for tensor in store.values())


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
        layers: Selection | None = None,
        deferred: Selection = (),
        atomic: Atomic = "staged",
        memory_limit: int | None = None,
        keep_previous: bool = False,
    ) -> None:
        """Take a model in checkpoint format: as its own loading code expects it. Nothing is read or changed.

        Args:
            model: stays the caller's; it is kept alive.
            process: turns one layer's tensors into what its kernels use, once for each load or update, in place. It is
                called for every module that has tensors of its own. By default those with a ``quant_method`` are
                processed, by that.
            layers: which modules are processed, where ``process`` is not for all of them: patterns of their qualified
                names, or a function of a module that says so.
            deferred: which of them are processed after all others, because they read them; given like ``layers``.
            atomic: how updates are all or nothing, unless they say otherwise, see ``live.strategy.Atomic``.
            memory_limit: bytes of device memory that open layers may take together, when tensors come in an order that
                keeps several open. Over it, tensors wait on the host.
            keep_previous: whether a commit keeps the version before, for ``rollback``. That takes no memory, but for
                objects in which no tensor is seen. Staged commits exchange bytes: readers wait about twice as long.
        """
        check_model(model)
        check_atomic(atomic)
        check_callable(process=process)
        if process is not None:
            check_takes_one("process=", process, "the module")
        check_flags(keep_previous=keep_previous)
        if keep_previous and atomic is False:
            raise UsageError(
                'keep_previous=True keeps what atomic="staged" and "journal" keep anyway; atomic=False keeps nothing. '
                "Leave one of them out"
            )
        if memory_limit is not None:
            check_count(0, memory_limit=memory_limit)
        self._model = model
        by_default = _has_tensors if process is not None else processes
        self._core = unwrapped(model)
        self._idle: list[str] = []  # what is said of patterns that match nothing
        self._is_processed = selected(by_default if layers is None else layers, model, "layers", self._idle)
        self._is_deferred = selected(deferred, model, "deferred", self._idle)
        self._once = Once(self._core, process, self._is_processed)
        self._atomic: Atomic = atomic
        self._limit = memory_limit
        self._current = Current()
        self._current.keeps_previous = keep_previous
        self._current.record.warned.update(self._idle)  # They are logged already.
        self._baseline: Baseline | None = None  # None until the first load begins, and again when that fails.
        self._match: Match = as_they_are  # Known from the first load on: processing changes names.
        self._others: dict[str, tuple[str, ...]] = {}

    @property
    def model(self) -> nn.Module:
        """The model that it was made with. It stays this one: another module needs a live model of its own."""
        return self._model

    def __repr__(self) -> str:
        return f"<LiveModel of {type(self.model).__name__}: version {self.version!r}, {self.state.value}>"

    def __reduce_ex__(self, protocol: SupportsIndex) -> str:
        raise UsageError("a live model is bound to addresses; copy its model, and make a live model of the copy")

    @property
    def version(self) -> str | int | None:
        """Which version is live; ``None`` before the first load. While TORN, the last whole one."""
        return self._current.version

    @property
    def state(self) -> State:
        """See ``State``."""
        return self._current.state

    def status(self) -> dict[str, object]:
        """How it is, as plain data for a health endpoint: ``json.dumps`` takes it. Waits for nobody.

        Keys: ``version``, ``state``; ``can_roll_back_to``, the version that ``rollback`` would make live;
        how many loads and updates were ``committed`` and ``failed``; ``last_act``, which
        is ``"load"``, ``"update"``, ``"rollback"`` or ``"failure"``; ``taken_back``, the version that a rollback took
        back, until another one is live; ``last_report``, as a dictionary, of what brought the live version;
        ``last_error`` in a line; ``last_failure``, the ``FailureReport`` of the load or update that failed last, as a
        dictionary; ``seconds_since_commit`` (of a rollback too) and ``seconds_since_error``. Each of
        these is ``None`` where there was none.
        """
        return {
            "version": self.version,
            "state": self.state.value,
            "can_roll_back_to": may_roll_back_to(self._current),
            **self._current.record.status(),
        }

    @property
    def plan(self) -> LoadPlan | None:
        """The plan by which the live version came, of the model in checkpoint format; ``None`` before the first load.

        It is of the unwrapped model, and has the names that ``rename=`` gave. Of the versions that partial updates
        brought it is the plan of the last whole one.
        """
        baseline = self._baseline
        return None if baseline is None or self.version is None else baseline.plans.last

    def explain(self, name: str) -> str:
        """In words: what becomes of a tensor of the checkpoint or the model, through loading and processing.

        Of a tensor of a processed layer it says also of which tensors processing makes it. Waits for nobody.

        Raises:
            UsageError: nothing was loaded yet; ``hotweights.trace(model, source).explain(name)`` tells of the loading.
            UnknownName: neither model nor source has this name; the message lists similar ones.
        """
        baseline = self._baseline
        if baseline is None or self.version is None:
            raise UsageError(
                "nothing was loaded yet; hotweights.trace(model, source).explain(name) tells what a load would do"
            )
        others = (own for own, several in self._others.items() if name in several)
        return baseline.explain([name, self._current.names.get(name, name), *others])

    def on_commit(self, hook: Callable[[str | int], object]) -> None:
        """Call ``hook(version)`` after each commit, never after an abort: to drop caches that hold the old weights.

        Nobody else reads the model until all hooks have run; a hook may. All of them run, also when one fails; then
        ``CommitHookError`` is raised, with the new version in place. A hook must not wait for a thread that reads the
        model within ``serving()``.
        """
        self._current.hooks.add(hook)

    def serving(self, timeout: float | None = None) -> Serving:
        """Read the model as it is of one version, whose name is given. Updates wait until all readers are gone.

        In a coroutine use it in an ``async with``. By ``with`` it cannot wait for an update that waits for another
        coroutine of this thread, so it goes before it; where one always reads, the update waits for ever.

        Raises:
            TimeoutError: an update did not let go within ``timeout`` seconds.
            LiveModelError: the model is TORN, or nothing was loaded yet.
        """
        check_timeout(timeout)
        return Serving(self._current, timeout)

    def digest(self) -> Digest:
        """Digests of all parameters and buffers, as they are now. Reads every byte of the model.

        Wrappers around the model have no part in them. A tied tensor is in it by each of its names.

        Raises:
            LiveModelError: tensors are on meta, as before the first load: they have no bytes, so all would be equal.
        """
        if empty := [name for name, tensor in survey(self._core).tensors.items() if tensor.is_meta]:
            raise LiveModelError(
                f"nothing was loaded yet: {some(empty, 3)} on meta, and without bytes all models have one digest; call "
                "load first, with device="
            )
        return digest_of(self._core)

    # The first load.

    @signals.watched
    def load(
        self,
        source: AnySource,
        *,
        version: str | int | None = None,
        device: torch.device | str | None = None,
        allow_missing: Patterns = (),
        allow_partial: Patterns = (),
        allow_unexpected: Patterns = (),
        allow_mismatched: Patterns = (),
        init_missing: InitMissing | None = None,
        cast: Cast | None = None,
        io: IOMode = "auto",
        threads: int | None = None,
        pool: Pool | None = None,
        verify: Verify = "off",
        show_progress: bool | None = None,
        rename: Rename | None = None,
        check: Check | None = None,
        by: By | None = None,
        variant: str | None = None,
        subfolder: str | None = None,
        digests: str | os.PathLike[str] | None = None,
    ) -> UpdateReport:
        """Load for the first time, layer by layer; each is processed when it is complete.

        The arguments are those of ``hotweights.load``; what is allowed here is allowed to every update too. With
        ``verify="loader"`` all is proven before the first layer is processed. ``check`` is that of ``update``: where it
        refuses, nothing is loaded, and another version can be.

        Raises:
            PlanError, CheckpointError, PlanDiffers: as ``hotweights.load``; except for the last, nothing was changed.
            LiveModelError: ``check`` returned ``False``.
            Exception: what failed while loading, or what ``check`` raised.

        After the last two the model is in checkpoint format again, and its values are undefined.
        """
        asks = self._asks(check)
        check_version(version)
        check_choices(
            verify=(verify, Verify),
            cast=("error" if cast is None else cast, Cast),
            by=("name" if by is None else by, By),
        )
        check_reading(io, threads, pool, show_progress)
        check_init_missing(init_missing)
        allowed = patterns_from(
            allow_missing=allow_missing,
            allow_partial=allow_partial,
            allow_unexpected=allow_unexpected,
            allow_mismatched=allow_mismatched,
        )
        where, version = device_from(device), name_of(source, version)
        with alone_in_a_fork(), without_collection(), ExitStack() as stack:
            stack.enter_context(refusing(source))
            origin = stack.enter_context(opened(source, variant=variant, subfolder=subfolder, digests=digests))
            with self._current.reserved():
                if self._current.holds is not State.EMPTY:
                    raise UsageError(
                        f"{self._current}, so load, which is for the first time, cannot be used; use update"
                    )
                options = self._options(allowed, cast, by)
                fed = FedNames(names_for(origin.manifest, rename, self._match))
                origin = renamed(origin, fed.new)
                stack.enter_context(naming_files(origin))
                self._once.refuse_own(origin)
                weights, _ = apart(origin, lambda: reachable(self._core).values())
                prove = verifier(self._core, weights, by) if verify == "loader" else None
                with self._once.telling(source, origin.manifest, by), self._once.noting_code(by):
                    plan = options.traced(self._core, origin.manifest, where)
                left = [] if where is None else left_on_meta(plan, survey(self._core), init_missing, self._core)
                wanted = {*plan.targets, *left}
                replaced = [] if where is None else materialise(places(self._core), wanted, where)
                stack.callback(self._put_back, replaced)
                initialise(self._core, left, init_missing)
                unknown = {place.name for place, _ in replaced} - {*left}
                self._baseline = Baseline(self._core, plan, options, self._is_processed, self._is_deferred, unknown)
                others = own(self._core, self._current)
                self._baseline.warnings = (*others, *self._idle, *self._once.unprocessed())
                named = version_of(origin, version)
                update = Update.begin_first(
                    self._current, self._baseline, self._once.process, self._limit, fed, asks, named
                )
                self._baseline.warnings = self._baseline.warnings[len(others) :]  # It is said once.
            with update:
                report = update.run(
                    weights,
                    named,
                    io=io,
                    threads=threads,
                    pool=pool,
                    verify=prove,
                    show_progress=show_progress,
                )
            if prove is None:
                return report
            return replace(report, proven=prove.proven, warnings=(*report.warnings, *unprovable(plan, prove.proven)))

    def _options(self, allowed: Sequence[Patterns], cast: Cast | None, by: By | None) -> Options:
        """What every load allows; and note the names by which the model's tensors are called from now on."""
        core, seen = self._core, survey(self._core)
        refuse_offloaded(core, seen)
        names = {*seen.names}
        self._match = KnownNames(core, names).matched if own_loader(core, by) is None else as_they_are
        self._others = other_names(core, outer_prefix(self.model), names, seen.others())
        missing, partly, unexpected, mismatched = allowed
        return Options(
            allow_missing=widened(missing, self._others),
            allow_partial=widened(partly, self._others),
            allow_unexpected=unexpected,
            allow_mismatched=widened(mismatched, self._others),
            cast=cast,
            by=by,
        )

    @signals.whole
    def _put_back(self, replaced: list[tuple[Place, torch.Tensor]]) -> None:
        """Tensors that were on meta are so again after a first load that failed."""
        if self._current.holds is State.EMPTY:
            self._baseline = None
            put_back(replaced)

    # Updates.

    @signals.watched
    def update(
        self,
        source: AnySource,
        *,
        version: str | int | None = None,
        atomic: Atomic | None = None,
        only: Patterns | None = None,
        cast: Cast | None = None,
        io: IOMode = "auto",
        threads: int | None = None,
        pool: Pool | None = None,
        show_progress: bool | None = None,
        rename: Rename | None = None,
        timeout: float | None = None,
        check: Check | None = None,
        variant: str | None = None,
        subfolder: str | None = None,
        digests: str | os.PathLike[str] | None = None,
    ) -> UpdateReport:
        """Take new weights for every tensor that the first load wrote, in place, all or nothing.

        What the first load allowed to be missing may come in one version and not in the next: then it is again as it
        was before the first load, and ``report.restored`` names it.

        Args:
            source: whatever ``hotweights.open`` takes, or an open source; of any names, dtypes and shapes that the
                model's own loading code takes.
            version: the new version's name; by default the source's, or else the number of commits.
            atomic: how it is all or nothing; by default as the live model does it.
            only: names of the model's tensors that are to be updated, and no others: a declared partial update.
            cast: which casts that lose information are done, see ``hotweights.load``. By default those that ``load``
                was given; or else floats are cast to the floats that the model holds (``"floats"``), and a model with a
                ``load_weights`` casts as that does (``"loader"``).
            io: how files are read, see ``IOMode``.
            threads: how many read at once.
            pool: memory for what cannot be read in place.
            show_progress: whether to draw a progress bar; by default on a terminal or in a notebook.
            rename: new names for the source's tensors, see ``hotweights.load``.
            timeout: seconds that it may wait for readers to leave ``serving()``, all its waits together; by default as
                long as they like. Then it aborts, and a ``TimeoutError`` is the cause.
            check: called with the model when the new version is complete, before it is committed and before a group
                decides: a forward on known input, say. If it raises, or returns ``False``, the update aborts; else it
                returns ``True`` or ``None``. Nobody else reads the model meanwhile; ``serving()`` lets the check in,
                and names the version before.
            variant: where ``source`` is a path: which variant of the weights there, see ``hotweights.open``.
            subfolder: where ``source`` is a path: which folder there.
            digests: where ``source`` is a path: what the files must hold, see ``hotweights.open``. It is known before
                the commit.

        Raises:
            UpdateAborted: it failed; its cause says why. Version N is live, byte for byte; with ``atomic=False`` the
                model may be TORN, and says so in ``state``.
            CommitHookError: the new version is live, and a hook failed.
            UsageError: an argument makes no sense, nothing was loaded yet, another update runs, or this thread reads
                the model. Version N is live.
        """
        check_version(version)
        check_reading(io, threads, pool, show_progress)
        asked = self._asked(atomic, only, cast, timeout, check)
        version = name_of(source, version)
        with alone_in_a_fork(), without_collection(), ExitStack() as stack:
            stack.enter_context(refusing(source))
            self._check_loaded()  # Before a receiver waits for a version.
            # An iterator without a manifest is read to its end to be opened.
            unread = "broke while it was read" if isinstance(source, IteratorSource) else "cannot be opened"
            with self._beginning(source, version, f"has a source that {unread}"):
                origin = stack.enter_context(opened(source, variant=variant, subfolder=subfolder, digests=digests))
            manifest = origin.manifest  # A receiver waits here. That no version came in time is no failed update.
            asked = replace(asked, version=version_of(origin, version))
            with self._beginning(source, asked.version, "was refused"):
                fed = FedNames(names_for(manifest, rename, self._match))
                origin = renamed(origin, fed.new)
                stack.enter_context(naming_files(origin))
                if self._baseline is not None:
                    refuse_kernels(own_of(origin, self._baseline.kernels))
                weights, _ = apart(origin, lambda: reachable(self._core).values())
            update = stack.enter_context(self._begin(origin.manifest, asked, fed))
            return update.run(
                weights,
                asked.version,
                io=io,
                threads=threads,
                pool=pool,
                show_progress=show_progress,
            )

    @alone_in_a_fork()
    @signals.watched
    def rollback(self, *, timeout: float | None = None) -> str | int:
        """Make the version before live again: its bytes and its name, which is returned. Hooks are called with it.

        Only what ``keep_previous=True`` kept can be rolled back to: once, after a commit, until the next update writes;
        ``status()["can_roll_back_to"]`` is its name.

        Args:
            timeout: seconds that it may wait for readers to leave ``serving()``; by default as long as they like.

        Raises:
            LiveModelError: no version before is kept, or tensors were moved; nothing was changed.
            UsageError: an update runs, or this thread reads the model; nothing was changed.
            TimeoutError: readers did not leave in time; nothing was changed.
            CommitHookError: the version before is live, and a hook failed.
        """
        check_timeout(timeout)
        return roll_back(self._current, self._baseline, timeout)

    @contextmanager
    @signals.held
    def _beginning(self, source: AnySource, version: str | int | None, what: str) -> Iterator[None]:
        """What fails inside ends the update; a program that is wrong is told so itself."""
        try:
            yield
        except Exception as error:
            # What an iterator raises while it is read ends the update, whatever it is.
            if isinstance(error, UsageError) and not isinstance(source, IteratorSource):
                raise
            raise aborted(self._current, version, what, error) from error

    @takes_what(update)
    async def update_async(self, source: AnySource, **options: Any) -> UpdateReport:
        """``update`` in a thread of the event loop's executor: other coroutines run meanwhile, readers among them.

        Cancelled, it aborts at the next tensor or layer, waits for that, and raises ``asyncio.CancelledError``; the new
        version is live if it was committed by then, see ``version``. A second cancellation does not wait. A source that
        waits, such as a receiver, is not woken: close it. Hooks run in the thread.
        """
        return await in_background(partial(self.update, source, **options))

    @takes_what(rollback)
    async def rollback_async(self, **options: Any) -> str | int:
        """``rollback`` in a thread of the event loop's executor, as ``update_async``: readers can leave meanwhile."""
        return await in_background(partial(self.rollback, **options))

    @alone_in_a_fork()
    @signals.watched
    def begin(
        self,
        manifest: Manifest | None = None,
        *,
        atomic: Atomic | None = None,
        only: Patterns | None = None,
        cast: Cast | None = None,
        rename: Rename | None = None,
        timeout: float | None = None,
        check: Check | None = None,
    ) -> Update:
        """Begin an update that is fed by hand. Use it in a ``with``: leaving it without a commit aborts.

        Args:
            manifest: what will come; by default the names and shapes that the live version came by. What does not fit
                is found here.
            atomic: see ``update``.
            only: see ``update``.
            cast: see ``update``.
            rename: new names for what is fed, see ``hotweights.load``.
            timeout: see ``update``; it counts to the end of the commit.
            check: see ``update``; ``prepare`` calls it.

        Raises:
            UpdateAborted: the manifest does not fit, or the host cannot hold the copy; nothing was changed.
        """
        check_kind("manifest", manifest, Manifest, "a Manifest, such as hotweights.open(tensors).manifest")
        asked = self._asked(atomic, only, cast, timeout, check)
        if manifest is None:
            fed = FedNames(self._current.names)
            if rename is not None:
                fed = replace(fed, rename=renamer(rename), meant=meant_by(self._others))
            return self._begin(None, asked, fed)
        try:
            fed = FedNames(names_for(manifest, rename, self._match))
        except UsageError:
            raise
        except Exception as error:
            raise aborted(self._current, None, "was refused", error) from error
        return self._begin(manifest.renamed(fed.new), asked, fed)

    def _asked(
        self,
        atomic: Atomic | None,
        only: Patterns | None,
        cast: Cast | None,
        timeout: float | None,
        check: Check | None,
    ) -> Asked:
        patterns = None if only is None else patterns_from(only=only)[0]
        return Asked(self._atomic if atomic is None else atomic, patterns, cast, timeout, self._asks(check))

    def _asks(self, check: Check | None) -> Callable[[], object] | None:
        check_callable(check=check)
        return None if check is None else partial(ask, check, self.model)

    def _check_loaded(self) -> None:
        if self._baseline is None:
            raise UsageError("nothing was loaded yet; the first time, use load")

    @signals.held
    def _begin(self, manifest: Manifest | None, asked: Asked, fed: FedNames) -> Update:
        current = self._current
        with current.reserved():
            self._check_loaded()
            assert self._baseline is not None
            if current.holds is State.TORN and asked.only is not None:
                raise UsageError("the model is torn; only a complete update mends it, so leave only= out")
            if asked.only is not None:
                asked = replace(asked, only=widened(asked.only, self._others))
            return Update.begin(current, self._baseline, self._once.process, self._limit, manifest, asked, fed)
