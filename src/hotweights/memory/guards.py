"""Guards: what makes a tensor loud once its lease is over.

One is chosen per stream or pool. ``"off"`` costs nothing. ``"poison"`` fills memory whose lease has ended with NaN.
``"trap"`` does that too, and wraps every leased tensor, so that its first use after the lease raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch.utils._pytree import tree_map

from ..dtypes import DType
from ..errors import BorrowedTensor, StaleLease

Guard = Literal["off", "poison", "trap"]  # each does all that those before it do


def stricter(guard: Guard, other: Guard) -> Guard:
    """The one of two guards that does more."""
    return max(guard, other, key=get_args(Guard).index)


def poison_byte(dtype: DType) -> int:
    """The byte that, repeated, is a NaN of ``dtype``; where there is no NaN, an improbable value.

    0xFF is a NaN in every IEEE-like format and in e4m3fn, e5m2 and e8m0. The fnuz formats have a single NaN, 0x80;
    0xFF is a plain number there. Integers have none: 0xFF is -1 in them, or the largest value.
    """
    return 0x80 if str(dtype).endswith("fnuz") else 0xFF


class Tripwire:
    """Knows whether a lease still runs. There is one per lease; every view made from its tensor shares it."""

    __slots__ = ("name", "over")

    def __init__(self, name: str) -> None:
        self.name = name
        self.over = False  # Set once, by the lease that owns it, when it ends.

    def check(self) -> None:
        """Raise ``StaleLease`` once the lease is over."""
        if self.over:
            raise StaleLease(
                f"tensor {self.name!r} was used after its lease had ended; its memory may hold another tensor by "
                "now. Use it before the stream advances, or keep lease.own()"
            )


_ESCAPES: Mapping[object, str] = {
    torch.Tensor.data_ptr: ".data_ptr()",
    torch.Tensor.numpy: ".numpy()",
    torch.Tensor.__array__: "numpy.asarray()",
    torch.Tensor.__dlpack__: "DLPack",
    torch.Tensor.untyped_storage: ".untyped_storage()",
    torch.Tensor.storage: ".storage()",
    torch.Tensor.share_memory_: ".share_memory_()",
}
_READS: Mapping[object, Callable[..., Any]] = {  # Reads of values that a wrapper subclass cannot do by itself.
    torch.Tensor.tolist: torch.Tensor.tolist,
    torch.Tensor.__deepcopy__: lambda inner, memo: inner.clone(),
    torch.Tensor.__reduce_ex__: lambda inner, protocol: inner.clone().__reduce_ex__(protocol),
    torch.Tensor.__format__: torch.Tensor.__format__,
}
_REBINDS = (torch.ops.aten._has_compatible_shallow_copy_type.default, torch.ops.aten.set_.source_Tensor)


class TrapTensor(torch.Tensor):
    """A leased tensor under ``guard="trap"``: every use goes through here, in any thread and grad mode.

    Views of it are traps too; results that own their memory are plain tensors. While the lease runs,
    ``BorrowedTensor`` is raised by writes, and by everything that would carry the address out of sight (``.numpy()``,
    DLPack, ``.data_ptr()``, ``param.data = trap``). A pointer that C++ code took is not seen; that is why the memory is
    poisoned as well.

    The wrapper itself is on the meta device, and answers with the real device when it is asked. So torch refuses to
    rebind a real parameter's ``.data`` to it; on a real device torch would do that, and crash later.
    """

    _inner: torch.Tensor
    _wire: Tripwire

    @staticmethod
    def __new__(cls, inner: torch.Tensor, wire: Tripwire) -> TrapTensor:
        """Wrap ``inner``, which stays its owner's."""
        self: TrapTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("meta"),
            dispatch_device=True,
        )
        self._inner = inner
        self._wire = wire
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        state = "stale" if self._wire.over else "leased"
        return f"<TrapTensor {self._wire.name!r} {self._inner.dtype} {list(self._inner.shape)}: {state}>"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        trap = args[0] if args and isinstance(args[0], TrapTensor) else None
        if trap is not None and func in _ESCAPES:
            trap._wire.check()
            raise _escape(trap, _ESCAPES[func])
        if trap is not None and func in _READS:
            trap._wire.check()
            return _READS[func](trap._inner, *args[1:], **(kwargs or {}))
        # Not super(): it would make every result, owned ones too, a TrapTensor without a wire.
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0]._inner.device
        wires: dict[int, Tripwire] = {}

        def unwrap(value: object) -> object:
            if not isinstance(value, TrapTensor):
                return value
            value._wire.check()
            if value._inner.numel():  # Memory of no bytes has no address to recognise, and nothing to overwrite.
                wires[value._inner.untyped_storage().data_ptr()] = value._wire
            return value._inner

        def wrap(value: object) -> object:
            if not isinstance(value, torch.Tensor) or isinstance(value, TrapTensor) or value.is_meta:
                return value
            wire = wires.get(value.untyped_storage().data_ptr())
            return value if wire is None else TrapTensor(value, wire)

        inner_args, inner_kwargs = tree_map(unwrap, (args, kwargs or {}))
        _refuse_writes(func, args, kwargs or {})
        return tree_map(wrap, func(*inner_args, **inner_kwargs))


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if func in _REBINDS:
        trap = next(value for value in args if isinstance(value, TrapTensor))
        raise _escape(trap, "rebinding another tensor to it (.data =, .set_())")
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, TrapTensor):
                raise BorrowedTensor(
                    f"{func} would write to the borrowed tensor {item._wire.name!r}; a lease is the right to read. "
                    "Write to lease.own() instead"
                )


def _escape(trap: TrapTensor, how: str) -> BorrowedTensor:
    return BorrowedTensor(
        f"{how} would carry the memory of the borrowed tensor {trap._wire.name!r} out of the guard's sight; "
        "use lease.own() for that"
    )
