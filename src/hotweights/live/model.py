"""LiveModel: a model that takes new weights while it serves, all or nothing. The parts beside this file do the work."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import xxhash
from torch import nn

from ..anchors import anchors
from ..arguments import check_model
from ..casts import Cast
from ..collection import without_collection
from ..errors import CommitHookError, HotweightsError, UnknownName, UpdateAborted, UsageError
from ..fit import digests
from ..manifest import Manifest
from ..memory import Pool
from ..modules import dressed, materialise, places, survey
from ..plan import LoadPlan, Patterns, both, destinations_of, matches
from ..progress import progress
from ..sources import open as open_source
from ..sources.contracts import Addressed, InMemory, Reading, Source
from ..sources.iterators import IteratorSource
from ..sources.state import StateSource
from ..trace import trace
from . import ways
from .accounting import OpenLayers
from .layers import Layer, contents, put
from .report import UpdateReport
from .serving import Serving
from .spans import Mirror, Spans, has_bytes
from .units import Unit, coverage, needs_initial, units_of
from .update import Job, Update
from .ways import Atomic, InPlace, Journal, Staged, Way

__all__ = ["Digest", "LiveModel", "State", "process_by_quant_method"]

Process = Callable[[nn.Module], object]
AnySource = str | os.PathLike[str] | Mapping[str, torch.Tensor] | nn.Module | Source
_PLANS = 4  # kept plans: several manifests take turns, none of them for long


class State(enum.Enum):
    """What a live model is in. Only one update runs at a time."""

    EMPTY = "empty"  # nothing was loaded yet
    SERVING = "serving"  # all of one version
    UPDATING = "updating"  # an update runs; version N is what an abort leaves
    PREPARED = "prepared"  # it can be committed; version N still
    TORN = "torn"  # tensors of two versions: an update with atomic=False failed


@dataclass(frozen=True, slots=True)
class Digest:
    """What a model holds.

    Attributes:
        whole: xxh3 of all tensors, names included.
        tensors: xxh3 of each parameter and buffer, by name.
    """

    whole: str
    tensors: Mapping[str, str]


def process_by_quant_method(layer: nn.Module) -> None:
    """What engines do after loading: ``layer.quant_method.process_weights_after_loading(layer)`` where there is one."""
    layer.quant_method.process_weights_after_loading(layer)  # type: ignore[union-attr, operator]


def _has_quant_method(layer: nn.Module) -> bool:
    return hasattr(getattr(layer, "quant_method", None), "process_weights_after_loading")


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
        deferred: Patterns = (),
        atomic: Atomic = "journal",
        memory_limit: int | None = None,
    ) -> None:
        """Take a model in checkpoint format: as its own loading code expects it. Nothing is read or changed.

        Args:
            model: stays the caller's; it is kept alive.
            process: turns one layer's tensors into what its kernels use, once for each load or update, in place. It is
                called for every module that has tensors of its own. By default those with a ``quant_method`` are
                processed, by that.
            deferred: qualified names of layers that are processed after all others, because they read them.
            atomic: how updates are all or nothing, unless they say otherwise, see ``ways.Atomic``.
            memory_limit: bytes of device memory that open layers may take together, when tensors come in an order that
                keeps several open. Over it, tensors wait on the host.
        """
        check_model(model)
        _check_atomic(atomic)
        self.model = model
        self._process: Process = process or process_by_quant_method
        self._has_process = process is not None
        self._deferred = matches(deferred)
        self._atomic: Atomic = atomic
        self._limit = memory_limit
        self._state = State.EMPTY
        self._version: str | int | None = None
        self._commits = 0
        self._hooks: list[Callable[[str | int], object]] = []
        self._serving = Serving()
        self._update: Update | None = None
        self._layers: list[Layer] = []
        self._live: dict[str, torch.Tensor] = {}
        self._where: dict[str, tuple[object, ...]] = {}
        self._mirror: Mirror | None = None
        self._warned = False

    def __repr__(self) -> str:
        return f"<LiveModel of {type(self.model).__name__}: version {self._version!r}, {self._state.value}>"

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

        All hooks run, also when one fails; then ``CommitHookError`` is raised, with the new version in place.
        """
        self._hooks.append(hook)

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
        tensors = {name: one for name, one in survey(self.model).tensors.items() if not nn.parameter.is_lazy(one)}
        found = digests(tensors, tensors)
        whole = xxhash.xxh3_128("".join(f"{name} {one}\n" for name, one in sorted(found.items())).encode())
        return Digest(whole.hexdigest(), found)

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
        reading: Reading = "auto",
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
        if self._state is not State.EMPTY:
            raise UsageError(f"the model holds version {self._version!r}; use update")
        self._options = {
            "allow_missing": both(allow_missing, ()),
            "allow_partial": both(allow_partial, ()),
            "allow_unexpected": both(allow_unexpected, ()),
            "cast": cast,
        }
        with without_collection(), _opened(source) as found, ExitStack() as stack:
            where = None if device is None else torch.device(device)
            plan = trace(self.model, found.manifest, device=where, **self._options)  # type: ignore[arg-type]
            stack.enter_context(self._real(plan, where))
            job = self._first_job(plan)
            self._state = State.UPDATING
            update = self._update = Update(
                _Owner(self), job, InPlace(self._live), self._open_layers(), self._serving, first=True
            )
            return self._run(update, found, version, reading, threads, pool, show_progress)

    @contextmanager
    def _real(self, plan: LoadPlan, device: torch.device | None) -> Iterator[None]:
        """Meta tensors are made real; they are on meta again if the load fails."""
        wanted = set(plan.targets)
        replaced = [] if device is None else materialise(places(self.model), wanted, device)
        try:
            yield
        except BaseException:
            for place, old in replaced:
                place.put(old)
            raise

    def _first_job(self, plan: LoadPlan) -> Job:
        self._layers = [
            Layer(name, module, deferred=self._deferred(name))
            for name, module in self.model.named_modules()
            if self._is_processed(module)
        ]
        self._live = self._tensors(plan)
        self._spans = Spans(self._live)
        direct, units = units_of(plan, self._layers, self._spans)
        wanted = {name for unit in (direct, *units) for name in needs_initial(plan, unit, self._live)}
        self._initial = {name: self._live[name].detach().to("cpu", copy=True) for name in wanted if name in self._spans}
        self._coverage = coverage(plan)
        self._plans = [plan]
        return self._job(plan, direct, units)

    def _job(self, plan: LoadPlan, direct: Unit, units: list[Unit]) -> Job:
        covers = coverage(plan)
        names = {name for name in self._live if covers.get(_owner(plan, name), 0) < self._live[name].numel()}
        return Job(
            self.model, self._process, plan, direct, units, self._spans, self._initial, self._live, frozenset(names)
        )

    def _is_processed(self, module: nn.Module) -> bool:
        if not self._has_process:
            return _has_quant_method(module)
        return any(one is not None for store in (module._parameters, module._buffers) for one in store.values())

    def _tensors(self, plan: LoadPlan) -> dict[str, torch.Tensor]:
        """Every tensor that is kept in place: parameters, buffers, attributes of layers, what only the plan knows."""
        found = survey(self.model).tensors
        for layer in self._layers:
            found |= layer.tensors()
        unnamed = {name for step in plan.steps for name in destinations_of(step)} - found.keys()
        if unnamed:
            reached = anchors(self.model)
            found |= {name: reached[name] for name in unnamed}
        return {name: one for name, one in found.items() if not nn.parameter.is_lazy(one)}

    # Updates.

    def update(
        self,
        source: AnySource,
        *,
        version: str | int | None = None,
        atomic: Atomic | None = None,
        only: Patterns | None = None,
        reading: Reading = "auto",
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
            reading: how files are read.
            threads: how many read at once.
            pool: memory for what cannot be read in place.
            show_progress: whether to draw a progress bar; by default on a terminal.

        Raises:
            UpdateAborted: it failed; its cause says why. Version N is live, byte for byte; with ``atomic=False`` the
                model may be TORN, and says so in ``state``.
            CommitHookError: the new version is live, and a hook failed.
        """
        with without_collection(), ExitStack() as stack:
            try:
                found = stack.enter_context(_opened(source))
            except HotweightsError as error:
                raise UpdateAborted(
                    f"version {self._version!r} is live; the source cannot be opened: {error}"
                ) from error
            version = getattr(found, "version", None) if version is None else version
            update = stack.enter_context(self.begin(found.manifest, atomic=atomic, only=only))
            return self._run(update, self._apart(found), version, reading, threads, pool, show_progress)

    def begin(
        self, manifest: Manifest | None = None, *, atomic: Atomic | None = None, only: Patterns | None = None
    ) -> Update:
        """Begin an update that is fed by hand. Use it in a ``with``: leaving it without a commit aborts.

        Args:
            manifest: what will come; by default what came last time. Everything that does not fit is found here.
            atomic: see ``update``.
            only: see ``update``.

        Raises:
            UpdateAborted: the manifest does not fit, or the host cannot hold the copy; nothing was changed.
        """
        atomic = self._atomic if atomic is None else atomic
        _check_atomic(atomic)
        if self._state is State.EMPTY:
            raise UsageError("nothing was loaded yet; the first time, use load")
        if self._update is not None:
            raise UsageError("another update runs; commit or abort it first")
        if self._state is State.TORN and only is not None:
            raise UsageError("the model is torn; only a complete update mends it")
        try:
            self._prove()
            plan = self._plan(self._plans[0].manifest if manifest is None else manifest, only)
            direct, units = units_of(plan, self._layers, self._spans)
            job = self._job(plan, direct, self._whole(units, plan, only))
            way = self._way(atomic, job)
        except HotweightsError as error:
            raise UpdateAborted(f"version {self._version!r} is live; nothing was changed: {error}") from error
        self._was = self._state
        self._state = State.UPDATING
        self._update = Update(_Owner(self), job, way, self._open_layers(), self._serving, first=False)
        return self._update

    def _plan(self, manifest: Manifest, only: Patterns | None) -> LoadPlan:
        if only is None:
            for plan in self._plans:
                if plan.manifest is manifest or list(plan.manifest.values()) == list(manifest.values()):
                    return plan
        plan = self._traced(manifest, only)
        if only is not None:
            return plan
        problems = [
            f"{name}: {plan_covers} of {covers} elements would be written, which the first load wrote"
            for name, covers in self._coverage.items()
            if (plan_covers := coverage(plan).get(name, 0)) != covers
        ]
        if problems:
            raise HotweightsError("; ".join(sorted(problems)))
        self._plans = [plan, *self._plans][:_PLANS]
        return plan

    def _traced(self, manifest: Manifest, only: Patterns | None) -> LoadPlan:
        """The plan for another manifest, traced while layers whose live tensors were processed hold their twins."""
        options = dict(self._options)
        if only is not None:
            chosen = matches(only)
            others = [name for name in self._plans[0].targets if not chosen(name)]
            options["allow_missing"] = both(options["allow_missing"], others)  # type: ignore[arg-type]
            options["allow_partial"] = both(options["allow_partial"], others)  # type: ignore[arg-type]
        with self._serving.writing():
            before = [(layer.module, contents(layer.module)) for layer in self._layers]
            held = {layer.module: found for layer, (_, found) in zip(self._layers, before, strict=True)}
            try:
                for layer in self._layers:
                    if layer.differs(held[layer.module]):
                        layer.show_twins()
                meta = [name for name, one in survey(self.model).tensors.items() if one.is_meta]
                options["allow_missing"] = both(options["allow_missing"], set(meta) & self._unloaded())  # type: ignore[arg-type]
                return trace(self.model, manifest, device="cpu", **options)  # type: ignore[arg-type]
            finally:
                for module, found in before:
                    put(module, found)

    def _unloaded(self) -> set[str]:
        return set(self._live) - self._coverage.keys()

    def _whole(self, units: list[Unit], plan: LoadPlan, only: Patterns | None) -> list[Unit]:
        """With ``only``, the units that it concerns; they must be complete."""
        if only is None:
            return units
        concerned = [unit for unit in units if unit.sources]
        covers = coverage(plan)
        lacking = [
            f"{name}: layer {unit.name} is processed as one, so an update of a part must bring this too"
            for unit in concerned
            for name in unit.names
            if covers.get(_owner(plan, name), 0) != self._coverage.get(_owner(plan, name), 0)
        ]
        if lacking:
            raise HotweightsError("; ".join(sorted(lacking)))
        return concerned

    def _way(self, atomic: Atomic, job: Job) -> Way:
        if atomic is False:
            return InPlace(self._live)
        if self._mirror is None:
            self._mirror = Mirror(Spans(self._live), ways.host_copy)
        touched = {name for unit in (job.direct, *job.units) for name in (*unit.names, *unit.touched)}
        ways.check_room(self._mirror, (name for name in touched if has_bytes(self._live[name])), atomic)
        # The model's own loading code writes to live tensors by references that nobody can swap.
        if atomic == "staged" and not job.plan.fallback:
            return Staged(self._live, self._mirror)
        return Journal(self._live, self._mirror)

    def _apart(self, source: Source) -> Source:
        """A source whose tensors share no memory with the model: writing one layer would change what another reads."""
        if not isinstance(source, InMemory):
            return source
        storages = {one.untyped_storage().data_ptr() for one in self._live.values() if has_bytes(one)}
        borrowed = {name: source.borrow(name) for name in source.manifest}
        shared = [
            name for name, one in borrowed.items() if has_bytes(one) and one.untyped_storage().data_ptr() in storages
        ]
        if not shared:
            return source
        return StateSource({**borrowed, **{name: borrowed[name].clone() for name in shared}})

    def _open_layers(self) -> OpenLayers:
        return OpenLayers(self._limit, warned=self._warned)

    def _run(
        self,
        update: Update,
        source: Source,
        version: str | int | None,
        reading: Reading,
        threads: int | None,
        pool: Pool | None,
        show_progress: bool | None,
    ) -> UpdateReport:
        with ExitStack() as stack:
            pool = pool or stack.enter_context(Pool())
            nbytes = sum(spec.nbytes for spec in source.manifest.values())
            advance = stack.enter_context(progress("loading", nbytes, show=show_progress))
            roads = {"reading": reading, "threads": threads} if isinstance(source, Addressed) else {}
            update.run(source, pool=pool, advance=advance, **roads)
            update.peak_buffer = pool.stats().peak * pool.slot_nbytes
            return update.commit(version)

    # What updates call.

    @contextmanager
    def _failing(self, update: Update) -> Iterator[None]:
        """Any failure inside aborts the update, and is told as such."""
        try:
            yield
        except BaseException as error:
            self._abort(update)
            if update.first or not isinstance(error, Exception):
                raise
            left = (
                f"the model is {self._state.value}"
                if self._state is State.TORN
                else f"version {self._version!r} is live"
            )
            raise UpdateAborted(f"{left}; the update failed: {error}") from error

    def _prepared(self, update: Update) -> None:
        assert update is self._update
        self._state = State.PREPARED

    def _prove(self) -> None:
        """Every live tensor is where it was, as it was: so aliases and ties hold too."""
        if not self._where:
            return
        now = self._tensors(self._plans[0])
        moved = [
            f"{name}: is not the tensor that it was; something else replaced or moved it"
            for name, where in self._where.items()
            if name not in now or _where(now[name]) != where
        ]
        if moved:
            raise HotweightsError("; ".join(sorted(moved)[:10]))

    @contextmanager
    def _showing(self, way: Way) -> Iterator[None]:
        """The model holds what it will hold, for layers that read others while they are processed."""
        found = [(place, place.tensor) for place in places(self.model)]
        try:
            for place, tensor in found:
                value = way.value(place.name)
                if value is not tensor:
                    place.put(_as(value, tensor))
            yield
        finally:
            for place, tensor in found:
                place.put(tensor)

    def _commit(self, update: Update, version: str | int | None) -> UpdateReport:
        with update.committing():
            update.written = update.way.commit()
            previous, self._version = self._version, self._commits + 1 if version is None else version
            self._commits += 1
            self._state = State.SERVING
            self._update = None
            if update.first:
                self._live = self._tensors(self._plans[0])
                self._where = {name: _where(one) for name, one in self._live.items()}
        self._warned = update.warned
        report = update.report(previous, self._version, self._mirror.nbytes if self._mirror is not None else 0)
        self._call_hooks(report.version)
        return report

    def _call_hooks(self, version: str | int) -> None:
        failed: list[tuple[Callable[[str | int], object], Exception]] = []
        for hook in self._hooks:
            try:
                hook(version)
            except Exception as error:
                failed.append((hook, error))
        if failed:
            problems = [f"{getattr(hook, '__qualname__', hook)}: {error!r}" for hook, error in failed]
            raise CommitHookError(f"version {version!r} is live, and hooks failed", problems) from failed[0][1]

    def _abort(self, update: Update) -> None:
        with update.aborting():
            update.way.abort()
            self._update = None
            self._warned = update.warned
            if update.first:
                for layer in self._layers:
                    layer.open(Mirror(self._spans, ways.host_copy).__getitem__)
                self._state = State.EMPTY
            else:
                torn = update.way.wrote and type(update.way) is InPlace
                self._state = State.TORN if torn else self._was


class _Owner:
    """What an update may do with its live model."""

    def __init__(self, live: LiveModel) -> None:
        self.failing = live._failing
        self.prepared = live._prepared
        self.prove = live._prove
        self.showing = live._showing
        self.commit = live._commit
        self.abort = live._abort


def _where(tensor: torch.Tensor) -> tuple[object, ...]:
    if not has_bytes(tensor):
        return (id(tensor),)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _as(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return dressed(value.detach(), like)


def _owner(plan: LoadPlan, name: str) -> str:
    target = plan.targets.get(name)
    return name if target is None else target.owner


def _check_atomic(atomic: object) -> None:
    if atomic is not False and atomic not in ("staged", "journal"):
        raise UnknownName("atomic", atomic, ("staged", "journal", "False"))


@contextmanager
def _opened(source: AnySource) -> Iterator[Source]:
    """The source; one that is opened here is closed here."""
    if isinstance(source, (str, os.PathLike, Mapping, nn.Module)):
        with open_source(source) as found:
            yield found
    elif isinstance(source, IteratorSource) and not isinstance(source, Source):
        with source.collect() as found:
            yield found
    elif isinstance(source, Source):
        yield source
    else:
        raise UsageError(
            f"a source is a path, a mapping of tensors, a module or a Source; found {type(source).__name__}"
        )
