"""Saved plans: their format, and everything that is checked before one is believed. It runs no operation on data.

A file is ``MAGIC``, the digest of the rest (xxh3, 8 bytes, little-endian), and one msgpack document. It holds names,
numbers and small constants. Operations are named from a list of ATen's that do nothing but compute on their operands;
each is tried on tensors without data, so that what a file says of its results is known to be so. A file of other bytes,
damaged or forged, gives ``PlanFileError`` and nothing else.
"""

from __future__ import annotations

import ctypes
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn

import msgspec
import torch
import xxhash
from torch.utils._pytree import tree_flatten

from .collection import without_collection
from .errors import PlanFileError
from .manifest import FORMAT_DTYPES, DType, Manifest, OpaqueDtype, TensorSpec
from .regions import Box, Memory, Region, extent, whole
from .steps import Copy, Fate, Note, Op, Program, Target

__all__ = ["operations", "read", "write"]

VERSION = 1
_MAGIC = b"hotweights plan\n"
_LARGEST = 2**48  # of any length, stride, offset or number of bytes: torch multiplies them in 64 bits

# Operations. No file may name others: these have no effect beside their operands and read nothing else.

_PACKETS = """
copy_ clone _to_copy contiguous _unsafe_view lift_fresh_copy detach_copy
add sub rsub mul div remainder fmod floor_divide true_divide pow neg abs sign reciprocal sqrt rsqrt square exp exp2
expm1 log log2 log10 log1p sin cos tan tanh sigmoid relu silu gelu softplus floor ceil round trunc frac clamp clamp_min
clamp_max maximum minimum lerp addcmul addcdiv erf isnan isinf isfinite nan_to_num ldexp frexp hypot atan2 copysign
add_ sub_ mul_ div_ remainder_ fmod_ pow_ neg_ abs_ reciprocal_ sqrt_ rsqrt_ exp_ log_ tanh_ sigmoid_ relu_ floor_ ceil_
round_ trunc_ clamp_ clamp_min_ clamp_max_ nan_to_num_ lerp_ addcmul_ addcdiv_ square_ sign_ expm1_ log1p_ exp2_
bitwise_and bitwise_or bitwise_xor bitwise_not bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__ __lshift__
__rshift__ bitwise_and_ bitwise_or_ bitwise_xor_ bitwise_not_ bitwise_left_shift_ bitwise_right_shift_ __iand__ __ior__
__ixor__ __ilshift__ __irshift__ logical_and logical_or logical_xor logical_not logical_not_
eq ne lt le gt ge where masked_fill masked_fill_
cat stack hstack vstack repeat repeat_interleave roll flip rot90 tril triu tril_ triu_ constant_pad_nd
index index_put index_put_ index_select gather scatter scatter_ index_copy index_copy_ index_fill index_fill_ index_add
index_add_ take take_along_dim slice_scatter select_scatter
sum mean prod amax amin max min argmax argmin any all cumsum cumprod var std norm linalg_vector_norm sort argsort topk
fill fill_ zero zero_ zeros ones empty full arange eye scalar_tensor linspace zeros_like ones_like empty_like full_like
new_empty new_zeros new_ones new_full new_empty_strided empty_strided
mm bmm addmm matmul dot mv outer
view_as_real_copy view_as_complex_copy permute_copy t_copy transpose_copy expand_copy slice_copy select_copy
"""

_TYPES = {
    "Tensor": Region,
    "int": int,
    "SymInt": int,
    "float": (int, float),
    "bool": bool,
    "number": (bool, int, float, complex),
    "str": str,
    "ScalarType": torch.dtype,
    "Layout": torch.layout,
    "Device": torch.device,
    "MemoryFormat": torch.memory_format,
}


@cache
def operations() -> Mapping[str, torch._ops.OpOverload]:
    """The operations that a saved plan may name, by their names."""
    found: dict[str, torch._ops.OpOverload] = {}
    for word in _PACKETS.split():
        packet = getattr(torch.ops.aten, word, None)
        for overload in packet.overloads() if packet is not None else ():
            func = getattr(packet, overload)
            if _is_plain(func):
                found[str(func)] = func
    return found


def _is_plain(func: torch._ops.OpOverload) -> bool:
    """Whether it takes only what a file can hold, and writes only what it is named for: no generator, no ``out=``."""
    return not any(one.is_out for one in func._schema.arguments) and all(
        _innermost(str(one.real_type)) in _TYPES for one in func._schema.arguments
    )


def _innermost(kind: str) -> str:
    while kind.endswith("]"):
        kind = kind.partition("[")[2][:-1]
    return kind


# The document. All of it is tuples and numbers, so that msgspec checks its shape while it decodes.

_WireBox = tuple[str, tuple[int, ...], tuple[int, ...], int]
_WireRegion = tuple[Literal["source", "model", "result", "constant"], str, _WireBox]


class _WireCopy(msgspec.Struct, array_like=True, tag=0, gc=False, forbid_unknown_fields=True):
    source: int
    destination: int
    of: _WireBox | None
    into: _WireBox | None


class _WireOp(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    func: str
    args: list[Any]
    kwargs: dict[str, Any]
    results: list[_WireRegion]


class _WireProgram(msgspec.Struct, array_like=True, tag=1, forbid_unknown_fields=True):
    ops: list[_WireOp]


class _WireTarget(msgspec.Struct, array_like=True, gc=False, forbid_unknown_fields=True):
    name: str
    dtype: str
    shape: tuple[int, ...]
    owner: int
    problem: str
    stride: tuple[int, ...] | None


class _WireConstant(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: str
    data: bytes


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    manifest: list[tuple[str, str, tuple[int, ...]]]
    targets: list[_WireTarget]
    steps: list[_WireCopy | _WireProgram]
    levels: list[int]
    ties: list[tuple[_WireCopy, _WireCopy]]
    fates: dict[str, Fate]
    casts: dict[str, str]
    constants: dict[str, _WireConstant]
    fallback: list[str]
    notes: list[Note]
    unproven: list[str]
    side_effects: list[str]
    state_read: list[str]
    warnings: list[str]
    digests: dict[str, str]
    by_layer: bool


_DTYPES: Mapping[str, torch.dtype] = {
    str(found).removeprefix("torch."): found
    for _, name in [*FORMAT_DTYPES.values(), (0, "complex128"), (0, "complex32")]
    if isinstance(found := getattr(torch, name or "-", None), torch.dtype)
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ATTRIBUTES = {
    kind: {str(one).removeprefix("torch."): one for one in vars(torch).values() if type(one) is kind}
    for kind in (torch.layout, torch.memory_format)
}


# Writing.


def write(path: str | os.PathLike[str], parts: Mapping[str, Any]) -> None:
    """Write the fields of a plan to ``path``, which is replaced at once, by all of it.

    Raises:
        PlanFileError: it holds something that a file may not.
    """
    with without_collection():
        payload = msgspec.msgpack.encode(_Writer(path, parts).document())
        try:  # What could not be read again is better refused now than when it is needed.
            _Reader(path, msgspec.msgpack.decode(payload, type=_Document)).parts()
        except PlanFileError as error:
            _refuse(path, str(error))
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with open(handle, "wb") as file:
            file.write(_MAGIC + xxhash.xxh3_64_intdigest(payload).to_bytes(8, "little") + payload)
        os.replace(name, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


class _Writer:
    """One plan as a document."""

    def __init__(self, path: str | os.PathLike[str], parts: Mapping[str, Any]) -> None:
        self._path = path
        self._plan = parts
        self._sources = {name: number for number, name in enumerate(parts["manifest"])}
        self._targets = {name: number for number, name in enumerate(parts["targets"])}

    def document(self) -> _Document:
        plan = self._plan
        unknown = sorted(
            {str(op.func) for step in plan["steps"] if isinstance(step, Program) for op in step.ops}
            - operations().keys()
        )
        if unknown:
            raise PlanFileError(
                f"{self._path}: this plan can be used but not saved: operations that no file may name",
                unknown,
            )
        lists = ("fallback", "notes", "unproven", "side_effects", "state_read", "warnings", "levels")
        return _Document(
            version=VERSION,
            manifest=[(spec.name, _dtype_name(spec.dtype), spec.shape) for spec in plan["manifest"].values()],
            targets=[self._target(name, one) for name, one in plan["targets"].items()],
            steps=[self._copy(one) if isinstance(one, Copy) else self._program(one) for one in plan["steps"]],
            ties=[(self._copy(one), self._copy(other)) for one, other in plan["ties"]],
            fates=dict(plan["fates"]),
            casts=dict(plan["casts"]),
            constants={name: self._constant(one) for name, one in plan["constants"].items()},
            digests=dict(plan["digests"]),
            by_layer=plan["by_layer"],
            **{name: list(plan[name]) for name in lists},
        )

    def _target(self, name: str, one: Target) -> _WireTarget:
        owner = self._targets[one.owner]
        return _WireTarget(name, _dtype_name(one.spec.dtype), one.spec.shape, owner, one.problem, one.stride)

    def _copy(self, step: Copy) -> _WireCopy:
        if step.destination not in self._targets:
            _refuse(self._path, f"the plan does not describe {step.destination}, which it writes")
        return _WireCopy(
            self._sources[step.source], self._targets[step.destination], _wire_box(step.of), _wire_box(step.into)
        )

    def _program(self, step: Program) -> _WireProgram:
        return _WireProgram(
            [
                _WireOp(
                    str(op.func),
                    [_wire(one, self._path) for one in op.args],
                    {key: _wire(one, self._path) for key, one in op.kwargs.items()},
                    [_wire_region(one) for one in op.results],
                )
                for op in step.ops
            ]
        )

    def _constant(self, tensor: torch.Tensor) -> _WireConstant:
        if type(tensor) is not torch.Tensor or tensor.is_meta or tensor.dtype not in _NAMES:
            _refuse(self._path, f"a constant is a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}")
        # Its storage, holes included: operations name places in it by bytes.
        raw = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).cpu()
        return _WireConstant(
            _NAMES[tensor.dtype],
            tuple(tensor.shape),
            tensor.stride(),
            str(tensor.device),
            ctypes.string_at(raw.data_ptr(), raw.numel()) if raw.numel() else b"",
        )


def _dtype_name(dtype: DType) -> str:
    return dtype.name if isinstance(dtype, OpaqueDtype) else _NAMES[dtype]


def _wire_box(box: Box | None) -> _WireBox | None:
    return None if box is None else (_NAMES[box.dtype], box.shape, box.stride, box.offset)


def _wire_region(region: Region) -> _WireRegion:
    box = _wire_box(region.box)
    assert box is not None
    return (region.memory.kind, region.memory.name, box)  # type: ignore[return-value]


def _wire(value: Any, path: object) -> Any:
    """An operand: what msgpack knows as it is, everything else as ``{kind: content}``."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [_wire(one, path) for one in value]}
    if isinstance(value, Region):
        return {"region": _wire_region(value)}
    if isinstance(value, torch.dtype) and value in _NAMES:
        return {"dtype": _NAMES[value]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, (torch.layout, torch.memory_format)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    return _refuse(path, f"an operand is a {type(value).__name__}: {value!r}")


def _refuse(path: object, why: str) -> NoReturn:
    raise PlanFileError(f"{path}: this plan can be used but not saved: {why}")


# Reading.


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of the plan in ``path``, checked: every index, every region, every operation.

    Raises:
        PlanFileError: this is no plan, or one that cannot be believed.
        FileNotFoundError: there is no such file; other errors of the file system are passed on alike.
    """
    data = Path(path).read_bytes()
    head = len(_MAGIC) + 8
    if data[: len(_MAGIC)] != _MAGIC or len(data) < head:
        raise PlanFileError(f"{path}: is no saved plan")
    if xxhash.xxh3_64_intdigest(memoryview(data)[head:]).to_bytes(8, "little") != data[head - 8 : head]:
        raise PlanFileError(f"{path}: is damaged: its digest does not match its bytes")
    with without_collection():
        try:
            version = msgspec.msgpack.decode(memoryview(data)[head:], type=_Versioned).version
            if version != VERSION:
                raise PlanFileError(f"{path}: is a plan of version {version}; this hotweights reads {VERSION}")
            document = msgspec.msgpack.decode(memoryview(data)[head:], type=_Document)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise PlanFileError(f"{path}: is no saved plan: {error}") from error
        return _Reader(path, document).parts()


class _Versioned(msgspec.Struct):
    version: int


class _Reader:
    """One document as the fields of a plan. Every method raises ``PlanFileError`` for what cannot be."""

    def __init__(self, path: object, document: _Document) -> None:
        self._path = path
        self._document = document
        self._boxes: dict[str, Box] = {}  # by source, all of it
        self._nbytes: dict[Memory, int] = {}
        self._levels = document.levels

    def parts(self) -> dict[str, Any]:
        document = self._document
        self._specs = [self._spec(*one) for one in document.manifest]
        manifest = {spec.name: spec for spec in self._specs}
        self._targets = [self._target(one) for one in document.targets]
        targets = {one.spec.name: one for one in self._targets}
        self._constants = {name: self._constant(name, one) for name, one in document.constants.items()}
        if len(manifest) != len(self._specs) or len(targets) != len(self._targets):
            self.wrong("it names a tensor twice")
        if document.levels and (len(document.levels) != len(document.steps) or min(document.levels) < 0):
            self.wrong("its levels are not those of its steps")
        unknown = {*document.fallback} - manifest.keys() | {*document.fates} - manifest.keys() - targets.keys()
        unknown |= {*document.unproven} - targets.keys() | {*document.state_read} ^ document.digests.keys()
        if unknown:
            self.wrong(f"it speaks of {sorted(unknown)[0]!r} and does not describe it")
        return {
            "manifest": Manifest(self._specs),
            "targets": targets,
            "constants": self._constants,
            "steps": tuple(
                self._copy(one) if isinstance(one, _WireCopy) else self._program(one) for one in document.steps
            ),
            "ties": tuple((self._copy(one), self._copy(other)) for one, other in document.ties),
            "fates": document.fates,
            "casts": document.casts,
            "digests": document.digests,
            "by_layer": document.by_layer,
            **{
                name: tuple(getattr(document, name))
                for name in ("levels", "fallback", "notes", "unproven", "side_effects", "state_read", "warnings")
            },
        }

    def wrong(self, why: str) -> NoReturn:
        raise PlanFileError(f"{self._path}: cannot be believed: {why}")

    # Tensors.

    def _spec(self, name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
        found: DType | None = _DTYPES.get(dtype)
        if found is None and dtype in FORMAT_DTYPES:
            found = OpaqueDtype(dtype, FORMAT_DTYPES[dtype][0])
        if found is None:
            self.wrong(f"{name}: torch {torch.__version__} has no dtype {dtype!r}")
        spec = TensorSpec(name, found, shape)
        if len(shape) > 64 or (shape and not 0 <= min(shape) <= max(shape) < _LARGEST) or spec.nbytes >= _LARGEST:
            self.wrong(f"{name}: no tensor has the shape {list(shape)}")
        return spec

    def _target(self, one: _WireTarget) -> Target:
        spec = self._spec(one.name, one.dtype, one.shape)
        if isinstance(spec.dtype, OpaqueDtype) or not 0 <= one.owner < len(self._document.targets):
            self.wrong(f"{one.name}: no tensor of a model is like this")
        target = Target(spec, self._document.targets[one.owner].name, one.problem, one.stride)
        if one.stride is not None:
            self._sized(target.box, Memory("model", one.name), _LARGEST)
        self._nbytes[Memory("model", one.name)] = extent(target.box)[1]
        return target

    def _constant(self, name: str, one: _WireConstant) -> torch.Tensor:
        spec = self._spec(f"constant {name}", one.dtype, one.shape)
        if isinstance(spec.dtype, OpaqueDtype):
            self.wrong(f"{spec.name}: no constant is like this")
        self._sized(Box(spec.dtype, one.shape, one.stride, 0), Memory("constant", name), len(one.data))
        self._nbytes[Memory("constant", name)] = len(one.data)
        try:
            raw = torch.frombuffer(bytearray(one.data), dtype=torch.uint8) if one.data else torch.empty(0).byte()
            storage = raw.to(torch.device(one.device)).untyped_storage()
            return torch.empty(0, dtype=spec.dtype, device=one.device).set_(storage, 0, one.shape, one.stride)
        except Exception as error:  # Devices have many ways of not being there.
            raise PlanFileError(f"{self._path}: cannot be believed: {spec.name}: {error}") from error

    # Places.

    def _sized(self, box: Box, memory: Memory, nbytes: int) -> None:
        if (
            len(box.shape) != len(box.stride)
            or len(box.shape) > 64
            or any(not 0 <= one < _LARGEST for one in (*box.shape, *box.stride, box.offset))
            or box.offset % box.dtype.itemsize
            or extent(box)[1] > nbytes
        ):
            self.wrong(
                f"{memory.kind} {memory.name}: {list(box.shape)} with strides {list(box.stride)} "
                f"from byte {box.offset} is not inside its {nbytes} bytes"
            )

    def _box(self, wire: _WireBox, memory: Memory, nbytes: int) -> Box:
        dtype = _DTYPES.get(wire[0])
        if dtype is None:
            self.wrong(f"{memory.name}: torch {torch.__version__} has no dtype {wire[0]!r}")
        box = Box(dtype, *wire[1:])
        self._sized(box, memory, nbytes)
        return box

    def region(self, wire: _WireRegion, results: Mapping[Memory, int]) -> Region:
        memory = Memory(wire[0], wire[1])
        nbytes = results.get(memory) if memory.kind == "result" else self._room(memory)
        if nbytes is None:
            self.wrong(f"an operation speaks of {memory.kind} {memory.name!r}, which is not there")
        return Region(memory, self._box(wire[2], memory, nbytes))

    def _room(self, memory: Memory) -> int | None:
        if memory.kind == "source" and not self._boxes:
            self._boxes = {one.name: whole(one) for one in self._specs if not isinstance(one.dtype, OpaqueDtype)}
        if memory.kind == "source":
            box = self._boxes.get(memory.name)
            return None if box is None else box.nbytes
        return self._nbytes.get(memory)

    # Steps.

    def _copy(self, wire: _WireCopy) -> Copy:
        if not (0 <= wire.source < len(self._specs) and 0 <= wire.destination < len(self._targets)):
            self.wrong("a copy is of or to a tensor that is not there")
        spec, target = self._specs[wire.source], self._targets[wire.destination]
        of = into = None
        if wire.of is not None:
            of = self._box(wire.of, Memory("source", spec.name), spec.nbytes)
        if wire.into is not None:
            memory = Memory("model", target.spec.name)
            into = self._box(wire.into, memory, self._nbytes[memory])
        if isinstance(spec.dtype, OpaqueDtype):
            self.wrong(f"{spec.name}: is copied, and torch has no such type")
        source_shape = spec.shape if of is None else of.shape
        shape = target.spec.shape if into is None else into.shape
        if math.prod(source_shape) != math.prod(shape):
            self.wrong(f"{target.spec.name}: {list(source_shape)} of {spec.name} is copied into {list(shape)}")
        return Copy(spec.name, target.spec.name, of, into)

    def _program(self, wire: _WireProgram) -> Program:
        trial = _Trial(self)
        try:
            ops = tuple(trial.op(one) for one in wire.ops)
        except PlanFileError:
            raise
        except Exception as error:  # torch has no common error for operands that it refuses.
            raise PlanFileError(f"{self._path}: cannot be believed: an operation fails: {error}") from error
        sources = dict.fromkeys(one.memory.name for op in ops for one in op.reads if one.memory.kind == "source")
        writes = tuple(one for op in ops for one in op.writes if one.memory.kind == "model")
        return Program(tuple(sources), ops, writes)


class _Trial:
    """One program's operations, decoded and tried one after the other on tensors without data."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        self._results: dict[Memory, int] = {}

    def op(self, wire: _WireOp) -> Op:
        func = operations().get(wire.func)
        if func is None:
            self._reader.wrong(f"it names an operation that no plan may name: {wire.func!r}")
        args = tuple(self._decoded(one) for one in wire.args)
        kwargs = {key: self._decoded(one) for key, one in wire.kwargs.items()}
        bound = self._bound(func, args, kwargs)
        writes = tuple(
            one
            for argument, value in bound
            if argument.alias_info is not None and argument.alias_info.is_write
            for one in tree_flatten(value)[0]
            if isinstance(one, Region)
        )
        results = self._tried(func, args, kwargs, wire.results)
        reads = tuple(one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Region))
        return Op(func, args, kwargs, results, writes, reads)

    def _decoded(self, wire: Any) -> Any:
        if not isinstance(wire, dict):
            if isinstance(wire, (list, bytes, msgspec.msgpack.Ext)):
                self._reader.wrong("an operand is of no known kind")
            return wire
        if len(wire) != 1:
            self._reader.wrong("an operand is of no known kind")
        ((kind, content),) = wire.items()
        make = _OPERANDS.get(kind)
        if kind in ("list", "tuple") and isinstance(content, list):
            several = [self._decoded(one) for one in content]
            return several if kind == "list" else tuple(several)
        if kind == "region":
            return self._reader.region(msgspec.convert(content, _WireRegion), self._results)
        if make is None:
            self._reader.wrong(f"an operand is of no known kind: {kind!r}")
        return make(content)

    def _bound(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[tuple[Any, Any]]:
        """Each argument of the schema with its value; all of the right type, none left over."""
        arguments = func._schema.arguments
        positional = [one for one in arguments if not one.kwarg_only]
        if len(args) > len(positional) or kwargs.keys() - {one.name for one in arguments[len(args) :]}:
            self._reader.wrong(f"{func} takes no such arguments")
        bound = [*zip(positional, args, strict=False)]
        for one in arguments[len(args) :]:
            if one.name in kwargs:
                bound.append((one, kwargs[one.name]))
            elif not one.has_default_value():
                self._reader.wrong(f"{func} needs {one.name}")
        for one, value in bound:
            if not _fits(value, str(one.real_type)):
                self._reader.wrong(f"{func}: {one.name} is no {one.real_type}")
        return iter(bound)

    def _tried(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], wires: list[_WireRegion]
    ) -> tuple[Region, ...]:
        metas: dict[int, torch.Tensor] = {}

        def meta(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(meta(one) for one in value)
            if isinstance(value, Region):
                box = value.box
                nbytes = extent(box)[1]
                raw = torch.empty(nbytes, dtype=torch.uint8, device="meta").untyped_storage()
                made = torch.empty(0, dtype=box.dtype, device="meta")
                made.set_(raw, box.offset // box.dtype.itemsize, box.shape, box.stride)
                metas[id(made)] = made
                return made
            return torch.device("meta") if isinstance(value, torch.device) else value

        given = {key: meta(value) for key, value in kwargs.items()}
        if any(one.name == "device" for one in func._schema.arguments):
            given["device"] = torch.device("meta")  # Without it, a factory would take memory.
        out = func(*meta(args), **given)
        fresh = [one for one in tree_flatten(out)[0] if isinstance(one, torch.Tensor) and id(one) not in metas]
        if len(fresh) != len(wires):
            self._reader.wrong(f"{func} gives {len(fresh)} tensors, the plan has {len(wires)}")
        found: list[Region] = []
        for wire, tensor in zip(wires, fresh, strict=True):
            memory = Memory(wire[0], wire[1])
            new = memory.kind == "result" and memory not in self._results
            # An operation may give a view that torch does not own up to: then it lies inside what is there.
            box = self._reader._box(wire[2], memory, _LARGEST) if new else self._reader.region(wire, self._results).box
            if (box.dtype, box.shape) != (tensor.dtype, tuple(tensor.shape)):
                self._reader.wrong(f"{func} gives {tensor.dtype} {list(tensor.shape)}, the plan has {list(box.shape)}")
            if new:
                self._results[memory] = extent(box)[1]
            found.append(Region(memory, box))
        return tuple(found)


_OPERANDS: Mapping[str, Callable[[Any], Any]] = {
    "dtype": lambda name: _DTYPES[name],
    "complex": lambda parts: complex(*parts),
    "device": torch.device,
    "layout": lambda name: _ATTRIBUTES[torch.layout][name],
    "memory_format": lambda name: _ATTRIBUTES[torch.memory_format][name],
}


def _fits(value: Any, kind: str) -> bool:
    """Whether ``value`` is what the schema calls ``kind``."""
    if kind.startswith("Optional["):
        return value is None or _fits(value, kind[len("Optional[") : -1])
    if kind.startswith("List["):
        inner = kind[len("List[") : -1]
        if isinstance(value, (list, tuple)):
            return all(_fits(one, inner) for one in value)
        return inner in ("int", "SymInt") and _fits(value, inner)  # torch takes one for all
    if kind in ("int", "SymInt") and isinstance(value, bool):
        return False
    if kind == "Tensor" and isinstance(value, (bool, int, float, complex)):
        return True  # torch hands numbers to overloads for tensors, and takes them there.
    return isinstance(value, _TYPES[kind])  # type: ignore[arg-type]
