"""StateSource: the tensors of a mapping or a module. They lie in memory already, and stay their owner's."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping

import torch

from ..arguments import check_choices
from ..errors import Closed, UsageError
from ..manifest import Manifest, TensorSpec
from ..memory.guards import Guard
from ..memory.lease import Lease
from ..text import some
from .streams import LeaseStream


class StateSource:
    """The tensors of a mapping (a state dict, say) or of a module's ``state_dict()``.

    They belong to whoever made them, who must not change them while a stream runs and may do so afterwards: leases are
    borrowed and cost nothing, and ``tensors()`` and ``own()`` copy.
    """

    def __init__(self, state: Mapping[str, torch.Tensor] | torch.nn.Module) -> None:
        tensors = state.state_dict() if isinstance(state, torch.nn.Module) else state
        problems = [message for name, tensor in tensors.items() if (message := unfit(name, tensor))]
        if problems:
            raise UsageError(f"these are no tensors with values: {some(sorted(problems), 50)}")
        self._tensors = {name: _with_bytes(tensor.detach()) for name, tensor in tensors.items()}
        self._manifest = Manifest(TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in self._tensors.items())
        self._closed = False

    @property
    def manifest(self) -> Manifest:
        """Name, dtype and shape of every tensor, in the mapping's order."""
        return self._manifest

    def leases(self, *, guard: Guard = "off") -> LeaseStream:
        """Stream every tensor, in the mapping's order, uncopied. ``poison`` does nothing: the memory is its owner's."""
        check_choices(guard=(guard, Guard))
        self._check_open()
        return LeaseStream(self._lease_all(guard))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a contiguous copy of every tensor."""
        self._check_open()
        for name, tensor in self._tensors.items():
            yield name, tensor.clone(memory_format=torch.contiguous_format)

    def borrow(self, name: str) -> torch.Tensor:
        """The tensor itself, to read while the source is open. It is its owner's: never write to it."""
        self._check_open()
        return self._tensors[name]

    def close(self) -> None:
        """Let go of the tensors. May be called twice."""
        self._closed = True
        self._tensors = {}

    def __enter__(self) -> StateSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<StateSource {len(self._manifest)} tensors in memory>"

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("this source was closed")

    def _lease_all(self, guard: Guard) -> Generator[Lease, None, None]:
        for spec in self._manifest.values():
            yield Lease(spec, tensor=self._tensors[spec.name], guard=guard)


def _with_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor. Of a lazily conjugated or negated view a copy: no bytes lie anywhere that could be leased."""
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def unfit(name: object, tensor: object) -> str | None:
    """Why this pair is no named tensor with values; ``None`` if it is one."""
    if not isinstance(name, str):
        return f"key {name!r} is no name"
    if not isinstance(tensor, torch.Tensor):
        return f"{name!r} is a {type(tensor).__name__}"
    if tensor.is_meta or torch.nn.parameter.is_lazy(tensor):
        return f"{name!r} is {'on meta' if tensor.is_meta else 'uninitialised'}"
    if tensor.layout is not torch.strided:
        return f"{name!r} is {tensor.layout}"
    return None
