"""Compiled models: whether compiled code may hold weights that no update reaches. It compiles nothing."""

from __future__ import annotations

import sys

from ..errors import HotweightsError

__all__ = ["refuse_frozen"]


def refuse_frozen() -> None:
    """See that inductor does not freeze weights: what it folds into compiled code stays what it was.

    The setting is all that it can ask: ``torch.compile(options={"freezing": True})`` is seen by nobody.

    Raises:
        HotweightsError: ``torch._inductor.config.freezing`` is on.
    """
    config = sys.modules.get("torch._inductor.config")  # Not imported: nothing was compiled by it.
    if config is not None and config.freezing:
        raise HotweightsError(
            "torch._inductor.config.freezing is on, so compiled code may hold weights of its own, which no update "
            "reaches; turn it off and compile anew"
        )
