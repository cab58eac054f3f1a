"""Update: the life of one attempt to take a live model from version N to M: begin, feed, prepare, commit or abort."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import nn

from .. import signals
from ..arguments import check_version
from ..errors import TransferInDoubt, UsageError
from ..failure import failure_report
from ..forked import alone_in_a_fork
from ..loading.verify import Verifier
from ..manifest import Manifest
from ..memory.devices import accelerator_of, wait_for_copies
from ..memory.pool import Pool
from ..notices import forgotten, log
from ..progress import progress
from ..sharding import reshard
from ..sources.contracts import Addressed, InMemory, IOMode, OnDisk, Participant, Source, Timed, warnings_of
from ..sources.pairs import pairs_of, plain
from ..timeline import Timeline
from .aborted import aborted, called
from .asked import Asked
from .attempt import Attempt
from .baseline import Baseline
from .compiled import refuse_frozen
from .fed_names import FedNames
from .job import Job
from .lock import WriteTurn
from .open_layers import OpenLayers
from .previous import Previous, used_up
from .record import in_a_line, tell_commit
from .report import UpdateReport
from .state import Current, State
from .strategy import InPlace, Strategy


class Update:
    """One attempt. A context manager; leaving it without ``commit`` aborts. Made by ``LiveModel.begin``.

    ``feed`` any number of times, then ``prepare``, then ``commit``. Until then version N is live, byte for byte: with
    ``atomic="staged"`` it serves on, with ``"journal"`` it is written over and every failure puts it back. All methods
    but ``abort`` raise ``UpdateAborted`` when something fails, and the update is over.
    """

    # Begin.

    @signals.held
    def __init__(
        self,
        current: Current,
        baseline: Baseline,
        job: Job,
        strategy: Strategy,
        timeline: Timeline,
        turn: WriteTurn,
        limit: int | None,
        fed: FedNames,
        check: Callable[[], object] | None,
        named: str | int | None = None,
    ) -> None:
        """For ``begin`` and ``begin_first``, while the live model is reserved; the end of the update lets go of it."""
        self._current = current
        self._baseline = baseline
        self._strategy = strategy
        self._fed = fed
        self._check_by = check
        self._named = named  # the new version, for messages
        self._attempt = Attempt(job, strategy, OpenLayers(limit, warned=current.warned), turn, fed, timeline)
        self._watcher = signals.watch()
        current.begin(self._attempt)
        # Its bytes lie where those of this update will.
        self._before, current.previous = current.previous, None

    @classmethod
    @signals.held
    def begin_first(
        cls,
        current: Current,
        baseline: Baseline,
        process: Callable[[nn.Module], object],
        limit: int | None,
        fed: FedNames,
        check: Callable[[], object] | None = None,
        named: str | int | None = None,
    ) -> Update:
        """The first load, straight into the model's own tensors."""
        timeline, turn, job = (
            Timeline(),
            WriteTurn(current.guard, devices=baseline.devices),
            baseline.first_job(process),
        )
        return cls(current, baseline, job, InPlace(baseline.live), timeline, turn, limit, fed, check, named)

    @classmethod
    @signals.held
    def begin(
        cls,
        current: Current,
        baseline: Baseline,
        process: Callable[[nn.Module], object],
        limit: int | None,
        manifest: Manifest | None,
        asked: Asked,
        fed: FedNames,
    ) -> Update:
        """Find everything that does not fit; then begin.

        Raises:
            UpdateAborted: the manifest does not fit, or the host cannot hold the copy; nothing was changed.
        """
        timeline = Timeline()
        turn = WriteTurn(current.guard, asked.timeout, timeline.note, baseline.devices)
        try:
            refuse_frozen()
            current.guard.check_writable()
            baseline.prove()
            with timeline.event("plan"):
                find = baseline.plans.find
                found = find(manifest, asked.only, baseline.live, asked.cast, alone=turn.briefly)
            job = baseline.job(process, found, promised=manifest is not None)
            strategy = baseline.strategy(asked.atomic, job)
        except UsageError:
            raise
        except Exception as error:
            raise aborted(current, asked.version, "was refused", error, timeline) from error
        return cls(current, baseline, job, strategy, timeline, turn, limit, fed, asked.check, asked.version)

    @property
    def manifest(self) -> Manifest:
        """What it must be fed: names, dtypes and shapes."""
        return self._fed.promised(self._attempt.manifest)

    @property
    def open_nbytes(self) -> int:
        """Device memory that layers take which have begun and lack tensors."""
        return self._attempt.open_nbytes

    # Feed.

    @alone_in_a_fork()
    @signals.held
    def feed(self, pairs: Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor]) -> None:
        """Take tensors, in any order and any number of calls. They may be borrowed: nothing is kept but by copy.

        A tensor is read until the iterator is advanced, on a device until its queue is done. Where ``begin`` was given
        no manifest, floats may come in other dtypes than before, as far as ``cast=`` allows.

        Raises:
            UsageError: these are no pairs; nothing was taken, and the update goes on.
            UpdateAborted: a tensor is unknown, of another dtype or shape than promised, or comes twice; it lies in the
                model's own memory, and that is written in place; or the iterator raised.
        """
        self._check("feed")
        if self._current.prepared:
            raise UsageError("this update is prepared; it cannot be fed any more")
        given = pairs_of(pairs)
        with self._failing():
            self._attempt.take_as_it_comes()
            for called, given_tensor in given:
                name = self._fed.of(called, self._attempt.manifest)
                tensor = plain(called, given_tensor, self._attempt.manifest.get(name))
                self._attempt.check_apart(name, tensor)
                # Behind the next tensor this one may be written over.
                wait_for_copies(self._attempt.take(name, tensor, tensor.clone))
                signals.deliver()

    @signals.held
    def run(
        self,
        source: Source,
        version: str | int | None,
        *,
        io: IOMode = "auto",
        threads: int | None = None,
        pool: Pool | None = None,
        verify: Verifier | None = None,
        show_progress: bool | None = None,
    ) -> UpdateReport:
        """Take everything from a source, and commit: with the group, where the source is a participant of one.

        Raises:
            UpdateAborted, CommitHookError: as ``feed``, ``prepare`` and ``commit``.
        """
        attempt = self._attempt
        with ExitStack() as stack:
            pool = pool or stack.enter_context(Pool(device=accelerator_of(self._baseline.devices())))
            options = {"io": io, "threads": threads} if isinstance(source, Addressed) else {}
            with self._failing():
                if isinstance(source, Timed):
                    source.time_into(attempt.timeline)
                if isinstance(source, Participant) and not isinstance(source, (Addressed, InMemory)):
                    with attempt.timeline.event("ask"):
                        source.wanted(attempt.requests())  # Others are asked for it tensor by tensor.
                nbytes = attempt.nbytes_to_read(source)
                advance = stack.enter_context(progress("loading", nbytes, show=show_progress))
                attempt.run(source, pool=pool, advance=advance, verify=verify, **options)
            attempt.peak_buffer = pool.stats().peak * pool.slot_nbytes
            self.prepare()
            with self._failing():
                if isinstance(source, OnDisk):
                    source.check()
                if isinstance(source, Participant):
                    if attempt.turn.has_limit:  # When the group has decided it is too late to give up.
                        attempt.turn.take()
                    self._current.deciding = source
                    stack.enter_context(source.decision())
            report = self.commit(version)
            return replace(report, warnings=(*warnings_of(source), *report.warnings))

    # Prepare.

    @alone_in_a_fork()
    @signals.held
    def prepare(self) -> None:
        """See that everything came, finish what waited, prove addresses and aliases; then ask ``check``.

        Version N is still live.

        Raises:
            UpdateAborted: something is missing, or was moved, or the check refused the version.
        """
        self._check("prepare")
        if self._current.prepared:
            return
        with self._failing(), self._attempt.timeline.event("prepare", ""):
            self._attempt.finish()
            self._baseline.prove()
            if self._check_by is not None:
                self._look(self._check_by)
            signals.deliver()  # The last place where an interruption still leaves version N.
        self._current.prepared = True

    @signals.held
    def _look(self, check: Callable[[], object]) -> None:
        """Let a check look at version M, with nobody else in the model, and take M out again."""
        current = self._current
        with self._attempt.turn.briefly(), self._attempt.timeline.event("check", ""):
            try:
                self._attempt.turn.take()
                self._show()
                with current.guard.writer_reads():
                    check()
            finally:
                self._hide()
        self._baseline.prove()  # The check is code of others too.

    @signals.whole
    def _show(self) -> None:
        self._current.checking = True
        self._strategy.show()
        self._wrote_all()

    @signals.whole
    def _hide(self) -> None:
        self._current.checking = False
        self._strategy.hide()
        self._wrote_all()

    def _wrote_all(self) -> None:
        reshard(self._attempt.job.model.modules())
        self._baseline.written(self._attempt.job)

    # Commit.

    @alone_in_a_fork()
    @signals.held
    def commit(self, version: str | int | None = None) -> UpdateReport:
        """Make it version M. Once readers have left, nothing can fail but the hooks, and they run after it.

        Args:
            version: its name; by default the number of commits, as text where the name before is text.

        Raises:
            UpdateAborted: something is missing, as ``prepare`` says, or readers did not leave in time.
            CommitHookError: version M is live, and a hook failed.
        """
        self._check("commit")
        check_version(version)
        self._named = self._named if version is None else version
        self.prepare()
        with self._failing():
            self._attempt.turn.take()
        failures: list[BaseException] = []
        report = None
        try:
            report = self._make_live(version, failures)
            with self._current.guard.writer_reads():
                self._current.hooks.call(report.version, failures)
            if failures:
                raise failures[0]
            return report
        finally:
            self._end()
            if report is not None:
                self._current.record.warned.add(self._attempt.open_warning)
                tell_commit(report, self._current.record.warned)
            if failures:
                self._note_late(failures[0])
            failures.clear()  # Their tracebacks hold this frame.

    def _note_late(self, error: BaseException) -> None:
        said = None if isinstance(error, Exception) else f"{self._current}; {_ending(error)} came during its commit"
        self._current.record.note_error(error, said)

    @signals.whole
    def _make_live(self, version: str | int | None, failures: list[BaseException]) -> UpdateReport:
        """Make the model version M, its bytes and its name: no signal comes between them."""
        current, attempt = self._current, self._attempt
        keeps = current.keeps_previous and current.holds is State.SERVING and self._strategy.name is not False
        kept = Previous(current, self._baseline, self._strategy, attempt.job) if keeps else None
        with attempt.timeline.event("commit", ""):
            nbytes = self._written(failures)
        current.previous, self._before = kept, None
        if kept is None:
            current.gone = _none_kept(current, attempt.job, self._strategy)
        current.commits += 1
        previous, current.version = current.version, current.default_name if version is None else version
        current.holds, current.running, current.warned = State.SERVING, None, attempt.warned
        current.doubted = False
        self._baseline.committed(attempt.job)
        if self._baseline.plans.last is attempt.job.plan:  # A partial update is not what the next one repeats.
            current.names = self._fed.new
        report = attempt.report(previous, current.version, nbytes, self._baseline.copy_nbytes)
        current.record.note_commit(report)
        return report

    def _written(self, failures: list[BaseException]) -> int:
        """How many bytes were written to make it version M. An interruption is put into ``failures``."""
        try:
            return self._commit()
        except BaseException as error:
            if not isinstance(error, Exception):
                failures.append(error)
        try:
            return self._commit()  # It writes what lies beside the model: that can be done again.
        except BaseException:
            self._current.holds, self._current.running = State.TORN, None
            raise

    def _commit(self) -> int:
        nbytes = self._strategy.show() if self._current.keeps_previous else self._strategy.commit()
        reshard(self._attempt.job.model.modules())
        return nbytes

    # Abort.

    @signals.whole
    def abort(self) -> None:
        """Make it version N again, whatever was fed. May be called twice, and does nothing after a commit."""
        if self._is_over():
            return
        attempt = self._attempt
        self._current.running, self._current.warned = None, attempt.warned
        torn = self._strategy.name is False and self._strategy.wrote
        try:
            alone_in_a_fork()(self._strategy.abort)()
            if attempt.job.first:
                self._baseline.reset(attempt.begun)
            if self._strategy.exclusive and self._strategy.wrote:
                self._baseline.written(attempt.job)
        except BaseException:
            torn = True
            raise
        finally:
            if torn and not attempt.job.first:
                self._baseline.torn(attempt.job)
                self._current.holds = State.TORN
            self._keep_on(torn)
            self._end()

    def _keep_on(self, torn: bool) -> None:
        """The version before N can be rolled back to all the same, unless this update has written over it."""
        before, self._before = self._before, None
        if before is not None and self._strategy.touched:
            self._current.gone = used_up(before, self._named)
        elif not torn:
            self._current.previous = before

    @contextmanager
    @signals.held
    def _failing(self) -> Iterator[None]:
        """Any failure inside aborts the update, and is told as such."""
        try:
            yield
        except BaseException as error:
            self.abort()
            self._current.doubted |= isinstance(error, TransferInDoubt)
            if self._attempt.job.first or not isinstance(error, Exception):
                self._note(error)
                raise
            raise aborted(self._current, self._named, "failed", error, self._attempt.timeline) from error

    # Its end.

    @signals.whole
    def _end(self) -> None:
        self._attempt.forget()
        self._current.end()
        signals.unwatch(self._watcher)

    @signals.held  # Else a signal in it would keep ``__exit__`` from the abort.
    def _is_over(self) -> bool:
        return self._current.running is not self._attempt

    def _check(self, verb: str) -> None:
        if self._is_over():
            raise UsageError(f"this update is over; it cannot {verb}. Begin another one")

    @signals.held
    def __enter__(self) -> Update:
        return self

    @signals.held
    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        was_over = self._is_over()
        self.abort()
        if error is None and not was_over:
            log(logging.WARNING, "an update was not committed before its with ended; %s", self._current)
        elif error is not None and not was_over:
            self._note(error)

    def _note(self, error: BaseException) -> None:
        """Take note of what ended this update and is raised as it is. Ctrl-C says nothing of itself."""
        said, what = None, called(self._named)
        if self._attempt.job.first:
            what = "the first load" + (f", of {what}," if self._named is not None else "")
            said = f"{what} failed: {in_a_line(error)}"
        if not isinstance(error, Exception):
            said = f"{what} was ended by {_ending(error)}; {self._current}"
        deed = "load" if self._attempt.job.first else "update"
        report = failure_report(self._attempt.timeline, deed, self._named)
        self._current.record.note_failure(error, said, report)

    @signals.whole  # A signal at its first line would leave the lock taken, and signals watched, for ever.
    def __del__(self) -> None:
        if hasattr(self, "_attempt") and not self._is_over():  # Its making may have been interrupted.
            try:
                forgotten("an update was neither committed nor aborted; it is aborted now", self)
            finally:
                self.abort()


def _ending(error: BaseException) -> str:
    return "a cancellation" if isinstance(error, signals.Stopped) else type(error).__name__


def _none_kept(current: Current, job: Job, strategy: Strategy) -> str:
    """Why a commit kept no version before."""
    if strategy.name is False and not job.first:
        return 'its update had atomic=False, and a commit with atomic="staged" or "journal" keeps one'
    if current.holds is State.TORN:
        return "the model was torn before"
    return "only one version was live so far"
