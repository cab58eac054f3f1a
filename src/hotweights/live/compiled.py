"""Compiled models: whether compiled code holds weights of its own, which no update reaches. It compiles nothing."""

from __future__ import annotations

import gc
import sys

from ..errors import HotweightsError


def refuse_frozen() -> None:
    """See that inductor froze no weights: what it has folded into compiled code stays what it was.

    Whose weights they were it does not keep, so code that was compiled so for another model is refused too.

    Raises:
        HotweightsError: freezing is on, or frozen code is alive in this process.
    """
    config = sys.modules.get("torch._inductor.config")  # Not imported: nothing was compiled by it.
    if config is not None and config.freezing:
        raise HotweightsError(
            "torch._inductor.config.freezing is on, so compiled code may hold weights of its own, which no update "
            "reaches; turn it off, call torch._dynamo.reset() and compile anew"
        )
    if frozen := _frozen():
        raise HotweightsError(
            f"compiled code holds {frozen} weights of its own, which no update reaches: inductor froze them; turn "
            "freezing off, call torch._dynamo.reset() and compile anew"
        )


def _frozen() -> int:
    """How many weights all compiled code of this process has frozen."""
    if "torch._inductor.freezing" not in sys.modules or not _frozen_alive():  # It is imported to freeze.
        return 0
    gc.collect()  # What was reset may still be lying about: it is full of cycles.
    return _frozen_alive()


def _frozen_alive() -> int:
    graph = getattr(sys.modules.get("torch._inductor.output_code"), "CompiledFxGraph", None)
    return sum(len(getattr(one, "frozen_param_names", ())) for one in gc.get_objects() if type(one) is graph)
