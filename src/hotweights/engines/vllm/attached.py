"""Attached: how a model knows its live model. It knows neither."""

from __future__ import annotations

from torch import nn

from ...live.model import LiveModel


class _Attached:
    """Hides a live model from whoever walks over the attributes of its model: it leads back to all of them."""

    __slots__ = ("live",)

    def __init__(self, live: LiveModel) -> None:
        self.live = live


def attach(model: nn.Module, live: LiveModel) -> None:
    """Keep the live model as long as the model."""
    model.__dict__["_hotweights"] = _Attached(live)


def attached(model: nn.Module) -> LiveModel | None:
    """The live model of a model, if it was loaded by us."""
    found = model.__dict__.get("_hotweights")
    return found.live if isinstance(found, _Attached) else None
