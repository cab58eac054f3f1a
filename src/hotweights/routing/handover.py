"""Feed and OnePass: pairs on their way to loading code, which gets only tensors that nobody will overwrite.

Loading code may do anything with a tensor: keep it, sort it into a list, let it wait for its scale. So it is given
tensors of its own. Leases under ``guard="trap"`` were refused: they raise in code that is right, and in code that needs
``data_ptr()`` or ``numpy()``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from types import GeneratorType

import torch

from ..errors import RoutingError, UsageError
from ..loading.apart import check_unwritten
from ..memory.aliases import has_bytes
from ..memory.devices import is_host, record_event, wait_for_copies
from ..memory.extents import Extents
from ..memory.host import HUGE_PAGE, host_empty
from ..memory.lease import Lease
from ..sources.pairs import Pair
from ..sources.state_dict import bare
from ..tracing.fake_weight import FakeWeight
from .component import Component

Pairs = Iterable[Pair]
Item = torch.Tensor | Lease
"""What a stream brings."""


def own(name: str, item: Item, borrowed: bool) -> torch.Tensor:
    """A tensor that nobody will overwrite: the one that was given, or a contiguous copy."""
    if isinstance(item, Lease):
        tensor = item.own()
        item.release(after=record_event(tensor.device))
        return tensor
    if not isinstance(item, torch.Tensor):
        raise UsageError(f"{name!r} is a {type(item).__name__}, not a tensor")
    if not borrowed:
        return item
    copy = _copy(item.detach())
    # Whoever lent it may overwrite it at the next step, and does not know that this copy may still run on a device.
    wait_for_copies([copy.device])
    return copy


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) is torch.Tensor and is_host(tensor.device) and tensor.nbytes >= 2 * HUGE_PAGE:
        # On huge pages: faults in small ones make the copy of a large tensor three times slower.
        return host_empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)
    return tensor.clone(memory_format=torch.contiguous_format)


def _nbytes(item: Item) -> int:
    if isinstance(item, Lease):
        return item.spec.nbytes
    return 0 if isinstance(item, FakeWeight) else item.nbytes  # A fake tensor takes no memory.


class Feed:
    """The pairs that one component's loading code is given. It can be ended, and remembers what happened.

    Attributes:
        taken: names that were given so far; ``last`` is the latest.
        nbytes: bytes of those tensors.
        failure: what the pairs raised; loading code may have swallowed it.
    """

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = iter(pairs)
        self._over = False
        self.taken: set[str] = set()
        self.last = ""
        self.nbytes = 0
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        if self._over:
            raise StopIteration
        try:
            pair = next(self._pairs)
        except BaseException as error:
            self._over = True
            if not isinstance(error, StopIteration):
                self.failure = error
            raise
        self.last = pair[0]
        self.taken.add(self.last)
        self.nbytes += pair[1].nbytes
        return pair

    def end(self) -> None:
        """Give nothing more, also to code that kept the iterator."""
        self._over = True
        if isinstance(self._pairs, GeneratorType):
            self._pairs.close()


class OnePass:
    """One pass through a stream: an iterator over the tensors of one component, while copies of the others' wait.

    Attributes:
        first: the component that does not wait for the end; ``None`` if all do.
        waiting: by component, copies of its tensors under the names that it knows.
        waiting_nbytes: bytes of all copies that had to wait so far.
    """

    def __init__(
        self,
        items: Iterator[tuple[str, Item]],
        place: Callable[[str], tuple[Component, str] | None],
        first: Component | None,
        *,
        borrowed: bool = True,
        limit: int | None,
        memory: Callable[[], Extents],
        written: Callable[[Collection[str]], Extents],
    ) -> None:
        """A pass through ``items``.

        Args:
            items: the stream.
            place: gives the component that a tensor belongs to and its name there; ``None`` if nobody gets it.
            first: the component that does not wait.
            borrowed: whether tensors of the stream may be overwritten later.
            limit: bytes that may wait.
            memory: gives that of all components. From the first tensor there on all wait, also those of ``first``:
                the stream may give the model's own tensors under other names.
            written: gives the memory that ``first`` may have written, having been given these names.
        """
        self._items = items
        self._place = place
        self.first = first
        self._borrowed = borrowed
        self._limit = limit
        self._memory = memory
        self._written = written
        self._given: set[str] = set()
        self._lost: Extents | None = None  # What ``first`` may have written, once tensors are held.
        self._next: tuple[str, str, Item, bool] | None = None
        self.waiting: dict[Component, deque[tuple[str, torch.Tensor]]] = {}
        self.waiting_nbytes = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        if self._next is None and not self.seek():
            raise StopIteration
        assert self._next is not None
        (ours, name, item, borrowed), self._next = self._next, None
        self._given.add(ours)
        return ours, own(name, item, borrowed)

    def seek(self) -> bool:
        """Go on to the next tensor of the first component; ``False`` at the end of the stream."""
        self._next = None
        for name, item in self._items:
            placed = self._place(name)
            if placed is None:
                continue
            component, ours = placed
            item = _bare(name, item)
            if self._lost is not None or self._lies_in_the_model(item):
                self._keep(component, ours, name, item, self._copied)
            elif component is self.first:
                self._next = ours, name, item, self._borrowed
                return True
            else:
                self._keep(component, ours, name, item, partial(own, borrowed=self._borrowed))
        self._items = iter(())  # An iterator of the caller's may fail if it is asked again after its end.
        if self.first is None or not (held := self.waiting.get(self.first)):
            return False
        ours, tensor = held.popleft()
        self._next = ours, ours, tensor, False
        if not held:
            del self.waiting[self.first]
        return True

    def emptied(self, component: Component) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what waits for the component, and let go of each tensor with that."""
        queue = self.waiting[component]
        while queue:
            yield queue.popleft()

    def _lies_in_the_model(self, item: Item) -> bool:
        tensor = item.tensor if isinstance(item, Lease) else item
        return isinstance(tensor, torch.Tensor) and has_bytes(tensor) and self._memory().meets(tensor)

    def _copied(self, name: str, item: Item) -> torch.Tensor:
        """A copy, unless the tensor lies where ``first`` may have written by now."""
        if self._lost is None:
            self._lost = self._written(self._given)
        tensor = item.tensor if isinstance(item, Lease) else item
        if not isinstance(tensor, torch.Tensor) or not has_bytes(tensor):
            return own(name, item, self._borrowed)
        check_unwritten(name, tensor, self._lost)
        return own(name, tensor, True)

    def _keep(
        self, component: Component, ours: str, name: str, item: Item, owned: Callable[[str, Item], torch.Tensor]
    ) -> None:
        nbytes = _nbytes(item)
        if self._limit is not None and self.waiting_nbytes + nbytes > self._limit:
            raise RoutingError(
                f"{component.name}: with {name} ({nbytes} bytes) {self.waiting_nbytes + nbytes} bytes would wait for "
                f"the end of the stream, more than memory_limit={self._limit}; put the largest component first, or "
                "give a source that is read in any order, such as files"
            )
        self.waiting_nbytes += nbytes
        self.waiting.setdefault(component, deque()).append((ours, owned(name, item)))


def _bare(name: str, item: Item) -> Item:
    """The item; of a DTensor what it holds. One without plain bytes is refused: no copy of it could wait."""
    if isinstance(item, Lease) or not isinstance(item, torch.Tensor):
        return item
    tensor, problem = bare(name, item)
    if problem is not None:
        raise UsageError(f"a stream of weights gives (name, tensor), but {problem}")
    return tensor
