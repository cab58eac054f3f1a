"""Plans kept for another load of the same: in memory, as long as their model lives, and in files. It makes none itself.

A plan may be used again where tracing would give it again. So a key is made of all that tracing looks at: the manifest,
the model's tensors, attributes, classes and loading code, its configuration, the process groups, the versions of the
packages, and the options. Values of the model that loading code asked for are compared by digest. Code that a model
reads from elsewhere while it loads (a global variable, the environment) is not seen: ``cache=False`` is for it.
"""

from __future__ import annotations

import enum
import functools
import logging
import os
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
import torch
import xxhash
from torch import nn

from ..errors import PlanError, PlanFileError
from ..gc_pause import without_collection
from ..manifest import Manifest
from ..memory.aliases import owners, spots
from ..model.digests import digests
from ..model.reachable import reachable
from ..model.survey import Survey
from ..plan.plan import LoadPlan
from ..tracing import fit

Options = tuple[object, ...]
"""All that a plan depends on beside model and manifest: plain values."""

_KEPT = 4  # plans of one model: several checkpoints take turns, none of them for long
_log = logging.getLogger("hotweights")


def planned(
    model: nn.Module,
    found: Survey | None,
    manifest: Manifest,
    options: Options,
    make: Callable[[], LoadPlan],
    directory: str | os.PathLike[str] | None = None,
) -> LoadPlan:
    """The plan that was made before from all the same; else a new one, which is kept.

    Args:
        model: whose plan it is. It is not kept alive.
        found: what was seen of it, if it is loaded by name and nothing but its tensors has a say in that.
        manifest: what will be loaded.
        options: what else ``make`` depends on.
        make: makes a plan; it changes nothing.
        directory: where plans are kept for other processes. It is made if need be.
    """
    with without_collection():
        key = _Key(model, found, manifest, options)
    kept = _kept(model)
    for entry in kept:
        if entry.fits(key) and _values_hold(entry.plan, model):
            return entry.plan
    file = None if directory is None else Path(directory) / f"{key.digest()}.plan"
    plan = None if file is None else _from_file(file, model, manifest)
    if plan is None:
        plan = make()
        if file is not None:
            _to_file(plan, file)
    with _LOCK:
        kept[:] = [_Entry(key, plan), *(one for one in kept if not one.fits(key))][:_KEPT]
    return plan


class _Key:
    """All that a plan is made from. It holds the model's tensors, so it is let go when the plan is found."""

    def __init__(self, model: nn.Module, found: Survey | None, manifest: Manifest, options: Options) -> None:
        seen = _Seen()
        self.facts: list[object] = [tuple(map(seen.trait, options)), _versions(), _groups(), list(manifest.values())]
        if found is None or not seen.plain(found):
            seen = _Seen()
            seen.model(model)
            self.facts += [seen.trait(getattr(model, "config", None)), [seen.of_class(one) for one in seen.classes]]
        self.facts.append(seen.rows)
        self.places = seen.places
        self._tensors = seen.tensors

    def ties(self) -> list[object]:
        """For each tensor of the model, the first name of it; and where those lie that share memory."""
        tensors = {str(number): one for number, one in enumerate(self._tensors)}
        return [*owners(tensors).values(), *spots(tensors).items()]

    def digest(self) -> str:
        """The same in every process."""
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode((self.facts, self.ties()), enc_hook=_encoded))


class _Entry:
    """A plan and what it was made from, without the tensors."""

    def __init__(self, key: _Key, plan: LoadPlan) -> None:
        self._facts = key.facts
        self._places = key.places
        self._ties = key.ties()
        self.plan = plan

    def fits(self, key: _Key) -> bool:
        """Whether tracing would give this plan."""
        if self._facts != key.facts:
            return False
        # Where every tensor lies where it lay, all share memory as they did.
        return self._places == key.places or self._ties == key.ties()


_PLANS: WeakKeyDictionary[nn.Module, list[_Entry]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def _kept(model: nn.Module) -> list[_Entry]:
    with _LOCK:
        return _PLANS.setdefault(model, [])


def _values_hold(plan: LoadPlan, model: nn.Module) -> bool:
    return not plan.state_read or digests(reachable(model), plan.state_read) == plan.digests


def _from_file(file: Path, model: nn.Module, manifest: Manifest) -> LoadPlan | None:
    try:
        plan = LoadPlan.load(file)
    except FileNotFoundError:
        return None
    except PlanFileError as error:
        _log.warning("a kept plan is not used, and made anew: %s", error)
        return None
    try:
        fit.check(plan, model, manifest, torch.device("cpu"))
    except PlanError as error:  # Values that loading code asked for, which no key knows before.
        _log.info("%s is not used, and made anew: %s", file, error)
        return None
    return plan


def _to_file(plan: LoadPlan, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        plan.save(file)
    except PlanFileError as error:
        _log.info("a plan is not kept for other processes: %s", error)


_PLAIN = frozenset((torch.Tensor, nn.Parameter, nn.Buffer))
_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl
_VALUES = frozenset(
    (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout)
)
_PRIVATE = frozenset(nn.Module().__dict__)
_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_pre_hooks", "_state_dict_hooks")
_ENTRANCES = ("load_weights", "_load_from_state_dict", "load_state_dict", "weight_loader", "set_extra_state")
_KNOWN_BY_VERSION = frozenset(("torch", "transformers", "vllm", "numpy", *sys.stdlib_module_names))
_DEPTH = 12


def _all_modules(model: nn.Module) -> set[int]:
    """The ids of ``model.modules()``, in a quarter of the time."""
    found: set[int] = set()
    todo: list[nn.Module | None] = [model]
    while todo:
        module = todo.pop()
        if module is not None and id(module) not in found:
            found.add(id(module))
            todo += module._modules.values()
    return found


class _Seen:
    """What was seen of a model so far, as plain values that keep nothing of it alive."""

    def __init__(self) -> None:
        self.rows: list[object] = []
        self.places: list[int] = []
        self.tensors: list[torch.Tensor] = []
        self.classes: dict[type, None] = {}
        self._met: dict[int, int] = {}  # objects by their turn: the second time, that is all there is to say
        self._registered: set[int] = set()
        self._loose: list[torch.Tensor] = []
        self._alive: list[object] = []  # What is made on the way must not give its id to another.

    def model(self, model: nn.Module) -> None:
        """Every module: its class, tensors and attributes."""
        rows, classes = self.rows, self.classes
        self._registered = _all_modules(model)
        stack = [("", model)]
        while stack:  # named_modules() in half the time
            prefix, module = stack.pop()
            attributes = module.__dict__
            stack += [(f"{prefix}.{key}", one) for key, one in attributes["_modules"].items() if one is not None]
            classes[type(module)] = None
            rows.append((prefix, type(module).__module__, type(module).__qualname__))
            for store in (attributes["_parameters"], attributes["_buffers"]):
                for key, tensor in store.items():
                    if tensor is not None:
                        self._tensor(key, tensor)
            if attributes["_non_persistent_buffers_set"]:
                rows.append(sorted(attributes["_non_persistent_buffers_set"]))
            for key in [one for one in attributes if one not in _PRIVATE]:
                value = attributes[key]
                rows.append((key, value if type(value) in _VALUES else self.trait(value)))
            for name in _HOOKS:
                hooks = attributes.get(name)
                if hooks:
                    rows.append([self.trait(one) for one in hooks.values()])
        rows += self._shared()

    def plain(self, found: Survey) -> bool:
        """Every tensor, if none has more to it than its dtype, place and form."""
        self.rows += (list(found.tensors), found.transient)
        rows, places = self.rows, self.places
        self.tensors += found.tensors.values()
        try:
            for tensor in self.tensors:
                if type(tensor) not in _PLAIN:
                    return False
                rows.append((tensor.dtype, tensor.shape, tensor.stride(), tensor.device))
                places.append(tensor.data_ptr() or id(tensor))
        except RuntimeError:  # sparse, or without plain bytes in another way
            return False
        return True

    def _tensor(self, key: str, tensor: torch.Tensor) -> None:
        kind = type(tensor)
        self.tensors.append(tensor)
        if kind in _PLAIN and not tensor.__dict__:
            try:
                row = (key, kind is nn.Parameter, tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
                self.places.append(tensor.data_ptr() or id(tensor))
                self.rows.append(row)
                return
            except RuntimeError:  # sparse, or without plain bytes in another way
                pass
        with torch._C.DisableTorchFunctionSubclass():
            self.rows.append((key, self._described(tensor), self._attributes(tensor.__dict__, 0)))
            self.places.append(_place(tensor))

    def _described(self, tensor: torch.Tensor) -> object:
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        if nn.parameter.is_lazy(tensor):
            return (kind, tensor.dtype, tensor.device)
        strides = tensor.stride() if tensor.layout is torch.strided else ()
        return (kind, tensor.dtype, tensor.shape, strides, tensor.layout, tensor.device)

    # Anything else.

    def trait(self, value: object, depth: int = 0) -> object:
        """``value`` as a plain value: equal where loading code cannot tell the difference."""
        kind = type(value)
        if kind in _VALUES:
            return value
        name = f"{kind.__module__}.{kind.__qualname__}"
        if id(value) in self._met:
            return ("met", self._met[id(value)])
        self._met[id(value)] = len(self._met)
        self._alive.append(value)
        if depth > _DEPTH or id(value) in self._registered or isinstance(value, types.ModuleType):
            return name
        if isinstance(value, nn.Module):
            return (name, self._attributes(vars(value), depth))
        if isinstance(value, enum.Enum):
            return (name, value.name)
        if isinstance(value, (list, tuple)):
            return (name, [self.trait(one, depth + 1) for one in value])
        if isinstance(value, Mapping):
            return (name, [(self.trait(key), self.trait(one, depth + 1)) for key, one in value.items()])
        if isinstance(value, (set, frozenset)):
            return (name, sorted(map(repr, value)))
        if isinstance(value, re.Pattern):
            return (value.pattern, value.flags)
        if isinstance(value, torch.Tensor):
            return (self._described(value), self._where(value), self._attributes(value.__dict__, depth))
        if callable(value) and not isinstance(value, type):
            return (name, self._callable(value, depth))
        if isinstance(value, type):
            return f"class {value.__module__}.{value.__qualname__}"
        if isinstance(value, (slice, range)):
            return (name, value.start, value.stop, value.step)
        to_bytes = getattr(value, "tobytes", None)
        if callable(to_bytes):
            return (name, xxhash.xxh3_64_hexdigest(to_bytes()))
        if hasattr(value, "__dict__") and not hasattr(kind, "__slots__"):
            return (name, self._attributes(vars(value), depth))
        # Whatever it holds cannot be seen, so it is another one each time: a plan too many, never a stale one.
        return (name, object())

    def _attributes(self, attributes: Mapping[str, object], depth: int) -> object:
        return [(key, self.trait(one, depth + 1)) for key, one in attributes.items()]

    def _where(self, tensor: torch.Tensor) -> int:
        self._loose.append(tensor)
        return len(self._loose)

    def _shared(self) -> Iterator[object]:
        """Of each tensor in an attribute, whose memory it has, and from where on."""
        turns = {place: -turn for turn, place in enumerate(self.places)}
        for tensor in self._loose:
            with torch._C.DisableTorchFunctionSubclass():
                if tensor.layout is not torch.strided or nn.parameter.is_lazy(tensor):
                    continue
                place = _place(tensor)
                if place != id(tensor):
                    place = tensor.untyped_storage().data_ptr()
                yield (turns.setdefault(place, len(turns)), tensor.storage_offset())

    def _callable(self, value: Any, depth: int) -> object:
        if isinstance(value, functools.partial):
            return [self.trait(one, depth + 1) for one in (value.func, value.args, value.keywords)]
        if isinstance(value, types.MethodType):
            return [self.trait(value.__func__, depth + 1), self.trait(value.__self__, depth + 1)]
        if isinstance(value, types.FunctionType):
            return self.function(value, depth, deep=True)
        if hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in _KNOWN_BY_VERSION:
            return self._attributes(vars(value), depth)
        return getattr(value, "__qualname__", "")

    # Code.

    def of_class(self, found: type) -> object:
        """The functions and values of a class and of those it is made from."""
        return [
            (
                one.__qualname__,
                [(key, self._member(key, value)) for key, value in vars(one).items() if key not in _DULL],
            )
            for one in found.__mro__
            if one.__module__.partition(".")[0] not in ("torch", "builtins")
        ]

    def _member(self, key: str, value: object) -> object:
        while isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, property):
            return [self._member(key, one) for one in (value.fget, value.fset) if one is not None]
        if isinstance(value, types.FunctionType):
            return self.function(value, 0, deep=key in _ENTRANCES)
        return self.trait(value)

    def function(self, function: types.FunctionType, depth: int, *, deep: bool) -> object:
        """A function's code; ``deep``, also the functions and values that it uses by global names."""
        if function.__module__ is not None and function.__module__.partition(".")[0] in _KNOWN_BY_VERSION:
            return f"{function.__module__}.{function.__qualname__}"
        made: list[object] = [function.__code__, self.trait(function.__defaults__, depth + 1)]
        made += [self.trait(_content(cell), depth + 1) for cell in function.__closure__ or ()]
        if deep and depth <= _DEPTH:
            for name in sorted(_names(function.__code__)):
                made.append((name, self._used(function.__globals__.get(name), depth + 1)))
        return made

    def _used(self, value: object, depth: int) -> object:
        if isinstance(value, (type, types.FunctionType)) and id(value) not in self._met:
            self._met[id(value)] = len(self._met)
            if (value.__module__ or "").partition(".")[0] in _KNOWN_BY_VERSION:
                return value.__qualname__
            if isinstance(value, types.FunctionType):
                return self.function(value, depth, deep=True)
            return [
                self.function(one, depth, deep=True)
                for one in vars(value).values()
                if isinstance(one, types.FunctionType)
            ]
        return self.trait(value, depth)


_DULL = frozenset(
    ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__annotate__", "__firstlineno__")
)


def _place(tensor: torch.Tensor) -> int:
    """Its address; where it has none, which object it is."""
    if type(tensor) not in _PLAIN and type(tensor).__torch_dispatch__ is not _NO_DISPATCH:
        return id(tensor)
    try:
        return tensor.data_ptr() or id(tensor)
    except (RuntimeError, ValueError):  # sparse, uninitialised, or without plain bytes in another way
        return id(tensor)


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield from _names(one)


def _versions() -> tuple[tuple[str, str], ...]:
    return tuple(
        (name, str(getattr(sys.modules[name], "__version__", "")))
        for name in ("torch", "transformers", "vllm", "sglang")
        if name in sys.modules
    )


def _groups() -> tuple[int, ...]:
    """This process's rank and their number, in the default group and by the others' members."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return ()
    return (distributed.get_rank(), distributed.get_world_size())


def _encoded(value: object) -> object:
    """For a digest that is the same in every process: what JSON does not know."""
    if isinstance(value, types.CodeType):
        return (value.co_qualname, value.co_code, value.co_names, [_constant(one) for one in value.co_consts])
    return str(value)


def _constant(value: object) -> object:
    if isinstance(value, types.CodeType):
        return value
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)
