"""FakeWeight: a fake tensor that stands for a weight of the source. Scalar: what ``item()`` of one gives."""

from __future__ import annotations

import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_flatten


class Witness(Protocol):
    """Is told what happens to fake tensors, from any thread."""

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do an operation with a fake tensor, or record it; returns what the loading code gets."""

    def scalar(self, fake: FakeWeight) -> Scalar:
        """What stands in for the fake tensor's value."""

    def refuse(self, what: str, tensors: Iterable[torch.Tensor], where: str = "") -> ValueRead:
        """Record a graph break; returns the error to raise into the loading code."""


class ValueRead(RuntimeError):
    """Loading code asked for a value or an address that a fake tensor does not have. Raised into the loading code."""


class FakeWeight(torch.Tensor):
    """A tensor without data that reports the dtype, shape and device of a real one, in any thread."""

    _meta: torch.Tensor
    _recorder: Witness
    _device: torch.device
    _shape: torch.Size
    _dtype: torch.dtype

    @staticmethod
    def __new__(cls, meta: torch.Tensor, recorder: Witness, device: torch.device) -> FakeWeight:
        """Stand in for the tensor that ``meta`` describes, on ``device``."""
        shape, dtype = meta.size(), meta.dtype
        self: FakeWeight = torch.Tensor._make_wrapper_subclass(
            cls,
            shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=dtype,
            device=META,
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
        return f"<FakeWeight {self.dtype} {list(self.shape)}>"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.item and args[0].numel() == 1:
            # A clone: what the tensor holds later is not what was asked for now.
            cloned = torch._C._disabled_torch_function_impl(torch.Tensor.clone, types, (args[0],), {})
            return args[0]._recorder.scalar(torch._C._disabled_torch_function_impl(_RESHAPE, types, (cloned, ()), {}))
        if func is torch.Tensor.new_tensor:  # It would lie on meta, where fake tensors really are, and hold nothing.
            kwargs = {"dtype": args[0].dtype, "device": args[0]._device, **(kwargs or {})}
            return torch.tensor(*args[1:], **kwargs)
        what = VALUE_READS.get(func)
        if what is not None:
            fake = next(value for value in args if isinstance(value, FakeWeight))
            raise fake._recorder.refuse(what, [value for value in args if isinstance(value, FakeWeight)])
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
            if isinstance(value, FakeWeight):
                return value._recorder.dispatch(func, args, kwargs or {})
        for value in tree_flatten((args, kwargs))[0]:
            if isinstance(value, FakeWeight):
                return value._recorder.dispatch(func, args, kwargs or {})
        raise AssertionError(func)


_AUTOCAST = threading.local()


def under_autocast() -> bool:
    """Whether the operation at hand was called under autocast: below torch's functions nothing else shows it."""
    return getattr(_AUTOCAST, "on", False)


def meta_of(value: Any) -> Any:
    """What describes a fake tensor; any other value as it is."""
    return value._meta if isinstance(value, FakeWeight) else value


def _under_autocast(call: Callable[..., Any], *args: Any) -> Any:
    _AUTOCAST.on = True
    try:
        return call(*args)
    finally:
        _AUTOCAST.on = False


class Scalar:
    """What ``.item()`` of a fake tensor gives: it may fill a tensor, and nothing else. To ``isinstance`` a number."""

    def __init__(self, fake: FakeWeight) -> None:
        self.fake = fake
        self.used = False
        self._where = line_of_the_model()

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        dtype = self.fake.dtype
        if dtype.is_floating_point or dtype.is_complex:
            return complex if dtype.is_complex else float
        return bool if dtype is torch.bool else int

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        scalars = [value for value in tree_flatten((args, kwargs))[0] if type(value) is cls]
        if func not in SCALAR_TAKERS or type(args[-1]) is not cls or len(scalars) != 1 or kwargs:
            raise scalars[0].refused()
        return func(*args[:-1], scalars[0].filling())

    def filling(self) -> FakeWeight:
        """The fake tensor, of which something is filled with its value."""
        self.used = True
        return self.fake

    def refused(self) -> ValueRead:
        """Record that the value was asked for, as a graph break; returns the error to raise."""
        self.used = True
        return self.fake._recorder.refuse(".item()", [self.fake], self._where)


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(self: Scalar, *args: object) -> Any:
        raise self.refused()

    refuse.__name__ = name
    return refuse


for _name in """
    repr str format bytes hash bool int float complex index round trunc floor ceil neg pos abs invert eq ne lt le gt ge
    add sub mul truediv floordiv mod divmod pow lshift rshift and or xor matmul
    radd rsub rmul rtruediv rfloordiv rmod rdivmod rpow rlshift rrshift rand ror rxor rmatmul
    len iter contains getitem copy deepcopy reduce_ex
""".split():
    setattr(Scalar, f"__{_name}__", _refusing(f"__{_name}__"))

_RESHAPE = torch.Tensor.reshape
SCALAR_TAKERS = {torch.Tensor.fill_, torch.Tensor.__setitem__}
META = torch.device("meta")
VALUE_READS: Mapping[object, str] = {
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

_OURS = __file__.rpartition("/tracing/")[0] + "/"  # Lines of the package are not lines of the model.
_TORCH = torch.__file__.rpartition("/")[0] + "/"


def line_of_the_model() -> str:
    """The innermost line that is neither torch's nor ours: the model's."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if _of_the_model(frame):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def line_of_the_error(error: BaseException) -> str:
    """The innermost line that the error came through and that is neither torch's nor ours."""
    found = "?"
    for frame, line in traceback.walk_tb(error.__traceback__):
        found = f"{frame.f_code.co_filename}:{line}" if _of_the_model(frame) else found
    return found


def _of_the_model(frame: types.FrameType) -> bool:
    path = frame.f_code.co_filename
    return not path.startswith((_OURS, _TORCH)) and "importlib" not in path
