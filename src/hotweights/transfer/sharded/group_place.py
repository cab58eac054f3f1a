"""GroupPlace: which rank of a process group this process is. Nothing here sends anything through the group."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...errors import UsageError

NEW = "make a new Sender on every rank"
"""What to do when a sharded sender has lost a rank, or its group."""


class GroupPlace(NamedTuple):
    """A rank in a group.

    Attributes:
        rank: in the group.
        ranks: of the group's members, as the whole job counts them.
    """

    rank: int
    ranks: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return len(self.ranks)


def place_in(group: Any) -> GroupPlace:
    """This process's place in a group.

    Raises:
        UsageError: it has none: the group was destroyed, or this process is not in it.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        raise UsageError(
            "group= is a process group, and this process has none (any more); torch.distributed.init_process_group "
            "makes one, and torch.distributed.group.WORLD is it"
        )
    if not isinstance(group, distributed.ProcessGroup):
        kind = type(group).__name__
        raise UsageError(f"group= is a process group, such as torch.distributed.group.WORLD; found {kind}")
    try:
        rank, ranks = distributed.get_rank(group), tuple(distributed.get_process_group_ranks(group))
    except (ValueError, RuntimeError, KeyError) as error:
        raise UsageError(f"group= is a process group that was destroyed: {error}") from error
    if rank < 0:
        raise UsageError("this process is not in group=; only its ranks make a sender")
    return GroupPlace(rank, ranks)


def leave_mark(group: Any, mark: str) -> str:
    """Write the mark into the group's store; returns it, or nothing if the group has no store that can be reached."""
    try:
        group.get_group_store().set(_key(mark), "1")
    except (RuntimeError, AttributeError):
        return ""
    return mark


def has_mark(group: Any, mark: str) -> bool:
    """Whether the group's store has the mark. If not, the group is another than that of who left it."""
    try:
        return bool(group.get_group_store().check([_key(mark)]))
    except (RuntimeError, AttributeError):
        return False


def _key(mark: str) -> str:
    return f"hotweights/{mark}"
