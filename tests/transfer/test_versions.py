"""Versions from a sender to receivers: exact, of every kind of tensor, into plain code and live models."""

import gc
import os

import pytest
import torch
from ends import Thread, going_on, receiver, sender, tensors
from torch import nn

import hotweights as hw
from hotweights.testing import SOURCE_CONTRACT, assert_same_bits


def take(address, versions=1, **options):
    with receiver(address, **options) as source:
        return [(dict(source.tensors()), source.version) for _ in range(versions)]


@pytest.mark.parametrize("check", SOURCE_CONTRACT, ids=lambda check: check.__name__)
@pytest.mark.parametrize("digests", [True, False])
def test_a_receiver_is_a_source_like_any_other(check, digests, address):
    content = tensors()
    with going_on(address, content, digests=digests):
        check(lambda: receiver(address), content)


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("as_pairs", [False, True])
@pytest.mark.parametrize("slot_nbytes", [4096, 1024 * 1024])
def test_every_kind_of_tensor_arrives_bit_for_bit(digests, as_pairs, slot_nbytes, address):
    taking = [Thread(take, address, 3) for _ in range(2)]
    with sender(address, receivers=2, digests=digests, slot_nbytes=slot_nbytes) as sending:
        for version in range(3):
            content = tensors(version)
            report = sending.send(list(content.items()) if as_pairs else content, version=version)
            assert len(report.committed) == 2
            assert report.nbytes == sum(tensor.nbytes for tensor in content.values())
    for thread in taking:
        for version, (taken, name) in enumerate(thread.result()):
            assert name == version
            assert_same_bits(taken, tensors(version))


def test_a_generator_is_read_as_it_is_sent(address):
    """With a manifest, each tensor may go as soon as the next is asked for."""
    content = tensors()
    alive = []

    def made():
        for name, tensor in content.items():
            yield name, tensor.clone()
            alive.append(name)

    taking = Thread(take, address)
    with sender(address) as sending:
        sending.send(made(), version="a", manifest=hw.open(content).manifest)
    ((taken, version),) = taking.result()
    assert version == "a"
    assert alive == list(content)
    assert_same_bits(taken, content)


def test_two_tensors_of_one_name_are_refused(address):
    with sender(address) as sending, pytest.raises(hw.UsageError, match="one name: a"):
        sending.send([("a", torch.zeros(1)), ("a", torch.ones(1))], version=1)


def test_a_sender_that_fails_tells_receivers_why(address):
    def broken():
        yield "a", torch.zeros(2)
        raise ValueError("no more")

    taking = Thread(take, address)
    with sender(address) as sending:
        manifest = hw.open({"a": torch.zeros(2), "b": torch.zeros(2)}).manifest
        with pytest.raises(ValueError, match="no more"):
            sending.send(broken(), version=1, manifest=manifest)
    with pytest.raises(hw.TransferAborted, match="no more"):
        taking.result()


def test_thousands_of_small_tensors_take_a_handful_of_descriptors(address):
    content = {f"layer.{number}": torch.full((3,), number, dtype=torch.bfloat16) for number in range(3000)}
    counted = []

    def count():
        with receiver(address) as source, source.leases() as stream:
            return {lease.name: (counted.append(len(os.listdir("/proc/self/fd"))), lease.own())[1] for lease in stream}

    before = len(os.listdir("/proc/self/fd"))
    taking = Thread(count)
    with sender(address) as sending:
        sending.send(content, version=1)
    assert_same_bits(taking.result(), content)
    assert max(counted) - before < 20  # of both ends together


class Layers(nn.Module):
    def __init__(self, value):
        super().__init__()
        torch.manual_seed(value)
        self.one, self.two = nn.Linear(40, 30), nn.Linear(30, 5)
        self.register_buffer("scale", torch.tensor(float(value)))


def follow(address, versions, **options):
    live = hw.LiveModel(Layers(0), **options)
    with receiver(address) as source:
        live.load(source)
        for _ in range(versions - 1):
            live.update(source)
    return live.version, live.model.state_dict()


@pytest.mark.parametrize("options", [{}, {"atomic": "staged"}, {"atomic": False}])
def test_a_live_model_follows_its_trainer(options, address):
    taking = [Thread(follow, address, 3), Thread(follow, address, 3)]
    with sender(address, receivers=2) as sending:
        for version in range(1, 4):
            assert len(sending.send(Layers(version), version=f"step-{version}").committed) == 2
    for thread in taking:
        version, state = thread.result()
        assert version == "step-3"
        assert_same_bits(state, Layers(3).state_dict())


@pytest.mark.parametrize("atomic", ["staged", "journal"])
def test_one_worker_whose_check_fails_keeps_the_version_from_all(atomic, address):
    def worker(fits):
        live = hw.LiveModel(Layers(0), atomic=atomic)
        with receiver(address) as source:
            live.load(source)
            with pytest.raises(hw.UpdateAborted) as caught:
                live.update(source, check=lambda model: fits)
            refused = live.version, {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
            live.update(source, check=lambda model: model.scale == 3)
        return caught.value, refused, live.version

    taking = [Thread(worker, fits) for fits in (True, False)]
    with sender(address, receivers=2) as sending:
        sending.send(Layers(1), version=1)
        with pytest.raises(hw.TransferAborted):
            sending.send(Layers(2), version=2)
        sending.send(Layers(3), version=3)
    errors = []
    for thread in taking:
        error, (version, state), now = thread.result()
        errors.append(str(error))
        assert (version, now) == (1, 3)
        assert_same_bits(state, Layers(1).state_dict())
    assert all("returned False" in error for error in errors)  # The other worker is told why.


def test_only_what_is_wanted_is_sent(address):
    live = hw.LiveModel(Layers(0))
    live.load(Layers(1))

    def update():
        with receiver(address) as source:
            return live.update(source, only="two.*")

    taking = Thread(update)
    with sender(address) as sending:
        report = sending.send(Layers(2), version=2)
    taking.result()
    assert report.tensors == 2
    assert report.unwanted == ("scale", "one.weight", "one.bias")
    assert "unwanted  3: scale, one.weight, one.bias" in str(report)
    assert report.as_dict()["unwanted"] == ["scale", "one.weight", "one.bias"]
    assert report.nbytes == live.model.two.weight.nbytes + live.model.two.bias.nbytes
    assert torch.equal(live.model.one.weight, Layers(1).one.weight)
    assert torch.equal(live.model.two.weight, Layers(2).two.weight)


def test_what_does_not_fit_is_told_before_the_first_byte(address):
    live = hw.LiveModel(Layers(0))
    live.load(Layers(1))

    def update():
        with receiver(address) as source, pytest.raises(hw.UpdateAborted):
            live.update(source)

    taking = Thread(update)
    with sender(address) as sending, pytest.raises(hw.TransferAborted, match=r"(?s)process \d+.*two\.weight"):
        sending.send({**Layers(2).state_dict(), "two.weight": torch.zeros(5, 31)}, version=2)
    taking.result()
    assert_same_bits(live.model.state_dict(), Layers(1).state_dict())


def test_load_takes_a_receiver(address):
    model = Layers(0)

    def load():
        with receiver(address) as source:
            hw.load(model, source)

    taking = Thread(load)
    with sender(address) as sending:
        sending.send(Layers(7), version=7)
    taking.result()
    assert_same_bits(model.state_dict(), Layers(7).state_dict())


def test_a_hook_that_fails_after_the_commit_is_reported_and_not_undone(address):
    live = hw.LiveModel(Layers(0))
    live.load(Layers(1))
    live.on_commit(lambda version: 1 / 0)

    def update():
        with receiver(address) as source, pytest.raises(hw.CommitHookError):
            live.update(source)

    taking = Thread(update)
    with sender(address) as sending:
        report = sending.send(Layers(2), version=2)
    taking.result()
    assert "division by zero" in str(report)
    assert len(report.committed) == 1
    assert live.version == 2
    gc.collect()
