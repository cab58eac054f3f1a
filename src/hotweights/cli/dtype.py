"""Dtypes by the names that people type: the format's, such as ``BF16``, or torch's."""

from __future__ import annotations

import re

import torch

from ..dtypes import FORMAT_DTYPES
from ..errors import UnknownName

_QUANTISED = ("F4", "F8_E8M0")  # A tool that quantises writes these.


def _is_float(torch_name: str) -> bool:
    dtype = getattr(torch, torch_name, None)
    return dtype is not None and bool(dtype.is_floating_point)


def dtype_from(name: str | None) -> torch.dtype | None:
    """The dtype of this name; ``None`` for ``None``. Raises ``UnknownName``."""
    if name is None:
        return None
    known = {format_name: torch_name for format_name, (_, torch_name) in FORMAT_DTYPES.items() if torch_name}
    short = name.removeprefix("torch.").lower()
    short = re.sub(r"^fp(?=\d)", "float", short)  # fp16, as many write float16
    dtype = getattr(torch, known.get(short.upper(), short), None)
    if not isinstance(dtype, torch.dtype):
        floats = [each for each, torch_name in known.items() if each not in _QUANTISED and _is_float(torch_name)]
        raise UnknownName("dtype", name, floats)  # What models and checkpoints are made of; the others are refused.
    return dtype
