"""Checkpoints for the readers of other packages, whichever files a reader reads."""

import torch

from hotweights.sources.files.layout import SAFETENSORS
from hotweights.sources.readers import source as readers
from hotweights.testing import write_checkpoint

REUSING = {"runai": {"RUNAI_STREAMER_MEMORY_LIMIT": "0"}}
"""The environment under which a package uses its memory again as soon as it can, where it has such a setting."""

CANNOT = {"fastsafetensors": {torch.complex64}}
"""Dtypes that a package does not know."""


def layout(reader):
    """Which files the reader reads."""
    return readers._import(reader).layout


def save(directory, tensors, *, reader, shards=1):
    """Write a checkpoint that the reader can read; another layout than safetensors' is one file of torch's."""
    if layout(reader) is SAFETENSORS:
        return write_checkpoint(directory, tensors, shards=shards)
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, directory / f"{layout(reader).stems[0]}{layout(reader).suffix}")
    return directory
