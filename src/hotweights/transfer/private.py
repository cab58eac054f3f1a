"""Private: memory of a receiver's own, for tensors that have no place of their own. It copies nothing."""

from __future__ import annotations

import torch

from ..memory import host_empty

__all__ = ["Private"]


class Private:
    """Memory of a receiver's own for one tensor at a time, used again and again. Grows to the largest."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> torch.Tensor:
        """``uint8 [nbytes]``, until the next call."""
        if self._memory.numel() < nbytes:
            self._memory = host_empty((nbytes,), torch.uint8)
        return self._memory[:nbytes]
