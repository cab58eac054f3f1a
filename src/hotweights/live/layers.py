"""Layer: a module of a live model, in checkpoint format and in kernel format. Formats are swapped, never copied.

The *checkpoint format* of a layer is what it holds before it is processed for the first time: classes, shapes, strides,
dtypes and attributes of its tensors, and its own attributes. It is kept as twins on the meta device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import signals
from ..arguments import patterns_from, takes_one
from ..errors import LiveModelError, UsageError
from ..memory.aliases import has_bytes
from ..memory.wrappers import leaves
from ..model.materialise import dressed
from ..names import bare_modules, outer_prefix, unwrapped
from ..notices import log
from ..plan.patterns import Patterns, matches
from .attributes import ABSENT, Held, assign, by_name, exchanged, held_by, state_of, step, tensors_in

Dressing = dict[int, torch.Tensor]
"""What was made of each twin while some layers are open: a parameter that two layers hold is one object in both."""


class Contents(NamedTuple):
    """What a module holds, as objects. Its children are not among them.

    Attributes:
        parameters: ``module._parameters``.
        buffers: ``module._buffers``.
        transient: names of buffers that are not persistent.
        attributes: everything else in its ``__dict__``, and its class.
        holders: containers and objects that the attributes lead to, by path, with what they hold.
        others: paths of tensors in holders that belong to other modules.
    """

    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, torch.Tensor | None]
    transient: set[str]
    attributes: dict[str, object]
    holders: dict[str, Held]
    others: frozenset[str] = frozenset()

    def own(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that is a parameter, a buffer or an attribute, by key; of wrapper tensors the inner ones too."""
        for store in (self.parameters, self.buffers, self.attributes):
            for key, value in store.items():
                if isinstance(value, torch.Tensor):
                    yield from leaves(key, value)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What ``own`` gives, and every tensor in holders, by path."""
        yield from self.own()
        yield from ((path, tensor) for path, tensor in tensors_in(self.holders) if path not in self.others)

    def replaced(self, made: Mapping[str, torch.Tensor]) -> Contents:
        """The same, with the tensors of ``made`` in place of those at their keys and paths."""
        change = by_name(made)
        stores = (self.parameters, self.buffers, self.attributes)
        parameters, buffers, attributes = (
            {key: exchanged(key, value, change) for key, value in store.items()} for store in stores
        )
        holders = {
            path: Held(holder, {key: exchanged(step(path, holder, key), value, change) for key, value in state.items()})
            for path, (holder, state) in self.holders.items()
        }
        return Contents(parameters, buffers, set(self.transient), attributes, holders, self.others)  # type: ignore[arg-type]


def contents(module: nn.Module, own: Container[int] | None = None) -> Contents:
    """What ``module`` holds now; ``own`` is that of ``held_by``."""
    attributes = state_of(module)
    return Contents(
        dict(module._parameters),
        dict(module._buffers),
        set(module._non_persistent_buffers_set),
        attributes,
        held_by(attributes, own, _methods(module)),
    )


def modules_held(model: nn.Module) -> list[nn.Module]:
    """The modules whose contents can be exchanged: all but TorchScript's, which nobody can put a tensor into."""
    return [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]


def _methods(module: nn.Module) -> dict[str, nn.Module]:
    """Its ``quant_method``, where that is a child module: what processing made of the layer is held there too."""
    method = module._modules.get("quant_method")
    return {} if method is None else {"quant_method": method}


def put(module: nn.Module, held: Contents) -> None:
    """Make ``module`` and its holders hold this, and nothing else."""
    for store, wanted in ((module._parameters, held.parameters), (module._buffers, held.buffers)):
        store.clear()
        store.update(wanted)  # type: ignore[arg-type]
    module._non_persistent_buffers_set.clear()
    module._non_persistent_buffers_set.update(held.transient)
    assign(module, held.attributes)
    for holder, state in held.holders.values():
        assign(holder, state)


@signals.whole
def put_back(before: Iterable[tuple[nn.Module, Contents]]) -> None:
    """Make modules hold what they held before."""
    for module, held in before:
        put(module, held)


class Layer:
    """One module of a live model that is processed, and its checkpoint format.

    Attributes:
        name: qualified; empty for the model itself.
        names: all names under which the model has the module.
        module: the module.
        deferred: whether it is processed after all others.
        acted: keys of attributes that processing has set, changed or removed at some time.
        made: whether its tensors are what processing made of them, as far as that can be seen.
        beneath: keeps tensors alive whose addresses may be hidden in objects of the live layer (a packed handle, say).
    """

    def __init__(
        self,
        names: Sequence[str],
        module: nn.Module,
        *,
        deferred: bool,
        twins: Dressing,
        own: Container[int],
        shared: Container[int] = (),
    ) -> None:
        """Look at a module in checkpoint format.

        Args:
            names: its qualified names in the model.
            module: the module.
            deferred: whether it is processed after all others.
            twins: the meta twins of tensors that other layers hold too, by the tensors' ids; it is added to.
            own: ids of the model's modules. A module that is none of them belongs to the layer, as any object does.
            shared: ids of holders that other modules reach too. What they hold is the layer's only if processing the
                layer has put it there.
        """
        self.name = names[0]
        self.names = tuple(names)
        self.module = module
        self.deferred = deferred
        self.acted: set[str] = set()
        self.made = False
        self._own = own
        self.beneath: dict[str, object] = {}
        self._shared = shared
        self._children = {key: child for key, child in module._modules.items() if child is not None and _loads(child)}
        held = self.contents()
        self._twins = {key: _twin(tensor, twins) for key, tensor in held.tensors() if has_bytes(tensor)}
        self._format = held.replaced(self._twins)

    def contents(self, held: Contents | None = None) -> Contents:
        """What the module holds now; or what it held, if that is given."""
        held = held or contents(self.module, self._own)
        shared = {path: item for path, item in held.holders.items() if id(item.holder) in self._shared}
        others = frozenset(path for path, _ in tensors_in(shared)) - self.acted if shared else frozenset()
        return held._replace(others=others)

    def full(self, key: str) -> str:
        """The qualified name of one of its tensors."""
        return _joined(self.name, key)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that it holds now, by every qualified name."""
        return {_joined(name, key): tensor for name in self.names for key, tensor in self.contents().tensors()}

    def captured(self) -> dict[str, torch.Tensor]:
        """The twins of its checkpoint format, by every qualified name."""
        return {_joined(name, key): twin for name in self.names for key, twin in self._twins.items()}

    def open(self, scratch: Callable[[str], torch.Tensor], dressing: Dressing, *, anew: bool = False) -> Contents:
        """Put the module into checkpoint format, as processing saw it the first time. Returns what it then holds.

        Attributes that processing never touched stay as they are, unless it is made ``anew``.

        Args:
            scratch: gives the memory of each tensor by its qualified name, in that format's shape.
            dressing: what was made for layers that are open too; it is added to.
            anew: whether all its attributes become those of before the first load.
        """
        made = {key: _dressed(scratch, self.full(key), twin, dressing) for key, twin in self._twins.items()}
        held = self._format.replaced(made)
        if not anew:
            back = self.acted | made.keys()
            attributes = _partly(state_of(self.module), held.attributes, lambda key: key in back)
            holders = {path: _opened(path, item, back) for path, item in held.holders.items()}
            held = held._replace(attributes=attributes, holders=holders)
        put(self.module, held)
        return held

    @signals.whole
    def processed(self, before: Contents, after: Contents) -> None:
        """Take note of what processing changed in its attributes, and in the objects that they lead to.

        Raises:
            LiveModelError: it has replaced a module into which weights are loaded.
        """
        was, now = (held.holders["_modules"].state for held in (before, after))
        for key, child in self._children.items():
            if was.get(key) is child is not now.get(key):
                raise LiveModelError(
                    f"{self.full(key)}: processing replaced a module that weights are loaded into, so nothing can be "
                    "loaded into it again; let it replace what that module holds"
                )
        self.acted |= _changed(before.attributes, after.attributes)
        for path, (holder, state) in after.holders.items():
            old = before.holders.get(path)
            if old is None or old.holder is not holder:
                self.acted |= {step(path, holder, key) for key in state}
                continue
            changed = _changed(old.state, state)
            if not (first := self._format.holders.get(path)) or first.holder is not holder:
                first = self._format.holders[path] = Held(holder, dict(old.state))
            for key in changed:
                name = step(path, holder, key)
                if name not in self.acted | self._twins.keys():  # As the layer saw it, not as it was before all layers.
                    first.state[key] = old.state.get(key, ABSENT)
                self.acted.add(name)

    def shares(self, holder: object) -> bool:
        """Whether other modules reach the holder too, through attributes of theirs."""
        return id(holder) in self._shared

    def free(self) -> set[str]:
        """Keys of tensors in attributes that processing never set. Others may replace them: a cache, say."""
        held = self.contents()
        return (
            {key for key, _ in held.tensors()}
            - {key for key, _ in held._replace(attributes={}, holders={}).own()}
            - self.acted
        )

    def twin(self, key: str) -> torch.Tensor | None:
        """The twin of one of its tensors."""
        return self._twins.get(key)


def _loads(module: nn.Module) -> bool:
    """Whether the module or one beneath it has tensors, so that weights may be loaded into it."""
    return any(child._parameters or child._buffers for child in module.modules())


def _changed(old: Mapping[Any, object], new: Mapping[Any, object]) -> set[Any]:
    return {key for key in old.keys() | new.keys() if old.get(key, ABSENT) is not new.get(key, ABSENT)}


def _partly(now: Mapping[Any, object], then: Mapping[Any, object], back: Callable[[Any], bool]) -> dict[Any, object]:
    """What is there now, but for the keys that ``back`` holds for: those as they were then."""
    kept = {key: value for key, value in now.items() if not back(key)}
    mixed = kept | {key: value for key, value in then.items() if back(key)}
    return {key: value for key, value in mixed.items() if value is not ABSENT}


def _opened(path: str, then: Held, back: Container[str]) -> Held:
    holder = then.holder
    return Held(holder, _partly(state_of(holder), then.state, lambda key: step(path, holder, key) in back))


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _twin(tensor: torch.Tensor, twins: Dressing) -> torch.Tensor:
    if id(tensor) not in twins:
        bare = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")
        twins[id(tensor)] = dressed(bare, tensor)
    return twins[id(tensor)]


def _dressed(scratch: Callable[[str], torch.Tensor], name: str, twin: torch.Tensor, dressing: Dressing) -> torch.Tensor:
    if id(twin) not in dressing:
        dressing[id(twin)] = dressed(scratch(name), twin)
    return dressing[id(twin)]


@contextmanager
@signals.held
def unmoved(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, code may write tensors of these modules, but not replace or move them.

    Raises:
        LiveModelError: it replaced or moved some. They are put back, as they are when the code fails.
    """
    before = [(module, contents(module)) for module in modules]
    memory = [(tensor, tensor.data) for _, held in before for _, tensor in held.own() if has_bytes(tensor)]
    try:
        yield
        replaced = sum(not _same_objects(contents(module), held) for module, held in before)
        replaced += sum(tensor.data_ptr() != data.data_ptr() for tensor, data in memory)
        if replaced:
            raise LiveModelError("the model's own loading code replaced tensors that are live, instead of writing them")
    except BaseException:
        put_back(before)
        _move_back(memory)
        raise


@signals.whole
def _move_back(memory: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for tensor, data in memory:
        if tensor.data_ptr() != data.data_ptr():
            tensor.data = data


def _same_objects(now: Contents, before: Contents) -> bool:
    return {key: id(tensor) for key, tensor in now.own()} == {key: id(tensor) for key, tensor in before.own()}


Selection = Patterns | Callable[[nn.Module], bool]
"""Which modules of a model: patterns of their qualified names, or a function that says so of a module."""


def selected(selection: Selection, model: nn.Module, option: str, idle: list[str]) -> Callable[[str, nn.Module], bool]:
    """Whether a module, given with its name in the unwrapped ``model``, is one of the selection under any name.

    ``option`` is what the caller gave it as; to ``idle`` is added what is said of patterns that match nothing.
    """
    if callable(selection):
        if not takes_one(selection):
            raise UsageError(f"{option}= is a function of one argument, a module, or patterns of names of modules")
        return lambda _, module: selection(module)
    (patterns,) = patterns_from(**{option: selection})
    outer, bare = outer_prefix(model), bare_modules(unwrapped(model))

    def names_of(name: str) -> tuple[str, ...]:
        return name, f"{outer}{name}", bare.get(name, name)

    names = {each for name, _ in unwrapped(model).named_modules(remove_duplicate=False) for each in names_of(name)} | {
        name for name, _ in model.named_modules(remove_duplicate=False)
    }
    if lost := [pattern for pattern in patterns if not any(map(matches([pattern]), names))]:
        said = (
            f"{option}={lost[0]!r} matches no module of the model; its names are those of named_modules(). A function "
            "of a module works too"
        )
        if option == "layers":  # They would stay unprocessed.
            raise UsageError(said)
        # One list of what is deferred may serve many kinds of model.
        log(logging.WARNING, "%s", said)
        idle.append(said)
    match = matches(patterns)
    return lambda name, _: any(map(match, names_of(name)))


def layers_of(model: nn.Module, chosen: Callable[[str, nn.Module], bool]) -> dict[nn.Module, list[str]]:
    """The modules that ``chosen`` holds for under any of their names, each with all its names, in the model's order."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    layers = {module: several for module, several in names.items() if any(chosen(name, module) for name in several)}
    for module, several in layers.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(
                f"{several[0]}: is a TorchScript module, which cannot be processed: nobody can put other tensors into "
                "it; leave it out of layers=, or script or trace it after processing"
            )
    return layers
