"""Tracing: a model's own loading code, run on stand-ins, becomes a record. No byte is read, no live tensor written.

A *stand-in* is a tensor without data. Views of it are computed as metadata; everything else that touches a
stand-in, writes to the model, or reads what was written there, is recorded and not done. What touches none of them
runs for real. Operands are recorded as *regions*: a box of elements over a piece of memory (a source tensor's bytes, a
tensor of the model, an intermediate result, a constant), so views need no record of their own.
"""

from __future__ import annotations

import itertools
import threading
import traceback
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
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
    _scalar: bool  # What .item() gave: it may fill, and be nothing else.

    @staticmethod
    def __new__(cls, meta: torch.Tensor, recorder: _Recorder, device: torch.device) -> StandIn:
        """Stand in for the tensor that ``meta`` describes, on ``device``."""
        self: StandIn = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=_META,
            dispatch_device=True,
        )
        self._meta = meta
        self._recorder = recorder
        self._device = device
        self._scalar = False
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<StandIn {self.dtype} {list(self.shape)}>"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.item and args[0].numel() == 1:
            scalar = StandIn(args[0]._meta.reshape(()), args[0]._recorder, args[0]._device)
            scalar._scalar = True
            return scalar
        what = _VALUE_READS.get(func)
        if what is not None:
            one = next(value for value in args if isinstance(value, StandIn))
            raise one._recorder.refuse(what, [value for value in args if isinstance(value, StandIn)])
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
_FILLS = {aten.fill_.Tensor, aten.copy_.default}
_REBINDS = {
    aten._has_compatible_shallow_copy_type.default: ".data =",
    aten.set_.source_Tensor: ".set_()",
    aten.set_.source_Storage: ".set_()",
    aten.set_.source_Storage_storage_offset: ".set_()",
    aten.resize_.default: ".resize_()",
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

    def refuse(self, what: str, tensors: Iterable[torch.Tensor]) -> ValueRead:
        """Note what was asked for; the error to raise into the loading code."""
        asked = [self.region(one).memory for one in tensors if self.knows(one)]
        sources = sorted({name for memory in asked for name in self.sources_of(memory)})
        where = _line_of_the_model()
        self.notes.append(Note(what, tuple(sources), where))
        return ValueRead(
            f"{what} at {where} asks for what tensor {', '.join(sources)} does not have while it is traced"
        )

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether it is a stand-in, or memory that was written."""
        return isinstance(tensor, StandIn) or tensor.untyped_storage()._cdata in self._memories

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
        with self.lock:
            return self._dispatch(func, args, kwargs)

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.active:
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
            if func in _SCALAR_READS:
                self.state_read.update(self._memory(one).name for one in tensors if self._is_ours(one))
            return func(*args, **kwargs)
        if func in _REBINDS:
            raise self.refuse(_REBINDS[func], tensors)
        if func in _SCALAR_READS:
            return self._value(func, args, kwargs, tensors, standins)
        return self._record(func, flat, spec, tensors, written)

    def _is_ours(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, StandIn) or tensor.untyped_storage()._cdata in self._memories

    def _is_dirty(self, tensor: torch.Tensor) -> bool:
        if isinstance(tensor, StandIn):
            return True
        return self._memories.get(tensor.untyped_storage()._cdata) in self._dirty

    def _view(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A view of a stand-in stands in for the view; a view of a real tensor is known by its storage."""
        one = args[0]
        if not isinstance(one, StandIn):
            return func(*args, **kwargs)
        out = func(one._meta, *args[1:], **kwargs)
        if isinstance(out, torch.Tensor):
            return StandIn(out, self, one._device)
        return type(out)(StandIn(value, self, one._device) for value in out)

    def _plainly_copied(self, destination: torch.Tensor, source: torch.Tensor) -> bool:
        """Record the most frequent operation by far, a stand-in of the same shape into the model, without ceremony."""
        if not isinstance(source, StandIn) or isinstance(destination, StandIn) or source.shape != destination.shape:
            return False
        memory = self._memories.get(destination.untyped_storage()._cdata)
        if memory is None or memory.kind != "model":
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
        if func not in _FILLS and any(isinstance(one, StandIn) and one._scalar for one in tensors):
            raise self.refuse(".item()", tensors)
        device = _device_of(flat, tensors)
        for tensor in written:
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
                value = self._constant(value)  # State that loading has not written: its value now is part of the plan.
            metas.append(self._on_meta(value))
            encoded.append(self.region(value))
        args, kwargs = spec.unflatten(metas)
        if func in _FACTORIES:
            kwargs = {**kwargs, "device": _META}
        out = func(*args, **kwargs)  # The mode that called is off meanwhile, so this is not recorded again.
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
        with _disable_current_modes():
            copied = tensor.detach().clone()
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
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((_OURS, _TORCH)) and "importlib" not in frame.filename:
            return f"{frame.filename}:{frame.lineno}"
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


class _Rebinds(torch.overrides.TorchFunctionMode):
    """Sees ``param.data = stand_in``, which torch refuses in words that name nothing."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _SET_DATA and isinstance(args[1], StandIn):
            raise self._recorder.refuse(".data =", [args[1]])
        return func(*args, **(kwargs or {}))


_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


@contextmanager
def in_every_thread(*modes: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Enter the modes in this thread and in those that start or are given work meanwhile: modes belong to threads."""
    run, submit = threading.Thread.run, ThreadPoolExecutor.submit

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode())
            yield

    def in_modes(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with entered():
            return work(*args, **kwargs)

    def recorded_run(self: threading.Thread) -> None:
        in_modes(run, self)

    def recorded_submit(self: ThreadPoolExecutor, work: Any, /, *args: Any, **kwargs: Any) -> Any:
        return submit(self, in_modes, work, *args, **kwargs)

    threading.Thread.run, ThreadPoolExecutor.submit = recorded_run, recorded_submit  # type: ignore[method-assign, assignment]
    try:
        with entered():
            yield
    finally:
        threading.Thread.run, ThreadPoolExecutor.submit = run, submit  # type: ignore[method-assign]


def anchors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that can be reached from ``model``, by a path that leads to it: state first, then attributes.

    Where several share memory the first one names it, so buffers that are no state come after those that they view.
    """
    parameters: dict[str, torch.Tensor] = {}
    buffers: dict[str, torch.Tensor] = {}
    others: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        parameters.update({dot + key: one for key, one in module._parameters.items() if one is not None})
        for key, one in module._buffers.items():
            if one is not None:
                (others if key in module._non_persistent_buffers_set else buffers)[dot + key] = one
    found = {**parameters, **buffers, **others}
    seen = {id(tensor) for tensor in found.values()}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for key, value in module.__dict__.items():
            if not key.startswith("_") or key not in _MODULE_PRIVATE:
                _reach(dot + key, value, found, seen, 0)
    return found


_MODULE_PRIVATE = set(nn.Module().__dict__)
_DEPTH = 6


def _reach(path: str, value: object, found: dict[str, torch.Tensor], seen: set[int], depth: int) -> None:
    if isinstance(value, (nn.Module, str, int, float, bool, type(None), type)) or depth > _DEPTH:
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        found[path] = value
    elif isinstance(value, dict):
        for key, item in value.items():
            _reach(f"{path}[{key!r}]", item, found, seen, depth + 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for number, item in enumerate(value):
            _reach(f"{path}[{number}]", item, found, seen, depth + 1)
    elif hasattr(value, "__dict__") and not callable(value):
        for key, item in vars(value).items():
            _reach(f"{path}.{key}", item, found, seen, depth + 1)


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
    snapshot = Snapshot(model)
    try:
        with in_every_thread(torch.no_grad, lambda: _Rebinds(recorder), lambda: _Mode(recorder)):
            try:
                load(stream())
            except Exception as caught:
                error = caught
    finally:
        recorder.active = False
        rebound = list(_rebound(model, recorder, snapshot))
        side_effects = snapshot.put_back()
    recorder.notes += rebound
    return Recording(
        recorder.records,
        recorder.notes,
        recorder.constants,
        frozenset(taken),
        frozenset(recorder.state_read),
        [effect for effect in side_effects if not any(effect == note.what for note in rebound)],
        error,
    )


def _rebound(model: nn.Module, recorder: _Recorder, snapshot: Snapshot) -> Iterator[Note]:
    """Parameters and buffers that another tensor has taken the place of."""
    before = snapshot.tensors
    for prefix, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                name = f"{prefix}.{key}" if prefix else key
                if tensor is not None and tensor is not before.get(name):
                    sources = recorder.sources_of(recorder.region(tensor).memory) if recorder.knows(tensor) else ()
                    yield Note(f"rebinding {name}", tuple(sorted(sources)), "attribute assignment")


def _plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and not nn.parameter.is_lazy(tensor)
        and type(tensor).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
    )
