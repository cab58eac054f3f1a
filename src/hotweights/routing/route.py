"""``route``: the tensors of one source, given to the loading code of several components."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain

import torch
from msgspec.structs import replace
from torch import nn

from ..arguments import check_count
from ..errors import PlanError, RoutingError
from ..forked import alone_in_a_fork
from ..gc_pause import without_collection
from ..loading.apart import apart
from ..loading.load import load
from ..manifest import Manifest, TensorSpec
from ..memory.extents import Extents
from ..model.reachable import reachable
from ..model.survey import finished, own_loader
from ..names import unwrapped
from ..plan.plan import LoadPlan
from ..signals import held, watched
from ..sources.contracts import Addressed, InMemory, OnDisk, Source
from ..sources.iterator import IteratorSource
from ..sources.opening import AnySource, is_pairs, opened
from ..sources.owned import unsupported
from ..sources.pairs import pairs_of
from ..sources.state_dict import StateSource, check_whole
from ..tracing.fake_weight import FakeWeight
from ..tracing.trace import trace
from .component import Component, Routes, unfilled
from .handover import Feed, OnePass, Pairs, own
from .memory import memory_of
from .parts import Passing, Readings, Subset
from .report import RouteReport

_Load = Callable[[Pairs], object]


@alone_in_a_fork()
@watched
def route(
    source: AnySource | Pairs,
    components: Iterable[Component],
    *,
    borrowed: bool = True,
    memory_limit: int | None = None,
) -> RouteReport:
    """Give each component's own loading code the tensors that are its own. For code without a plan.

    No loading code ever gets a tensor that will be overwritten: it may keep tensors, sort them, or let them wait.

    Files, mappings and modules are read in the order of the components, one after another, and nothing waits. A stream
    is passed through once, to its end. One component is loaded while it passes: the largest by the manifest, or without
    a manifest the first that has loading code. Copies of the others' tensors wait for the end. Without a manifest, the
    tensors of a module that is loaded by name always wait.

    Loading code runs without autograd, in this thread. A failure leaves its component loaded in part, those before it
    loaded, and those after it untouched; the error's note says which. The source's stream is closed in any case; a
    source that was open stays open.

    Args:
        source: an open source; anything that ``hotweights.open`` takes; or an iterable of names and tensors.
        components: the parts of the model. They are loaded in this order, but for the one that is loaded while a stream
            passes.
        borrowed: whether the tensors of pairs, of a mapping or of a module may be overwritten later. If not, they are
            handed on uncopied. Files and open sources know for themselves.
        memory_limit: how many bytes may wait for the end of a stream; by default any number.

    Raises:
        CheckpointError: the checkpoint is broken; nothing was read.
        PlanError: by the manifest, source and components do not fit; nothing was read.
        RoutingError: a stream without a manifest has passed, and it and the components do not fit; or more than
            ``memory_limit`` would have to wait.
        UsageError: an argument is of the wrong kind; nothing was read.
    """
    began = time.perf_counter()
    if memory_limit is not None:
        check_count(0, memory_limit=memory_limit)
    routes = Routes(components)
    with ExitStack() as stack:
        done = _Loaded()
        if is_pairs(source):
            _from_pairs(source, routes, done, stack, borrowed, memory_limit)
        elif isinstance(source, IteratorSource) and not isinstance(source, Source):
            # It has no manifest. The tensors that it yields are owned.
            _from_pairs(source.tensors(), routes, done, stack, False, memory_limit)
        else:
            given = stack.enter_context(opened(source))
            check_whole(given.manifest)
            if isinstance(given, (Addressed, InMemory)):
                _one_after_another(given, routes, done, stack, borrowed)
                if isinstance(given, OnDisk):
                    given.check()
            else:
                _from_stream(given, routes, done, stack, memory_limit)
    return _report(routes, done, time.perf_counter() - began)


@dataclass(slots=True)
class _Loaded:
    """What was done so far, by component. ``taken`` holds the names that its loading code knows."""

    returned: dict[str, object] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)
    taken: dict[str, set[str]] = field(default_factory=dict)
    peak: int = 0
    streamed: str | None = None


def _report(routes: Routes, done: _Loaded, seconds: float) -> RouteReport:
    loaded = {part.name: routes.names(part) for part in routes.components if part.name in done.returned}
    untaken = {
        name: tuple(theirs for ours, theirs in names.items() if ours not in done.taken[name])
        for name, names in loaded.items()
    }
    return RouteReport(
        tensors={name: tuple(names.values()) for name, names in loaded.items()},
        nbytes={name: done.nbytes[name] for name in loaded},
        returned=done.returned,
        untaken={name: names for name, names in untaken.items() if names},
        disabled={part.name: tuple(routes.names(part).values()) for part in routes.components if not part.enabled},
        streamed=done.streamed,
        peak_waiting_bytes=done.peak,
        seconds=seconds,
    )


# --- one component ---------------------------------------------------------------------------------------------------


def _code(component: Component) -> _Load | None:
    """The component's loading code; ``None`` if it is a module that is loaded by name."""
    target = component.load_weights
    return own_loader(unwrapped(target)) if isinstance(target, nn.Module) else target


@held  # Else a signal might leave autograd off.
def _give(component: Component, load: _Load, pairs: Pairs, done: _Loaded) -> None:
    """Let the component's code load ``pairs``."""
    feed = Feed(pairs)
    try:
        with torch.no_grad():
            returned = finished(load(feed))
        if feed.failure is not None:  # Loading code that swallows it takes a broken stream for one that has ended.
            raise feed.failure
    except BaseException as error:
        given = f", after it was given {feed.last!r}" if feed.last else ""
        before = ", ".join(done.returned) or "none"
        error.add_note(
            f"hotweights: raised while component {component.name!r} was loaded{given}; loaded by then: {before}"
        )
        raise
    finally:
        feed.end()
    done.returned[component.name] = returned
    done.taken[component.name] = feed.taken
    done.nbytes[component.name] = feed.nbytes


# --- with a manifest -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _ByName:
    """How a module without loading code is loaded; ``manifest`` has its tensors under the names that it knows."""

    manifest: Manifest
    plan: LoadPlan


@dataclass(frozen=True, slots=True)
class _Planned:
    """What a component will get. ``by_name`` is ``None`` if its own code loads it."""

    nbytes: int
    by_name: _ByName | None = None


@without_collection()
def _plan(manifest: Manifest, routes: Routes, *, limit: int | None) -> dict[Component, _Planned]:
    """What each component gets, and how it is loaded if that is by name.

    Raises:
        PlanError: with every problem that the manifest shows.
    """
    for name in manifest:
        routes.place(name)
    problems = [*routes.problems, *unfilled(routes)]
    planned: dict[Component, _Planned] = {}
    for component in routes.loaded():
        specs = [manifest[theirs] for theirs in routes.names(component).values()]
        by_name = None
        if _code(component) is None:
            by_name, misfits = _plan_by_name(component, specs, routes)
        else:
            misfits = [why for spec in specs if (why := unsupported(spec)) is not None]
        problems += (f"{component.name}: {misfit}" for misfit in misfits)
        planned[component] = _Planned(sum(spec.nbytes for spec in specs), by_name)
    waiting = sum(sorted(what.nbytes for what in planned.values())[:-1])
    if limit is not None and waiting > limit:
        problems.append(f"{waiting} bytes would have to wait for the end of the stream, more than memory_limit={limit}")
    if problems:
        raise PlanError("source and components do not fit; nothing was read", problems)
    return planned


def _plan_by_name(component: Component, specs: list[TensorSpec], routes: Routes) -> tuple[_ByName | None, list[str]]:
    assert isinstance(component.load_weights, nn.Module)
    part = Manifest(replace(spec, name=ours) for spec, ours in zip(specs, routes.names(component), strict=True))
    try:
        return _ByName(part, trace(component.load_weights, part, cast=component.cast)), []
    except PlanError as error:
        return None, list(error.problems)


def _one_after_another(
    source: Addressed | InMemory, routes: Routes, done: _Loaded, stack: ExitStack, borrowed: bool
) -> None:
    planned = _plan(source.manifest, routes, limit=None)
    # A component may be given tensors that lie in another's memory, under other names.
    wanted = {name for component in planned for name in routes.names(component).values()}
    if isinstance(source, InMemory):
        source, _ = apart(source, partial(_memory, routes), wanted)
    coded = [routes.names(component) for component in planned if _code(component) is not None]
    pairs: Callable[[Mapping[str, str]], Pairs]
    if isinstance(source, Addressed):
        readings = Readings(source, coded)
        stack.callback(readings.close)
        pairs = readings.pairs
    else:
        pairs = partial(_from_memory, source, borrowed)
    for component, what in planned.items():
        names = routes.names(component)
        if what.by_name is None:
            code = _code(component)
            assert code is not None
            _give(component, code, pairs(names), done)
        else:
            # Without the detour over pairs: from where the bytes lie straight into the parameters.
            _give(component, partial(_directly, component, _part(source, names), what.by_name.plan), (), done)
            done.taken[component.name], done.nbytes[component.name] = set(names), what.nbytes


def _from_memory(source: InMemory, borrowed: bool, names: Mapping[str, str]) -> Pairs:
    return ((ours, own(theirs, source.borrow(theirs), borrowed)) for ours, theirs in names.items())


def _part(source: Addressed | InMemory, names: Mapping[str, str]) -> Source:
    if isinstance(source, Addressed):
        return Subset(source, names)
    return StateSource({ours: source.borrow(theirs) for ours, theirs in names.items()})


def _directly(component: Component, part: Source, plan: LoadPlan | None, _: Pairs) -> object:
    return _by_name(component, part, plan)


def _by_name(component: Component, source: Source, plan: LoadPlan | None) -> object:
    assert isinstance(component.load_weights, nn.Module)
    return load(component.load_weights, source, plan=plan, cast=component.cast, show_progress=False)


def _when_whole(component: Component, state: dict[str, torch.Tensor]) -> object:
    if any(isinstance(tensor, FakeWeight) for tensor in state.values()):
        assert isinstance(component.load_weights, nn.Module)
        # The caller's code is being traced. A load in here would plan for itself, and ask fake tensors for bytes.
        return component.load_weights.load_state_dict(state)
    return _by_name(component, StateSource(state), None)


# --- streams ---------------------------------------------------------------------------------------------------------


def _from_stream(source: Source, routes: Routes, done: _Loaded, stack: ExitStack, limit: int | None) -> None:
    """Load from a source with a manifest that can only be streamed."""
    planned = _plan(source.manifest, routes, limit=limit)
    promised = {theirs: (part, ours) for part in planned for ours, theirs in routes.names(part).items()}
    largest = max(planned, key=lambda component: planned[component].nbytes, default=None)
    loads = {component: _load(component, what.by_name) for component, what in planned.items()}
    with source.leases() as leases:
        items = ((lease.name, lease) for lease in leases)
        plan = None if largest is None or (by_name := planned[largest].by_name) is None else by_name.plan
        stream = OnePass(
            items,
            lambda name: promised.pop(name, None),
            largest,
            limit=limit,
            memory=cache(lambda: Extents(_memory(routes))),
            written=partial(_written, largest, plan),
        )
        _pass_through(stream, loads, done, stack)
    if promised:
        never = [f"{component.name}: {name}" for name, (component, _) in promised.items()]
        raise RoutingError("the source's manifest promised tensors that never came", never)
    _load_waiting(stream, loads, done)


def _from_pairs(
    pairs: Pairs, routes: Routes, done: _Loaded, stack: ExitStack, borrowed: bool, limit: int | None
) -> None:
    """Load from a stream without a manifest."""
    stack.callback(getattr(pairs, "close", bool))
    present = routes.present()
    first = next((component for component in present if _code(component) is not None), None)
    loads = {component: _load(component) for component in present}
    stream = OnePass(
        pairs_of(pairs),
        routes.place,
        first,
        borrowed=borrowed,
        limit=limit,
        memory=cache(lambda: Extents(_memory(routes))),
        written=partial(_written, first, None),
    )
    _pass_through(stream, loads, done, stack)
    problems = [*routes.problems, *unfilled(routes)]
    if problems:
        raise RoutingError("stream and components do not fit", problems)
    _load_waiting(stream, loads, done)


def _memory(routes: Routes) -> Iterator[torch.Tensor]:
    return chain.from_iterable(map(memory_of, routes.present()))


def _written(first: Component | None, plan: LoadPlan | None, given: Collection[str]) -> Extents:
    """The memory that the component may have written, having been given these names; by its own code it may be all."""
    if first is None or not given:
        return Extents(())
    if plan is None:
        return Extents(memory_of(first))
    assert isinstance(first.load_weights, nn.Module)
    origins = plan.manifest.origins
    taken = {name for name in plan.manifest if origins.get(name, name) in given}
    names = {name for step in plan.steps for name in step.destinations if not taken.isdisjoint(step.sources)}
    return Extents(tensor for name, tensor in reachable(unwrapped(first.load_weights)).items() if name in names)


def _load(component: Component, by_name: _ByName | None = None) -> _Load:
    """The code that loads the component from owned tensors."""
    if by_name is not None:
        return lambda pairs: _by_name(component, Passing(by_name.manifest, pairs), by_name.plan)
    return _code(component) or (lambda pairs: _when_whole(component, dict(pairs)))


def _pass_through(stream: OnePass, loads: Mapping[Component, _Load], done: _Loaded, stack: ExitStack) -> None:
    """Load the first component, and go on to the end of the stream, wherever its loading code stopped."""
    stack.callback(stream.waiting.clear)  # An error's traceback would keep the copies alive.
    if stream.seek() and stream.first is not None:
        _give(stream.first, loads[stream.first], stream, done)
        done.streamed = stream.first.name
    while stream.seek():
        pass
    done.peak = stream.waiting_nbytes


def _load_waiting(stream: OnePass, loads: Mapping[Component, _Load], done: _Loaded) -> None:
    for component, code in loads.items():
        if component in stream.waiting:
            _give(component, code, stream.emptied(component), done)
