"""SGLang: a load format, and updates by SGLang's own calls that come whole or not at all. Importing imports no SGLang.

``register`` is the plug-in that SGLang finds, in the group ``sglang.srt.plugins``. It has not met a running SGLang.
"""

from __future__ import annotations

import logging

__all__ = ["register"]


def register() -> None:
    """Make our load format and hooks known to SGLang, which calls this in each of its processes."""
    try:
        from .hooks import register_hooks
        from .loader import register_loader
    except ImportError as error:  # An engine that never asks for our format must start all the same.
        if (error.name or "").split(".")[0] != "sglang":
            raise
        logging.getLogger("hotweights").warning("this SGLang has no place for load format 'hotweights': %s", error)
        return
    register_loader()
    register_hooks()
