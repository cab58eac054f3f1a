"""Materialising: tensors on the meta device are replaced by real ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable

import torch
from torch import nn

from .. import signals
from ..memory.aliases import plain
from .places import Place


@signals.whole
def materialise(
    places: Iterable[Place], names: Container[str], device: torch.device
) -> list[tuple[Place, torch.Tensor]]:
    """Replace the meta tensors with these names by uninitialised tensors on ``device``.

    A tied tensor is replaced under all its names by one. Tensors that share memory with a replaced one are replaced
    too, and share memory as before. Classes, attributes and ``requires_grad`` stay. Returns the places with the
    tensors that were there, so that they can be put back.
    """
    places = [place for place in places if place.tensor.is_meta]
    wanted = {_memory(place.tensor) for place in places if place.name in names}
    metas = {id(place.tensor): place.tensor for place in places if _memory(place.tensor) in wanted}
    sharing = Counter(map(_memory, metas.values()))
    shared = {_memory(tensor): _whole(tensor, device) for tensor in metas.values() if sharing[_memory(tensor)] > 1}
    made = {key: _real(tensor, device, shared.get(_memory(tensor))) for key, tensor in metas.items()}
    replaced = [(place, place.tensor) for place in places if id(place.tensor) in made]
    for place, old in replaced:
        place.put(made[id(old)])
    return replaced


@signals.whole
def put_back(replaced: Iterable[tuple[Place, torch.Tensor]]) -> None:
    """Put the tensors that ``materialise`` replaced into their places again."""
    for place, old in replaced:
        place.put(old)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata if plain(tensor) else id(tensor)


def _whole(tensor: torch.Tensor, device: torch.device) -> torch.UntypedStorage:
    return torch.empty(tensor.untyped_storage().nbytes(), dtype=torch.uint8, device=device).untyped_storage()


def _real(old: torch.Tensor, device: torch.device, shared: torch.UntypedStorage | None) -> torch.Tensor:
    if shared is None:
        return dressed(torch.empty_like(old, device=device), old)
    new = torch.empty(0, dtype=old.dtype, device=device)
    return dressed(new.set_(shared, int(old.storage_offset()), old.size(), old.stride()), old)


def dressed(bare: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``bare``'s memory with the class, the attributes and ``requires_grad`` of another tensor."""
    new = bare
    if isinstance(like, nn.Parameter):
        new = nn.Parameter(bare, requires_grad=like.requires_grad)
        if type(like) is not nn.Parameter:
            new = new.as_subclass(type(like))
    elif type(like) is not torch.Tensor:
        new = bare.as_subclass(type(like))
    new.__dict__.update(like.__dict__)
    return new
