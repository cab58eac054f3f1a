"""State and Digest: what a live model is in, and what a model holds. Nothing here changes either."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import xxhash
from torch import nn

from ..fit import digests
from ..modules import survey
from .wrappers import is_wrapper, leaves

__all__ = ["Digest", "State", "digest_of"]


class State(enum.Enum):
    """What a live model is in. Only one update runs at a time."""

    EMPTY = "empty"  # nothing was loaded yet
    SERVING = "serving"  # all of one version
    UPDATING = "updating"  # an update runs; version N is what an abort leaves
    PREPARED = "prepared"  # it can be committed; version N still
    TORN = "torn"  # tensors of two versions: an update with atomic=False failed


@dataclass(frozen=True, slots=True)
class Digest:
    """What a model holds.

    Attributes:
        whole: xxh3 of all tensors, names included.
        tensors: xxh3 of each parameter and buffer, by name; of a wrapper, of the tensors inside.
    """

    whole: str
    tensors: Mapping[str, str]


def digest_of(model: nn.Module) -> Digest:
    """Digests of all parameters and buffers of a model."""
    found = (pair for name, one in survey(model).tensors.items() for pair in leaves(name, one))
    tensors = {name: one for name, one in found if not nn.parameter.is_lazy(one) and not is_wrapper(one)}
    each = digests(tensors, tensors)
    whole = xxhash.xxh3_128("".join(f"{name} {one}\n" for name, one in sorted(each.items())).encode())
    return Digest(whole.hexdigest(), each)
