"""Looks processed: layers that do not fit a checkpoint because an engine has processed them, as far as that is seen."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import nn

from ..errors import PlanError
from ..manifest import Manifest
from ..text import some

_SHAPES = re.compile(r"\[([\d, ]+)\] expected.*?\[([\d, ]+)\] found")
_CAST = re.compile(r"\bB?F(16|32|64) -> (I|U|F8)")
_PACKED = re.compile(r"(.+)\.[^.]+: missing; (I|U|F8)\S* ")


def advise_of_processed(error: PlanError, manifest: Manifest, layers: Mapping[str, nn.Module], instead: str) -> None:
    """Say in the error's advice which layers look processed, and what to do ``instead``.

    Args:
        error: of a model and a checkpoint that do not fit.
        manifest: the checkpoint's.
        layers: those that an engine may process, by name.
        instead: what to do where an engine has processed them.
    """
    if not (names := _looking_processed(error, manifest, layers)):
        return
    # To allow its names would leave such a layer without weights.
    lines = [line for line in error.advice.splitlines() if "allow_" not in line]
    lines.append(
        f"{some(names, 3)}: is not as in this checkpoint, but as processing may leave it. If an engine has processed "
        f"layers of this model already (process_weights_after_loading), {instead}; if nobody has, this checkpoint is "
        "another model's."
    )
    error.advice = "\n".join(lines)


def _looking_processed(error: PlanError, manifest: Manifest, layers: Mapping[str, nn.Module]) -> list[str]:
    """Those of which a problem tells such a shape, or integers for floats, as processing makes."""
    found: dict[str, None] = {}
    for problem in error.problems:
        name = max((name for name in layers if name and f"{name}." in problem), key=len, default=None)
        if name is None:
            continue
        shapes, packed = _SHAPES.search(problem), _PACKED.match(problem) and f"{name}.weight" in manifest
        if (
            packed
            or _CAST.search(problem)
            or (shapes and (_is_unlike_itself(layers[name]) or _made_by_processing(*map(_shape, shapes.groups()))))
        ):
            found[name] = None
    return [*found]


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _is_unlike_itself(layer: nn.Module) -> bool:
    """Whether a weight is not of the sizes that the layer was made with, as far as it keeps them as Linear does."""
    sizes = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    weight = layer._parameters.get("weight")
    return None not in sizes and weight is not None and tuple(weight.shape) != sizes


def _made_by_processing(held: tuple[int, ...], read: tuple[int, ...]) -> bool:
    """Whether a tensor of one shape may be what processing made of the other: turned round, packed anew, padded.

    A rank's part of a tensor, or another model's size, is neither.
    """
    if held == read:
        return False
    turned = len(held) == len(read) and all(own >= of for own, of in zip(held, reversed(read), strict=True))
    padded = len(held) == len(read) and all(own >= of for own, of in zip(held, read, strict=True))
    return sorted(held) == sorted(read) or math.prod(held) == math.prod(read) or (turned and not padded)
