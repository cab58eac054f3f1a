"""Merged adapters: PEFT has added them to the weights, and will take off what the adapters are by then."""

from __future__ import annotations

import sys

from torch import nn

from ..errors import PlanError
from ..text import some


def refuse_merged(model: nn.Module) -> None:
    """Raise ``PlanError`` if adapters are merged into the model's weights.

    New adapters would have no effect then, and new weights would lose the old adapters at ``unmerge_adapter()``.
    """
    peft = sys.modules.get("peft.tuners.tuners_utils")  # Where nobody has imported it, there are no adapters.
    if peft is None:
        return
    merged = [
        name for name, module in model.named_modules() if isinstance(module, peft.BaseTunerLayer) and module.merged
    ]
    if merged:
        raise PlanError(
            "PEFT has merged adapters into the weights of these layers; nothing was read or written",
            [f"{some(merged, 5)}: what is loaded now would be wrong after unmerge_adapter()"],
            advice="Call model.unmerge_adapter() first, and merge_adapter() again afterwards.",
        )
