"""Baseline: what the first load of a live model finds out, and every update needs. It runs no update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence

import torch
from torch import nn

from ..errors import HotweightsError
from ..memory import host
from ..memory.aliases import has_bytes
from ..model.materialise import dressed
from ..model.places import places
from ..model.reachable import reachable
from ..model.survey import survey
from ..plan.plan import LoadPlan
from ..sources.contracts import InMemory, Source
from ..sources.state_dict import StateSource
from .atomic import Atomic, InPlace, Journal, Staged, Strategy, check_room
from .attributes import held_by, state_of
from .groups import LayerGroup, coverage, elements, units_of
from .job import Job
from .layers import Dressing, Layer, layers_of
from .layout import MemoryLayout, Mirror
from .plans import Options, Plans


class Baseline:
    """A model as it was in checkpoint format, and as it is live.

    Attributes:
        plans: how it is loaded.
        live: every tensor that is kept in place, by name; those of checkpoint format until the first load commits.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: LoadPlan,
        options: Options,
        is_processed: Callable[[nn.Module], bool],
        is_deferred: Callable[[str], bool],
    ) -> None:
        """Look at a model in checkpoint format."""
        self._model = model
        twins: Dressing = {}
        loaded = {name.rpartition(".")[0] for step in plan.steps for name in step.destinations}
        self._loaded = [
            (_joined(name, key), module, key, child)
            for name, module in model.named_modules(remove_duplicate=False)
            for key, child in module._modules.items()
            if child is not None and _joined(name, key) in loaded
        ]
        self._processed = set(layers_of(model, is_processed))
        # Loading code of the model's own may replace tensors, and write here today and there tomorrow: into scratch.
        loose = _by_own_code(model, plan)
        own = frozenset(map(id, model.modules()))
        shared = _shared(model, own)
        self._layers = [
            Layer(names, module, deferred=any(map(is_deferred, names)), twins=twins, own=own, shared=shared)
            for module, names in layers_of(model, lambda one: one in self._processed or one in loose).items()
        ]
        self.live = self._tensors(plan)
        self._spans = MemoryLayout(self.live)
        self.plans = Plans(model, plan, options, self._layers, self._spans)
        self._initial = {name: self.live[name].detach().to("cpu", copy=True) for name in self.plans.initial()}
        self._acted: set[str] = set()
        self._where: dict[str, tuple[object, ...]] = {}
        self._mirror: Mirror | None = None

    @property
    def copy_nbytes(self) -> int:
        """Bytes of the copy of the model that is kept on the host."""
        return 0 if self._mirror is None else self._mirror.nbytes

    def first_job(self, process: Callable[[nn.Module], object]) -> Job:
        """The work of the first load."""
        plan = self.plans.first
        return self._job(process, plan, *units_of(plan, self._layers, self._spans), first=True)

    def job(
        self, process: Callable[[nn.Module], object], plan: LoadPlan, direct: LayerGroup, units: list[LayerGroup]
    ) -> Job:
        """The work of an update."""
        return self._job(process, plan, direct, units, first=False)

    def _job(
        self,
        process: Callable[[nn.Module], object],
        plan: LoadPlan,
        direct: LayerGroup,
        units: list[LayerGroup],
        *,
        first: bool,
    ) -> Job:
        covers, processed = coverage(plan), self._processed
        partial = {name for name in direct.touched if elements(covers, plan, name) < self.live[name].numel()}
        return Job(
            model=self._model,
            process=lambda layer: process(layer) if layer in processed else None,
            plan=plan,
            direct=direct,
            units=units,
            spans=self._spans,
            initial=self._initial,
            live=self.live,
            partial=frozenset(partial),
            acted=self._acted,
            first=first,
        )

    def _tensors(self, plan: LoadPlan) -> dict[str, torch.Tensor]:
        """Every tensor that is kept in place: parameters, buffers, attributes of layers, what only the plan knows."""
        found = survey(self._model).tensors
        for layer in self._layers:
            found |= layer.tensors()
        unnamed = {name for step in plan.steps for name in step.destinations} - found.keys()
        if unnamed:
            reached = reachable(self._model)
            found |= {name: reached[name] for name in unnamed if name in reached}
        return {name: one for name, one in found.items() if not nn.parameter.is_lazy(one)}

    def committed(self, job: Job) -> None:
        """A version came by this job. After the first, all is kept where it is."""
        self.plans.committed(job.plan)
        if job.first:
            self.live = self._tensors(self.plans.first)
            free = {layer.full(key) for layer in self._layers for key in layer.free()} - self._acted
            written = {name for step in self.plans.first.steps for name in step.destinations}
            # Nor is a tensor ours that no step writes and no layer has: whoever uses it may cast it, a table say.
            alone = {name for group in self._spans.together() if written.isdisjoint(group) for name in group}
            free |= alone.difference(*(layer.tensors() for layer in self._layers))
            self._where = {name: _where(one) for name, one in self.live.items() if name not in free - written}

    def prove(self) -> None:
        """Every live tensor is where it was, as it was: so aliases and ties hold too. And so is every module.

        Raises:
            HotweightsError: with the names of those that are not.
        """
        lost = [name for name, module, key, child in self._loaded if module._modules.get(key) is not child]
        if lost:
            raise HotweightsError(
                f"modules that weights are loaded into were replaced, so nothing can be loaded into them: {_some(lost)}"
            )
        now = self._tensors(self.plans.first) if self._where else {}
        moved = sorted(name for name, where in self._where.items() if name not in now or _where(now[name]) != where)
        if moved:
            raise HotweightsError(
                "these are not the tensors that they were; something else replaced or moved them, so put them back or "
                f"make a new live model: {_some(moved)}"
            )

    def way(self, atomic: Atomic, job: Job) -> Strategy:
        """Where the bytes of an update go.

        Raises:
            HotweightsError: the host cannot hold the copy of the model.
        """
        if atomic is False:
            return InPlace(self.live)
        if self._mirror is None:
            self._mirror = Mirror(MemoryLayout(self.live), host.host_copy)
        touched = {name for unit in (job.direct, *job.units) for name in (*unit.names, *unit.touched)}
        touched.update(name for unit in job.units for layer in unit.layers for name in layer.tensors())
        check_room(self._mirror, touched, atomic)
        # The model's own loading code writes to live tensors by references that nobody can swap.
        if atomic == "staged" and not job.plan.fallback:
            return Staged(self.live, self._mirror)
        return Journal(self.live, self._mirror)

    def apart(self, source: Source) -> Source:
        """A source whose tensors share no memory with the model: writing one layer would change what another reads."""
        if not isinstance(source, InMemory):
            return source
        borrowed = {name: source.borrow(name) for name in source.manifest}
        both = {f"model {name}": one for name, one in self.live.items()}
        both |= {f"source {name}": one for name, one in borrowed.items()}
        groups = (group for group in MemoryLayout(both).together() if any(name.startswith("model ") for name in group))
        shared = {name.removeprefix("source ") for group in groups for name in group if name.startswith("source ")}
        if not shared:
            return source
        return StateSource({name: one.clone() if name in shared else one for name, one in borrowed.items()})

    def reset(self, begun: Sequence[LayerGroup]) -> None:
        """After a first load that failed: checkpoint format again, and of what no load writes the old values.

        Layers that were processed get new memory.
        """
        for _, module, key, child in self._loaded:
            module._modules[key] = child
        renewed = {name for unit in begun for name in unit.names}
        loose = {name for unit in begun for name in unit.loose}
        memory = Mirror(self._spans, host.scratch)
        for name, value in self._initial.items():
            host.copy_bytes(memory[name] if name in renewed else self.live[name], value)
        for place in list(places(self._model)):
            if place.name in loose:
                place.put(dressed(memory[place.name], place.tensor))
        dressing: Dressing = {}
        for unit in begun:
            for layer in unit.layers:
                layer.open(memory.__getitem__, dressing, anew=True)


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _by_own_code(model: nn.Module, plan: LoadPlan) -> set[nn.Module]:
    """Modules of which the plan does not write everything, where the model's own code must load a part."""
    if not plan.fallback:
        return set()
    covers = coverage(plan)
    found = ((place.module, place.tensor, elements(covers, plan, place.name)) for place in places(model))
    return {module for module, tensor, count in found if nn.parameter.is_lazy(tensor) or count < tensor.numel()}


def _shared(model: nn.Module, own: Container[int]) -> set[int]:
    """Ids of the containers and objects that attributes of several modules lead to."""
    seen: Counter[int] = Counter()
    for module in model.modules():
        seen.update(id(held.holder) for held in held_by(state_of(module), own).values())
    return {one for one, count in seen.items() if count > 1}


def _where(tensor: torch.Tensor) -> tuple[object, ...]:
    if not has_bytes(tensor):
        return (id(tensor),)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
