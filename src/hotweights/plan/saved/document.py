"""Document: a plan as tuples, numbers and names, as a file holds it. Whether one is right is for ``validation``."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import msgspec
import torch

from ...boxes import Box, Region
from ...dtypes import FORMAT_DTYPES, DType, OpaqueDtype
from ...errors import PlanFileError
from ...text import some
from ..steps import Copy, Fate, GraphBreak, Program, Target
from .operations import operations

VERSION = 2

# All of it is tuples and numbers, so that msgspec checks its shape while it decodes.

WireBox = tuple[str, tuple[int, ...], tuple[int, ...], int]
WireRegion = tuple[Literal["source", "model", "result", "constant"], str, WireBox]


class WireCopy(msgspec.Struct, array_like=True, tag=0, gc=False, forbid_unknown_fields=True):
    """A copy; source and destination by their numbers in the document."""

    source: int
    destination: int
    of: WireBox | None
    into: WireBox | None


class WireOp(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """An operation; operands that msgpack does not know as ``{kind: content}``."""

    func: str
    args: list[Any]
    kwargs: dict[str, Any]
    results: list[WireRegion]


class WireProgram(msgspec.Struct, array_like=True, tag=1, forbid_unknown_fields=True):
    """A program. What it takes and writes is not said: it follows from the operations."""

    ops: list[WireOp]


class WireTarget(msgspec.Struct, array_like=True, gc=False, forbid_unknown_fields=True):
    """A target; its owner by number."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    owner: int
    problem: str
    stride: tuple[int, ...] | None
    memory: str
    start: int


class WireConstant(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A constant, with the bytes of its storage."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: str
    data: bytes


class Document(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of a plan, and the version of the file format."""

    version: int
    manifest: list[tuple[str, str, tuple[int, ...]]]
    targets: list[WireTarget]
    steps: list[WireCopy | WireProgram]
    levels: list[int]
    ties: list[tuple[WireCopy, WireCopy]]
    fates: dict[str, Fate]
    casts: dict[str, str]
    constants: dict[str, WireConstant]
    fallback: list[str]
    graph_breaks: list[GraphBreak] = msgspec.field(name="notes")  # as files of this version say
    unproven: list[str]
    side_effects: list[str]
    state_read: list[str]
    digests: dict[str, str]
    by_layer: bool
    warnings: list[str] = msgspec.field(default_factory=list)  # always empty; files of this version have it
    mismatched: dict[str, str] = msgspec.field(default_factory=dict)
    transient: dict[str, str] = msgspec.field(default_factory=dict)
    processed: list[str] = msgspec.field(default_factory=list)
    origins: dict[str, str] = msgspec.field(default_factory=dict)  # where ``rename=`` gave other names


DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for _, name in [*FORMAT_DTYPES.values(), (0, "complex128"), (0, "complex32")]
    if isinstance(dtype := getattr(torch, name or "-", None), torch.dtype)
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ATTRIBUTES = {
    kind: {str(value).removeprefix("torch."): value for value in vars(torch).values() if type(value) is kind}
    for kind in (torch.layout, torch.memory_format)
}


def document_of(path: object, parts: Mapping[str, Any]) -> Document:
    """The fields of a plan as a document, to be written to ``path``.

    Raises:
        PlanFileError: it holds something that a file may not.
    """
    return _Writer(path, parts).document()


class _Writer:
    """One plan as a document."""

    def __init__(self, path: object, parts: Mapping[str, Any]) -> None:
        self._path = path
        self._plan = parts
        self._sources = {name: number for number, name in enumerate(parts["manifest"])}
        self._targets = {name: number for number, name in enumerate(parts["targets"])}

    def document(self) -> Document:
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
        parts = [name for name, target in plan["targets"].items() if target.part]
        parts += [name for name, spec in plan["manifest"].items() if spec.part]
        if parts:
            _refuse(self._path, f"it is for what one rank holds of sharded tensors: {some(parts)}")
        specs = [*(target.spec for target in plan["targets"].values()), *plan["manifest"].values()]
        if wrapped := {spec.shell.outer(spec.name): None for spec in specs if spec.shell}:
            _refuse(self._path, f"it is for what lies in wrapper tensors: {some(list(wrapped))}")
        lists = ("fallback", "graph_breaks", "unproven", "side_effects", "state_read", "levels", "processed")
        return Document(
            version=VERSION,
            manifest=[(spec.name, _dtype_name(spec.dtype), spec.shape) for spec in plan["manifest"].values()],
            targets=[self._target(name, target) for name, target in plan["targets"].items()],
            steps=[self._copy(step) if isinstance(step, Copy) else self._program(step) for step in plan["steps"]],
            ties=[(self._copy(first), self._copy(second)) for first, second in plan["ties"]],
            fates=dict(plan["fates"]),
            casts=dict(plan["casts"]),
            constants={name: self._constant(tensor) for name, tensor in plan["constants"].items()},
            digests=dict(plan["digests"]),
            by_layer=plan["by_layer"],
            mismatched=dict(plan["mismatched"]),
            transient=dict(plan["transient"]),
            origins=dict(plan["manifest"].origins),
            **{name: list(plan[name]) for name in lists},
        )

    def _target(self, name: str, target: Target) -> WireTarget:
        owner = self._targets[target.owner]
        return WireTarget(
            name,
            _dtype_name(target.spec.dtype),
            target.spec.shape,
            owner,
            target.problem,
            target.stride,
            target.memory,
            target.start,
        )

    def _copy(self, step: Copy) -> WireCopy:
        if step.destination not in self._targets:
            _refuse(self._path, f"the plan does not describe {step.destination}, which it writes")
        return WireCopy(
            self._sources[step.source], self._targets[step.destination], _wire_box(step.of), _wire_box(step.into)
        )

    def _program(self, step: Program) -> WireProgram:
        return WireProgram(
            [
                WireOp(
                    str(op.func),
                    [_wire(value, self._path) for value in op.args],
                    {key: _wire(value, self._path) for key, value in op.kwargs.items()},
                    [_wire_region(region) for region in op.results],
                )
                for op in step.ops
            ]
        )

    def _constant(self, tensor: torch.Tensor) -> WireConstant:
        if type(tensor) is not torch.Tensor or tensor.is_meta or tensor.dtype not in NAMES:
            _refuse(self._path, f"a constant is a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}")
        # Its storage, holes included: operations name places in it by bytes.
        raw = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).cpu()
        return WireConstant(
            NAMES[tensor.dtype],
            tuple(tensor.shape),
            tensor.stride(),
            str(tensor.device),
            ctypes.string_at(raw.data_ptr(), raw.numel()) if raw.numel() else b"",
        )


def _dtype_name(dtype: DType) -> str:
    return dtype.name if isinstance(dtype, OpaqueDtype) else NAMES[dtype]


def _wire_box(box: Box | None) -> WireBox | None:
    return None if box is None else (NAMES[box.dtype], box.shape, box.stride, box.offset)


def _wire_region(region: Region) -> WireRegion:
    box = _wire_box(region.box)
    assert box is not None
    return (region.memory.kind, region.memory.name, box)  # type: ignore[return-value]


def _wire(value: Any, path: object) -> Any:
    """An operand: what msgpack knows as it is, everything else as ``{kind: content}``."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [_wire(item, path) for item in value]}
    if isinstance(value, Region):
        return {"region": _wire_region(value)}
    if isinstance(value, torch.dtype) and value in NAMES:
        return {"dtype": NAMES[value]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, (torch.layout, torch.memory_format)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    return _refuse(path, f"an operand is a {type(value).__name__}: {value!r}")


def _refuse(path: object, why: str) -> NoReturn:
    raise PlanFileError(f"{path}: this plan can be used but not saved: {why}")
