"""``quiet``: keeps other packages from the network, and from log lines that would bury the demo's own."""

from __future__ import annotations

import os

from ..noise import hide_noise


def quiet() -> None:
    """Let nothing be fetched, and hide log lines of other packages."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # Without this transformers would look for newer files at the hub.
    hide_noise()
