"""Tracing: a model's own loading code, run on stand-ins, becomes a record. No byte is read, no live tensor written.

A *stand-in* is a tensor without data. Views of it are computed as metadata; everything else that touches a
stand-in, writes to the model, or reads what was written there, is recorded and not done. What touches none of them
runs for real. Operands are recorded as *regions*: a box of elements over a piece of memory (a source tensor's bytes, a
tensor of the model, an intermediate result, a constant), so views need no record of their own.
"""

from __future__ import annotations

import concurrent.futures.thread
import functools
import itertools
import sys
import threading
import time
import types
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from .manifest import Manifest, OpaqueDtype, TensorSpec
from .plan import Note, Op
from .regions import Memory, Region, box_of
from .snapshot import Snapshot

__all__ = ["Recording", "StandIn", "ValueRead", "anchors", "in_every_thread", "record", "written_by"]

aten = torch.ops.aten


class ValueRead(RuntimeError):
    """Loading code asked for a value or an address that a stand-in does not have. Raised into the loading code."""


class StandIn(torch.Tensor):
    """A tensor without data that reports the dtype, shape and device of a real one, in any thread."""

    _meta: torch.Tensor
    _recorder: _Recorder
    _device: torch.device
    _shape: torch.Size
    _dtype: torch.dtype

    @staticmethod
    def __new__(cls, meta: torch.Tensor, recorder: _Recorder, device: torch.device) -> StandIn:
        """Stand in for the tensor that ``meta`` describes, on ``device``."""
        shape, dtype = meta.size(), meta.dtype
        self: StandIn = torch.Tensor._make_wrapper_subclass(
            cls,
            shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=dtype,
            device=_META,
            dispatch_device=True,
        )
        self._shape = shape
        self._dtype = dtype
        self._meta = meta
        self._recorder = recorder
        self._device = device
        return self

    # What loading code asks most often. Torch would take each question through the modes, at twenty times the price.
    shape = property(lambda self: self._shape)
    dtype = property(lambda self: self._dtype)
    device = property(lambda self: self._device)
    ndim = property(lambda self: len(self._shape))

    def dim(self) -> int:
        """As ``Tensor.dim``."""
        return len(self._shape)

    def size(self, dim: int | None = None) -> Any:
        """As ``Tensor.size``."""
        return self._shape if dim is None else self._shape[dim]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<StandIn {self.dtype} {list(self.shape)}>"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.item and args[0].numel() == 1:
            # A clone: what the tensor holds later is not what was asked for now.
            cloned = torch._C._disabled_torch_function_impl(torch.Tensor.clone, types, (args[0],), {})
            return args[0]._recorder.scalar(torch._C._disabled_torch_function_impl(_RESHAPE, types, (cloned, ()), {}))
        if func is torch.Tensor.new_tensor:  # It would lie on meta, where stand-ins really are, and hold nothing.
            kwargs = {"dtype": args[0].dtype, "device": args[0]._device, **(kwargs or {})}
            return torch.tensor(*args[1:], **kwargs)
        what = _VALUE_READS.get(func)
        if what is not None:
            one = next(value for value in args if isinstance(value, StandIn))
            raise one._recorder.refuse(what, [value for value in args if isinstance(value, StandIn)])
        if torch._C._is_any_autocast_enabled():  # Seen only from here: below, autocast has done its work and is off.
            return _under_autocast(torch._C._disabled_torch_function_impl, func, types, args, kwargs or {})
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0]._device
        leaves = tree_flatten((args, kwargs))[0] if kwargs else args
        for value in leaves:
            if isinstance(value, StandIn):
                return value._recorder.dispatch(func, args, kwargs or {})
        for value in tree_flatten((args, kwargs))[0]:
            if isinstance(value, StandIn):
                return value._recorder.dispatch(func, args, kwargs or {})
        raise AssertionError(func)


_AUTOCAST = threading.local()


def _under_autocast(call: Callable[..., Any], *args: Any) -> Any:
    _AUTOCAST.on = True
    try:
        return call(*args)
    finally:
        _AUTOCAST.on = False


class _Scalar:
    """What ``.item()`` of a stand-in gives: it may fill a tensor, and do nothing else. To ``isinstance`` a number."""

    def __init__(self, standin: StandIn) -> None:
        self._standin = standin
        self._used = False
        self._where = _line_of_the_model()

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        dtype = self._standin.dtype
        if dtype.is_floating_point or dtype.is_complex:
            return complex if dtype.is_complex else float
        return bool if dtype is torch.bool else int

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        scalars = [one for one in tree_flatten((args, kwargs))[0] if type(one) is cls]
        if func not in _SCALAR_TAKERS or type(args[-1]) is not cls or len(scalars) != 1 or kwargs:
            raise scalars[0]._refused()
        return func(*args[:-1], scalars[0]._filling())

    def _filling(self) -> StandIn:
        self._used = True
        return self._standin

    def _refused(self) -> ValueRead:
        self._used = True
        return self._standin._recorder.refuse(".item()", [self._standin], self._where)


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(self: _Scalar, *args: object) -> Any:
        raise self._refused()

    refuse.__name__ = name
    return refuse


for _name in """
    repr str format bytes hash bool int float complex index round trunc floor ceil neg pos abs invert eq ne lt le gt ge
    add sub mul truediv floordiv mod divmod pow lshift rshift and or xor matmul
    radd rsub rmul rtruediv rfloordiv rmod rdivmod rpow rlshift rrshift rand ror rxor rmatmul
    len iter contains getitem copy deepcopy reduce_ex
""".split():
    setattr(_Scalar, f"__{_name}__", _refusing(f"__{_name}__"))

_RESHAPE = torch.Tensor.reshape
_SCALAR_TAKERS = {torch.Tensor.fill_, torch.Tensor.__setitem__}
_META = torch.device("meta")
_AT_ONCE = 256  # stand-ins that are made together
_VALUE_READS: Mapping[object, str] = {
    torch.Tensor.data_ptr: ".data_ptr()",
    torch.Tensor.numpy: ".numpy()",
    torch.Tensor.__array__: "numpy.asarray()",
    torch.Tensor.__dlpack__: "DLPack",
    torch.Tensor.untyped_storage: ".untyped_storage()",
    torch.Tensor.storage: ".storage()",
    torch.Tensor.tolist: ".tolist()",
    torch.Tensor.__deepcopy__: "copy.deepcopy()",
    torch.Tensor.__reduce_ex__: "pickling",
    torch.Tensor.share_memory_: ".share_memory_()",
    torch.Tensor.is_set_to: ".is_set_to()",
}
_SCALAR_READS = {
    aten._local_scalar_dense.default: ".item()",
    aten.equal.default: "torch.equal()",
    aten.is_nonzero.default: "bool()",
    aten.nonzero.default: ".nonzero()",
    aten.masked_select.default: ".masked_select()",
    aten.is_same_size.default: "",
}
_CONJUGATES = {aten._conj.default: aten.conj_physical.default, aten._neg_view.default: aten.neg.default}
_NEVER_AUTOCAST = {aten.copy_.default, aten.clone.default, aten._to_copy.default, aten.fill_.Scalar, aten.zero_.default}
_LIFTS = {aten.lift.default, aten.lift_fresh.default}
_OF_REAL: Mapping[object, str] = {  # what bypasses the dispatcher; for memory that was written, or that is the model's
    torch.Tensor.numpy: "model",
    torch.Tensor.__array__: "model",
    torch.Tensor.__dlpack__: "model",
    torch.Tensor.untyped_storage: "model",
    torch.Tensor.storage: "model",
    torch.Tensor._typed_storage: "model",
    torch.Tensor.share_memory_: "model",
    torch.Tensor.tolist: "written",
    torch.Tensor.__deepcopy__: "written",
    torch.Tensor.__reduce_ex__: "written",
}
_REBINDS = {
    aten._has_compatible_shallow_copy_type.default: ".data =",
    aten.set_.default: ".set_()",
    aten.set_.source_Tensor: ".set_()",
    aten.set_.source_Storage: ".set_()",
    aten.set_.source_Storage_storage_offset: ".set_()",
    aten.resize_.default: ".resize_()",
    aten.resize_as_.default: ".resize_as_()",
}


class _Recorder:
    """Everything one trace knows. Used from the thread that traces and from those that the loading code starts."""

    def __init__(self, anchors: Mapping[str, torch.Tensor]) -> None:
        self.records: list[Op] = []
        self.notes: list[Note] = []
        self.constants: dict[str, torch.Tensor] = {}
        self.lock = threading.RLock()
        self.active = True  # Threads of the loading code may outlive the trace, with its modes; then this is False.
        self._memories: dict[int, Memory] = {}  # by the address of the storage object
        self._kept: list[object] = []  # Storages whose address is a key must outlive the trace.
        self._bases: dict[Memory, int] = {}  # first byte of a model tensor within its storage
        self._metas: dict[int, torch.Tensor] = {}  # for a real storage, its whole memory on meta, as bytes
        self._dirty: set[Memory] = set()
        self._born: dict[int, StorageWeakRef] = {}  # Memory made since; the reference keeps its address from others.
        self._copied: set[Memory] = set()  # Stand in for views that cannot be had; writing to them would be lost.
        self._scalars: list[_Scalar] = []
        self.state_read: set[str] = set()
        self._results = 0
        for name, tensor in anchors.items():
            storage = tensor.untyped_storage()
            memory = self._memories.setdefault(storage._cdata, Memory("model", name))
            if memory.name == name:
                self._kept.append(storage)
                self._bases[memory] = int(tensor.storage_offset()) * tensor.element_size()

    # What the loading code sees.

    def stand_ins(self, specs: Sequence[TensorSpec], device: torch.device) -> list[StandIn]:
        """One for each spec. Several at once, because stepping out of the modes costs more than making one."""
        made: list[StandIn] = []
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            for spec in specs:
                assert isinstance(spec.dtype, torch.dtype)
                meta = torch.empty(spec.shape, dtype=spec.dtype, device=_META)
                self._own(meta, Memory("source", spec.name))
                made.append(StandIn(meta, self, device))
        return made

    def scalar(self, standin: StandIn) -> _Scalar:
        """What stands in for its value."""
        self._scalars.append(_Scalar(standin))
        return self._scalars[-1]

    def end(self) -> None:
        """Note the values that were asked for and did not fill anything: they went where nobody sees them."""
        for scalar in self._scalars:
            if not scalar._used:
                scalar._refused()
        self.active = False

    def refuse(self, what: str, tensors: Iterable[torch.Tensor], where: str = "") -> ValueRead:
        """Note what was asked for; the error to raise into the loading code."""
        with torch._C.DisableTorchFunction():
            asked = [self._memory(_meta_of(one)) for one in tensors if self.knows(one)]
        sources = sorted({name for memory in asked for name in self.sources_of(memory)})
        where = where or _line_of_the_model()
        self.notes.append(Note(what, tuple(sources), where))
        return ValueRead(
            f"{what} at {where} asks for what tensor {', '.join(sources)} does not have while it is traced"
        )

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether it is a stand-in, or memory of the model, or was written."""
        with torch._C.DisableTorchFunction():
            return self._is_ours(tensor)

    def written(self, tensor: torch.Tensor) -> bool:
        """Whether what it holds is not what it would hold after loading."""
        with torch._C.DisableTorchFunction():
            return self._is_dirty(tensor)

    def read(self, tensor: torch.Tensor) -> None:
        """Note that the model's own state was asked for."""
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
        found: set[str] = set()
        seen, todo = set[Memory](), [memory]
        while todo:
            one = todo.pop()
            if one in seen:
                continue
            seen.add(one)
            if one.kind == "source":
                found.add(one.name)
            for record in self.records:
                if any(region.memory == one for region in (*record.results, *record.writes)):
                    todo += [region.memory for region in record.reads]
        return found

    def region(self, tensor: torch.Tensor) -> Region:
        meta = tensor._meta if isinstance(tensor, StandIn) else tensor
        memory = self._memory(meta)
        return Region(memory, box_of(meta, self._bases.get(memory, 0)))

    # What happens to an operation.

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.lock, torch._C.DisableTorchFunction():
            return self._dispatch(func, args, kwargs)

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.active:
            if any(isinstance(one, StandIn) for one in tree_flatten((args, kwargs))[0]):
                raise ValueRead(f"{func} of a stand-in whose trace is over: the loading code kept it")
            return func(*args, **kwargs)
        if _is_view(func):
            return self._view(func, args, kwargs)
        if func is aten.copy_.default and self._plainly_copied(args[0], args[1]):
            return args[0]
        flat, spec = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, torch.Tensor)]
        standins = [value for value in tensors if isinstance(value, StandIn)]
        written = written_by(func, args, kwargs)
        if not standins and not any(map(self._is_ours, written)) and not any(map(self._is_dirty, tensors)):
            self.state_read.update(self._memory(one).name for one in tensors if self._is_ours(one))
            self._check_own(written)
            return self._bear(func(*args, **kwargs), tensors)
        if func in _REBINDS:
            raise self.refuse(_REBINDS[func], tensors)
        if func in _SCALAR_READS:
            return self._value(func, args, kwargs, tensors, standins)
        return self._record(func, flat, spec, tensors, written)

    def _is_ours(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, StandIn) or _storage_of(tensor) in self._memories

    def _is_dirty(self, tensor: torch.Tensor) -> bool:
        if isinstance(tensor, StandIn):
            return True
        return self._memories.get(_storage_of(tensor)) in self._dirty

    def _bear(self, made: Any, operands: Sequence[torch.Tensor]) -> Any:
        """Remember the memory of tensors that the loading code made itself: it may write to that."""
        old = {_storage_of(one) for one in operands}
        for one in tree_flatten(made)[0]:
            if isinstance(one, torch.Tensor) and _storage_of(one) not in old and _plain(one):
                self._born[_storage_of(one)] = _weakly(one)
        return made

    def _check_own(self, written: Iterable[torch.Tensor]) -> None:
        """Memory that was there before and that no path from the model leads to may be anybody's."""
        for tensor in written:
            if _storage_of(tensor) not in self._born:
                raise self.refuse("writing to memory that is not the model's", [tensor])

    def _view(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A view of a stand-in stands in for the view; a view of a real tensor is known by its storage."""
        one = args[0]
        if not isinstance(one, StandIn):
            out = func(*args, **kwargs)
            # torch.tensor() makes memory of its own, torch.from_numpy() does not.
            if func in _LIFTS and one.untyped_storage().resizable():
                self._born[_storage_of(one)] = _weakly(one)
            return out
        if func in _CONJUGATES:
            out = self._dispatch(_CONJUGATES[func], args, kwargs)
            self._copied.add(self._memory(out._meta))
            return out
        out = func(one._meta, *args[1:], **kwargs)
        if isinstance(out, torch.Tensor):
            return StandIn(out, self, one._device)
        return type(out)(StandIn(value, self, one._device) for value in out)

    def _plainly_copied(self, destination: torch.Tensor, source: torch.Tensor) -> bool:
        """Record the most frequent operation by far, a stand-in of the same shape into the model, without ceremony."""
        if not isinstance(source, StandIn) or isinstance(destination, StandIn) or source.shape != destination.shape:
            return False
        memory = self._memories.get(destination.untyped_storage()._cdata)
        if memory is None or memory.kind != "model" or destination.is_conj() or destination.is_neg():
            return False
        into, of = Region(memory, box_of(destination, self._bases[memory])), self.region(source)
        self._dirty.add(memory)
        self.records.append(Op(aten.copy_.default, (into, of), {}, (), (into,), (into, of)))
        return True

    def _value(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], standins: list[StandIn]) -> Any:
        if func is aten.is_same_size.default:
            return tensors[0].shape == tensors[1].shape
        raise self.refuse(_SCALAR_READS[func], tensors)

    def _record(
        self, func: Any, flat: list[Any], spec: Any, tensors: list[torch.Tensor], written: list[torch.Tensor]
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self.refuse("random numbers", tensors)
        if getattr(_AUTOCAST, "on", False) and func not in _NEVER_AUTOCAST:
            raise self.refuse("autocast", tensors)  # It passes tensors by that have no data.
        device = _device_of(flat, tensors)
        if not all(isinstance(one, StandIn) or _plain(one) for one in tensors):
            raise self.refuse(f"{func} with a tensor that is not plain", tensors)
        self._check_own(tensor for tensor in written if not self._is_ours(tensor))
        for tensor in written:
            if self._is_ours(tensor) and self._memory(_meta_of(tensor)) in self._copied:
                raise self.refuse("writing to a conjugate", tensors)
            if not self._is_ours(tensor):
                self._adopt(tensor)
        metas: list[Any] = []
        encoded: list[Any] = []
        for value in flat:
            if not isinstance(value, torch.Tensor):
                metas.append(_META if isinstance(value, torch.device) else value)
                encoded.append(value)
                continue
            if not self._is_ours(value) or not (self._is_dirty(value) or any(value is one for one in written)):
                if self._is_ours(value):
                    self.state_read.add(self._memory(value).name)
                value = self._constant(value)  # State that loading has not written: its value now is part of the plan.
            if value.is_conj() or value.is_neg():
                raise self.refuse("a conjugate", tensors)
            metas.append(self._on_meta(value))
            encoded.append(self.region(value))
        args, kwargs = spec.unflatten(metas)
        if func in _FACTORIES:
            kwargs = {**kwargs, "device": _META}
        try:
            out = func(*args, **kwargs)  # The mode that called is off meanwhile, so this is not recorded again.
        except Exception as error:
            if _fails_really(func, args, kwargs):
                raise
            raise self.refuse(f"{func}, which depends on values", tensors) from error
        known = {id(meta): value for meta, value in zip(metas, flat, strict=True) if isinstance(meta, torch.Tensor)}
        results: list[Region] = []

        def wrap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in known:
                return known[id(value)]
            if value.untyped_storage()._cdata not in self._memories:
                self._results += 1
                self._own(value, Memory("result", str(self._results)))
            standin = StandIn(value, self, device)
            results.append(self.region(standin))
            return standin

        returned = tree_map(wrap, out)
        regions = [one for one in encoded if isinstance(one, Region)]
        writes = tuple(self.region(tensor) for tensor in written)
        self._dirty.update(region.memory for region in writes)
        enc_args, enc_kwargs = spec.unflatten(encoded)
        self.records.append(Op(func, tuple(enc_args), enc_kwargs, tuple(results), writes, tuple(regions)))
        return returned

    def _adopt(self, tensor: torch.Tensor) -> None:
        """A scratch tensor of the loading code into which a stand-in is written: its bytes until now are a constant."""
        with _disable_current_modes():
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
            copied = whole.clone()
        memory = Memory("constant", str(len(self.constants)))
        self.constants[memory.name] = copied
        self._memories[tensor.untyped_storage()._cdata] = memory
        self._kept.append(tensor.untyped_storage())
        self._dirty.add(memory)

    def _constant(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            raise self.refuse("a tensor without data", [tensor])
        with _disable_current_modes():
            copied = tensor.detach().clone().resolve_conj().resolve_neg()
        memory = Memory("constant", str(len(self.constants)))
        self.constants[memory.name] = copied
        self._own(copied, memory)
        return copied

    def _on_meta(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, StandIn):
            return tensor._meta
        storage = tensor.untyped_storage()
        with _disable_current_modes():
            if storage._cdata not in self._metas:
                whole = torch.empty(storage.nbytes(), dtype=torch.uint8, device=_META)
                self._metas[storage._cdata] = whole
                self._memories[whole.untyped_storage()._cdata] = self._memories[storage._cdata]
            twin = torch.empty(0, dtype=tensor.dtype, device=_META)
            return twin.set_(
                self._metas[storage._cdata].untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
            )


def _meta_of(value: Any) -> Any:
    return value._meta if isinstance(value, StandIn) else value


def _weakly(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _storage_of(tensor: torch.Tensor) -> int:
    """What tells its memory from others'; 0 for tensors that have none of their own."""
    try:
        cdata: int = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError, ValueError):
        return 0
    return cdata


_TRIED = 1 << 30  # bytes; an operation on more than this is not tried for its error


def _fails_really(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation that failed without data fails with data too: then the loading code would see that error."""
    metas = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
    if sum(one.nbytes for one in metas) > _TRIED:
        return False

    def real(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value

    try:
        func(*tree_map(real, args), **tree_map(real, kwargs))
    except Exception:
        return True
    return False


_SCHEMAS: dict[Any, tuple[tuple[tuple[int, str], ...], bool]] = {}  # by overload: its written arguments; is it a view
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


def _schema(func: Any) -> tuple[tuple[tuple[int, str], ...], bool]:
    known = _SCHEMAS.get(func)
    if known is None:
        arguments = func._schema.arguments
        writes = tuple(
            (number, one.name)
            for number, one in enumerate(arguments)
            if one.alias_info is not None and one.alias_info.is_write
        )
        view = not writes and any(one.alias_info is not None for one in func._schema.returns)
        known = _SCHEMAS[func] = (writes, view)
    return known


def written_by(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation writes to."""
    found: list[torch.Tensor] = []
    for number, name in _schema(func)[0]:
        value = args[number] if number < len(args) else kwargs.get(name)
        found += [
            one for one in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(one, torch.Tensor)
        ]
    return found


def _is_view(func: Any) -> bool:
    return _schema(func)[1]


def _device_of(flat: list[Any], tensors: list[torch.Tensor]) -> torch.device:
    for value in flat:
        if isinstance(value, torch.device):
            return value
    sized = [one for one in tensors if one.dim()] or tensors
    return sized[0].device if sized else torch.device("cpu")


_OURS = __file__.rpartition("/")[0] + "/"
_TORCH = torch.__file__.rpartition("/")[0] + "/"


def _line_of_the_model() -> str:
    """The innermost line that is neither torch's nor ours: the model's."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith((_OURS, _TORCH)) and "importlib" not in path:
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees operations without a stand-in: fills, and reads of what was written."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap every single operation to keep its compiler out; there is nothing to compile.

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0]._device if isinstance(args[0], StandIn) else func(*args)
        return self._recorder.dispatch(func, args, kwargs or {})


class _Bypasses(torch.overrides.TorchFunctionMode):
    """Sees what passes the dispatcher by: ``param.data =``, and views of memory that are no tensors."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _WATCHED:
            return func(*args, **kwargs) if kwargs else func(*args)
        recorder = self._recorder
        what = _OF_REAL.get(func)
        if what is not None and not isinstance(args[0], StandIn) and recorder.active:
            if recorder.knows(args[0]) and (what == "model" or recorder.written(args[0])):
                raise recorder.refuse(_VALUE_READS.get(func, ".storage()"), [args[0]])
            recorder.read(args[0])
        elif func == _SET_DATA and recorder.active:
            if any(recorder.knows(one) or nn.parameter.is_lazy(one) for one in args):
                raise recorder.refuse(".data =", [one for one in args if not nn.parameter.is_lazy(one)])
        elif func in _SCALAR_TAKERS and type(args[-1]) is _Scalar:
            return func(*args[:-1], args[-1]._filling())
        return func(*args, **(kwargs or {}))


_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_WATCHED = {*_OF_REAL, *_SCALAR_TAKERS, _SET_DATA}


@contextmanager
def _no_swaps(recorder: _Recorder) -> Iterator[None]:
    """``torch.utils.swap_tensors`` exchanges what two tensors are, unseen by modes: it is refused meanwhile."""
    swap = torch.utils.swap_tensors

    def refused(one: torch.Tensor, other: torch.Tensor) -> None:
        raise recorder.refuse("torch.utils.swap_tensors()", [one, other])

    torch.utils.swap_tensors = refused
    try:
        yield
    finally:
        torch.utils.swap_tensors = swap


@contextmanager
def in_every_thread(*modes: Callable[[], AbstractContextManager[object]]) -> Iterator[Callable[[], bool]]:
    """Enter the modes in this thread and in those that start or are given work meanwhile: modes belong to threads.

    Gives a function that says whether any of that work is still under way.
    """
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit
    threads: list[threading.Thread] = []
    futures: list[Future[Any]] = []

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode())
            yield

    def in_modes(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with entered():
            return work(*args, **kwargs)

    def recorded_start(self: threading.Thread) -> None:
        # A pool's thread outlives its work, so there only the work is put into the modes.
        if getattr(self, "_target", None) is not _POOL_WORKER:
            run = self.run

            def recorded_run() -> None:
                del self.__dict__["run"]
                in_modes(run)

            self.run = recorded_run  # type: ignore[method-assign]
            threads.append(self)
        start(self)

    def recorded_submit(self: ThreadPoolExecutor, work: Any, /, *args: Any, **kwargs: Any) -> Any:
        futures.append(submit(self, in_modes, work, *args, **kwargs))
        return futures[-1]

    def unfinished() -> bool:
        patience = time.monotonic() + _PATIENCE
        for thread in threads:
            thread.join(max(0.0, patience - time.monotonic()))
        return any(thread.is_alive() for thread in threads) or not all(future.done() for future in futures)

    threading.Thread.start, ThreadPoolExecutor.submit = recorded_start, recorded_submit  # type: ignore[method-assign, assignment]
    try:
        with entered():
            yield unfinished
    finally:
        threading.Thread.start, ThreadPoolExecutor.submit = start, submit  # type: ignore[method-assign]


_POOL_WORKER = getattr(concurrent.futures.thread, "_worker", None)
_PATIENCE = 0.5  # seconds that threads of the loading code have to end when it has returned


def anchors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that can be reached from ``model``, by a path that leads to it: state first, then attributes.

    Where several share memory the first one names it, so buffers that are no state come after those that they view.
    """
    parameters: dict[str, torch.Tensor] = {}
    buffers: dict[str, torch.Tensor] = {}
    others: dict[str, torch.Tensor] = {}
    modules = list(model.named_modules(remove_duplicate=False))
    for prefix, module in modules:
        dot = f"{prefix}." if prefix else ""
        parameters.update({dot + key: one for key, one in module._parameters.items() if one is not None})
        for key, one in module._buffers.items():
            if one is not None:
                (others if key in module._non_persistent_buffers_set else buffers)[dot + key] = one
    found = {**parameters, **buffers, **others}
    seen = {id(tensor) for tensor in found.values()}
    for prefix, module in modules:
        if id(module) in seen:
            continue
        seen.add(id(module))
        dot = f"{prefix}." if prefix else ""
        for key, value in module.__dict__.items():
            if key not in _MODULE_PRIVATE and type(value) not in _NO_TENSORS:
                _reach(dot + key, value, found, seen, 0)
    return found


_MODULE_PRIVATE = set(nn.Module().__dict__)
_NO_TENSORS = {bool, int, float, str, type(None), torch.dtype, torch.device}
_DEPTH = 6


def _reach(path: str, value: object, found: dict[str, torch.Tensor], seen: set[int], depth: int) -> None:
    if isinstance(value, (str, int, float, bool, type(None), type, types.ModuleType)) or depth > _DEPTH:
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        found[path] = value
        return
    for step, item in _steps(value):
        _reach(path + step, item, found, seen, depth + 1)


def _steps(value: Any) -> Iterator[tuple[str, object]]:
    """What one step leads to, and how the step is written."""
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{number}]", item) for number, item in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        for number, cell in enumerate(value.__closure__ or ()):
            with suppress(ValueError):  # an empty cell
                yield f".__closure__[{number}]", cell.cell_contents
    elif isinstance(value, nn.Module):
        yield from ((f".{key}", item) for key, item in (*value._parameters.items(), *value._buffers.items()))
        yield from ((f".{key}", item) for key, item in value._modules.items())
        yield from ((f".{key}", item) for key, item in vars(value).items() if key not in _MODULE_PRIVATE)
    elif type(getattr(value, "__dict__", None)) is dict:
        yield from ((f".{key}", item) for key, item in vars(value).items())


class Recording(NamedTuple):
    """What one run of the loading code on stand-ins gave.

    Attributes:
        ops: what it did, in order.
        notes: what it did that cannot be repeated.
        constants: tensors that the operations use, by name.
        taken: names that it took from the stream.
        state_read: names of the model's tensors whose values it asked for.
        side_effects: attributes that it changed, and that were put back.
        error: what it raised, if it did.
    """

    ops: list[Op]
    notes: list[Note]
    constants: dict[str, torch.Tensor]
    taken: frozenset[str]
    state_read: frozenset[str]
    side_effects: list[str]
    error: Exception | None


def record(
    model: nn.Module,
    manifest: Manifest,
    load: Callable[[Iterator[tuple[str, torch.Tensor]]], object],
    *,
    device: torch.device,
    leave_out: Container[str] = (),
) -> Recording:
    """Run ``load`` on stand-ins for the tensors of ``manifest`` and record what it does.

    Nothing is read, no tensor of ``model`` is written, and its attributes are put back, also when ``load`` raises.

    Args:
        model: whose tensors are watched.
        manifest: what the stand-ins stand in for; it is streamed in this order.
        load: the model's own loading code.
        device: what the stand-ins report.
        leave_out: names that are not streamed.
    """
    recorder = _Recorder({name: one for name, one in anchors(model).items() if _plain(one)})
    taken: set[str] = set()

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        wanted = (
            spec for spec in manifest.values() if spec.name not in leave_out and not isinstance(spec.dtype, OpaqueDtype)
        )
        while specs := list(itertools.islice(wanted, _AT_ONCE)):
            for spec, standin in zip(specs, recorder.stand_ins(specs, device), strict=True):
                taken.add(spec.name)
                yield spec.name, standin

    error: Exception | None = None
    random = torch.get_rng_state()
    snapshot = Snapshot(model)
    try:
        with (
            _no_swaps(recorder),
            in_every_thread(torch.no_grad, lambda: _Bypasses(recorder), lambda: _Mode(recorder)) as unfinished,
        ):
            try:
                load(stream())
            except Exception as caught:
                error = caught
            if unfinished():
                recorder.refuse("a thread that goes on when loading is over", ())
    finally:
        recorder.end()
        changes = snapshot.put_back()
        torch.set_rng_state(random)
    for change in changes:
        held = list(_held(change.now, recorder))
        if change.of_state or held:
            where = change.where.removeprefix(f"{type(model).__name__}.")
            recorder.refuse(f"{'rebinding' if change.of_state else 'keeping'} {where}", held)
    return Recording(
        recorder.records,
        recorder.notes,
        recorder.constants,
        frozenset(taken),
        frozenset(recorder.state_read),
        [change.where for change in changes],
        error,
    )


def _held(value: object, recorder: _Recorder, depth: int = 0) -> Iterator[torch.Tensor]:
    """Tensors within ``value`` that do not hold what they would hold after loading."""
    if type(value) is _Scalar:
        yield value._standin
    elif isinstance(value, torch.Tensor):
        if recorder.written(value):
            yield value
    elif isinstance(value, (list, tuple, set, frozenset, dict)) and depth < _DEPTH:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _held(item, recorder, depth + 1)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType)) and depth < _DEPTH:
        yield from _held(vars(value), recorder, depth + 1)


def _plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and not nn.parameter.is_lazy(tensor)
        and type(tensor).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
    )
