"""``route``: one source to the loading code of several components. It moves tensors; what goes where is decided."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import GeneratorType

import torch
from msgspec.structs import replace
from torch import nn

from .devices import record_event, wait_for_copies
from .errors import PlanError, RoutingError, UsageError
from .load import load
from .manifest import Manifest
from .memory import Lease
from .plan import LoadPlan
from .report import RouteReport
from .routing import Component, Routes, unfilled
from .sources import Addressed, Source, StateSource
from .sources import open as open_source
from .sources.contracts import InMemory
from .sources.parts import Part, Passing, unsupported
from .trace import trace
from .tracing import StandIn

__all__ = ["route"]

Pairs = Iterable[tuple[str, torch.Tensor]]
_Load = Callable[[Pairs], object]
_Item = torch.Tensor | Lease
_Place = Callable[[str], "tuple[Component, str] | None"]


def route(
    source: str | os.PathLike[str] | Mapping[str, torch.Tensor] | nn.Module | Source | Pairs,
    components: Iterable[Component],
    *,
    borrowed: bool = True,
    memory_limit: int | None = None,
) -> RouteReport:
    """Give each component's own loading code the tensors that are its own. For code without a plan.

    No loading code ever gets a tensor that will be overwritten: it may keep them, sort them, wait with one for another.
    Where the source has to be asked tensor by tensor in an order of our choice (files, mappings, modules), components
    are loaded one after another, and nothing waits. A stream is passed through once, to its end: one component is
    loaded while it passes, the largest by the manifest, or without a manifest the first that has loading code; copies
    of the others' tensors wait for its end. A module that is loaded by name and a stream without a manifest make that
    module's tensors wait, too.

    Loading code runs without autograd, in this thread. A failure leaves its component loaded in part, those before it
    loaded, and those after it untouched; the error's note says which. The source's stream is closed in any case; a
    source that was open stays open.

    Args:
        source: an open source; anything that ``hotweights.open`` takes; or an iterable of names and tensors.
        components: the parts of the model, in the order in which they are loaded, but for the one that streams first.
        borrowed: whether whoever made the pairs, or owns the mapping or module, may overwrite the tensors later. If
            not, they are handed on uncopied. Files and open streams of leases know for themselves.
        memory_limit: bytes that may wait for the end of a stream; by default any number.

    Raises:
        CheckpointError: the checkpoint is broken; nothing was read.
        PlanError: by the manifest, source and components do not fit; nothing was read.
        RoutingError: the same, for a stream without a manifest, which is known when it has passed; or more than
            ``memory_limit`` would have to wait.
    """
    began = time.perf_counter()
    if memory_limit is not None and memory_limit < 0:
        raise UsageError(f"a limit of memory is a number of bytes; got memory_limit={memory_limit}")
    routes = Routes(components)
    with ExitStack() as stack:
        given: Source | Pairs
        if isinstance(source, (str, os.PathLike, Mapping, nn.Module)):
            opened: Source = open_source(source)
            given = stack.enter_context(opened)
        else:
            given = source
        done = _Done()
        stack.callback(done.waiting.clear)  # The frames of an error would keep the copies alive.
        if isinstance(given, (Addressed, InMemory)):
            _one_after_another(given, routes, done, borrowed)
        elif isinstance(given, Source):
            _from_stream(given, routes, done, memory_limit)
        elif isinstance(given, Iterable):
            _from_pairs(given, routes, done, stack, borrowed, memory_limit)
        else:
            raise UsageError(f"a {type(given).__name__} is no source, and yields no pairs of names and tensors")
    return _report(routes, done, time.perf_counter() - began)


@dataclass(slots=True)
class _Done:
    """What has been done so far, by name of component. ``taken`` holds names as its loading code knows them."""

    returned: dict[str, object] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)
    taken: dict[str, set[str]] = field(default_factory=dict)
    waiting: dict[Component, deque[tuple[str, torch.Tensor]]] = field(default_factory=dict)
    waiting_nbytes: int = 0
    streamed: str | None = None


def _report(routes: Routes, done: _Done, seconds: float) -> RouteReport:
    loaded = {one.name: routes.names(one) for one in routes.components if one.name in done.returned}
    untaken = {
        name: tuple(theirs for ours, theirs in names.items() if ours not in done.taken[name])
        for name, names in loaded.items()
    }
    return RouteReport(
        tensors={name: tuple(names.values()) for name, names in loaded.items()},
        nbytes={name: done.nbytes[name] for name in loaded},
        returned=done.returned,
        untaken={name: names for name, names in untaken.items() if names},
        disabled={one.name: tuple(routes.names(one).values()) for one in routes.components if not one.enabled},
        streamed=done.streamed,
        peak_waiting_bytes=done.waiting_nbytes,
        seconds=seconds,
    )


# --- one component ---------------------------------------------------------------------------------------------------


def _code(component: Component) -> _Load | None:
    """The component's loading code; ``None`` if it is a module that is loaded by name."""
    target = component.load_weights
    code: _Load | None = getattr(target, "load_weights", None) if isinstance(target, nn.Module) else target
    return code


def _give(component: Component, load: _Load, pairs: Pairs, done: _Done) -> None:
    """Let the component's code load ``pairs``."""
    handed = _Handed(pairs)
    try:
        with torch.no_grad():
            returned = load(handed)
            # Loading code that yields does nothing until somebody asks for what it yields.
            returned = tuple(returned) if isinstance(returned, GeneratorType) else returned
        if handed.failure is not None:  # A broken stream must not look like its end, whatever the loading code thinks.
            raise handed.failure
    except BaseException as error:
        given = f", after it was given {handed.last!r}" if handed.last else ""
        before = ", ".join(done.returned) or "none"
        error.add_note(
            f"hotweights: raised while component {component.name!r} was loaded{given}; loaded by then: {before}"
        )
        raise
    finally:
        handed.end()
    done.returned[component.name] = returned
    done.taken[component.name] = handed.taken
    done.nbytes[component.name] = handed.nbytes


class _Handed:
    """The pairs on their way to one component: they can be ended, and a failure is remembered."""

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = iter(pairs)
        self._over = False
        self.taken: set[str] = set()
        self.last = ""
        self.nbytes = 0
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        if self._over:
            raise StopIteration
        try:
            pair = next(self._pairs)
        except BaseException as error:
            self._over = True
            if not isinstance(error, StopIteration):
                self.failure = error
            raise
        self.last = pair[0]
        self.taken.add(self.last)
        self.nbytes += pair[1].nbytes
        return pair

    def end(self) -> None:
        """Give nothing more, also to code that kept this."""
        self._over = True
        if isinstance(self._pairs, GeneratorType):
            self._pairs.close()


# --- with a manifest -------------------------------------------------------------------------------------------------


def _plan(
    manifest: Manifest, routes: Routes, *, limit: int | None
) -> dict[Component, tuple[Manifest, LoadPlan | None]]:
    """What each component gets, and how it is loaded if it is by name. Raises with every problem that is known now."""
    for name in manifest:
        routes.place(name)
    problems = [*routes.problems, *unfilled(routes)]
    planned: dict[Component, tuple[Manifest, LoadPlan | None]] = {}
    for component in routes.loaded():
        part = Manifest(replace(manifest[theirs], name=ours) for ours, theirs in routes.names(component).items())
        plan, misfits = None, [why for spec in part.values() if (why := unsupported(spec)) is not None]
        if _code(component) is None:
            plan, misfits = _plan_by_name(component, part)
        problems += (f"{component.name}: {misfit}" for misfit in misfits)
        planned[component] = part, plan
    waiting = sum(sorted(part.nbytes for part, _ in planned.values())[:-1])
    if limit is not None and waiting > limit:
        problems.append(f"{waiting} bytes would have to wait, more than memory_limit={limit}")
    if problems:
        raise PlanError("source and components do not fit; nothing was read", problems)
    return planned


def _plan_by_name(component: Component, part: Manifest) -> tuple[LoadPlan | None, list[str]]:
    assert isinstance(component.load_weights, nn.Module)
    try:
        return trace(component.load_weights, part), []
    except PlanError as error:
        return None, list(error.problems)


def _one_after_another(source: Addressed | InMemory, routes: Routes, done: _Done, borrowed: bool) -> None:
    planned = _plan(source.manifest, routes, limit=None)
    for component, (part, plan) in planned.items():
        names = routes.names(component)
        code = _code(component)
        if code is not None:
            _give(component, code, _owned(source, names, borrowed), done)
        else:
            # Straight from where the bytes are to where they belong.
            _give(component, partial(_directly, component, _part(source, names), plan), (), done)
            done.taken[component.name], done.nbytes[component.name] = set(names), part.nbytes


def _owned(source: Addressed | InMemory, names: Mapping[str, str], borrowed: bool) -> Pairs:
    if isinstance(source, Addressed):
        return Part(source, names).tensors()
    return ((ours, _own(theirs, source.borrow(theirs), borrowed)) for ours, theirs in names.items())


def _part(source: Addressed | InMemory, names: Mapping[str, str]) -> Source:
    if isinstance(source, Addressed):
        return Part(source, names)
    return StateSource({ours: source.borrow(theirs) for ours, theirs in names.items()})


def _directly(component: Component, part: Source, plan: LoadPlan | None, _: Pairs) -> object:
    return _by_name(component, part, plan)


def _by_name(component: Component, source: Source, plan: LoadPlan | None) -> object:
    assert isinstance(component.load_weights, nn.Module)
    return load(component.load_weights, source, plan=plan, show_progress=False)


def _when_whole(component: Component, state: dict[str, torch.Tensor]) -> object:
    if any(isinstance(tensor, StandIn) for tensor in state.values()):
        assert isinstance(component.load_weights, nn.Module)
        # Somebody traces the code that called us: a load within would plan for itself, and ask stand-ins for bytes.
        return component.load_weights.load_state_dict(state)
    return _by_name(component, StateSource(state), None)


def _own(name: str, item: _Item, borrowed: bool) -> torch.Tensor:
    """A tensor that nobody will overwrite: the one that was given, or a contiguous copy."""
    if isinstance(item, Lease):
        tensor = item.own()
        item.release(after=record_event(tensor.device))
        return tensor
    if not isinstance(item, torch.Tensor):
        raise UsageError(f"{name!r} is a {type(item).__name__}, not a tensor")
    if not borrowed:
        return item
    copy = item.detach().clone(memory_format=torch.contiguous_format)
    # Whoever lent it may overwrite it at the next step, and does not know what still runs on our stream.
    wait_for_copies(copy.device)
    return copy


def _nbytes(item: _Item) -> int:
    if isinstance(item, Lease):
        return item.spec.nbytes
    return 0 if isinstance(item, StandIn) else item.nbytes  # A stand-in holds no memory that could be too much.


# --- streams ---------------------------------------------------------------------------------------------------------


def _from_stream(source: Source, routes: Routes, done: _Done, limit: int | None) -> None:
    """A source that comes as it comes, with a manifest."""
    planned = _plan(source.manifest, routes, limit=limit)
    promised = {theirs: (one, ours) for one in planned for ours, theirs in routes.names(one).items()}
    largest = max(planned, key=lambda component: planned[component][0].nbytes, default=None)
    loads = {component: _load(component, part, plan) for component, (part, plan) in planned.items()}
    with source.leases() as leases:
        items = ((lease.name, lease) for lease in leases)
        _Stream(items, lambda name: promised.pop(name, None), done, largest, limit=limit).run(loads)
    if promised:
        never = [f"{component.name}: {name}" for name, (component, _) in promised.items()]
        raise RoutingError("the source's manifest promised what never came", never)
    _load_waiting(loads, done)


def _from_pairs(pairs: Pairs, routes: Routes, done: _Done, stack: ExitStack, borrowed: bool, limit: int | None) -> None:
    """A stream of which nothing is known."""
    items = iter(pairs)
    stack.callback(getattr(items, "close", bool))
    present = [one for one in routes.components if one.enabled and one.load_weights is not None]
    loads = {component: _load(component) for component in present}
    first = next((one for one in present if _code(one) is not None), None)
    _Stream(items, routes.place, done, first, borrowed=borrowed, limit=limit).run(loads)
    problems = [*routes.problems, *unfilled(routes)]
    if problems:
        raise RoutingError("stream and components do not fit", problems)
    _load_waiting(loads, done)


def _load(component: Component, part: Manifest | None = None, plan: LoadPlan | None = None) -> _Load:
    """What loads the component from owned tensors."""
    code = _code(component)
    if code is not None:
        return code
    if part is None:
        return lambda pairs: _when_whole(component, dict(pairs))
    return lambda pairs: _by_name(component, Passing(part, pairs), plan)


def _load_waiting(loads: Mapping[Component, _Load], done: _Done) -> None:
    for component, code in loads.items():
        if component in done.waiting:
            _give(component, code, _emptied(done.waiting.pop(component)), done)


def _emptied(queue: deque[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Nothing here keeps a tensor that has been given away."""
    while queue:
        yield queue.popleft()


class _Stream:
    """One pass through a stream. An iterator over the tensors of one component; copies of the others' wait."""

    def __init__(
        self,
        items: Iterator[tuple[str, _Item]],
        place: _Place,
        done: _Done,
        first: Component | None,
        *,
        borrowed: bool = True,
        limit: int | None,
    ) -> None:
        self._items = items
        self._place = place
        self._done = done
        self._first = first
        self._borrowed = borrowed
        self._limit = limit
        self._found: tuple[str, str, _Item] | None = None

    def run(self, loads: Mapping[Component, _Load]) -> None:
        """Load the first component, and pass on to the end of the stream, wherever its loading code stopped."""
        if self._seek() and self._first is not None:
            _give(self._first, loads[self._first], self, self._done)
            self._done.streamed = self._first.name
        while self._seek():
            pass

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        if self._found is None and not self._seek():
            raise StopIteration
        assert self._found is not None
        (ours, name, item), self._found = self._found, None
        return ours, _own(name, item, self._borrowed)

    def _seek(self) -> bool:
        """Pass on to the next tensor of the first component."""
        self._found = None
        for name, item in self._items:
            placed = self._place(name)
            if placed is None:
                continue
            component, ours = placed
            if component is self._first:
                self._found = ours, name, item
                return True
            self._keep(component, ours, name, item)
        self._items = iter(())  # An iterator of somebody's may not like to be asked again after its end.
        return False

    def _keep(self, component: Component, ours: str, name: str, item: _Item) -> None:
        nbytes = _nbytes(item)
        self._done.waiting_nbytes += nbytes
        if self._limit is not None and self._done.waiting_nbytes > self._limit:
            raise RoutingError(
                f"{component.name}: with {name} ({nbytes} bytes) {self._done.waiting_nbytes} bytes would wait for the "
                f"end of the stream, more than memory_limit={self._limit}; put the largest component first, or give a "
                "source that is read in any order"
            )
        self._done.waiting.setdefault(component, deque()).append((ours, _own(name, item, self._borrowed)))
