"""Recording: a model's own loading code is run on fake tensors, and what it does becomes a list of operations.

A *fake tensor* is a tensor without data. A view of it is another fake tensor. Every other operation that touches a fake
tensor, writes to the model or reads what was written there is recorded and not done. All others run for real. Operands
are recorded as *regions*: a box of elements over a piece of memory (a source tensor, a tensor of the model, an
intermediate result or a constant). So views need no record of their own.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import signals
from ..dtypes import OpaqueDtype
from ..manifest import Manifest
from ..memory.aliases import plain
from ..model.reachable import reachable
from ..model.snapshot import Snapshot
from ..model.walk import DEPTH
from ..plan.steps import GraphBreak, Op
from .bypasses import Bypasses, no_swaps
from .fake_weight import FakeWeight, Scalar
from .recorder import FailedOp, Recorder
from .threads import in_every_thread

_NONE: Mapping[str, torch.Tensor] = {}
_AT_ONCE = 256  # fake tensors that are made together


class Recording(NamedTuple):
    """What one run of the loading code on fake tensors gave.

    Attributes:
        ops: what it did, in order.
        graph_breaks: what it did that cannot be repeated.
        constants: tensors that the operations use, by name.
        taken: names that it took from the stream.
        state_read: names of the model's tensors whose values it asked for.
        side_effects: attributes that it changed, and that were put back.
        error: what it raised, if it did.
        refused: the source tensor at which it failed, and the operation that did, as far as they are known.
    """

    ops: list[Op]
    graph_breaks: list[GraphBreak]
    constants: dict[str, torch.Tensor]
    taken: frozenset[str]
    state_read: frozenset[str]
    side_effects: list[str]
    error: Exception | None
    refused: tuple[str, FailedOp | None] | None = None


@signals.held  # Else a signal might leave autograd off, or a mode of torch on.
def record(
    model: nn.Module,
    manifest: Manifest,
    load: Callable[[Iterator[tuple[str, torch.Tensor]]], object],
    *,
    device: torch.device,
    leave_out: Container[str] = (),
    stand_ins: Mapping[str, torch.Tensor] = _NONE,
) -> Recording:
    """Run ``load`` on fake tensors for the tensors of ``manifest`` and record what it does.

    Nothing is read, no tensor of ``model`` is written, and its attributes are put back, also when ``load`` raises.

    Args:
        model: whose tensors are watched.
        manifest: what the fake tensors stand in for; it is streamed in this order.
        load: the model's own loading code.
        device: what the fake tensors report.
        leave_out: names that are not streamed.
        stand_ins: tensors that ``load`` writes in place of the model's of these names.
    """
    recorder = Recorder({**{name: tensor for name, tensor in reachable(model).items() if plain(tensor)}, **stand_ins})
    taken: set[str] = set()
    at: list[str] = []  # The tensor that the loading code was given last, while it has not asked for the next one.

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        wanted = (
            spec for spec in manifest.values() if spec.name not in leave_out and not isinstance(spec.dtype, OpaqueDtype)
        )
        while specs := list(itertools.islice(wanted, _AT_ONCE)):
            for spec, fake in zip(specs, recorder.fake_weights(specs, device), strict=True):
                taken.add(spec.name)
                at[:] = [spec.name]
                yield spec.name, fake
        at.clear()

    error: Exception | None = None
    random = torch.get_rng_state()
    snapshot = Snapshot(model)
    try:
        modes = (torch.no_grad, lambda: no_swaps(recorder), lambda: Bypasses(recorder), lambda: _Mode(recorder))
        with in_every_thread(*modes) as unfinished:
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
            # The line that runs now is the caller's; and a gradient, or an item of a list, is given by nobody we see.
            line = recorder.line_of(change.now) or f"an unknown line of {type(model).__name__}'s loading code"
            recorder.refuse(f"{'rebinding' if change.of_state else 'keeping'} {where}", held, line)
    return Recording(
        recorder.records,
        recorder.graph_breaks,
        recorder.constants,
        frozenset(taken),
        frozenset(recorder.state_read),
        [change.where for change in changes],
        error,
        None if error is None else _refused(error, recorder, at),
    )


def _refused(error: Exception, recorder: Recorder, at: list[str]) -> tuple[str, FailedOp | None] | None:
    """Which source tensor the loading code failed at: an operand of what raised, or else the last that it was given."""
    raised: BaseException | None = error
    while raised is not None:
        for failed in recorder.failed:
            if failed.error is raised and failed.sources:
                return failed.sources[0], failed
        raised = raised.__cause__ or raised.__context__
    return (at[0], None) if at else None


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands the recorder operations without a fake tensor: fills, and reads of what was written."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap every single operation to keep its compiler out; there is nothing to compile.

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].device if isinstance(args[0], FakeWeight) else func(*args)
        return self._recorder.dispatch(func, args, kwargs or {})


def _held(value: object, recorder: Recorder, depth: int = 0) -> Iterator[torch.Tensor]:
    """Tensors within ``value`` that do not hold what they would hold after loading."""
    if type(value) is Scalar:
        yield value.fake
    elif isinstance(value, torch.Tensor):
        if recorder.written(value):
            yield value
    elif isinstance(value, (list, tuple, set, frozenset, dict)) and depth < DEPTH:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _held(item, recorder, depth + 1)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType)) and depth < DEPTH:
        yield from _held(vars(value), recorder, depth + 1)
