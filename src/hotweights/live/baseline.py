"""Baseline: what is found out at the first load of a live model, and needed by every update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence

import torch
from torch import nn

from ..dtypes import Cast
from ..errors import LiveModelError
from ..memory import host
from ..memory.aliases import has_bytes, plain
from ..memory.extents import Extents, renew
from ..model.materialise import dressed
from ..model.merged import refuse_merged
from ..model.offloading import refuse_offloaded
from ..model.places import places
from ..model.processed import note
from ..model.reachable import attributes, reachable
from ..model.survey import survey
from ..model.walk import modules_of
from ..plan.plan import LoadPlan
from . import explain
from .attributes import held_by, state_of
from .groups import LayerGroup, coverage, elements, groups_of
from .job import Job
from .layers import Dressing, Layer, layers_of
from .layout import MemoryLayout, Mirror
from .once import process_by_quant_method
from .plans import Found, Options, Plans
from .strategy import Atomic, InPlace, Journal, Staged, Strategy, check_room


class Baseline:
    """A model as it was in checkpoint format, and as it is live.

    Attributes:
        plans: the plans by which it is loaded.
        live: every tensor that is kept in place, by name; until the first load commits, those in checkpoint format.
        kernels: the memory of layers that processing has changed, from the first load's commit on.
        warnings: what a person should read of each version.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: LoadPlan,
        options: Options,
        is_processed: Callable[[str, nn.Module], bool],
        is_deferred: Callable[[str, nn.Module], bool],
        unknown: Collection[str] = (),
    ) -> None:
        """Look at a model in checkpoint format; ``unknown`` are names of tensors that hold no values yet."""
        self._model = model
        self._by = options.by
        self.kernels = Extents(())
        self.warnings: tuple[str, ...] = ()
        twins: Dressing = {}
        loaded = {name.rpartition(".")[0] for step in plan.steps for name in step.destinations}
        self._loaded = [
            (_joined(name, key), module, key, child)
            for name, module in model.named_modules(remove_duplicate=False)
            for key, child in module._modules.items()
            if child is not None and _joined(name, key) in loaded
        ]
        self._processed = set(layers_of(model, is_processed))
        # The model's own loading code may replace tensors, and write others at the next update: so these get scratch.
        by_own_code = _by_own_code(model, plan)
        own = frozenset(map(id, model.modules()))
        shared = _shared(model, own)
        self._layers = [
            Layer(
                names,
                module,
                deferred=any(is_deferred(name, module) for name in names),
                twins=twins,
                own=own,
                shared=shared,
            )
            for module, names in layers_of(
                model, lambda _, layer: layer in self._processed or layer in by_own_code
            ).items()
        ]
        self.live = self._tensors(plan)
        _refuse_parts(self._layers, survey(model).parts)
        self._layout = MemoryLayout(self.live)
        self.plans = Plans(model, plan, options, self._layers, self._layout, unknown)
        self._initial = {name: self.live[name].detach().to("cpu", copy=True) for name in self.plans.initial()}
        self._acted: set[str] = set()
        self._formats: list[explain.Formats] = []
        self._where: dict[str, tuple[object, ...]] = {}
        self._mirror: Mirror | None = None

    def devices(self) -> set[torch.device]:
        """Where live tensors lie."""
        return {tensor.device for tensor in self.live.values()}

    @property
    def copy_nbytes(self) -> int:
        """Bytes of the copy of the model that is kept on the host."""
        return 0 if self._mirror is None else self._mirror.nbytes

    def first_job(self, process: Callable[[nn.Module], object]) -> Job:
        """The work of the first load."""
        plan = self.plans.first
        groups = groups_of(plan, self._layers, self._layout)
        found = Found(plan, *groups, frozenset(), frozenset(), None)
        return self._job(process, found, None, first=True)

    def job(self, process: Callable[[nn.Module], object], found: Found, *, promised: bool) -> Job:
        """The work of an update; ``promised`` says whether its manifest was given, so that nothing else may come.

        Raises:
            LiveModelError: something else replaced what the first load did not write, and this would.
        """
        cast = None if promised else found.cast
        job = self._job(process, found, cast, first=False)
        written = {name for step in job.plan.steps for name in step.destinations} | job.restored
        loose = {name for name in written & self.live.keys() if name not in self._where}
        if loose:
            now = self._tensors(self.plans.first)
            _refuse_moved(name for name in loose if name not in now or _where(now[name]) != _where(self.live[name]))
        return job

    def _job(
        self,
        process: Callable[[nn.Module], object],
        found: Found,
        cast: Cast | None,
        *,
        first: bool,
    ) -> Job:
        plan, in_place = found.plan, found.in_place
        covers, processed = coverage(plan), self._processed
        partial = {name for name in in_place.touched if elements(covers, plan, name) < self.live[name].numel()}
        return Job(
            model=self._model,
            process=lambda layer: process(layer) if layer in processed else None,
            plan=plan,
            in_place=in_place,
            groups=found.groups,
            layout=self._layout,
            initial=self._initial,
            live=self.live,
            partial=frozenset(partial),
            acted=self._acted,
            restored=found.restored,
            kept=found.kept,
            cast=cast,
            first=first,
            warnings=(*found.warnings, *self.warnings),
            kernels=self.kernels,
            by=self._by,
            unasked=processed if process is process_by_quant_method else frozenset(),
        )

    def _tensors(self, plan: LoadPlan) -> dict[str, torch.Tensor]:
        """Every tensor that is kept in place: parameters, buffers, attributes of layers, what only the plan knows."""
        surveyed = survey(self._model)
        refuse_offloaded(self._model, surveyed)
        tensors = surveyed.tensors
        for layer in self._layers:
            tensors |= layer.tensors()
        unnamed = {name for step in plan.steps for name in step.destinations} - tensors.keys()
        if unnamed:
            reached = reachable(self._model)
            tensors |= {name: reached[name] for name in unnamed if name in reached}
        return {name: tensor for name, tensor in tensors.items() if not nn.parameter.is_lazy(tensor)}

    def committed(self, job: Job) -> None:
        """Take note that a version came by this job. From the first one on, every live tensor stays where it is."""
        self.plans.committed(job.plan, job.restored)
        if job.first:
            self.live = self._tensors(self.plans.first)
            self._note_formats()
            self.kernels = Extents(
                tensor for layer in self._layers if layer.made for _, tensor in layer.contents().tensors()
            )
            free = {layer.full(key) for layer in self._layers for key in layer.free()} - self._acted
            written = {name for step in self.plans.first.steps for name in step.destinations}
            # A tensor that no step writes and no layer has may be replaced by whoever uses it: a table that is cast.
            alone = {name for group in self._layout.together() if written.isdisjoint(group) for name in group}
            free |= alone.difference(*(layer.tensors() for layer in self._layers))
            self._where = {name: _where(tensor) for name, tensor in self.live.items() if name not in free - written}
        self.written(job)

    def _note_formats(self) -> None:
        layers = [layer for layer in self._layers if layer.module in self._processed]
        note(layer.module for layer in layers)
        self._formats = [
            explain.Formats(layer.name, layer.deferred, frozenset(layer.captured()), tuple(layer.tensors()))
            for layer in layers
        ]

    def explain(self, names: Sequence[str]) -> str:
        """What becomes of a tensor, by the first of its ``names`` that is known, see ``LiveModel.explain``."""
        plan = self.plans.last
        name = next((name for name in names if explain.knows(plan, self.live, name)), names[0])
        return explain.explain(plan, self._formats, self.live, name)

    def torn(self, job: Job) -> None:
        """Take note that the model holds some of what came by this job."""
        self.plans.optional.came(job.plan, coverage(job.plan), ())

    def written(self, job: Job) -> None:
        """Give every tensor that the job writes, and all that see its bytes, a new ``_version``."""
        names = {name for step in job.plan.steps for name in step.destinations} | job.restored
        for group in job.groups:
            names |= {*group.names, *(name for layer in group.layers for name in layer.tensors())}
        if job.plan.fallback:  # The model's own code may write to all of them.
            names |= self.live.keys()
        others = attributes(modules_of(self._model), set(map(id, self.live.values())))
        seen = survey(self._model)
        tensors = [*self.live.values(), *seen.tensors.values(), *seen.wrappers, *(tensor for _, tensor in others)]
        renew([self.live[name] for name in names if name in self.live], tensors)

    def prove(self) -> None:
        """See that every live tensor is where it was, with its shape and dtype, and that modules were not replaced.

        Then aliases and ties hold too.

        Raises:
            LiveModelError: it names the tensors and modules that were replaced or moved.
            PlanError: adapters were merged into the weights.
        """
        refuse_merged(self._model)
        lost = [name for name, module, key, child in self._loaded if module._modules.get(key) is not child]
        if lost:
            raise LiveModelError(
                "nothing can be loaded into modules that were replaced; make a new live model",
                [f"{name}: is another module now" for name in lost],
            )
        now = self._tensors(self.plans.first) if self._where else {}
        self._refuse_cast(now)
        _refuse_moved(name for name, where in self._where.items() if name not in now or _where(now[name]) != where)

    def _refuse_cast(self, now: Mapping[str, torch.Tensor]) -> None:
        problems = [
            f"{name}: was {dtype}, and is {now[name].dtype} now"
            for name, where in self._where.items()
            for dtype in where
            if name in now and isinstance(dtype, torch.dtype) and dtype != now[name].dtype
        ]
        if problems:
            raise LiveModelError(
                "tensors have another dtype than after the load, as by model.half() or model.to(dtype). Drop this live "
                "model, build the model anew in that dtype, and load it: hotweights.LiveModel(model).load(source, "
                'cast="floats")',
                problems,
            )

    def strategy(self, atomic: Atomic, job: Job) -> Strategy:
        """Where the bytes of an update go until it commits.

        Raises:
            LiveModelError: the host cannot hold the copy of the model.
        """
        if atomic is False:
            return InPlace(self.live)
        if self._mirror is None:
            self._mirror = Mirror(MemoryLayout(self.live), host.host_copy)
        touched = {name for group in (job.in_place, *job.groups) for name in (*group.names, *group.touched)}
        touched.update(job.restored)
        touched.update(name for group in job.groups for layer in group.layers for name in layer.tensors())
        check_room(self._mirror, touched, atomic)
        # The model's own loading code writes to live tensors by references that nobody can swap.
        if atomic == "staged" and not job.plan.fallback:
            return Staged(self.live, self._mirror)
        return Journal(self.live, self._mirror)

    def reset(self, begun: Sequence[LayerGroup]) -> None:
        """After a first load that failed, put the model into checkpoint format again.

        Layers that were processed get new memory. Tensors that no load writes get their old values.
        """
        for _, module, key, child in self._loaded:
            module._modules[key] = child
        renewed = {name for group in begun for name in group.names}
        without_layer = {name for group in begun for name in group.without_layer}
        memory = Mirror(self._layout, host.scratch)
        for name, value in self._initial.items():
            host.copy_bytes(memory[name] if name in renewed else self.live[name], value)
        for place in list(places(self._model)):
            if place.name in without_layer:
                place.put(dressed(memory[place.name], place.tensor))
        dressing: Dressing = {}
        for group in begun:
            for layer in group.layers:
                layer.open(memory.__getitem__, dressing, anew=True)


def _refuse_moved(names: Iterable[str]) -> None:
    problems = [f"{name}: something else replaced or moved it" for name in names]
    if problems:
        raise LiveModelError(
            "these are not the tensors that they were; put them back, or make a new live model", problems
        )


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _by_own_code(model: nn.Module, plan: LoadPlan) -> set[nn.Module]:
    """Modules that the plan does not write completely, in a model whose own code must load a part."""
    if not plan.fallback:
        return set()
    covers = coverage(plan)
    counted = ((place.module, place.tensor, elements(covers, plan, place.name)) for place in places(model))
    return {module for module, tensor, count in counted if nn.parameter.is_lazy(tensor) or count < tensor.numel()}


def _shared(model: nn.Module, own: Container[int]) -> set[int]:
    """Ids of the containers and objects that attributes of several modules lead to."""
    seen: Counter[int] = Counter()
    for module in model.modules():
        seen.update(id(held.holder) for held in held_by(state_of(module), own).values())
    return {identity for identity, count in seen.items() if count > 1}


def _where(tensor: torch.Tensor) -> tuple[object, ...]:
    if plain(tensor) and not tensor.numel():
        return tensor.dtype, tensor.shape  # No bytes that could move; FSDP2 makes an empty shard anew.
    if not has_bytes(tensor):
        return (id(tensor),)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _refuse_parts(layers: Sequence[Layer], parts: Container[str]) -> None:
    """Refuse DTensors in layers that are processed: processing is made for whole tensors."""
    names = [name for layer in layers for name in layer.tensors() if name in parts]
    if names:
        raise LiveModelError(
            "layers that are processed hold parts of sharded tensors; leave these layers out with layers=",
            [f"{name}: is a DTensor" for name in names],
        )
