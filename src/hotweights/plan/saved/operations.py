"""The operations of ATen that a saved plan may name, and whether a value is what one of them takes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from ...boxes import Region

# No file may name others: these have no effect beside their operands and read nothing else.
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
    known: dict[str, torch._ops.OpOverload] = {}
    for word in _PACKETS.split():
        packet = getattr(torch.ops.aten, word, None)
        for overload in packet.overloads() if packet is not None else ():
            func = getattr(packet, overload)
            if _is_plain(func):
                known[str(func)] = func
    return known


def _is_plain(func: torch._ops.OpOverload) -> bool:
    """Whether it takes only what a file can hold, and writes only what it is named for: no generator, no ``out=``."""
    return not any(argument.is_out for argument in func._schema.arguments) and all(
        _innermost(str(argument.real_type)) in _TYPES for argument in func._schema.arguments
    )


def _innermost(kind: str) -> str:
    while kind.endswith("]"):
        kind = kind.partition("[")[2][:-1]
    return kind


def fits(value: Any, kind: str) -> bool:
    """Whether ``value`` is what the schema calls ``kind``."""
    if kind.startswith("Optional["):
        return value is None or fits(value, kind[len("Optional[") : -1])
    if kind.startswith("List["):
        inner = kind[len("List[") : -1]
        if isinstance(value, (list, tuple)):
            return all(fits(item, inner) for item in value)
        return inner in ("int", "SymInt") and fits(value, inner)  # torch takes one for all
    if kind in ("int", "SymInt") and isinstance(value, bool):
        return False
    if kind == "Tensor" and isinstance(value, (bool, int, float, complex)):
        return True  # torch hands numbers to overloads for tensors, and takes them there.
    return isinstance(value, _TYPES[kind])  # type: ignore[arg-type]
