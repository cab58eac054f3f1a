"""What people do to a transfer that no page tells them to: close it at any time, in any thread; odd names and paths."""

import os
import resource
import threading
from contextlib import suppress
from unittest import mock

import pytest
import torch
from ends import TIMEOUT, Thread, receiver, sender
from torch import nn

import hotweights as hw
from hotweights.ranges import Range
from hotweights.sources.contracts import Request
from hotweights.transfer import member
from hotweights.transfer.ballot import Ballot
from hotweights.transfer.decision import Decision


def taken(address, **options):
    with receiver(address, **options) as source:
        return dict(source.tensors())


# Closing.


@pytest.mark.parametrize("digests", [True, False])
def test_a_stream_whose_receiver_another_thread_closes_says_so(digests, address):
    source = receiver(address)

    def consume():
        for number, _ in enumerate(source.leases()):
            if number == 4:
                Thread(source.close).result()

    with sender(address, digests=digests) as sending:
        consumer = Thread(consume)
        with pytest.raises(hw.TransferAborted, match="closed"):
            sending.send({str(number): torch.ones(900) for number in range(20)}, version=1)
        with pytest.raises(hw.Closed):
            consumer.result()


def test_a_version_that_was_decided_is_taken_whoever_closes_the_receiver_meanwhile(address, monkeypatch):
    new = nn.Linear(8, 8)
    live = hw.LiveModel(nn.Linear(8, 8))
    live.load({name: torch.zeros(tensor.shape) for name, tensor in new.state_dict().items()}, version="old")
    source, asked = receiver(address), threading.Event()
    closer = threading.Thread(target=source.close, daemon=True)
    decide, holding, at_lock, excluded = Ballot.decide, member.holding, threading.Event(), []

    def deciding(ballot, vote):
        if vote is Decision.COMMIT:
            decided = decide(ballot, vote)
            closer.start()
            assert asked.wait(TIMEOUT)  # Its message to commit is late: the receiver reads what was decided.
            return decided
        asked.set()
        assert at_lock.wait(TIMEOUT), "close does not wait"
        return decide(ballot, vote)

    def locking(lock, seconds):
        if threading.current_thread() is closer:
            free = lock.acquire(blocking=False)
            if free:
                lock.release()
            excluded.append(not free)
            at_lock.set()
        return holding(lock, seconds)

    monkeypatch.setattr(Ballot, "decide", deciding)
    monkeypatch.setattr(member, "holding", locking)
    with sender(address) as sending:
        worker = Thread(lambda: live.update(source))
        with pytest.raises(hw.TransferIncomplete):
            sending.send(new, version="new")
        worker.result()
        closer.join(TIMEOUT)
    assert excluded == [True], "close could let go of the ballot before the receiver read it"
    assert live.version == "new"
    assert torch.equal(live.model.weight, new.weight)


@pytest.mark.parametrize("as_stream", [False, True])
def test_a_sender_may_be_closed_by_what_it_sends(as_stream, address):
    sending = sender(address)
    spec = hw.TensorSpec("a", torch.float32, (1,)), hw.TensorSpec("b", torch.float32, (1,))

    def pairs():
        yield "a", torch.ones(1)
        sending.close()
        yield "b", torch.ones(1)

    def work():
        while True:
            with suppress(hw.TransferAborted):  # It may have been offered, or not.
                return taken(address)

    worker = Thread(work)
    manifest = hw.Manifest(spec) if as_stream else None
    with pytest.raises(hw.Closed):
        Thread(lambda: sending.send(pairs(), version=1, manifest=manifest)).result()
    with sender(address) as later:  # The address is free.
        later.send({"c": torch.ones(1)}, version=2)
        assert worker.result().keys() == {"c"}


# What cannot be said.


@pytest.mark.parametrize(
    ("content", "version"),
    [
        ({f"{'n' * 1000}{number}": torch.zeros(()) for number in range(35_000)}, 1),
        ({"half \ud800": torch.zeros(1)}, 1),
        ({"a": torch.zeros(1)}, 2**64),
    ],
    ids=["too many", "no text", "no number"],
)
def test_who_was_not_told_of_an_offer_is_not_told_of_its_end(content, version, address):
    with sender(address) as sending:
        worker = Thread(taken, address)
        with pytest.raises(hw.UsageError, match=r"too large|no text|64 bits"):
            sending.send(content, version=version)
        assert sending.send({"a": torch.ones(1)}, version=2).committed
        assert worker.result().keys() == {"a"}


def test_a_path_can_be_sent_and_what_holds_no_pairs_cannot(address, tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    with sender(address) as sending:
        worker = Thread(taken, address)
        sending.send(str(tmp_path), version=1)
        assert torch.equal(worker.result()["a"], torch.ones(3))
        for wrong in ([1], [("a",)], [("a", torch.ones(1), 2)], {"a", "b"}):
            with pytest.raises(hw.UsageError, match="weights are given as pairs"):
                sending.send(wrong, version=2)


@pytest.mark.parametrize("as_stream", [False, True])
def test_a_wrapper_is_refused_and_never_read_at_its_null_address(as_stream, address):
    from torch.testing._internal.two_tensor import TwoTensor  # as DTensor is: its bytes lie in others

    content = {"a": torch.ones(3), "b": TwoTensor(torch.ones(3), torch.ones(3))}
    manifest = hw.Manifest(hw.TensorSpec(name, torch.float32, (3,)) for name in content) if as_stream else None
    with sender(address) as sending, receiver(address) as source:
        worker = Thread(lambda: dict(source.tensors()))
        with pytest.raises(hw.UsageError, match=r"TwoTensor.*plain tensor"):
            sending.send(iter(content.items()), version=1, manifest=manifest)
        if as_stream:
            with pytest.raises(hw.TransferAborted, match="TwoTensor"):
                worker.result()
        else:
            sending.send({"c": torch.ones(1)}, version=2)
            worker.result()


# Requests.


def test_ranges_that_touch_are_never_sent_as_one_piece(address):
    def slices(*ranges):
        with receiver(address) as source:
            source.wanted([Request("a", ranges)])
            (tensor,) = [lease.own() for lease in source.leases()]
            with source.decision():
                return tensor

    content = torch.arange(1000, dtype=torch.int32)
    with sender(address, receivers=2) as sending:
        workers = Thread(slices, Range(0, 1000), Range(1000, 1000)), Thread(slices, Range(500, 3000))
        sending.send({"a": content}, version=1)
        touching, middle = (worker.result() for worker in workers)
    assert torch.equal(touching[:500], content[:500])
    assert torch.equal(middle[125:875], content[125:875])


def test_room_of_the_wrong_size_is_the_consumers_mistake(address):
    def consume():
        with receiver(address) as source:
            source.wanted([Request("a", into=lambda: torch.empty(5))])
            return list(source.leases())

    with sender(address) as sending:
        worker = Thread(consume)
        with pytest.raises(hw.TransferAborted, match="room"):
            sending.send({"a": torch.ones(10)}, version=1)
        with pytest.raises(hw.UsageError, match=r"a: .*room of 40"):
            worker.result()


# Addresses.


def test_a_short_path_in_a_long_directory(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.chdir(deep)
    with sender("unix:run/socket") as sending:
        worker = Thread(taken, "unix:run/socket")
        sending.send({"a": torch.ones(1)}, version=1)
        worker.result()
    assert not os.listdir("run")


def test_paths_at_which_nobody_can_listen_or_connect(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(hw.UsageError, match=r"/no/such does not exist.* make it with: mkdir"):
        sender(f"unix:{tmp_path}/no/such/socket")
    with receiver(f"unix:{tmp_path}/file/socket") as source, pytest.raises(hw.TransferError, match="Not a directory"):
        source.manifest  # noqa: B018


# Numbers.


def test_waits_may_be_endless_and_are_never_no_number(address):
    with sender(address, timeout=float("inf")) as sending:
        worker = Thread(lambda: taken(address, timeout=float("inf"), offer_timeout=float("inf")))
        sending.send({"a": torch.ones(1)}, version=1)
        worker.result()
    for wrong in (float("nan"), -1.0):
        with pytest.raises(hw.UsageError):
            sender(address, timeout=wrong)
        with pytest.raises(hw.UsageError):
            receiver(address, offer_timeout=wrong)


def test_shared_memory_that_cannot_be_had_is_told(address):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(hw.TransferError, match="8192 bytes for the slots"):
            sender(address)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_receiver_that_cannot_map_the_slots_tells_the_sender_and_can_later(address):
    with receiver(address) as source:
        no_room = mock.patch("mmap.mmap", side_effect=OSError(12, "Cannot allocate memory"))
        with sender(address, timeout=10) as sending, no_room:
            worker = Thread(lambda: source.manifest)
            # It may learn so while it waits for receivers, or when it has offered already.
            with pytest.raises(hw.TransferError, match="cannot be mapped"):
                sending.send({"a": torch.ones(1)}, version=1)
            with pytest.raises(hw.TransferError, match="Cannot allocate memory"):
                worker.result()
        with sender(address) as sending:
            worker = Thread(lambda: dict(source.tensors()))
            sending.send({"a": torch.ones(1)}, version=2)
            worker.result()


def test_who_left_before_a_send_is_told_by_that_send(address):
    with receiver(address) as source, sender(address, timeout=0.5) as sending:
        with mock.patch("mmap.mmap", side_effect=OSError(12, "Cannot allocate memory")):
            worker = Thread(lambda: source.manifest)
            while worker.is_alive():
                _ = sending.connected
        with pytest.raises(hw.TransferError, match="cannot be mapped"):
            sending.send({"a": torch.ones(1)}, version=1)


def test_a_child_takes_the_address_after_its_parent_let_go(address):
    sending = sender(address)
    read, write = os.pipe()
    go_read, go_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(go_read, 1)
        try:
            with sender(address):
                os.write(write, b"ok")
        except BaseException as error:
            os.write(write, str(error).encode())
        os._exit(0)
    sending.close()
    os.write(go_write, b"x")
    assert os.read(read, 1000) == b"ok"
    os.waitpid(child, 0)
    for descriptor in (read, write, go_read, go_write):
        os.close(descriptor)


# hw.load.


def test_a_load_that_does_not_fit_is_told_at_once_and_the_worker_may_go_on(address):
    model = nn.Linear(4, 4)
    with sender(address) as sending, receiver(address) as source:

        def work():
            with pytest.raises(hw.PlanError):
                hw.load(nn.Linear(5, 5), source)
            hw.load(model, source)

        worker = Thread(work)
        with pytest.raises(hw.TransferAborted, match=r"weight: shape \[5, 5\] expected"):
            sending.send(nn.Linear(4, 4), version=1)
        new = nn.Linear(4, 4)
        sending.send(new, version=2)
        worker.result()
    assert torch.equal(model.weight, new.weight)


def test_a_load_that_fails_after_the_last_tensor_takes_no_version(address):
    tied = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    tied["b"].weight = tied["a"].weight
    content = {"a.weight": torch.zeros(4, 4), "b.weight": torch.ones(4, 4)}
    with sender(address) as sending, receiver(address) as source:
        worker = Thread(lambda: hw.load(tied, source))
        with pytest.raises(hw.TransferAborted, match="differ in the source"):
            sending.send(content, version=1)
        with pytest.raises(hw.TiedWeightsDiffer):
            worker.result()


def test_a_load_is_sent_what_it_needs_and_no_more(address):
    model = nn.Linear(4, 4)
    content = {**nn.Linear(4, 4).state_dict(), "draft.weight": torch.ones(1000)}
    with sender(address) as sending, receiver(address) as source:
        worker = Thread(lambda: hw.load(model, source, allow_unexpected="draft.*"))
        report = sending.send(content, version=1)
        worker.result()
    assert (report.tensors, report.nbytes) == (2, 80)
    assert torch.equal(model.weight, content["weight"])


def test_a_version_without_a_name_is_refused(address):
    with sender(address) as sending:
        for wrong in (None, True, 1.5):
            with pytest.raises(hw.UsageError, match="a str or an int"):
                sending.send({"a": torch.ones(1)}, version=wrong)
