"""Fingerprint: all of a model that tracing looks at, as plain values that can be compared and keep nothing alive.

Loading code may look at anything, so much is in it: tensors (not their values), attributes, classes, the code of
methods and of the functions that loading code calls. A value whose content cannot be seen never equals another: that
costs a trace too many, where a guess would cost a stale plan.
"""

from __future__ import annotations

import enum
import functools
import re
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import torch
import xxhash
from torch import nn

from ..model.survey import Survey
from ..sharding import is_dtensor, local

_PLAIN = frozenset((torch.Tensor, nn.Parameter, nn.Buffer))
_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl
_VALUES = frozenset(
    (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout)
)
_PRIVATE = frozenset(nn.Module().__dict__)
_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_pre_hooks", "_state_dict_hooks")
_ENTRANCES = ("load_weights", "_load_from_state_dict", "load_state_dict", "weight_loader", "set_extra_state")
_KNOWN_BY_VERSION = frozenset(("torch", "transformers", "vllm", "numpy", *sys.stdlib_module_names))
_DULL = frozenset(
    ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__annotate__", "__firstlineno__")
)
_DEPTH = 12  # of attributes within attributes; below that only a value's type counts


class Fingerprint:
    """What was seen of a model so far.

    Attributes:
        rows: the plain values, in the order in which they were met.
        places: an address for each of ``tensors``; where it has none, its id.
        tensors: every parameter and buffer. They are held, so let go of the fingerprint when it was compared.
        classes: of every module, in the order of appearance.
    """

    def __init__(self) -> None:
        self.rows: list[object] = []
        self.places: list[int] = []
        self.tensors: list[torch.Tensor] = []
        self.classes: dict[type, None] = {}
        self._met: dict[int, int] = {}  # object id -> its turn, which is all that a second meeting adds
        self._registered: set[int] = set()
        self._loose: list[torch.Tensor] = []
        self._alive: list[object] = []  # An object that is freed on the way would give its id to another one.

    def add_by_name(self, survey: Survey) -> bool:
        """Add the tensors of a model that is loaded by name: dtype, form and place are all that counts there.

        Returns:
            Whether that is so. A tensor of another class, or without plain bytes, needs ``add_model``.
        """
        self.rows += (list(survey.tensors), survey.transient, survey.parts, survey.shells)
        rows, places = self.rows, self.places
        self.tensors += survey.tensors.values()
        try:
            for tensor in self.tensors:
                if type(tensor) not in _PLAIN:
                    return False
                rows.append((tensor.dtype, tensor.shape, tensor.stride(), tensor.device))
                places.append(tensor.data_ptr() or id(tensor))
        except RuntimeError:  # sparse, or without plain bytes in another way
            return False
        return True

    def add_model(self, model: nn.Module) -> None:
        """Add every module: its class, tensors, attributes and hooks. The classes' code is added by ``code_of``."""
        rows, classes = self.rows, self.classes
        self._registered = _ids_of_modules(model)
        stack = [("", model)]
        while stack:  # named_modules() takes twice the time.
            prefix, module = stack.pop()
            attributes = module.__dict__
            stack += [(f"{prefix}.{key}", child) for key, child in attributes["_modules"].items() if child is not None]
            classes[type(module)] = None
            rows.append((prefix, type(module).__module__, type(module).__qualname__))
            for store in (attributes["_parameters"], attributes["_buffers"]):
                for key, tensor in store.items():
                    if tensor is not None:
                        self._add_tensor(key, tensor)
            if attributes["_non_persistent_buffers_set"]:
                rows.append(sorted(attributes["_non_persistent_buffers_set"]))
            for key in [key for key in attributes if key not in _PRIVATE]:
                value = attributes[key]
                rows.append((key, value if type(value) in _VALUES else self.trait(value)))
            for name in _HOOKS:
                if hooks := attributes.get(name):
                    rows.append([self.trait(hook) for hook in hooks.values()])
        rows += self._shared()

    def _add_tensor(self, key: str, tensor: torch.Tensor) -> None:
        self.tensors.append(tensor)
        if is_dtensor(tensor):
            tensor, part = local(tensor)
            self.rows.append(part)
        kind = type(tensor)
        if kind in _PLAIN and not tensor.__dict__:
            try:
                row = (key, kind is nn.Parameter, tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
                self.places.append(tensor.data_ptr() or id(tensor))
                self.rows.append(row)
                return
            except RuntimeError:  # sparse, or without plain bytes in another way
                pass
        with torch._C.DisableTorchFunctionSubclass():
            self.rows.append((key, _form(tensor), self._attributes(tensor.__dict__, 0)))
            self.places.append(_place(tensor))

    def _shared(self) -> Iterator[object]:
        """For each tensor in an attribute: which tensor before it has the same memory, and its offset there."""
        turns = {place: -turn for turn, place in enumerate(self.places)}
        for tensor in self._loose:
            with torch._C.DisableTorchFunctionSubclass():
                if tensor.layout is not torch.strided or nn.parameter.is_lazy(tensor):
                    continue
                place = _place(tensor)
                if place != id(tensor):
                    place = tensor.untyped_storage().data_ptr()
                yield (turns.setdefault(place, len(turns)), tensor.storage_offset())

    # Any object.

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
            return (name, [self.trait(item, depth + 1) for item in value])
        if isinstance(value, (dict, types.MappingProxyType)):  # Other mappings may read files to give their items.
            return (name, [(self.trait(key), self.trait(item, depth + 1)) for key, item in value.items()])
        if isinstance(value, (set, frozenset)):
            return (name, sorted(map(repr, value)))
        if isinstance(value, re.Pattern):
            return (value.pattern, value.flags)
        if isinstance(value, torch.Tensor):
            self._loose.append(value)
            return (_form(value), len(self._loose), self._attributes(value.__dict__, depth))
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
        return (name, object())  # Its content cannot be seen, so it equals nothing.

    def _attributes(self, attributes: Mapping[str, object], depth: int) -> object:
        return [(key, self.trait(value, depth + 1)) for key, value in attributes.items()]

    def _callable(self, value: Any, depth: int) -> object:
        if isinstance(value, functools.partial):
            return [self.trait(part, depth + 1) for part in (value.func, value.args, value.keywords)]
        if isinstance(value, types.MethodType):
            return [self.trait(value.__func__, depth + 1), self.trait(value.__self__, depth + 1)]
        if isinstance(value, types.FunctionType):
            return self._function(value, depth, deep=True)
        if hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in _KNOWN_BY_VERSION:
            return self._attributes(vars(value), depth)
        return getattr(value, "__qualname__", "")

    # Code.

    def code_of(self, kind: type) -> object:
        """The functions and values of a class and of its bases; torch's own are known by torch's version."""
        return [
            (
                base.__qualname__,
                [(key, self._member(key, value)) for key, value in vars(base).items() if key not in _DULL],
            )
            for base in kind.__mro__
            if base.__module__.partition(".")[0] not in ("torch", "builtins")
        ]

    def _member(self, key: str, value: object) -> object:
        while isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, property):
            return [self._member(key, part) for part in (value.fget, value.fset) if part is not None]
        if isinstance(value, types.FunctionType):
            return self._function(value, 0, deep=key in _ENTRANCES)
        return self.trait(value)

    def _function(self, function: types.FunctionType, depth: int, *, deep: bool) -> object:
        """A function's code; if ``deep``, also the functions and values that it uses by global names."""
        if function.__module__ is not None and function.__module__.partition(".")[0] in _KNOWN_BY_VERSION:
            return f"{function.__module__}.{function.__qualname__}"
        made: list[object] = [function.__code__, self.trait(function.__defaults__, depth + 1)]
        made += [self.trait(_content(cell), depth + 1) for cell in function.__closure__ or ()]
        if deep and depth <= _DEPTH:
            for name in sorted(_names(function.__code__)):
                made.append((name, self._global(function.__globals__.get(name), depth + 1)))
        return made

    def _global(self, value: object, depth: int) -> object:
        if isinstance(value, (type, types.FunctionType)) and id(value) not in self._met:
            self._met[id(value)] = len(self._met)
            if (value.__module__ or "").partition(".")[0] in _KNOWN_BY_VERSION:
                return value.__qualname__
            if isinstance(value, types.FunctionType):
                return self._function(value, depth, deep=True)
            functions = (member for member in vars(value).values() if isinstance(member, types.FunctionType))
            return [self._function(function, depth, deep=True) for function in functions]
        return self.trait(value, depth)


def portable_digest(facts: object) -> str:
    """A digest of plain values that is the same in every process."""
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(facts, enc_hook=_encoded))


def _encoded(value: object) -> object:
    """What JSON does not know. Line numbers are no part of code: an edit above it changes nothing."""
    if isinstance(value, types.CodeType):
        return (value.co_qualname, value.co_code, value.co_names, [_constant(constant) for constant in value.co_consts])
    return str(value)


def _constant(value: object) -> object:
    if isinstance(value, types.CodeType):
        return value
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


def _ids_of_modules(model: nn.Module) -> set[int]:
    """The ids of ``model.modules()``, in a quarter of the time."""
    ids: set[int] = set()
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in ids:
            ids.add(id(module))
            waiting += module._modules.values()
    return ids


def _form(tensor: torch.Tensor) -> object:
    """Everything about a tensor but its memory and its attributes."""
    kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
    if nn.parameter.is_lazy(tensor) or tensor.is_nested:
        return (kind, tensor.dtype, tensor.device)
    strides = tensor.stride() if tensor.layout is torch.strided else ()
    return (kind, tensor.dtype, tensor.shape, strides, tensor.layout, tensor.device)


def _place(tensor: torch.Tensor) -> int:
    """Its address; where it has none, its id."""
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
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
