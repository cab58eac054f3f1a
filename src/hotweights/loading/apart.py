"""``apart`` and ``held_apart``: what comes from the model's own memory is copied before that memory is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from typing import TypeVar

import torch

from ..errors import SourceError
from ..memory.extents import Extents
from ..memory.lease import Lease
from ..sources.contracts import InMemory, Source
from ..sources.state_dict import StateSource

S = TypeVar("S", bound=Source)


def apart(
    source: S, tensors: Callable[[], Iterable[torch.Tensor]], names: Container[str] | None = None
) -> tuple[S | StateSource, int]:
    """The source, and how many bytes were copied: if it lies in memory, those that share bytes with the model.

    Args:
        source: its owner closes it.
        tensors: gives the model's.
        names: which of the source's tensors are wanted; by default all.
    """
    if not isinstance(source, InMemory):
        return source, 0
    model = Extents(tensors())
    borrowed = {name: source.borrow(name) for name in source.manifest}
    wanted = (name for name in borrowed if names is None or name in names)
    copies = {name: copied(borrowed[name]) for name in wanted if model.meets(borrowed[name])}
    return (StateSource(borrowed | copies), sum(copy.nbytes for copy in copies.values())) if copies else (source, 0)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that nobody else will write to."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def held_apart(leases: Iterable[Lease], model: Extents, begun: Callable[[], Extents]) -> Iterator[Lease]:
    """The leases of a stream. From the first in the model's own memory on they are copied, and come at the end.

    So a stream may permute what the model holds. Its memory is that of one checkpoint then.

    Args:
        leases: of the stream.
        model: the memory that is written.
        begun: gives the memory that may have been written by now.

    Raises:
        SourceError: a tensor lies where an earlier one was written; its bytes are lost.
    """
    held: deque[Lease] = deque()
    written: Extents | None = None
    for lease in leases:
        if lease.placed or not (held or model.meets(lease.tensor)):
            yield lease
            continue
        written = written or begun()
        check_unwritten(lease.name, lease.tensor, written)
        held.append(Lease(lease.spec, tensor=copied(lease.tensor), borrowed=False))
    while held:
        yield held.popleft()


def check_unwritten(name: str, tensor: torch.Tensor, written: Extents) -> None:
    """Refuse a tensor whose bytes are lost, because it lies in what was written by now."""
    if written.meets(tensor):
        raise SourceError(
            "the stream gives the model's own memory, which was written over by then; give copies (tensor.clone()), "
            "or a mapping of all tensors, which is copied before the first write",
            [f"{name}: lies where an earlier tensor of the stream was loaded"],
        )
