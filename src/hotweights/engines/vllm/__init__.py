"""vLLM: a load format, and updates of a running engine. Importing this imports nothing of vLLM.

``register`` is the plug-in that vLLM finds. ``Worker`` is the worker extension. ``update`` and ``update_async`` are for
whoever holds an engine; ``status`` says what its workers hold.
"""

from __future__ import annotations

import logging

from .engine import Outcome, RanksDiffer, status, status_async, update, update_async
from .worker import Worker

__all__ = ["Outcome", "RanksDiffer", "Worker", "register", "status", "status_async", "update", "update_async"]


def register() -> None:
    """Make ``--load-format hotweights`` known to vLLM. Called by vLLM in each of its processes; twice does nothing."""
    try:
        from .loader import register_loader
    except ImportError as error:  # An engine that never asks for our format must start all the same.
        if (error.name or "").split(".")[0] != "vllm":
            raise
        logging.getLogger("hotweights").warning("this vLLM has no load format 'hotweights': %s", error)
        return
    register_loader()
