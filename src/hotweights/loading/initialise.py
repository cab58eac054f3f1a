"""Initialising: what a load leaves on meta gets memory and values. It reads no source, and writes no other tensor."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Literal

import torch
from torch import nn

from ..errors import PlanError, UsageError
from ..failure import blame, called
from ..memory.aliases import plain
from ..model.places import places
from ..model.survey import Survey
from ..model.unprocessed import unprocessed
from ..plan.plan import LoadPlan
from ..plan.steps import Fate
from ..signals import held
from ..text import some
from ..tracing.frameworks import has_rules, initialise_by_rules

InitMissing = Callable[[str, torch.Tensor], object] | Literal[True]
"""Fills a tensor, whose name is given, in place; or ``True`` for the ``reset_parameters`` of the module that has it."""


def check_init_missing(init_missing: object) -> None:
    """See that it is one."""
    if init_missing is not None and init_missing is not True and not callable(init_missing):
        raise UsageError(
            f"init_missing= is a function that is called as fn(name, tensor), or True; found {init_missing!r}"
        )


def left_on_meta(plan: LoadPlan, seen: Survey, init_missing: InitMissing | None, model: nn.Module) -> list[str]:
    """Names of the meta tensors that the plan does not write, or not whole: they have to be initialised.

    Raises:
        PlanError: they cannot be, and would stay on meta: a model that does not compute.
    """
    kept = {name for fate in (Fate.MISSING, Fate.PARTIAL, Fate.MISMATCHED) for name in plan.names(fate)}
    kept |= set(seen.transient)
    metas = {name: tensor for name, tensor in seen.tensors.items() if tensor.is_meta and not _is_lazy(tensor)}
    # A buffer may be a view of a parameter: what is loaded into that is its value.
    loaded = {_memory(tensor) for name, tensor in metas.items() if name not in kept}
    left = [name for name in metas if name in kept and _memory(metas[name]) not in loaded]
    if left and init_missing is None and not has_rules(model) and not _may_reset(model, left, seen):
        raise PlanError(
            "tensors would stay on the meta device; nothing was read or written",
            [_in_words(name, plan, seen) for name in left],
            advice=_advice(model, left, seen),
        )
    if init_missing is True:
        _check_reset(model, left)
    return left


@held
def initialise(model: nn.Module, names: list[str], init_missing: InitMissing | None) -> None:
    """Fill the tensors with these names. They are real by now, and hold anything."""
    if not names:
        return
    named = {place.name: place.tensor for place in places(model)}
    with torch.no_grad():
        if init_missing is True or (init_missing is None and not has_rules(model)):
            _reset(model, names)
        elif init_missing is not None:
            first: dict[int, str] = {}  # A tied tensor is filled once.
            for name in names:
                if first.setdefault(id(named[name]), name) == name:
                    _fill(name, named[name].detach(), init_missing)
        else:
            initialise_by_rules(model, names)


def told(model: nn.Module, names: list[str], init_missing: InitMissing | None) -> tuple[str, ...]:
    """A warning of tensors that nobody said how to initialise."""
    if not names or init_missing is not None or has_rules(model):
        return ()
    return (
        f"{some(names, 3)}: not loaded; the model was made without values, so their modules' reset_parameters gave "
        "them new ones",
    )


def _fill(name: str, tensor: torch.Tensor, init: Callable[[str, torch.Tensor], object]) -> None:
    """Let ``init`` fill the tensor. One that makes another tensor instead would leave this one with any bytes."""
    where = tensor.data_ptr()
    try:
        returned = init(name, tensor)
    except Exception as error:
        blame(error, f"init_missing={called(init)} for {name!r}")
        raise
    others = [other for other in (tensor, returned) if isinstance(other, torch.Tensor) and other.data_ptr() != where]
    if others and tensor.numel():
        raise UsageError(
            f"init_missing= is to fill {name} in place, and made another tensor; write its values by tensor.copy_(...)"
        )


def _in_words(name: str, plan: LoadPlan, seen: Survey) -> str:
    if name in seen.transient:
        return f"{name}: is a non-persistent buffer on the meta device, and no checkpoint carries it"
    fate = plan.fates[name]
    shapes = f" ({plan.mismatched[name]})" if name in plan.mismatched else ""
    return f"{name}: {fate.value}{shapes}, so it would not be loaded, and it is on the meta device"


def _is_lazy(tensor: torch.Tensor) -> bool:
    return bool(nn.parameter.is_lazy(tensor))


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata if plain(tensor) else id(tensor)


def _advice(model: nn.Module, left: list[str], seen: Survey) -> str:
    """What can be done about these, and nothing that would be refused, or leave them without their values."""
    ways = []
    if set(left).intersection(seen.transient):
        # What hotweights.build makes is not processed.
        cure = (
            "make the model on its device instead, outside torch.device('meta'), and load into that."
            if unprocessed(model)
            else "hotweights.build(directory, factory=..., device=...) does so and leaves the parameters on meta."
        )
        ways.append(
            "A buffer that no checkpoint carries is computed by the model's __init__, which has to run off meta: "
            f"{cure}"
        )
    fn = "init_missing=fn calls fn(name, tensor) to fill each in place, as tensor.copy_(values) does"
    if _can_reset(model, left):
        fn += "; init_missing=True calls their modules' reset_parameters"
    ways.append(f"{'Or say' if ways else 'Say'} what they hold: {fn}.")
    return " ".join(ways)


def _holders(model: nn.Module, names: list[str]) -> dict[nn.Module, list[str]]:
    """The modules that hold the tensors with these names, each with their names."""
    wanted = set(names)
    holders: dict[nn.Module, list[str]] = {}
    for place in places(model):
        if place.name in wanted:
            holders.setdefault(place.module, []).append(place.name)
    return holders


def _may_reset(model: nn.Module, names: list[str], seen: Survey) -> bool:
    """Whether the caller has allowed each of these to be without bytes, and all their modules can reset themselves."""
    allowed = not set(names).intersection(seen.transient)  # No checkpoint carries those: nobody was asked.
    return allowed and _can_reset(model, names)


def _can_reset(model: nn.Module, names: list[str]) -> bool:
    return all(callable(getattr(module, "reset_parameters", None)) for module in _holders(model, names))


def _check_reset(model: nn.Module, names: list[str]) -> None:
    problems = [
        f"{name}: {type(module).__name__} has no reset_parameters"
        for module, held in _holders(model, names).items()
        if not callable(getattr(module, "reset_parameters", None))
        for name in held
    ]
    if problems:
        raise PlanError(
            "init_missing=True cannot initialise these; nothing was read or written",
            problems,
            advice="Give init_missing= a function instead: it is called as fn(name, tensor) and fills each in place.",
        )


def _reset(model: nn.Module, names: list[str]) -> None:
    """Run ``reset_parameters`` on twins of the modules: what else these hold is to keep its value."""
    fresh = {id(place.tensor) for place in places(model) if place.name in set(names)}
    for module in _holders(model, names):
        _twin(module, fresh).reset_parameters()  # type: ignore[operator]


def _twin(module: nn.Module, fresh: Container[int]) -> nn.Module:
    """The module with only these tensors of its own; all others, also in its children, are decoys on meta."""
    twin: nn.Module = object.__new__(type(module))  # copy.copy is refused by modules that are parametrised.
    twin.__dict__.update(module.__dict__)
    for store in ("_parameters", "_buffers"):
        tensors: dict[str, torch.Tensor | None] = getattr(module, store)
        twin.__dict__[store] = {
            key: tensor if tensor is None or id(tensor) in fresh else _decoy(tensor) for key, tensor in tensors.items()
        }
    twin.__dict__["_modules"] = {
        key: None if child is None else _twin(child, fresh) for key, child in module._modules.items()
    }
    return twin


def _decoy(tensor: torch.Tensor) -> torch.Tensor:
    decoy = torch.empty_like(tensor, device="meta")
    return nn.Parameter(decoy, requires_grad=False) if isinstance(tensor, nn.Parameter) else decoy
