"""``quiet``: what the demo's processes keep other packages from doing and saying. It hides nothing of ours."""

from __future__ import annotations

import logging
import os


def quiet() -> None:
    """Nothing is fetched, and what torchao and torch say of each other when transformers imports them is not shown."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # Without this transformers would look for newer files at the hub.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
