"""``attach`` and ``attached``: the live model that belongs to a model of vLLM's, kept on the model itself."""

from __future__ import annotations

from torch import nn

from ...live.model import LiveModel


class _Attached:
    """Holds a live model where walks over a model's attributes do not find it: it leads back to the whole model."""

    __slots__ = ("live",)

    def __init__(self, live: LiveModel) -> None:
        self.live = live


def attach(model: nn.Module, live: LiveModel) -> None:
    """Keep the live model as long as the model."""
    model.__dict__["_hotweights"] = _Attached(live)


def attached(model: nn.Module) -> LiveModel | None:
    """The live model of a model, if it was loaded by us."""
    holder = model.__dict__.get("_hotweights")
    return holder.live if isinstance(holder, _Attached) else None
