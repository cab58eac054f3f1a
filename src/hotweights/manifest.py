"""TensorSpec and Manifest: what a source promises. Frozen facts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import force_setattr

from .dtypes import DType, OpaqueDtype, format_name
from .errors import UsageError
from .text import some

if TYPE_CHECKING:
    from .sharding import Part  # They need torch.
    from .shell import Shell


class TensorSpec(msgspec.Struct, frozen=True, gc=False):
    """What a source promises about one tensor.

    Attributes:
        name: as the source spells it.
        dtype: a ``torch.dtype``, or an ``OpaqueDtype`` where torch has none.
        shape: as torch counts it (packed dtypes in packs); for an ``OpaqueDtype``, as the format counts it.
        nbytes: size in bytes, without padding. It follows from the others and is not given.
        part: which part of a tensor it is, where a rank holds no more; the shape is that of the part.
        shell: the wrapper in which it lies, such as torchao's.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int = -1
    part: Part | None = None
    shell: Shell | None = None

    def __post_init__(self) -> None:
        # Worked out once: every tensor is asked for it many times.
        bits = self.dtype.bits if isinstance(self.dtype, OpaqueDtype) else 8 * self.dtype.itemsize
        force_setattr(self, "nbytes", math.prod(self.shape) * bits // 8)

    def __str__(self) -> str:
        part = "" if self.part is None else f" (a part: {self.part})"
        shell = "" if self.shell is None else f" (in a {self.shell})"
        return f"{self.name}: {format_name(self.dtype)} {list(self.shape)}{part}{shell}"


_NOT_RENAMED: Mapping[str, str] = {}


class Manifest(Mapping[str, TensorSpec]):
    """What a source promises: an ordered, frozen mapping from name to spec.

    The order is the source's own. Tensors may arrive in another one.
    """

    __slots__ = ("_specs", "nbytes", "origins", "wrapped")

    def __init__(self, specs: Iterable[TensorSpec], *, origins: Mapping[str, str] = _NOT_RENAMED) -> None:
        given = tuple(specs)
        self._specs: dict[str, TensorSpec] = {spec.name: spec for spec in given}
        if len(given) != len(self._specs):
            twice = sorted({name for name, count in Counter(spec.name for spec in given).items() if count > 1})
            raise UsageError(f"a manifest names tensors twice: {some(twice)}; give each spec once")
        self.nbytes = sum(spec.nbytes for spec in self._specs.values())
        """Bytes of all tensors together."""
        self.wrapped = any(spec.shell is not None for spec in given)
        """Whether some of them lie in wrappers."""
        self.origins = origins
        """For tensors that were renamed: their names where they come from."""

    def called(self, name: str) -> str:
        """The tensor's name for messages, with the one that it has where it comes from."""
        return f"{name} ({self.origins[name]} in the source)" if name in self.origins else name

    def renamed(self, names: Mapping[str, str]) -> Manifest:
        """The same tensors under new names: ``names`` gives those of the tensors that get one."""
        if not names:
            return self
        origins = {names.get(name, name): self.origins.get(name, name) for name in self}
        origins = {new: old for new, old in origins.items() if new != old}
        return Manifest(
            (msgspec.structs.replace(spec, name=names.get(spec.name, spec.name)) for spec in self.values()),
            origins=origins,
        )

    def __getitem__(self, name: str) -> TensorSpec:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    # Those of ``Mapping`` ask for each item by its name: of thousands of tensors that takes long.

    def keys(self) -> KeysView[str]:
        """The names, in order."""
        return self._specs.keys()

    def values(self) -> ValuesView[TensorSpec]:
        """The specs, in order."""
        return self._specs.values()

    def items(self) -> ItemsView[str, TensorSpec]:
        """Names and specs, in order."""
        return self._specs.items()

    def __repr__(self) -> str:
        return f"<Manifest {len(self)} tensors, {self.nbytes} bytes>"
