"""transformers: ``from_pretrained`` that reads as ``hotweights.load`` does, and ``build``. transformers itself is
imported only when one of them is called.
"""

from __future__ import annotations

from .blank import build
from .pretrained import from_pretrained, reading

__all__ = ["build", "from_pretrained", "reading"]
