"""The digest of a model: of all its parameters and buffers."""

from __future__ import annotations

from torch import nn

from ..memory.digest import Digest, digests
from ..memory.wrappers import is_wrapper, leaves
from .survey import survey


def digest_of(model: nn.Module) -> Digest:
    """Digests of all parameters and buffers of a model."""
    pairs = (pair for name, tensor in survey(model).tensors.items() for pair in leaves(name, tensor))
    tensors = {name: tensor for name, tensor in pairs if not nn.parameter.is_lazy(tensor) and not is_wrapper(tensor)}
    return Digest.of(digests(tensors, tensors))
