"""Noise: log lines of other packages about each other, which would bury what a command prints."""

from __future__ import annotations

import logging


def hide_noise() -> None:
    """Hide what torchao and torch log about each other when transformers imports them. Errors are still told."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
