"""Devices: pinned memory, and events that tell when a device has finished. On a CPU every event has happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple, Protocol

import torch

from ..signals import held

POLL = 0.001  # seconds; device events have no wait with a deadline, so they are asked again this often


class Event(Protocol):
    """Something that happens once, and after which memory may be reused. A ``torch.Event`` is one."""

    def query(self) -> bool:
        """Has it happened? Never blocks; may be called from any thread."""


def is_host(device: torch.device) -> bool:
    """Whether the host's threads can write the device's memory directly."""
    return device.type == "cpu"


def _has_streams(device: torch.device) -> bool:
    return not is_host(device) and device.type != "meta"


def accelerator_of(devices: Iterable[torch.device]) -> torch.device:
    """The device that the memory of a pool must suit: an accelerator if any of ``devices`` is one, else the host."""
    return min(filter(_has_streams, devices), key=str, default=torch.device("cpu"))


def record_event(device: torch.device) -> Event | None:
    """The event after which all copies queued so far on ``device`` by this thread are done.

    Returns ``None`` on a CPU, where every copy has happened when the call returns.
    """
    if not _has_streams(device):
        return None
    event = torch.Event(device=device)
    event.record(torch.accelerator.current_stream(device))
    return event


class _All(NamedTuple):
    """Several events as one. It has happened when all of them have."""

    events: tuple[Event, ...]

    def query(self) -> bool:
        return all(event.query() for event in self.events)


def record_events(devices: Iterable[torch.device]) -> Event | None:
    """The event after which all copies queued so far by this thread on any of ``devices`` are done.

    Returns ``None`` where every copy has happened when the call returns.
    """
    events = tuple(event for device in set(devices) if (event := record_event(device)) is not None)
    return _All(events) if events else None


def wait_for_copies(devices: Iterable[torch.device]) -> None:
    """Return when all copies queued so far on any of ``devices`` by this thread are done. On a CPU they are."""
    for device in filter(_has_streams, set(devices)):
        torch.accelerator.current_stream(device).synchronize()


def wait_for_all(devices: Iterable[torch.device]) -> None:
    """Return when all that any thread queued so far on any of ``devices`` is done, forward passes too."""
    for device in filter(_has_streams, set(devices)):
        torch.accelerator.synchronize(device)


def as_here(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """What other threads enter for their copies, so that they stand in one order with what this thread queues.

    Each thread has a current stream of its own, and between two streams there is no order.
    """
    return partial(_on, torch.accelerator.current_stream(device)) if _has_streams(device) else nullcontext


@contextmanager
@held
def _on(stream: torch.Stream) -> Iterator[None]:
    before = torch.accelerator.current_stream(stream.device)
    if before == stream:  # To set it would also make its device the thread's current one.
        yield
        return
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)


def wait(happened: Callable[[], bool], timeout: float | None, stop: Callable[[], bool] = bool) -> bool:
    """Ask ``happened`` every ``POLL`` seconds until it says true.

    Args:
        happened: asked at least once; usually an event's ``query``. What it raises ends the wait.
        timeout: seconds to wait at most; ``None`` for no limit.
        stop: asked as often; when it says true the wait ends. What it raises ends the wait, too.

    Returns:
        Whether it happened. If not, time was up or ``stop`` said true.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while not happened():
        if stop() or (deadline is not None and time.monotonic() >= deadline):
            return False
        time.sleep(POLL)
    return True


def pinned_empty(nbytes: int) -> torch.Tensor:
    """Page-locked host memory, ``uint8 [nbytes]``: accelerators copy from it asynchronously. It is the caller's."""
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
