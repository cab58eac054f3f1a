"""What torch's dispatcher does not see: ``param.data =``, views of memory that are no tensors, swaps.

No plan can repeat these, so each is a graph break where it concerns the model's tensors or fake ones.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .fake_weight import SCALAR_TAKERS, VALUE_READS, FakeWeight, Scalar, line_of_the_model
from .recorder import Recorder
from .replaced import Replaced

# Functions that the dispatcher does not see, and of which real tensors they are refused: of those that the recorded
# operations have written, or of all that the model has.
_OF_REAL: Mapping[object, str] = {
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


class Bypasses(torch.overrides.TorchFunctionMode):
    """A mode that refuses ``param.data =`` and views of memory that are no tensors, such as ``.numpy()``."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _WATCHED:
            return func(*args, **kwargs) if kwargs else func(*args)
        recorder = self._recorder
        what = _OF_REAL.get(func)
        if what is not None and not isinstance(args[0], FakeWeight) and recorder.active:
            if recorder.knows(args[0]) and (what == "model" or recorder.written(args[0])):
                raise recorder.refuse(VALUE_READS.get(func, ".storage()"), [args[0]])
            recorder.read(args[0])
        elif func == _SET_DATA and recorder.active:
            if any(recorder.knows(tensor) or nn.parameter.is_lazy(tensor) for tensor in args):
                raise recorder.refuse(".data =", [tensor for tensor in args if not nn.parameter.is_lazy(tensor)])
        elif func in SCALAR_TAKERS and type(args[-1]) is Scalar:
            return func(*args[:-1], args[-1].filling())
        return func(*args, **(kwargs or {}))


_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_WATCHED = {*_OF_REAL, *SCALAR_TAKERS, _SET_DATA}


class _Tracing(threading.local):
    """The recorder of the trace that this thread works for, if any."""

    recorder: Recorder | None = None


_tracing = _Tracing()


@contextmanager
def no_swaps(recorder: Recorder) -> Iterator[None]:
    """Refuse ``torch.utils.swap_tensors`` in this thread: it exchanges what two tensors are, and no mode sees it.

    And note at which line a module is given another tensor: that it was is found out when the code has run.
    """
    before = _tracing.recorder
    with ExitStack() as stack:
        for function in (_SWAPS, *_GIVES):
            stack.enter_context(function.meanwhile())
        _tracing.recorder = recorder
        try:
            yield
        finally:
            _tracing.recorder = before


def _swap(first: torch.Tensor, second: torch.Tensor) -> None:
    if _tracing.recorder is not None:
        raise _tracing.recorder.refuse("torch.utils.swap_tensors()", [first, second])
    _SWAPS.original(first, second)


_SWAPS = Replaced(torch.utils, "swap_tensors", _swap)


def _giving(name: str) -> Replaced:
    """A method that gives a module a tensor or a part, and notes the line that calls it."""

    def give(module: nn.Module, key: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if _tracing.recorder is not None and isinstance(value, (torch.Tensor, nn.Module)):
            _tracing.recorder.given(value, line_of_the_model())
        replaced.original(module, key, value, *args, **kwargs)

    replaced = Replaced(nn.Module, name, give)
    return replaced


_GIVES = [_giving(name) for name in ("__setattr__", "register_parameter", "register_buffer")]
