"""As saved: the tensors of a transformers model under the names, and in the shapes, of what ``save_pretrained`` writes.

In memory transformers keeps the experts of a layer as one tensor, say. Engines know what checkpoints have.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import nn

from .. import signals
from ..names import unwrapped
from ..sharding import is_dtensor


@signals.held
def as_saved(model: nn.Module) -> nn.Module | Mapping[str, torch.Tensor]:
    """The tensors that it would save, views of its own where that is possible; or the model, if those are its own.

    Also the model, if transformers would need more than the tensors here to save it: of which this rank holds parts, or
    that its quantiser holds.
    """
    modeling, core = sys.modules.get("transformers.modeling_utils"), unwrapped(model)
    if modeling is None or not isinstance(core, modeling.PreTrainedModel) or hasattr(core, "hf_quantizer"):
        return model
    revert = getattr(modeling, "revert_weight_conversion", None)
    state = core.state_dict()
    if revert is None or any(is_dtensor(tensor) or tensor.is_meta for tensor in state.values()):
        return model
    with torch.no_grad():
        saved: dict[str, torch.Tensor] = revert(core, dict(state))
    return model if saved.keys() == state.keys() else saved
