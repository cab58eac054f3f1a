"""vLLM: a load format, updates of a running engine, and the weight-transfer backend. Importing this imports no vLLM.

``register`` is the plug-in that vLLM finds. ``Worker`` is the worker extension. ``update`` and ``update_async`` are for
whoever holds an engine; ``status`` says what its workers hold. ``TrainerInit`` makes vLLM's trainer factory use our
backend, and ``HTTPClient``, ``LLMClient``, ``AsyncLLMClient`` and ``Clients`` are how a trainer asks engines.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .clients import AsyncLLMClient, Clients, HTTPClient, LLMClient
from .engine import Outcome, RanksDiffer, status, status_async, update, update_async
from .worker import Worker

if TYPE_CHECKING:
    from .trainer import TrainerInit

__all__ = [
    "AsyncLLMClient",
    "Clients",
    "HTTPClient",
    "LLMClient",
    "Outcome",
    "RanksDiffer",
    "TrainerInit",
    "Worker",
    "register",
    "status",
    "status_async",
    "update",
    "update_async",
]


def register() -> None:
    """Make our load format and backend known to vLLM, which calls this in each of its processes. Twice does nothing."""
    try:
        from .loader import register_loader
    except ImportError as error:  # An engine that never asks for our format must start all the same.
        if (error.name or "").split(".")[0] != "vllm":
            raise
        logging.getLogger("hotweights").warning("this vLLM has no load format 'hotweights': %s", error)
        return
    register_loader()
    try:
        from .backend import register_backend
        from .trainer import register_trainer
    except ImportError as error:  # vLLM before 0.32, which can be updated all the same.
        if (error.name or "").split(".")[0] != "vllm":
            raise
        logging.getLogger("hotweights").warning("this vLLM has no weight transfer that hotweights knows: %s", error)
        return
    register_backend()
    register_trainer()


def __getattr__(name: str) -> object:
    if name != "TrainerInit":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .trainer import TrainerInit, register_trainer

    register_trainer()  # A trainer is no engine: vLLM loads no plug-ins there.
    return TrainerInit
