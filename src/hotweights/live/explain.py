"""What becomes of a tensor of a live model, in words: through the plan, and through processing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from ..errors import UnknownName
from ..manifest import TensorSpec
from ..plan.explain import alike
from ..plan.plan import LoadPlan
from ..text import some

_SHOWN = 20  # tensors of one layer


class Formats(NamedTuple):
    """Both formats of a layer that is processed.

    Attributes:
        name: of the layer.
        deferred: whether it is processed after all others.
        checkpoint: the names of its tensors before processing.
        kernel: the names of those that it holds live.
    """

    name: str
    deferred: bool
    checkpoint: frozenset[str]
    kernel: tuple[str, ...]


def explain(plan: LoadPlan, layers: Sequence[Formats], live: Mapping[str, torch.Tensor], name: str) -> str:
    """What becomes of the tensor ``name`` of the source or the model, or how that of a processed layer comes to be.

    Args:
        plan: by which the model is loaded.
        layers: those that are processed.
        live: every live tensor by name.
        name: of a tensor.

    Raises:
        UnknownName: nobody has this name; the message lists similar ones.
    """
    if _is_planned(plan, name):
        return "\n".join([plan.explain(name), *_afterwards(plan, layers, live, name)])
    if not knows(plan, live, name):
        raise UnknownName("tensor", name, [some(alike(name, [*plan.targets, *plan.transient, *plan.manifest, *live]))])
    title = f"{_spec(live, name)} (live)"
    makers = [layer for layer in layers if name in layer.kernel]
    if not makers:
        return f"{title}\n  no checkpoint carries it: it keeps its values"
    return "\n".join([title, *(line for layer in makers for line in _making(plan, layer))])


def knows(plan: LoadPlan, live: Mapping[str, torch.Tensor], name: str) -> bool:
    """Whether ``explain`` has something to say."""
    return _is_planned(plan, name) or name in live


def _is_planned(plan: LoadPlan, name: str) -> bool:
    return name in plan.targets or name in plan.manifest or name in plan.transient


def _afterwards(
    plan: LoadPlan, layers: Sequence[Formats], live: Mapping[str, torch.Tensor], name: str
) -> Iterator[str]:
    """What processing makes of the tensors of the model that ``name`` goes into."""
    into = {name, *(target for step in plan.steps if name in step.sources for target in step.destinations)}
    into |= {second.destination for _, second in plan.ties if second.source == name}
    owners = {plan.targets[target].owner for target in into if target in plan.targets}
    into |= {target for target in plan.targets if plan.targets[target].owner in owners}
    for layer in layers:
        if layer.checkpoint.isdisjoint(into):
            continue
        later = ", after all that are not deferred" if layer.deferred else ""
        if not layer.kernel:
            yield f"  layer {layer.name} is processed then{later}; live, it holds no tensor that can be seen"
            continue
        yield f"  layer {layer.name} is processed then{later}; live, it holds"
        for made in layer.kernel[:_SHOWN]:
            yield f"    {_spec(live, made)}{'' if made in layer.checkpoint else ' (made by processing)'}"
        if len(layer.kernel) > _SHOWN:
            yield f"    and {len(layer.kernel) - _SHOWN} more"


def _making(plan: LoadPlan, layer: Formats) -> Iterator[str]:
    yield f"  processing layer {layer.name} makes it of"
    for name in sorted(layer.checkpoint & plan.targets.keys()):
        yield from (f"    {line}" for line in plan.explain(name).splitlines())


def _spec(live: Mapping[str, torch.Tensor], name: str) -> str:
    tensor = live[name]
    return str(TensorSpec(name, tensor.dtype, tuple(tensor.shape)))
