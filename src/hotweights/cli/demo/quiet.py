"""``quiet``: keeps other packages from the network, and from log lines that would bury the demo's own."""

from __future__ import annotations

import logging
import os


def quiet() -> None:
    """Let nothing be fetched, and hide what torchao and torch log about each other when transformers imports them."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # Without this transformers would look for newer files at the hub.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
