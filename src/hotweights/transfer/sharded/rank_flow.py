"""Rank flows: what a rank on another host packs of a slot, and how it gets to the one that leads, beside their link."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import torch
from msgspec.structs import replace

from ... import signals
from ...boxes import Box, row_major
from ..flow import GREETING
from ..slot_flow import SlotOutflow
from .words import Task


def packed(tasks: Sequence[Task]) -> tuple[tuple[Task, ...], list[Box]]:
    """The tasks for a rank on another host; and where what it makes goes here, as far as it comes.

    Its parts of a chunk lie there side by side. A chunk has room for all parts of it.
    """
    theirs: list[Task] = []
    landings: list[Box] = []
    for task in tasks:
        if task.whole:
            theirs.append(task)
            landings += [Box(torch.uint8, (task.nbytes,), (1,), task.start)] if task.comes else []
            continue
        patches, into = [], 0
        for patch in task.patches:
            patches.append(replace(patch, into=into, strides=row_major(patch.lengths)))
            landings.append(Box(torch.uint8, patch.lengths, patch.strides, task.start + patch.into))
            into += landings[-1].nbytes
        theirs.append(replace(task, patches=tuple(patches)))
    return tuple(theirs), landings


def stretch_of(task: Task) -> tuple[int, int]:
    """First byte and end of what a packed task makes of a slot."""
    return task.start, task.start + task.nbytes


@signals.held_throughout
class RankOutflow(SlotOutflow):
    """The rank's end of its flow to the lead."""

    def __init__(self, connecting: socket.socket, token: bytes) -> None:
        """Takes over a socket that is on its way to the lead, which gave the token."""
        super().__init__()
        self.attach(connecting)
        self._views.append(memoryview(GREETING + token))
