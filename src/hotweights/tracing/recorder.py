"""Recorder: what happens to fake tensors and to the model while loading code runs, as operations on regions.

It sees what goes through torch's dispatcher; what does not is the concern of ``bypasses``.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from .. import signals
from ..boxes import Memory, Region, box_of
from ..manifest import TensorSpec
from ..memory.aliases import plain
from ..plan.steps import GraphBreak, Op
from .dispatch import fails_really, is_view, written_by
from .fake_weight import META, FakeWeight, Scalar, ValueRead, line_of_the_model, meta_of, under_autocast

aten = torch.ops.aten


_SCALAR_READS = {
    aten._local_scalar_dense.default: ".item()",
    aten.equal.default: "torch.equal()",
    aten.is_nonzero.default: "bool()",
    aten.nonzero.default: ".nonzero()",
    aten.masked_select.default: ".masked_select()",
}
_CONJUGATES = {aten._conj.default: aten.conj_physical.default, aten._neg_view.default: aten.neg.default}
_NEVER_AUTOCAST = {aten.copy_.default, aten.clone.default, aten._to_copy.default, aten.fill_.Scalar, aten.zero_.default}
_LIFTS = {aten.lift.default, aten.lift_fresh.default}
_REBINDS = {
    aten._has_compatible_shallow_copy_type.default: ".data =",
    aten.set_.default: ".set_()",
    aten.set_.source_Tensor: ".set_()",
    aten.set_.source_Storage: ".set_()",
    aten.set_.source_Storage_storage_offset: ".set_()",
    aten.resize_.default: ".resize_()",
    aten.resize_as_.default: ".resize_as_()",
}

_FACTORIES = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.full_like.default,
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
}


class FailedOp(NamedTuple):
    """An operation on fake tensors that cannot be done.

    Attributes:
        error: what it raised into the loading code.
        sources: names of the source tensors that went into it.
        into: the shape that it writes, and the name of the model's tensor; ``None`` if it writes none.
        shape: of the operand that is, or is made of, source tensors.
    """

    error: Exception
    sources: tuple[str, ...]
    into: tuple[list[int], str] | None
    shape: list[int]


class Recorder:
    """Everything one trace knows. Used from the thread that traces and from those that the loading code starts.

    Attributes:
        records: the operations, in order.
        graph_breaks: what the loading code did that no plan can repeat.
        constants: tensors that operations use, by the names of their memory.
        state_read: names of the model's tensors whose values the loading code asked for.
        failed: operations that raised what they would raise on real tensors, too.
        active: whether the trace goes on; threads of the loading code may outlive it, with its modes.
    """

    def __init__(self, reached: Mapping[str, torch.Tensor]) -> None:
        self.records: list[Op] = []
        self.graph_breaks: list[GraphBreak] = []
        self.constants: dict[str, torch.Tensor] = {}
        self.state_read: set[str] = set()
        self.failed: list[FailedOp] = []
        self._given: dict[int, tuple[weakref.ref[Any], str]] = {}  # by identity, which another may have later
        self.active = True
        self._lock = threading.RLock()
        self._memories: dict[int, Memory] = {}  # by the address of the storage object
        self._kept: list[object] = []  # Storages whose address is a key must outlive the trace.
        self._bases: dict[Memory, int] = {}  # first byte of a model tensor within its storage
        self._metas: dict[int, torch.Tensor] = {}  # for a real storage, its whole memory on meta, as bytes
        self._written: set[Memory] = set()  # by recorded operations, so that it does not hold what it would hold
        self._made: dict[int, StorageWeakRef] = {}  # by the loading code; the reference keeps the address from others
        self._copied: set[Memory] = set()  # Copies in place of views that cannot be had: writing to them would be lost.
        self._scalars: list[Scalar] = []
        self._results = 0
        for name, tensor in reached.items():
            storage = tensor.untyped_storage()
            memory = self._memories.setdefault(storage._cdata, Memory("model", name))
            if memory.name == name:
                self._kept.append(storage)
                self._bases[memory] = int(tensor.storage_offset()) * tensor.element_size()

    # What the loading code sees.

    def fake_weights(self, specs: Sequence[TensorSpec], device: torch.device) -> list[FakeWeight]:
        """One for each spec. Several at once, because stepping out of the modes costs more than making one."""
        made: list[FakeWeight] = []
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            for spec in specs:
                assert isinstance(spec.dtype, torch.dtype)
                meta = torch.empty(spec.shape, dtype=spec.dtype, device=META)
                self._own(meta, Memory("source", spec.name))
                made.append(FakeWeight(meta, self, device))
        return made

    def scalar(self, fake: FakeWeight) -> Scalar:
        """What stands in for its value."""
        self._scalars.append(Scalar(fake))
        return self._scalars[-1]

    def end(self) -> None:
        """End the trace. Values that were asked for and filled nothing went where nobody sees them: graph breaks."""
        for scalar in self._scalars:
            if not scalar.used:
                scalar.refused()
        self.active = False

    def refuse(self, what: str, tensors: Iterable[torch.Tensor], where: str = "") -> ValueRead:
        """Record a graph break; returns the error to raise into the loading code.

        Args:
            what: what the loading code did, in words.
            tensors: the operands.
            where: the line of the model's code; by default the one that runs now.
        """
        with torch._C.DisableTorchFunction():
            asked = [self._memory(meta_of(tensor)) for tensor in tensors if self.knows(tensor)]
        sources = sorted({name for memory in asked for name in self.sources_of(memory)})
        where = where or line_of_the_model()
        self.graph_breaks.append(GraphBreak(what, tuple(sources), where))
        return ValueRead(
            f"{what} at {where} asks for what {', '.join(sources) or 'the model'} does not have while it is traced"
        )

    def given(self, value: object, where: str) -> None:
        """Note at which line of the model's code a module was given this tensor or part."""
        self._given[id(value)] = weakref.ref(value), where

    def line_of(self, value: object) -> str | None:
        """The line at which a module was given it, if that is known."""
        ref, where = self._given.get(id(value), (None, None))
        return where if ref is not None and ref() is value else None

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether it is a fake tensor, or lies in memory of the model or in memory that took a fake tensor."""
        with torch._C.DisableTorchFunction():
            return self._is_ours(tensor)

    def written(self, tensor: torch.Tensor) -> bool:
        """Whether it is a fake tensor or was written by a recorded operation: its real values are not there yet."""
        with torch._C.DisableTorchFunction():
            return self._is_written(tensor)

    def read(self, tensor: torch.Tensor) -> None:
        """Remember that the loading code asked for the value of this tensor, if it is one of the model's."""
        with torch._C.DisableTorchFunction():
            if self._is_ours(tensor):
                self.state_read.add(self._memory(tensor).name)

    # Where things lie.

    def _own(self, meta: torch.Tensor, memory: Memory) -> None:
        storage = meta.untyped_storage()
        self._memories[storage._cdata] = memory
        self._kept.append(storage)

    def _memory(self, tensor: torch.Tensor) -> Memory:
        return self._memories[tensor.untyped_storage()._cdata]

    def sources_of(self, memory: Memory) -> set[str]:
        """Names of the source tensors that went into ``memory``."""
        if memory.kind == "source":
            return {memory.name}
        seen, todo = set[Memory](), [memory]
        while todo:
            reached = todo.pop()
            if reached in seen:
                continue
            seen.add(reached)
            for op in self.records:
                if any(region.memory == reached for region in (*op.results, *op.writes)):
                    todo += [region.memory for region in op.reads]
        return {reached.name for reached in seen if reached.kind == "source"}

    def region(self, tensor: torch.Tensor) -> Region:
        """Where the tensor lies."""
        meta = meta_of(tensor)
        memory = self._memory(meta)
        return Region(memory, box_of(meta, self._bases.get(memory, 0)))

    # What happens to an operation.

    @signals.held
    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do an operation, or record it; returns what the loading code gets."""
        with self._lock, torch._C.DisableTorchFunction():
            return self._dispatch(func, args, kwargs)

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.active:
            if any(isinstance(value, FakeWeight) for value in tree_flatten((args, kwargs))[0]):
                raise ValueRead(f"{func} of a fake tensor whose trace is over: the loading code kept it")
            return func(*args, **kwargs)
        if is_view(func):
            return self._view(func, args, kwargs)
        if func is aten.copy_.default and self._plainly_copied(args[0], args[1]):
            return args[0]
        flat, spec = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, torch.Tensor)]
        written = written_by(func, args, kwargs)
        faked = any(isinstance(tensor, FakeWeight) for tensor in tensors)
        if not faked and not any(map(self._is_ours, written)) and not any(map(self._is_written, tensors)):
            self.state_read.update(self._memory(tensor).name for tensor in tensors if self._is_ours(tensor))
            self._check_own(written)
            return self._remember(func(*args, **kwargs), tensors)
        if func in _REBINDS:
            raise self.refuse(_REBINDS[func], tensors)
        if func is aten.is_same_size.default:
            return tensors[0].shape == tensors[1].shape
        if func in _SCALAR_READS:
            raise self.refuse(_SCALAR_READS[func], tensors)
        return self._record(func, flat, spec, tensors, written)

    def _is_ours(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, FakeWeight) or _storage_of(tensor) in self._memories

    def _is_written(self, tensor: torch.Tensor) -> bool:
        if isinstance(tensor, FakeWeight):
            return True
        return self._memories.get(_storage_of(tensor)) in self._written

    def _remember(self, made: Any, operands: Sequence[torch.Tensor]) -> Any:
        """Remember memory that the loading code made itself: it may write to it."""
        old = {_storage_of(tensor) for tensor in operands}
        for value in tree_flatten(made)[0]:
            if isinstance(value, torch.Tensor) and _storage_of(value) not in old and plain(value):
                self._made[_storage_of(value)] = _weakly(value)
        return made

    def _check_own(self, written: Iterable[torch.Tensor]) -> None:
        """Refuse writes to memory that was there before the trace and is not the model's: it may be anybody's."""
        for tensor in written:
            if _storage_of(tensor) not in self._made:
                raise self.refuse("writing to memory that is not the model's", [tensor])

    def _view(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A view of a fake tensor stands in for the view; a view of a real tensor is known by its storage."""
        base = args[0]
        if not isinstance(base, FakeWeight):
            out = func(*args, **kwargs)
            # torch.tensor() makes memory of its own, torch.from_numpy() does not.
            if func in _LIFTS and base.untyped_storage().resizable():
                self._made[_storage_of(base)] = _weakly(base)
            return out
        if func in _CONJUGATES:
            out = self._dispatch(_CONJUGATES[func], args, kwargs)
            self._copied.add(self._memory(meta_of(out)))
            return out
        try:
            out = func(meta_of(base), *args[1:], **kwargs)
        except Exception as error:
            self._note_failed(error, [base], [])
            raise
        if isinstance(out, torch.Tensor):
            return FakeWeight(out, self, base.device)
        return type(out)(FakeWeight(value, self, base.device) for value in out)

    def _plainly_copied(self, destination: torch.Tensor, source: torch.Tensor) -> bool:
        """Record the most frequent operation, a fake tensor of the same shape into the model, without ceremony."""
        if (
            not isinstance(source, FakeWeight)
            or isinstance(destination, FakeWeight)
            or source.shape != destination.shape
        ):
            return False
        memory = self._memories.get(destination.untyped_storage()._cdata)
        if memory is None or memory.kind != "model" or destination.is_conj() or destination.is_neg():
            return False
        into, of = Region(memory, box_of(destination, self._bases[memory])), self.region(source)
        self._written.add(memory)
        self.records.append(Op(aten.copy_.default, (into, of), {}, (), (into,), (into, of)))
        return True

    def _record(
        self, func: Any, flat: list[Any], spec: Any, tensors: list[torch.Tensor], written: list[torch.Tensor]
    ) -> Any:
        """Record an operation instead of doing it; ``flat`` and ``spec`` are its arguments. Gives fake results."""
        self._check(func, tensors, written)
        for tensor in written:
            if not self._is_ours(tensor):
                self._adopt(tensor)
        operands = [self._operand(value, written) if isinstance(value, torch.Tensor) else value for value in flat]
        if any(isinstance(value, torch.Tensor) and (value.is_conj() or value.is_neg()) for value in operands):
            raise self.refuse("a conjugate", tensors)
        metas = [self._on_meta(value) for value in operands]
        out = self._try(func, spec, metas, tensors, written)
        known = {id(meta): value for meta, value in zip(metas, flat, strict=True) if isinstance(meta, torch.Tensor)}
        returned, results = self._faked(out, known, _device_of(flat, tensors))
        encoded = [self.region(value) if isinstance(value, torch.Tensor) else value for value in operands]
        writes = tuple(map(self.region, written))
        self._written.update(region.memory for region in writes)
        args, kwargs = spec.unflatten(encoded)
        reads = tuple(value for value in encoded if isinstance(value, Region))
        self.records.append(Op(func, tuple(args), kwargs, results, writes, reads))
        return returned

    def _check(self, func: Any, tensors: list[torch.Tensor], written: list[torch.Tensor]) -> None:
        """Refuse an operation that cannot be done again, or not on these operands."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self.refuse("random numbers", tensors)
        if under_autocast() and func not in _NEVER_AUTOCAST:
            raise self.refuse("autocast", tensors)  # It passes tensors by that have no data.
        if not all(isinstance(tensor, FakeWeight) or plain(tensor) for tensor in tensors):
            raise self.refuse(f"{func} with a tensor that is not plain", tensors)
        self._check_own(tensor for tensor in written if not self._is_ours(tensor))
        if any(self._is_ours(tensor) and self._memory(meta_of(tensor)) in self._copied for tensor in written):
            raise self.refuse("writing to a conjugate", tensors)

    def _operand(self, tensor: torch.Tensor, written: list[torch.Tensor]) -> torch.Tensor:
        """The tensor itself, if recorded operations write it; else a constant with its value now."""
        if not self._is_ours(tensor):
            return self._constant(tensor)
        if self._is_written(tensor) or any(tensor is other for other in written):
            return tensor
        self.state_read.add(self._memory(tensor).name)  # The plan holds only for this value of it.
        return self._constant(tensor)

    def _try(
        self, func: Any, spec: Any, metas: list[Any], tensors: list[torch.Tensor], written: list[torch.Tensor]
    ) -> Any:
        """What the operation gives without data: the shapes and dtypes of its results."""
        args, kwargs = spec.unflatten(metas)
        if func in _FACTORIES:
            kwargs = {**kwargs, "device": META}
        try:
            return func(*args, **kwargs)  # The mode that called is off meanwhile, so this is not recorded again.
        except Exception as error:
            if fails_really(func, args, kwargs):
                self._note_failed(error, tensors, written)
                raise
            raise self.refuse(f"{func}, which depends on values", tensors) from error

    def _note_failed(self, error: Exception, tensors: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> None:
        into = next(
            ((list(tensor.shape), name) for tensor in written if (name := self._name_in_the_model(tensor))), None
        )
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeWeight)]
        sources = sorted({name for fake in fakes for name in self.sources_of(self._memory(meta_of(fake)))})
        self.failed.append(FailedOp(error, tuple(sources), into, list(fakes[0].shape) if fakes else []))

    def _name_in_the_model(self, tensor: torch.Tensor) -> str:
        memory = self._memory(meta_of(tensor)) if self._is_ours(tensor) else None
        return memory.name if memory is not None and memory.kind == "model" else ""

    def _faked(self, out: Any, known: Mapping[int, Any], device: torch.device) -> tuple[Any, tuple[Region, ...]]:
        """The results as the loading code gets them: operands by their ids on meta, fake tensors for all others."""
        regions: list[Region] = []

        def fake(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in known:
                return known[id(value)]
            if value.untyped_storage()._cdata not in self._memories:
                self._results += 1
                self._own(value, Memory("result", str(self._results)))
            made = FakeWeight(value, self, device)
            regions.append(self.region(made))
            return made

        return tree_map(fake, out), tuple(regions)

    def _adopt(self, tensor: torch.Tensor) -> None:
        """Watch a scratch tensor of the loading code that takes a fake tensor: its bytes until now are a constant."""
        with _disable_current_modes():
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
            copied = whole.clone()
        memory = Memory("constant", str(len(self.constants)))
        self.constants[memory.name] = copied
        self._memories[tensor.untyped_storage()._cdata] = memory
        self._kept.append(tensor.untyped_storage())
        self._written.add(memory)

    def _constant(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            raise self.refuse("a tensor without data", [tensor])
        with _disable_current_modes():
            copied = tensor.detach().clone().resolve_conj().resolve_neg()
        memory = Memory("constant", str(len(self.constants)))
        self.constants[memory.name] = copied
        self._own(copied, memory)
        return copied

    def _on_meta(self, value: Any) -> Any:
        """A tensor without data for a tensor, over memory that is known as the tensor's; the meta device for a device.

        Everything else is as it is.
        """
        if isinstance(value, torch.device):
            return META
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeWeight):
            return meta_of(value)
        return self._twin(value)

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        with _disable_current_modes():
            if storage._cdata not in self._metas:
                whole = torch.empty(storage.nbytes(), dtype=torch.uint8, device=META)
                self._metas[storage._cdata] = whole
                self._memories[whole.untyped_storage()._cdata] = self._memories[storage._cdata]
            twin = torch.empty(0, dtype=tensor.dtype, device=META)
            return twin.set_(
                self._metas[storage._cdata].untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
            )


def _weakly(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _storage_of(tensor: torch.Tensor) -> int:
    """What tells its memory from others'; 0 for tensors that have none of their own."""
    try:
        cdata: int = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError, ValueError):
        return 0
    return cdata


def _device_of(flat: list[Any], tensors: list[torch.Tensor]) -> torch.device:
    for value in flat:
        if isinstance(value, torch.device):
            return value
    sized = [tensor for tensor in tensors if tensor.dim()] or tensors
    return sized[0].device if sized else torch.device("cpu")
