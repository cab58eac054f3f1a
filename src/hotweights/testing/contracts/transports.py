"""The contract of a transport, which carries versions from a sender to receivers, as checks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from ...errors import Closed, TransferAborted, UpdateAborted, UsageError
from ...live.model import LiveModel
from ...manifest import Manifest, TensorSpec
from ...memory.lease import Lease
from ...ranges import Range
from ...sources.contracts import Participant, Request, Source
from ..checks import Tensors, assert_same_bits, raised

_PATIENCE = 60.0  # seconds that one end may take; longer waits count as endless


class Sending(AbstractContextManager["Sending"], Protocol):
    """The trainer's end."""

    def send(
        self, tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]], /, *, version: str | int
    ) -> object:
        """Send one version; return when every receiver has it, raise ``TransferAborted`` when none has."""

    def close(self) -> None:
        """End every wait. May be called twice."""


class Transport(Protocol):
    """One group that is about to meet. Each thread opens and closes its own end."""

    def sender(self, receivers: int) -> Sending:
        """The trainer's end; it sends when so many are there."""

    def receiver(self) -> Source:
        """A worker's end: a source that is a ``Participant``, and has the name of the last version in ``version``."""


MakeTransport = Callable[[], Transport]


def everybody_gets_every_tensor(make: MakeTransport, expected: Tensors) -> None:
    """Each version comes whole, once, with its name, to all receivers; whatever the tensors look like."""
    with _group(make(), _take_two, 2) as (sender, results):
        for version in ("one", 2):
            sender.send(dict(expected), version=version)
    for taken in results():
        assert [name for name, _ in taken] == ["one", 2]
        for _, tensors in taken:
            assert_same_bits(tensors, expected)


def pairs_are_sent_as_they_come(make: MakeTransport, expected: Tensors) -> None:
    """Pairs of name and tensor are as good as a mapping; two of one name are refused, and nobody is told of them."""
    with _group(make(), _take_two, 1) as (sender, results):
        sender.send(list(expected.items()), version=1)
        name, tensor = next(iter(expected.items()))
        raised(UsageError, lambda: sender.send([(name, tensor), (name, tensor)], version=2))
        sender.send(iter(list(expected.items())), version=3)
    ((first, second),) = results()
    assert (first[0], second[0]) == (1, 3)
    assert_same_bits(second[1], expected)


def what_is_sent_may_change_afterwards(make: MakeTransport, expected: Tensors) -> None:
    """When ``send`` has returned the trainer does as it likes with its tensors, and nobody notices."""
    mine = {name: tensor.clone() for name, tensor in expected.items()}
    with _group(make(), _take_two, 2) as (sender, results):
        sender.send(mine, version=1)
        for tensor in mine.values():
            tensor.zero_()
        sender.send(dict(expected), version=2)
    for taken in results():
        for _, tensors in taken:
            assert_same_bits(tensors, expected)


def leases_hold_still(make: MakeTransport, expected: Tensors) -> None:
    """What a lease shows does not change before it ends, whatever the sender has in store and others have read."""
    content = {f"w{number}": torch.full((5000,), float(number)) for number in range(100)}

    def look(source: Source) -> int:
        with source.leases() as stream:
            return sum(_holds_still(lease) for lease in stream)

    with _group(make(), look, 2) as (sender, results):
        sender.send(content, version=1)
    assert list(results()) == [len(content)] * 2


def slices_are_all_that_is_sent_of_a_tensor(make: MakeTransport, expected: Tensors) -> None:
    """Who says which ranges it wants gets those bytes, in room of its own where it gives some."""
    content = {"w": torch.arange(4096.0).view(64, 64), "unwanted": torch.zeros(3)}
    requests = ((Range(0, 4096),), (Range(4096, 12288),), (Range(128, 128, 64, 256),))

    def take(source: Source, number: int) -> torch.Tensor:
        assert isinstance(source, Participant)
        room = torch.zeros(sum(part.size for part in requests[number]), dtype=torch.uint8)
        source.wanted([Request("w", requests[number], lambda: room)])
        with source.leases() as stream:
            assert [(lease.name, lease.placed) for lease in stream] == [("w", True)]
        with source.decision():
            return room.view(torch.float32)

    with _group(make(), take, 3, numbered=True) as (sender, results):
        sender.send(content, version=1)
    first, second, third = results()
    assert torch.equal(torch.cat([first, second]), content["w"].flatten())
    assert torch.equal(third.view(64, 32), content["w"][:, 32:])


def a_consumer_that_fails_is_heard_by_all(make: MakeTransport, expected: Tensors) -> None:
    """An exception at any tensor reaches the sender with its text and keeps the others from the version."""
    count = min(len(expected), 4)

    def fail(source: Source, number: int) -> Tensors:
        for at in range(count if number == 0 else 0):
            assert str(at) in str(raised(ValueError, partial(_fail, source, at)))
        while True:
            with suppress(TransferAborted):  # Whoever is late does not even see a version that was given up.
                return dict(source.tensors())

    with _group(make(), fail, 2, numbered=True) as (sender, results):
        for at in range(count):
            error = raised(TransferAborted, partial(sender.send, dict(expected), version=at))
            assert f"failed at {at}" in str(error), error
        sender.send(dict(expected), version="next")
    for tensors in results():
        assert_same_bits(tensors, expected)


def a_trainer_that_fails_is_heard_by_all(make: MakeTransport, expected: Tensors) -> None:
    """When its tensors cannot be had, nobody has the version, and everybody knows why."""

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(2)
        raise ValueError("no more weights")

    def take(source: Source) -> Tensors:
        assert "no more weights" in str(raised(TransferAborted, lambda: dict(source.tensors())))
        return dict(source.tensors())

    manifest = Manifest(TensorSpec(name, torch.float32, (2,)) for name in "ab")
    with _group(make(), take, 2) as (sender, results):
        send: Any = sender.send
        raised(ValueError, lambda: send(broken(), version=1, manifest=manifest))
        sender.send(dict(expected), version=2)
    for tensors in results():
        assert_same_bits(tensors, expected)


def live_models_take_a_version_together(make: MakeTransport, expected: Tensors) -> None:
    """Those of a group commit together; when one cannot, for its shapes or while it works, none does."""

    def follow(source: Source, number: int) -> tuple[object, list[float]]:
        live = LiveModel(_Model(), process=_processing if number == 0 else None)
        live.load(source)
        while live.version == 1:
            assert _values(live) == {1.0}
            with suppress(UpdateAborted):
                live.update(source)
        return live.version, sorted(_values(live))

    with _group(make(), follow, 2, numbered=True) as (sender, results):
        sender.send(_Model(1.0).state_dict(), version=1)
        odd = {**_Model(2.0).state_dict(), "one": torch.zeros(7)}
        assert "one" in str(raised(TransferAborted, lambda: sender.send(odd, version=2)))
        refused = raised(TransferAborted, lambda: sender.send(_Model(13.0).state_dict(), version=3))
        assert "thirteen" in str(refused)
        sender.send(_Model(4.0).state_dict(), version=4)
    assert list(results()) == [(4, [4.0])] * 2


def closing_ends_every_wait(make: MakeTransport, expected: Tensors) -> None:
    """``close`` in another thread ends the wait for receivers, and that for a version; both may be called twice."""
    transport = make()
    receiver = transport.receiver()
    waiting = _Thread(lambda: raised(Closed, lambda: receiver.manifest))
    receiver.close()
    receiver.close()
    waiting.result()
    sender = transport.sender(1)
    waiting = _Thread(lambda: raised(Closed, lambda: sender.send(dict(expected), version=1)))
    sender.close()
    sender.close()
    waiting.result()


def _take_two(source: Source) -> list[tuple[object, Tensors]]:
    versions: list[tuple[object, Tensors]] = []
    for _ in range(2):
        tensors = dict(source.tensors())
        versions.append((getattr(source, "version"), tensors))  # noqa: B009 - no source but a receiver has one
    return versions


def _holds_still(lease: Lease) -> bool:
    return all(bool((lease.tensor == float(lease.name[1:])).all()) for _ in range(3))


def _fail(source: Source, at: int) -> None:
    with source.leases() as stream:
        for number, _ in enumerate(stream):
            if number == at:
                raise ValueError(f"failed at {at}")


class _Model(nn.Module):
    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.full((300, 10), value), requires_grad=False)
        self.two = nn.Parameter(torch.full((7,), value), requires_grad=False)


def _processing(layer: nn.Module) -> None:
    if any(bool((parameter == 13.0).all()) for parameter in layer.parameters()):
        raise ValueError("thirteen")


def _values(live: LiveModel) -> set[float]:
    return {value for parameter in live.model.parameters() for value in parameter.flatten().tolist()}


@contextmanager
def _group(
    transport: Transport, work: Callable[..., Any], receivers: int, *, numbered: bool = False
) -> Iterator[tuple[Sending, Callable[[], Iterator[Any]]]]:
    """A sender, receivers that work in a thread each, and what gives their results once they have ended."""

    def run(number: int) -> object:
        with transport.receiver() as source:
            return work(source, number) if numbered else work(source)

    with ExitStack() as stack:
        threads: list[_Thread] = []
        sender = stack.enter_context(transport.sender(receivers))
        threads += [_Thread(run, number) for number in range(receivers)]
        yield sender, lambda: (thread.result() for thread in threads)


class _Thread(threading.Thread):
    """Runs a function; ``result`` returns what it returned, or raises what it raised."""

    def __init__(self, work: Callable[..., Any], *arguments: object) -> None:
        super().__init__(daemon=True)
        self._work, self._arguments = work, arguments
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._work(*self._arguments)
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self.join(_PATIENCE)
        assert not self.is_alive(), "somebody waits for ever"
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._result


TRANSPORT_CONTRACT: tuple[Callable[[MakeTransport, Tensors], None], ...] = (
    everybody_gets_every_tensor,
    pairs_are_sent_as_they_come,
    what_is_sent_may_change_afterwards,
    leases_hold_still,
    slices_are_all_that_is_sent_of_a_tensor,
    a_consumer_that_fails_is_heard_by_all,
    a_trainer_that_fails_is_heard_by_all,
    live_models_take_a_version_together,
    closing_ends_every_wait,
)
"""What every transport must do. Each check takes what makes a group that has not met, and tensors to send."""
