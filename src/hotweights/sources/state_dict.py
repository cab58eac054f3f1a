"""StateSource: the tensors of a mapping or a module. They lie in memory already, and stay their owner's."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch

from ..arguments import check_choices
from ..errors import Closed, UsageError
from ..manifest import Manifest, TensorSpec
from ..memory.digest import Digest, digests
from ..memory.guards import Guard
from ..memory.lease import Lease
from ..memory.wrappers import hidden, inside
from ..sharding import GATHER, Part, is_dtensor, local
from ..shell import Shell
from ..text import some
from .streams import LeaseStream


class StateSource:
    """The tensors of a mapping (a state dict, say) or of a module's ``state_dict()``.

    They belong to whoever made them, who must not change them while a stream runs and may do so afterwards: leases are
    borrowed and cost nothing, and ``tensors()`` and ``own()`` copy.

    Of a wrapper tensor, such as torchao's, it has the tensors inside, by names like ``weight.qdata``; they fit only a
    model that has a wrapper of the same kind there.

    Of a DTensor it has what this rank holds, and the manifest says which part that is. With ``gather`` it has whole
    tensors: every rank must make such a source of the same tensors at the same time, and holds all of them.
    """

    def __init__(self, state: Mapping[str, torch.Tensor] | torch.nn.Module, *, gather: bool = False) -> None:
        given = state.state_dict() if isinstance(state, torch.nn.Module) else state
        parts: dict[str, Part | None] = {}
        shells: dict[str, Shell] = {}
        tensors: dict[str, Any] = {}
        for name, tensor in given.items():  # In this order on every rank: to gather a tensor, all take part.
            here, part = _local(tensor, gather)
            held = inside(name, here) if part is None and isinstance(here, torch.Tensor) and not here.is_meta else {}
            if both := held.keys() & given.keys():
                raise UsageError(f"these names are those of tensors inside {name!r} too: {some(sorted(both))}")
            tensors |= {key: within for key, (within, _) in held.items()} or {name: here}
            shells |= {key: shell for key, (_, shell) in held.items()}
            parts[name] = part
        problems = [message for name, tensor in tensors.items() if (message := unfit(name, tensor))]
        problems += [
            f"{name!r} is a DTensor ({part}), and {part.problem}; {GATHER}"
            for name, part in parts.items()
            if part is not None and part.problem
        ]
        if problems:
            raise UsageError(f"these are no tensors with values: {some(sorted(problems), 50)}")
        self._tensors = {name: _with_bytes(tensor.detach()) for name, tensor in tensors.items()}
        self._manifest = Manifest(
            TensorSpec(name, t.dtype, tuple(t.shape), part=parts.get(name), shell=shells.get(name))
            for name, t in self._tensors.items()
        )
        self._closed = False

    @property
    def manifest(self) -> Manifest:
        """Name, dtype and shape of every tensor, in the mapping's order."""
        return self._manifest

    def leases(self, *, guard: Guard = "off") -> LeaseStream:
        """Stream every tensor, in the mapping's order, uncopied. ``poison`` does nothing: the memory is its owner's.

        Raises:
            UsageError: a tensor is a DTensor of which this rank holds a part, or lies in a wrapper.
        """
        check_choices(guard=(guard, Guard))
        self._check_open()
        check_whole(self._manifest)
        return LeaseStream(self._lease_all(guard))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a contiguous copy of every tensor.

        Raises:
            UsageError: a tensor is a DTensor of which this rank holds a part, or lies in a wrapper.
        """
        self._check_open()
        check_whole(self._manifest)
        for name, tensor in self._tensors.items():
            yield name, tensor.clone(memory_format=torch.contiguous_format)

    def borrow(self, name: str) -> torch.Tensor:
        """The tensor itself, to read while the source is open. It is its owner's: never write to it.

        Of a DTensor it is what this rank holds; ``manifest[name].part`` says which part that is.
        """
        self._check_open()
        return self._tensors[name]

    def digest(self) -> Digest:
        """The digest of every tensor, which is that of a file with the same names and values. Reads every byte.

        Raises:
            UsageError: a tensor is a DTensor of which this rank holds a part.
        """
        self._check_open()
        if any(spec.part for spec in self._manifest.values()):
            check_whole(self._manifest)
        return Digest.of(digests(self._tensors, self._tensors))

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


def check_whole(manifest: Manifest) -> None:
    """Raise ``UsageError`` if it has parts of tensors, or what lies in wrappers.

    Whoever gets them one by one takes them for whole ones, and for values.
    """
    parts = [f"{name} ({spec.part})" for name, spec in manifest.items() if spec.part]
    if parts:
        raise UsageError(f"whole tensors are needed, and of these only parts lie here: {some(parts)}; {GATHER}")
    shells = {spec.shell.outer(name): spec.shell.kind for name, spec in manifest.items() if spec.shell}
    if shells:
        names = [f"{name!r} is a {kind.rpartition('.')[2]}" for name, kind in shells.items()]
        raise UsageError(
            f"plain tensors are needed, and the bytes of these lie in other tensors: {some(names)}; give plain tensors "
            "of their values (torchao: dequantize()), or load them straight into a model that has such tensors: "
            "hotweights.load(model, state)"
        )


def unfit(name: object, tensor: object) -> str | None:
    """Why this pair is no named tensor with values; ``None`` if it is one."""
    if not isinstance(name, str):
        return f"key {name!r} is no name"
    if not isinstance(tensor, torch.Tensor):
        return f"{name!r} is a {type(tensor).__name__}{_instead(name, tensor)}"
    if tensor.is_meta or torch.nn.parameter.is_lazy(tensor):
        return f"{name!r} is {'on meta' if tensor.is_meta else 'uninitialised'}"
    return None if (words := hidden(tensor)) is None else f"{name!r} is {words}"


def _instead(name: str, found: object) -> str:
    if isinstance(found, Mapping) and any(isinstance(value, torch.Tensor) for value in found.values()):
        return f", and has tensors: give the entry {name!r} itself"
    return " (torch.from_numpy(array) is a tensor)" if type(found).__name__ == "ndarray" else ""


def bare(name: object, tensor: object, promised: TensorSpec | None = None) -> tuple[torch.Tensor, str | None]:
    """The tensor as it lies here, and why it is not fit to be streamed: its bytes are not plain, or it is only a part.

    A part is fit where the same part was ``promised``, and only a DTensor can say that it is.
    """
    here, part = _local(tensor, gather=False)
    if promised is not None and promised.shell is not None:
        return here, (
            f"{name!r} lies in a {promised.shell.kind.rpartition('.')[2]} of the model; give a mapping of whole ones, "
            "to update(state)"
        )
    wanted = None if promised is None else promised.part
    if wanted is None and part is not None:
        return here, f"{name!r} is a DTensor, and this rank holds a part ({part}); give its full_tensor()"
    if wanted is not None and (part is None or not part.same_elements(wanted)):
        return here, f"{name!r} is {part or 'whole'}, where a part ({wanted}) was promised; give a DTensor of that"
    return here, unfit(name, here)


def _local(tensor: Any, gather: bool) -> tuple[Any, Part | None]:
    """What this rank holds, and which part that is. To gather is to ask all ranks for their parts."""
    if not is_dtensor(tensor):
        return tensor, None
    if gather and not tensor.is_meta:
        return tensor.detach().full_tensor(), None
    return local(tensor)
