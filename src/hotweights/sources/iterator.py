"""IteratorSource: any iterator of (name, tensor) as a source. It comes in its own order, and maybe only once."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import torch

from .. import signals
from ..arguments import check_choices
from ..errors import Closed, NoManifest, PoolTimeout, SourceError, UsageError
from ..manifest import Manifest, TensorSpec
from ..memory.devices import Event, record_event
from ..memory.guards import Guard, poison_byte
from ..memory.lease import Lease
from .pairs import Pair, plain, split
from .state_dict import StateSource
from .streams import LeaseStream

_POLL = 0.001  # seconds; device events have no wait with a deadline, so they are asked again this often
_PATIENCE = 60.0  # seconds that a copy out of lent memory may take


def from_iterator(pairs: Iterable[Pair], manifest: Manifest | None = None, *, borrowed: bool = True) -> IteratorSource:
    """Make any iterator of (name, tensor) safe: a source whose tensors may be kept. Close it; use it in a ``with``.

    ``model.load_weights(from_iterator(pairs).tensors())`` needs nothing else. ``hotweights.load`` and ``trace`` plan
    from the manifest. With one, a tensor at a time is in memory. Without one, ``load`` reads the iterator to its end
    first and keeps every tensor, which takes the memory of one checkpoint.

    Args:
        pairs: an iterator, which can be streamed once and is closed with the source; or what can be iterated again
            and again, such as a list. It may give the model's own tensors, which are copied in time. One that
            computes from them while it is read sees what was written by then: make a mapping of it first.
        manifest: what it will give, in any order. Each tensor is checked against it as it passes.
        borrowed: whether the memory of a tensor may be used again when the iterator advances; ``tensors()`` copies
            then. Say ``False`` only if the iterator gives each tensor memory of its own for good.
    """
    return IteratorSource(pairs, manifest, borrowed=borrowed)


class IteratorSource:
    """The tensors that an iterator gives, in its order. Made by ``hotweights.from_iterator``.

    One lease runs at a time. The iterator advances only when the lease has ended *and* the event given to its
    ``release`` has happened: the end of the lease is the acknowledgement.

    Attributes:
        manifest: what the iterator promises. If none was given, the attribute is missing and this is no ``Source``:
            nothing can be planned from it, until ``collect`` makes one.
    """

    manifest: Manifest

    def __init__(self, pairs: Iterable[Pair], manifest: Manifest | None = None, *, borrowed: bool = True) -> None:
        if isinstance(pairs, (Mapping, torch.nn.Module)) or not isinstance(pairs, Iterable):
            raise UsageError(
                f"an iterator gives (name, tensor); this is a {type(pairs).__name__}. hotweights.open takes mappings, "
                "modules and paths"
            )
        if manifest is not None:
            if not isinstance(manifest, Manifest):
                raise UsageError(f"manifest= is a hotweights.Manifest; found a {type(manifest).__name__}")
            self.manifest = manifest
        self._promised = manifest
        self._pairs = pairs
        self._borrowed = borrowed
        self._only = _Pass(pairs) if isinstance(pairs, Iterator) else None
        self._passes = [] if self._only is None else [self._only]
        self._streamed = False
        self._closed = False

    def leases(self, *, guard: Guard = "off") -> LeaseStream:
        """Stream every tensor as a lease on the iterator's own memory, uncopied, in its order.

        Args:
            guard: makes stale tensors loud, see ``guards``. The iterator's own memory is never written: under
                ``poison`` and ``trap`` each borrowed tensor is copied, and the copy is leased and poisoned.

        Raises:
            UsageError: it can be streamed only once, and was.
        """
        check_choices(guard=(guard, Guard))
        run = self._begin()
        return LeaseStream(self._lease_all(run, guard), stop=run.stop)

    def tensors(self) -> Iterator[Pair]:
        """Yield every tensor, contiguous and the caller's to keep: a copy if it is borrowed, itself if not.

        Raises:
            UsageError: it can be streamed only once, and was.
        """
        return _own_all(self._lease_all(self._begin(), "off"))

    def collect(self) -> StateSource:
        """Read the iterator to its end and keep every tensor: a source with a manifest. The caller closes it.

        Takes the memory of all tensors together.
        """
        return StateSource(dict(self.tensors()))

    def close(self) -> None:
        """Close the iterator, and those of running streams. May be called twice."""
        self._closed = True
        passes, self._passes = self._passes, []
        with ExitStack() as stack:  # Each is closed, also if another fails to.
            for run in passes:
                stack.callback(run.close)

    def __enter__(self) -> IteratorSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        promised = "no manifest" if self._promised is None else f"{len(self._promised)} tensors"
        return f"<IteratorSource {promised}, {'borrowed' if self._borrowed else 'not borrowed'}>"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # Not a property: then every IteratorSource were a Source, also one that has no manifest.
            if name == "manifest":
                raise NoManifest(
                    "this iterator came without a manifest, and planning starts from one. Pass "
                    "from_iterator(pairs, manifest=...) what it will give, for example hotweights.open(path).manifest; "
                    "or keep every tensor in memory, and take the manifest of .collect(). .tensors() needs none"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _begin(self) -> _Pass:
        if self._closed:
            raise Closed("this source was closed")
        if self._only is None:
            run = _Pass(iter(self._pairs))
            self._passes = [running for running in self._passes if not running.done] + [run]
            return run
        if self._streamed:
            raise UsageError(
                "an iterator gives its tensors once, and this one was streamed before. Make a new one, or pass "
                "from_iterator what can be iterated again"
            )
        self._streamed = True
        return self._only

    def _lease_all(self, run: _Pass, guard: Guard) -> Generator[Lease, None, None]:
        seen: set[str] = set()
        try:
            for pair in run:
                lease = run.lend(*self._checked(pair), self._borrowed, guard)
                if lease.name in seen:
                    raise _broken([f"tensor {lease.name!r}: came twice"])
                seen.add(lease.name)
                del pair  # Nobody but the lease holds the tensor: where memory is not reused, it goes with it.
                yield lease
            missing = [] if self._promised is None else self._promised.keys() - seen
            if missing:
                raise _broken(f"tensor {name!r}: was promised, and never came" for name in missing)
        finally:
            run.close()

    def _checked(self, pair: object) -> tuple[TensorSpec, torch.Tensor]:
        name, tensor = split(pair)
        promised = None if self._promised is None else self._promised.get(name)
        tensor = plain(name, tensor, promised)
        if self._promised is None:
            return TensorSpec(name, tensor.dtype, tuple(tensor.shape)), tensor
        if promised is None:
            raise _broken([f"tensor {name!r}: came, and the manifest does not name it"])
        if promised.dtype != tensor.dtype or promised.shape != tensor.shape:
            came = TensorSpec(name, tensor.dtype, tuple(tensor.shape))
            raise _broken([f"tensor {promised} was promised, {came} came"])
        return promised, tensor


def _own_all(leases: Generator[Lease, None, None]) -> Generator[Pair, None, None]:
    with closing(leases):
        for lease in leases:
            yield _owned(lease)


def _owned(lease: Lease) -> Pair:
    with lease:
        return lease.name, lease.own()


def _broken(problems: Iterable[str]) -> SourceError:
    return SourceError("the iterator does not keep its promise", problems)


@signals.held_throughout
class _Pass:
    """One pass through an iterator. It advances only when nobody reads what it gave last."""

    def __init__(self, pairs: Iterator[Pair]) -> None:
        self._pairs = pairs
        self._lease: Lease | None = None
        self._device = torch.device("cpu")
        self._private: torch.Tensor | None = None  # The copy that is leased under a guard.
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        # Both change under the lock. Only one thread lets go of the iterator, and not while another is inside it.
        self._busy = False
        self.done = False

    def __iter__(self) -> _Pass:
        return self

    def __next__(self) -> Pair:
        """Wait until the last lease's memory is free, then advance."""
        with self._lock:
            self._busy = True
        try:
            self._settle(self._stopped)
            return next(self._pairs)
        finally:
            with self._lock:
                self._busy = False
            self._check_open()  # If it was closed meanwhile, neither a pair nor an end that came is to be believed.

    def lend(self, spec: TensorSpec, tensor: torch.Tensor, borrowed: bool, guard: Guard) -> Lease:
        """Lease what the iterator gave last."""
        plain = tensor.detach().resolve_conj().resolve_neg()
        self._device = plain.device
        if type(plain) is torch.Tensor and plain.data_ptr() % plain.element_size():
            # Some packages give float32 at odd addresses: a file packs them behind three bytes.
            plain, borrowed = plain.clone(memory_format=torch.contiguous_format), False
        if borrowed and guard != "off":
            plain = self._private = plain.clone(memory_format=torch.contiguous_format)
        self._lease = Lease(spec, tensor=plain, borrowed=borrowed, guard=guard)
        return self._lease

    @signals.whole
    def stop(self) -> None:
        """End another thread's wait to advance. The iterator's own code cannot be interrupted."""
        self._stopped.set()

    def close(self) -> None:
        """Let go of the iterator. If another thread is inside it, that thread does so when it comes back."""
        self.stop()
        with self._lock:
            if self._busy or self.done:
                return
            self.done = True
        try:
            # A generator that is closed frees memory, which a device may still read.
            self._settle(threading.Event())
        finally:
            if callable(close := getattr(self._pairs, "close", None)):
                close()

    def _check_open(self) -> None:
        if self._stopped.is_set():
            raise Closed("this source, or its stream, was closed")

    def _settle(self, stopped: threading.Event) -> None:
        if self._lease is None:
            return
        self._lease.release()
        # Copies out of device memory, by own() too, return before they end.
        queued = record_event(self._device)
        end = time.monotonic() + _PATIENCE
        while self._lease.pending() or not _happened(queued):
            if stopped.wait(_POLL):
                self._check_open()
            if time.monotonic() > end:
                name, self._lease = self._lease.name, None  # So that close does not wait again.
                raise PoolTimeout(
                    f"the event given to the release of {name!r} has not happened for {_PATIENCE:g} s; the iterator "
                    "cannot advance, because it may use the memory again"
                )
        if self._private is not None:
            self._private.view(-1).view(torch.uint8).fill_(poison_byte(self._private.dtype))
        self._lease = self._private = None


def _happened(event: Event | None) -> bool:
    return event is None or event.query()
