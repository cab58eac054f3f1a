"""MemoryLayout: where tensors lie relative to each other. Mirror: other memory that is laid out the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from ..boxes import Box, box_of, extent, view
from ..memory.aliases import has_bytes
from . import open_layers

_GRAIN = 64  # bytes; spans begin on a multiple, so that every tensor in one keeps its alignment


class _Place(NamedTuple):
    span: int
    box: Box


class MemoryLayout:
    """How the memory of some tensors lies. Tensors that overlap, tied ones too, share a *span* of bytes.

    It keeps no tensor alive. It is made in one pass over the sorted addresses.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.nbytes: list[int] = []
        """Bytes of each span."""
        self.devices: list[torch.device] = []
        """Where each span lies."""
        self._places: dict[str, _Place] = {}
        self._names: list[list[str]] = []
        for device, start, stop, inside in _merged(tensors):
            for name in inside:
                box = box_of(tensors[name])
                offset = tensors[name].data_ptr() - start
                self._places[name] = _Place(len(self.nbytes), Box(box.dtype, box.shape, box.stride, offset))
            self.nbytes.append(stop - start)
            self.devices.append(device)
            self._names.append(inside)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def of(self, name: str) -> int:
        """The number of the span in which the tensor lies."""
        return self._places[name].span

    def box(self, name: str) -> Box:
        """The tensor within its span."""
        return self._places[name].box

    def like(self, name: str, other: MemoryLayout) -> bool:
        """Whether the tensor lies alone in its span of host memory, here and in the other layout, and lies the same."""
        here, there = self.of(name), other.of(name)
        return (
            not (open_layers.is_device(self.devices[here]) or open_layers.is_device(other.devices[there]))
            and (self.box(name), self.nbytes[here]) == (other.box(name), other.nbytes[there])
            and set(self.names(here)) == set(other.names(there))
            and len(self.inside(here)) == 1
        )

    def together(self) -> Iterator[list[str]]:
        """The names of each span."""
        yield from self._names

    def names(self, span: int) -> list[str]:
        """Names of all that lies in a span, those of tied tensors too."""
        return self._names[span]

    def inside(self, span: int) -> list[str]:
        """Names of all that lies in a span; of tied tensors one."""
        return list({self._places[name].box: name for name in self._names[span]}.values())


def _merged(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[torch.device, int, int, list[str]]]:
    entries = sorted(
        (
            (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + _reach(tensor), name)
            for name, tensor in tensors.items()
            if has_bytes(tensor)
        ),
    )
    device, start, stop, names = "", 0, 0, list[str]()
    for where, first, last, name in entries:
        if names and where == device and first < stop:
            stop = max(stop, last)
            names.append(name)
            continue
        if names:
            yield torch.device(device), start - start % _GRAIN, stop, names
        device, start, stop, names = where, first, last, [name]
    if names:
        yield torch.device(device), start - start % _GRAIN, stop, names


def _reach(tensor: torch.Tensor) -> int:
    box = box_of(tensor)
    return extent(box)[1] - box.offset


class Mirror:
    """Memory with the same layout: the tensors in it overlap where the originals do. It owns its memory."""

    def __init__(self, layout: MemoryLayout, make: Callable[[int, torch.device], torch.Tensor]) -> None:
        """``make(nbytes, device)`` gives memory, ``uint8 [nbytes]``, for a tensor on that device."""
        self.layout = layout
        self._make = make
        self._memory: dict[int, torch.Tensor] = {}
        self._borrowed: set[int] = set()

    @property
    def nbytes(self) -> int:
        """Bytes taken so far; what another lends is that one's."""
        return sum(memory.nbytes for span, memory in self._memory.items() if span not in self._borrowed)

    def lend(self, names: Iterable[str], to: Mirror) -> Iterator[int]:
        """Let tensors of another mirror lie in this one's memory, where both have the same room for the same tensors.

        That is host memory which holds one tensor, under one name or several. Gives the numbers of the spans lent.
        """
        for name in names:
            if name in self.layout and name in to.layout and self.layout.like(name, to.layout):
                here, there = self.layout.of(name), to.layout.of(name)
                if there not in to._memory:
                    if here in self._memory:
                        self.take_back(here)  # An update that was aborted did not.
                    to._memory[there] = self._at(here)
                    to._borrowed.add(there)
                    yield here

    def take_back(self, span: int) -> None:
        """Own the bytes of a span alone: if anything else still refers to its memory, take other memory for them."""
        memory = self._memory[span]
        if _is_shared(memory):
            del self._memory[span]
            self._at(span).copy_(memory)

    def lacking(self, names: Iterable[str]) -> int:
        """Bytes that would have to be taken for these tensors, as far as they have bytes."""
        wanted = {self.layout.of(name) for name in names if name in self.layout}
        return sum(self.layout.nbytes[span] for span in wanted - self._memory.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        return view(self._at(self.layout.of(name)), self.layout.box(name))

    def _at(self, span: int) -> torch.Tensor:
        memory = self._memory.get(span)
        if memory is None:
            memory = self._memory[span] = self._make(self.layout.nbytes[span], self.layout.devices[span])
        return memory


def _is_shared(memory: torch.Tensor) -> bool:
    """Whether other tensors, arrays and the like refer to this memory. Where torch cannot tell, they are taken to."""
    use_count = getattr(torch._C, "_storage_Use_Count", None)
    if use_count is None:
        return True
    here, alone = (int(use_count(tensor.untyped_storage()._cdata)) for tensor in (memory, torch.empty(0)))
    return here > alone
