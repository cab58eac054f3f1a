"""diffusers: ``from_pretrained`` and ``reading``; ``load``, ``live`` and ``weights`` for a pipeline that is there.

Pipelines and models are diffusers' own; their weights are read as by ``hotweights.load``. diffusers is imported when
one of these is called.
"""

from __future__ import annotations

from .pipeline import live, load, weights
from .pretrained import from_pretrained, reading

__all__ = ["from_pretrained", "live", "load", "reading", "weights"]
