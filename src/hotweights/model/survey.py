"""Survey: what loading code a model has, and which tensors it loads."""

from __future__ import annotations

import inspect
import re
import types
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import nn

from ..errors import UsageError
from ..memory.wrappers import inside, is_wrapper
from ..names import inside as wraps
from ..sharding import Part, is_dtensor, is_fsdp, is_fsdps, local, shards_of
from ..shell import Shell, outer_names
from ..text import some
from .walk import modules_of
from .weights_map import Offloaded, offloaded

By = Literal["loader", "name"]
"""How a model that has a ``load_weights`` is loaded: by that, or by name."""

LoadingCode = Callable[[Iterable[tuple[str, torch.Tensor]]], object]


class Survey(NamedTuple):
    """What one walk over a model finds.

    Attributes:
        tensors: every parameter and buffer, by each name it has, in the order of ``places``.
        transient: which of them are not persistent.
        plain: whether loading is copying by name: nowhere is there loading code, a hook or extra state.
        hooked: the modules, by name, whose forward was replaced or has hooks before it.
        parts: which part of a whole tensor this rank holds, of those of which ``tensors`` has no more than that.
        offloaded: what accelerate's hooks keep.
        kept: names of that: ``tensors`` has it in place of the modules' own tensors.
        shells: the wrappers of those of ``tensors`` that lie in one: of a wrapper it has the tensors inside.
        wrappers: the wrappers themselves.
    """

    tensors: dict[str, torch.Tensor]
    transient: list[str]
    plain: bool
    hooked: list[tuple[str, nn.Module]]
    parts: dict[str, Part]
    offloaded: Offloaded
    kept: list[str]
    shells: dict[str, Shell]
    wrappers: list[torch.Tensor]

    @property
    def persistent(self) -> dict[str, torch.Tensor]:
        """The tensors of the state dict; computed anew each time."""
        transient = set(self.transient)
        return {name: tensor for name, tensor in self.tensors.items() if name not in transient}

    @property
    def names(self) -> Collection[str]:
        """The names by which a source calls ``tensors``: of what lies in a wrapper, the wrapper's."""
        if not self.shells:
            return self.tensors.keys()
        return dict.fromkeys(self.outer_names().values())

    def outer_names(self) -> dict[str, str]:
        """For each of ``tensors`` the name of the wrapper that it lies in, or its own."""
        return outer_names({name: self.shells.get(name) for name in self.tensors})

    def others(self) -> dict[str, tuple[str, ...]]:
        """For each name of a tensor in a wrapper, those of the wrapper and of all that lies in it."""
        together: dict[str, list[str]] = defaultdict(list)
        for name, shell in self.shells.items():
            together[shell.outer(name)].append(name)
        return {name: (outer, *names) for outer, names in together.items() for name in (outer, *names)}


def survey(model: nn.Module, by: By | None = None) -> Survey:
    """Look at every module once. Every load does this, so one walk answers all questions.

    Args:
        model: is looked at, not changed.
        by: what is ``plain`` depends on it, see ``By``.

    Raises:
        UsageError: a part does not show its tensors, as those that are scripted, traced or made for mkldnn.
    """
    tensors: dict[str, torch.Tensor] = {}
    transient: list[str] = []
    plain = own_loader(model, by) is None and _loads_by_name(model)
    kinds: dict[type, bool] = {}
    hidden: list[str] = []
    hooked: list[tuple[str, nn.Module]] = []
    aligned: list[tuple[str, nn.Module]] = []
    for prefix, module in modules_of(model):
        inside = module.__dict__
        kind = type(module)
        if "_parameters" not in inside:
            hidden += [f"{prefix[:-1]} ({kind.__name__})"] if module.state_dict() else ()
            continue
        if kind not in kinds:
            kinds[kind] = not _has_loading_code(kind) and kind.set_extra_state is nn.Module.set_extra_state
        if inside["_forward_pre_hooks"] or "forward" in inside:
            hooked.append((prefix[:-1], module))
        if "_hf_hook" in inside:
            aligned.append((prefix[:-1], module))
        if not kinds[kind] or _is_hooked(module):
            plain = False
        for key, tensor in inside["_parameters"].items():
            if tensor is not None:
                tensors[prefix + key] = tensor
        for key, tensor in inside["_buffers"].items():
            if tensor is not None:
                tensors[prefix + key] = tensor
                if key in inside["_non_persistent_buffers_set"]:
                    transient.append(prefix + key)
    if hidden:
        raise UsageError(
            f"these parts of the model are TorchScript modules, which do not show their tensors: {some(hidden)}; load "
            "the model before its parts are scripted, traced or converted for mkldnn"
        )
    if any(map(is_fsdp, kinds)):
        tensors |= _sharded(model)
    kept = offloaded(aligned)
    brought = _named(model, kept.tensors) if kept.tensors else {}
    tensors |= brought
    parts = _localised(tensors)
    shells: dict[str, Shell] = {}
    wrappers = [tensor for name, tensor in tensors.items() if name not in parts and is_wrapper(tensor)]
    if wrappers:
        tensors, transient = _unwrapped(tensors, parts, transient, shells)
    return Survey(tensors, transient, plain, hooked, parts, kept, [*brought], shells, wrappers)


def _sharded(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that FSDP2 shards, by name: its modules may hold gathered ones, whose values are dropped."""
    shards = {
        (id(owner), key): tensor
        for module in model.modules()
        if is_fsdp(type(module))
        for owner, key, tensor in shards_of(module)
    }
    return _named(model, shards)


def _named(model: nn.Module, tensors: dict[tuple[int, str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that are given by the id of their module and their key there, by all their names."""
    return {
        prefix + key: tensors[id(module), key]
        for prefix, module in modules_of(model)
        for key in (*module._parameters, *module._buffers)
        if (id(module), key) in tensors
    }


def _localised(tensors: dict[str, torch.Tensor]) -> dict[str, Part]:
    """Put what this rank holds in place of each DTensor. Returns which parts those are."""
    parts: dict[str, Part] = {}
    for name in [name for name, tensor in tensors.items() if is_dtensor(tensor)]:
        tensors[name], part = local(tensors[name])
        if part is not None:
            parts[name] = part
    return parts


def _unwrapped(
    tensors: dict[str, torch.Tensor], parts: Container[str], transient: Container[str], shells: dict[str, Shell]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Tensors with those inside wrappers in place of these, and which are not persistent. The ``shells`` are added.

    A wrapper that holds what has no plain bytes, or a part of a DTensor, stays as it is.
    """
    opened: dict[str, torch.Tensor] = {}
    hidden: list[str] = []
    for name, tensor in tensors.items():
        held = {} if name in parts else inside(name, tensor)
        opened |= {key: part for key, (part, _) in held.items()} or {name: tensor}
        shells |= {key: shell for key, (_, shell) in held.items()}
        if name in transient:
            hidden += held or [name]
    return opened, hidden


_HARMLESS = (
    "torch.nn.modules.batchnorm",
    "torch.nn.modules.instancenorm",
)  # Their code fills in counters of old files.


def counters(model: nn.Module, absent: Iterable[str]) -> list[str]:
    """Those of the ``absent`` names that torch's own ``load_state_dict`` does not miss, as old checkpoints lack them.

    Torch keeps the values of real counters, and makes zeros of those on meta.
    """
    split = (name.rpartition(".") for name in absent)
    holders = {"".join(parts): model.get_submodule(parts[0]) for parts in split if parts[2] == "num_batches_tracked"}
    return [name for name, module in holders.items() if type(module)._load_from_state_dict.__module__ in _HARMLESS]


def hook_problems(model: nn.Module) -> Iterator[str]:
    """Modules whose ``load_state_dict`` does more than copy by name: by name that would be skipped, in silence."""
    cure = "load_state_dict runs it, loading by name does not"
    if not _loads_by_name(model):
        yield f"module {type(model).__name__}: has a load_state_dict of its own; loading by name does not run it"
    seen: set[int] = set()
    own: dict[type, bool] = {}
    for prefix, module in modules_of(model):
        if id(module) in seen:
            continue
        seen.add(id(module))
        kind = type(module)
        if kind not in own:
            own[kind] = _has_loading_code(kind)
        if own[kind]:
            yield f"module {prefix[:-1] or kind.__name__}: {kind.__name__} has loading code of its own; {cure}"
        if _is_hooked(module):
            yield f"module {prefix[:-1] or kind.__name__}: has a hook around loading; {cure}"


def _is_hooked(module: nn.Module) -> bool:
    """Whether hooks around its ``load_state_dict`` do more than copying by name, or than a wrapper's: change names."""
    before, after = module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks
    if not (before or after):
        return False
    hooks = [*before.values(), *after.values()]
    if all(map(is_fsdps, hooks)):
        return False
    return wraps(type(module)) is None or any(not _of_torch(getattr(hook, "hook", hook)) for hook in hooks)


def _of_torch(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def _loads_by_name(model: nn.Module) -> bool:
    return getattr(model.load_state_dict, "__func__", None) is nn.Module.load_state_dict


def _has_loading_code(kind: type[nn.Module]) -> bool:
    override = kind._load_from_state_dict
    return override is not nn.Module._load_from_state_dict and override.__module__ not in _HARMLESS


def extra_states(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that keep extra state, by its key in the state dict: ``load_state_dict`` hands it to them."""
    return {
        f"{prefix}_extra_state": module
        for prefix, module in modules_of(model)
        if type(module).set_extra_state is not nn.Module.set_extra_state
    }


def own_loader(model: nn.Module, by: By | None = None) -> LoadingCode | None:
    """The model's ``load_weights``, if it is the engines' protocol, and ``by`` does not say otherwise.

    Raises:
        UsageError: ``by`` asks for a ``load_weights``, and the model has none.
    """
    load = None if by == "name" else getattr(model, "load_weights", None)
    if load is None and by == "loader":
        raise UsageError(f'by="loader" asks for a load_weights, which {type(model).__name__} does not have')
    return load if by == "loader" or (load is not None and _takes_pairs(load)) else None


def passed_over(model: nn.Module, by: By | None = None) -> str:
    """Why the model's ``load_weights`` is not used, and what to type; empty if it is used, or there is none."""
    load = getattr(model, "load_weights", None)
    if not callable(load) or by == "loader" or (by is None and _takes_pairs(load)):
        return ""
    said = f"{type(model).__name__}.load_weights was not used"
    if by == "name":
        return f'{said}: by="name" leaves it out. If it is what slices, fuses or renames, leave by= out.'
    own = inspect.signature(load)
    try:
        own.bind(())
    except TypeError:
        return (
            f"{said}: it is called with one argument, pairs of name and tensor, and its signature is {own}. Give the "
            "other arguments defaults: load_weights(self, weights, ...)."
        )
    return (
        f"{said}: by its signature {own} it takes a place, and not pairs of name and tensor. If it takes such pairs, "
        'say by="loader", or call the argument weights. If it reads files itself, give the model a '
        "load_weights(self, weights) that takes pairs."
    )


_A_PLACE = re.compile(r"path|file|fname|url|ckpt|checkpoint|pretrained|(^|_)dir")


def _takes_pairs(load: Callable[..., object]) -> bool:
    """Whether a function can be called with pairs of name and tensor alone, as far as its signature says.

    Many a model has a ``load_weights(path)`` that reads a file.
    """
    try:
        parameters = list(inspect.signature(load).parameters.values())
    except (TypeError, ValueError):
        return True
    places = [part for part in parameters if part.kind not in (part.KEYWORD_ONLY, part.VAR_KEYWORD)]
    needed = [part for part in parameters if part.default is part.empty and part.kind not in _VARIADIC]
    if not places or needed not in ([], places[:1]):
        return False
    first = places[0]
    said = "" if first.annotation is first.empty else str(first.annotation)
    if said and not re.search(r"\bAny\b|object", said):
        return bool(re.search(r"Iter|Gen|tuple|Tensor|list|Sequence|Mapping|dict", said)) or not re.search(
            r"\bstr\b|Path|bytes", said
        )
    return first.kind in _VARIADIC or not _A_PLACE.search(first.name.lower())


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def loader_of(model: nn.Module, by: By | None = None) -> LoadingCode | None:
    """The model's own loading code; ``None`` where loading by name is all that it would do."""
    if (own := own_loader(model, by)) is not None:
        return lambda pairs: finished(own(pairs))
    if any(map(nn.parameter.is_lazy, survey(model).tensors.values())):
        return None  # Loading code would make them real.
    return by_name(model) if any(hook_problems(model)) or extra_states(model) else None


def finished(returned: object) -> object:
    """What loading code returned, once it has done its work: a generator does nothing until somebody iterates over it.

    Raises:
        UsageError: it is a coroutine, which nobody here can await.
    """
    if inspect.iscoroutine(returned):
        returned.close()
        raise UsageError("this load_weights is a coroutine function; give code that loads when it is called")
    return tuple(returned) if isinstance(returned, types.GeneratorType) else returned


def by_name(model: nn.Module) -> LoadingCode:
    """``load_state_dict`` as loading code."""
    return lambda pairs: model.load_state_dict(dict(pairs), strict=False)
