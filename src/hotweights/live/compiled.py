"""Compiled models: whether compiled code holds weights of its own, which no update reaches."""

from __future__ import annotations

import gc
import sys

from ..errors import LiveModelError


def refuse_frozen() -> None:
    """See that inductor froze no weights: those that it folded into compiled code would keep their old values.

    Inductor does not say whose weights they were, so frozen code of another model is refused too.

    Raises:
        LiveModelError: freezing is on, or frozen code is alive in this process.
    """
    config = sys.modules.get("torch._inductor.config")  # Not imported: nothing was compiled by it.
    if config is not None and config.freezing:
        raise LiveModelError(
            "torch._inductor.config.freezing is on, so compiled code may hold weights of its own, which no update "
            "reaches; turn it off, call torch._dynamo.reset() and compile anew"
        )
    if frozen := _frozen():
        raise LiveModelError(
            f"compiled code holds {frozen} weights of its own, which no update reaches: inductor froze them; turn "
            "freezing off, call torch._dynamo.reset() and compile anew"
        )


def _frozen() -> int:
    """How many weights are frozen in all compiled code of this process."""
    if "torch._inductor.freezing" not in sys.modules or not _frozen_alive():  # It is imported to freeze.
        return 0
    gc.collect()  # Code that was reset is full of cycles, and may not have been freed yet.
    return _frozen_alive()


def _frozen_alive() -> int:
    graph = getattr(sys.modules.get("torch._inductor.output_code"), "CompiledFxGraph", None)
    return sum(len(getattr(item, "frozen_param_names", ())) for item in gc.get_objects() if type(item) is graph)
