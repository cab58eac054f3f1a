"""Feed and OnePass: pairs on their way to loading code. They hand on nothing that will be overwritten.

Loading code may do anything with a tensor: keep it, sort it into a list, let it wait for its scale. So what it gets is
its own. Trapped leases were no choice: they would raise in code that is right with tensors of its own, and refuse
``data_ptr()`` and ``numpy()``, which some needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import GeneratorType

import torch

from ..errors import RoutingError, UsageError
from ..memory.devices import is_host, record_event, wait_for_copies
from ..memory.host import HUGE_PAGE, host_empty
from ..memory.lease import Lease
from ..tracing.fake_weight import FakeWeight
from .component import Component

Pairs = Iterable[tuple[str, torch.Tensor]]
Item = torch.Tensor | Lease
"""What comes along a stream."""


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
    # Whoever lent it may overwrite it at the next step, and does not know what still runs on our stream.
    wait_for_copies(copy.device)
    return copy


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) is torch.Tensor and is_host(tensor.device) and tensor.nbytes >= 2 * HUGE_PAGE:
        # On huge pages: faulting in small ones makes the copy of a large tensor three times slower.
        return host_empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)
    return tensor.clone(memory_format=torch.contiguous_format)


def _nbytes(item: Item) -> int:
    if isinstance(item, Lease):
        return item.spec.nbytes
    return 0 if isinstance(item, FakeWeight) else item.nbytes  # A fake tensor holds no memory that could be too much.


class Feed:
    """The pairs on their way to one component: they can be ended, and a failure is remembered."""

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
        """Give nothing more, also to code that kept this."""
        self._over = True
        if isinstance(self._pairs, GeneratorType):
            self._pairs.close()


class OnePass:
    """One pass through a stream. An iterator over the tensors of one component; copies of the others' wait.

    Attributes:
        first: the component that does not wait for the end; ``None`` if all do.
        waiting: copies by component, under the names that it gets them under.
        waiting_nbytes: how much waits, or waited, at the end of what has passed.
    """

    def __init__(
        self,
        items: Iterator[tuple[str, Item]],
        place: Callable[[str], tuple[Component, str] | None],
        first: Component | None,
        *,
        borrowed: bool = True,
        limit: int | None,
    ) -> None:
        """``place`` says whose a tensor is, and under which name it gets it."""
        self._items = items
        self._place = place
        self.first = first
        self._borrowed = borrowed
        self._limit = limit
        self._found: tuple[str, str, Item] | None = None
        self.waiting: dict[Component, deque[tuple[str, torch.Tensor]]] = {}
        self.waiting_nbytes = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        if self._found is None and not self.seek():
            raise StopIteration
        assert self._found is not None
        (ours, name, item), self._found = self._found, None
        return ours, own(name, item, self._borrowed)

    def seek(self) -> bool:
        """Pass on to the next tensor of the first component. False at the end."""
        self._found = None
        for name, item in self._items:
            placed = self._place(name)
            if placed is None:
                continue
            component, ours = placed
            if component is self.first:
                self._found = ours, name, item
                return True
            self._keep(component, ours, name, item)
        self._items = iter(())  # An iterator of somebody's may not like to be asked again after its end.
        return False

    def emptied(self, component: Component) -> Iterator[tuple[str, torch.Tensor]]:
        """Give away what waits for the component, and keep none of it."""
        queue = self.waiting[component]
        while queue:
            yield queue.popleft()

    def _keep(self, component: Component, ours: str, name: str, item: Item) -> None:
        nbytes = _nbytes(item)
        if self._limit is not None and self.waiting_nbytes + nbytes > self._limit:
            raise RoutingError(
                f"{component.name}: with {name} ({nbytes} bytes) {self.waiting_nbytes + nbytes} bytes would wait for "
                f"the end of the stream, more than memory_limit={self._limit}; put the largest component first, or "
                "give a source that is read in any order"
            )
        self.waiting_nbytes += nbytes
        self.waiting.setdefault(component, deque()).append((ours, own(name, item, self._borrowed)))
