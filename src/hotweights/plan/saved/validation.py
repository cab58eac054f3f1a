"""Validation: a document becomes the fields of a plan again, with every index, region and operation checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import msgspec
import torch
from torch.utils._pytree import tree_flatten

from ...boxes import Box, Memory, Region, extent, whole
from ...dtypes import FORMAT_DTYPES, DType, OpaqueDtype
from ...errors import PlanFileError
from ...manifest import Manifest, TensorSpec
from ..steps import Copy, Op, Program, Target
from .document import (
    ATTRIBUTES,
    DTYPES,
    Document,
    WireBox,
    WireConstant,
    WireCopy,
    WireOp,
    WireProgram,
    WireRegion,
    WireTarget,
)
from .operations import fits, operations

_LARGEST = 2**48  # of any length, stride, offset or number of bytes: torch multiplies them in 64 bits


def validated(path: object, document: Document) -> dict[str, Any]:
    """The fields of the plan that ``document``, read from ``path``, holds.

    Raises:
        PlanFileError: it says something that cannot be.
    """
    return _Validator(path, document).parts()


class _Validator:
    """One document as the fields of a plan. Every method raises ``PlanFileError`` for what cannot be."""

    def __init__(self, path: object, document: Document) -> None:
        self._path = path
        self._document = document
        self._boxes: dict[str, Box] = {}  # by source, all of it
        self._nbytes: dict[Memory, int] = {}
        self._levels = document.levels

    def parts(self) -> dict[str, Any]:
        document = self._document
        self._specs = [self._spec(*row) for row in document.manifest]
        manifest = {spec.name: spec for spec in self._specs}
        self._targets = [self._target(wire) for wire in document.targets]
        targets = {target.spec.name: target for target in self._targets}
        self._constants = {name: self._constant(name, wire) for name, wire in document.constants.items()}
        if len(manifest) != len(self._specs) or len(targets) != len(self._targets):
            self.wrong("it names a tensor twice")
        if document.levels and (len(document.levels) != len(document.steps) or min(document.levels) < 0):
            self.wrong("its levels are not those of its steps")
        unknown = {*document.fallback} - manifest.keys() | {*document.fates} - manifest.keys() - targets.keys()
        unknown |= ({*document.mismatched} | {*document.transient.values()} - {""}) - targets.keys()
        unknown |= {*document.origins} - manifest.keys()
        unknown |= {*document.unproven} - targets.keys() | {*document.state_read} ^ document.digests.keys()
        if unknown:
            self.wrong(f"it names {sorted(unknown)[0]!r} and does not describe it")
        return {
            "manifest": Manifest(self._specs, origins=document.origins),
            "targets": targets,
            "constants": self._constants,
            "steps": tuple(
                self._copy(wire) if isinstance(wire, WireCopy) else self._program(wire) for wire in document.steps
            ),
            "ties": tuple((self._copy(first), self._copy(second)) for first, second in document.ties),
            "fates": document.fates,
            "casts": document.casts,
            "digests": document.digests,
            "by_layer": document.by_layer,
            "mismatched": document.mismatched,
            "transient": document.transient,
            **{
                name: tuple(getattr(document, name))
                for name in (
                    "levels",
                    "fallback",
                    "graph_breaks",
                    "unproven",
                    "side_effects",
                    "state_read",
                    "processed",
                )
            },
        }

    def wrong(self, why: str) -> NoReturn:
        raise PlanFileError(f"{self._path}: cannot be believed: {why}")

    # Tensors.

    def _spec(self, name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
        kind: DType | None = DTYPES.get(dtype)
        if kind is None and dtype in FORMAT_DTYPES:
            kind = OpaqueDtype(dtype, FORMAT_DTYPES[dtype][0])
        if kind is None:
            self.wrong(f"{name}: torch {torch.__version__} has no dtype {dtype!r}")
        spec = TensorSpec(name, kind, shape)
        if len(shape) > 64 or (shape and not 0 <= min(shape) <= max(shape) < _LARGEST) or spec.nbytes >= _LARGEST:
            self.wrong(f"{name}: no tensor has the shape {list(shape)}")
        return spec

    def _target(self, wire: WireTarget) -> Target:
        spec = self._spec(wire.name, wire.dtype, wire.shape)
        if isinstance(spec.dtype, OpaqueDtype) or not 0 <= wire.owner < len(self._document.targets):
            self.wrong(f"{wire.name}: no tensor of a model is like this")
        if not 0 <= wire.start < _LARGEST:
            self.wrong(f"{wire.name}: no memory has a byte {wire.start}")
        owner = self._document.targets[wire.owner].name
        target = Target(spec, owner, wire.problem, wire.stride, wire.memory, wire.start)
        if wire.stride is not None:
            self._sized(target.box, Memory("model", wire.name), _LARGEST)
        self._nbytes[Memory("model", wire.name)] = extent(target.box)[1]
        return target

    def _constant(self, name: str, wire: WireConstant) -> torch.Tensor:
        spec = self._spec(f"constant {name}", wire.dtype, wire.shape)
        if isinstance(spec.dtype, OpaqueDtype):
            self.wrong(f"{spec.name}: no constant is like this")
        self._sized(Box(spec.dtype, wire.shape, wire.stride, 0), Memory("constant", name), len(wire.data))
        self._nbytes[Memory("constant", name)] = len(wire.data)
        try:
            raw = (
                torch.frombuffer(bytearray(wire.data), dtype=torch.uint8)
                if wire.data
                else torch.empty(0, dtype=torch.uint8, device="cpu")
            )
            storage = raw.to(torch.device(wire.device)).untyped_storage()
            return torch.empty(0, dtype=spec.dtype, device=wire.device).set_(storage, 0, wire.shape, wire.stride)
        except Exception as error:  # Devices have many ways of not being there.
            raise PlanFileError(f"{self._path}: cannot be believed: {spec.name}: {error}") from error

    # Places.

    def _sized(self, box: Box, memory: Memory, nbytes: int) -> None:
        if (
            len(box.shape) != len(box.stride)
            or len(box.shape) > 64
            or any(not 0 <= number < _LARGEST for number in (*box.shape, *box.stride, box.offset))
            or box.offset % box.dtype.itemsize
            or extent(box)[1] > nbytes
        ):
            self.wrong(
                f"{memory.kind} {memory.name}: {list(box.shape)} with strides {list(box.stride)} "
                f"from byte {box.offset} is not inside its {nbytes} bytes"
            )

    def box(self, wire: WireBox, memory: Memory, nbytes: int) -> Box:
        dtype = DTYPES.get(wire[0])
        if dtype is None:
            self.wrong(f"{memory.name}: torch {torch.__version__} has no dtype {wire[0]!r}")
        box = Box(dtype, *wire[1:])
        self._sized(box, memory, nbytes)
        return box

    def region(self, wire: WireRegion, results: Mapping[Memory, int]) -> Region:
        memory = Memory(wire[0], wire[1])
        nbytes = results.get(memory) if memory.kind == "result" else self._room(memory)
        if nbytes is None:
            self.wrong(f"an operation names {memory.kind} {memory.name!r}, which is not there")
        return Region(memory, self.box(wire[2], memory, nbytes))

    def _room(self, memory: Memory) -> int | None:
        if memory.kind == "source" and not self._boxes:
            self._boxes = {spec.name: whole(spec) for spec in self._specs if not isinstance(spec.dtype, OpaqueDtype)}
        if memory.kind == "source":
            box = self._boxes.get(memory.name)
            return None if box is None else box.nbytes
        return self._nbytes.get(memory)

    # Steps.

    def _copy(self, wire: WireCopy) -> Copy:
        if not (0 <= wire.source < len(self._specs) and 0 <= wire.destination < len(self._targets)):
            self.wrong("a copy is of or to a tensor that is not there")
        spec, target = self._specs[wire.source], self._targets[wire.destination]
        of = into = None
        if wire.of is not None:
            of = self.box(wire.of, Memory("source", spec.name), spec.nbytes)
        if wire.into is not None:
            memory = Memory("model", target.spec.name)
            into = self.box(wire.into, memory, self._nbytes[memory])
        if isinstance(spec.dtype, OpaqueDtype):
            self.wrong(f"{spec.name}: is copied, and torch has no such type")
        if into is not None and any(s == 0 and n > 1 for n, s in zip(into.shape, into.stride, strict=True)):
            self.wrong(f"{target.spec.name}: is written by a copy that puts several elements in one place")
        source_shape = spec.shape if of is None else of.shape
        shape = target.spec.shape if into is None else into.shape
        if math.prod(source_shape) != math.prod(shape):
            self.wrong(f"{target.spec.name}: {list(source_shape)} of {spec.name} is copied into {list(shape)}")
        return Copy(spec.name, target.spec.name, of, into)

    def _program(self, wire: WireProgram) -> Program:
        trial = _Trial(self)
        try:
            ops = tuple(trial.op(operation) for operation in wire.ops)
        except PlanFileError:
            raise
        except Exception as error:  # torch has no common error for operands that it refuses.
            raise PlanFileError(f"{self._path}: cannot be believed: an operation fails: {error}") from error
        sources = dict.fromkeys(
            region.memory.name for op in ops for region in op.reads if region.memory.kind == "source"
        )
        writes = tuple(region for op in ops for region in op.writes if region.memory.kind == "model")
        return Program(tuple(sources), ops, writes)


def _dimensions(region: Region) -> Iterator[tuple[int, int]]:
    """Size and stride of each dimension."""
    return zip(region.box.shape, region.box.stride, strict=True)


class _Trial:
    """One program's operations, decoded and tried one after the other on tensors without data."""

    def __init__(self, validator: _Validator) -> None:
        self._validator = validator
        self._results: dict[Memory, int] = {}

    def op(self, wire: WireOp) -> Op:
        func = operations().get(wire.func)
        if func is None:
            self._validator.wrong(f"it names an operation that no plan may name: {wire.func!r}")
        args = tuple(self._decoded(value) for value in wire.args)
        kwargs = {key: self._decoded(value) for key, value in wire.kwargs.items()}
        bound = self._bound(func, args, kwargs)
        writes = tuple(
            region
            for argument, value in bound
            if argument.alias_info is not None and argument.alias_info.is_write
            for region in tree_flatten(value)[0]
            if isinstance(region, Region)
        )
        if any(size > 1 and not stride for region in writes for size, stride in _dimensions(region)):
            self._validator.wrong(f"{func} writes to a tensor whose elements share their bytes")
        results = self._tried(func, args, kwargs, wire.results)
        reads = tuple(region for region in tree_flatten((args, kwargs))[0] if isinstance(region, Region))
        return Op(func, args, kwargs, results, writes, reads)

    def _decoded(self, wire: Any) -> Any:
        if not isinstance(wire, dict):
            if isinstance(wire, (list, bytes, msgspec.msgpack.Ext)):
                self._validator.wrong("an operand is of no known kind")
            return wire
        if len(wire) != 1:
            self._validator.wrong("an operand is of no known kind")
        ((kind, content),) = wire.items()
        make = _OPERANDS.get(kind)
        if kind in ("list", "tuple") and isinstance(content, list):
            several = [self._decoded(item) for item in content]
            return several if kind == "list" else tuple(several)
        if kind == "region":
            return self._validator.region(msgspec.convert(content, WireRegion), self._results)
        if make is None:
            self._validator.wrong(f"an operand is of no known kind: {kind!r}")
        return make(content)

    def _bound(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[tuple[Any, Any]]:
        """Each argument of the schema with its value; all of the right type, none left over."""
        arguments = func._schema.arguments
        positional = [argument for argument in arguments if not argument.kwarg_only]
        if len(args) > len(positional) or kwargs.keys() - {argument.name for argument in arguments[len(args) :]}:
            self._validator.wrong(f"{func} takes no such arguments")
        bound = [*zip(positional, args, strict=False)]
        for argument in arguments[len(args) :]:
            if argument.name in kwargs:
                bound.append((argument, kwargs[argument.name]))
            elif not argument.has_default_value():
                self._validator.wrong(f"{func} needs {argument.name}")
        for argument, value in bound:
            if not fits(value, str(argument.real_type)):
                self._validator.wrong(f"{func}: {argument.name} is no {argument.real_type}")
        return iter(bound)

    def _tried(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], wires: list[WireRegion]
    ) -> tuple[Region, ...]:
        metas: dict[int, torch.Tensor] = {}

        def meta(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(meta(item) for item in value)
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
        if any(argument.name == "device" for argument in func._schema.arguments):
            given["device"] = torch.device("meta")  # Without it, a factory would take memory.
        out = func(*meta(args), **given)
        fresh = [
            tensor for tensor in tree_flatten(out)[0] if isinstance(tensor, torch.Tensor) and id(tensor) not in metas
        ]
        if len(fresh) != len(wires):
            self._validator.wrong(f"{func} gives {len(fresh)} tensors, the plan has {len(wires)}")
        results: list[Region] = []
        for wire, tensor in zip(wires, fresh, strict=True):
            memory = Memory(wire[0], wire[1])
            new = memory.kind == "result" and memory not in self._results
            # An operation may give a view that torch does not own up to: then it lies inside what is there.
            box = (
                self._validator.box(wire[2], memory, _LARGEST)
                if new
                else self._validator.region(wire, self._results).box
            )
            if (box.dtype, box.shape) != (tensor.dtype, tuple(tensor.shape)):
                self._validator.wrong(
                    f"{func} gives {tensor.dtype} {list(tensor.shape)}, the plan has {list(box.shape)}"
                )
            if new:
                self._results[memory] = extent(box)[1]
            results.append(Region(memory, box))
        return tuple(results)


_OPERANDS: Mapping[str, Callable[[Any], Any]] = {
    "dtype": lambda name: DTYPES[name],
    "complex": lambda parts: complex(*parts),
    "device": torch.device,
    "layout": lambda name: ATTRIBUTES[torch.layout][name],
    "memory_format": lambda name: ATTRIBUTES[torch.memory_format][name],
}
