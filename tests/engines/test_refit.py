"""Trainers and rollouts of stacks that stream between both: all rollouts take a version, or none does."""

import asyncio
import os
import tempfile

import pytest
import torch

import hotweights as hw
from hosts import free_address
from hotweights.engines.refit import RefitEnd


def state(value, count=5):
    return {f"{number}.weight": torch.full((32, 32), float(value)) for number in range(count)}


@pytest.fixture
def ends():
    """Two ranks of a trainer, and two rollouts."""
    made = [RefitEnd(timeout=20) for _ in range(4)]
    connect(made)
    yield made
    for end in made:
        end.close()


def connect(ends, trainers=2):
    said = [end.describe() for end in ends]
    for rank, end in enumerate(ends):
        end.connect(said, rank=rank, trainers=trainers)


async def taken(end, stop_at=None):
    found = {}
    async for name, tensor in end.receive():
        found[name] = tensor
        if len(found) == stop_at:
            raise ValueError("the engine cannot load this")
    return found


def one_round(ends, weights, version, stop_at=None):
    """What each end has returned or raised."""

    async def run():
        sending = [end.send(weights(), version) for end in ends[:2]]
        taking = [taken(ends[2]), taken(ends[3], stop_at)]
        return await asyncio.gather(*sending, *taking, return_exceptions=True)

    return asyncio.run(asyncio.wait_for(run(), 60))


def is_whole(results, value):
    report, other, *found = results
    assert other is None
    for state_of in found:
        assert list(state_of) == list(state(value))
        assert all(tensor.eq(value).all() for tensor in state_of.values())
    return report


def reused(value):
    """As trainers give them: a tensor that was read is written over."""
    buffer = torch.empty(32, 32)
    for name, tensor in state(value).items():
        yield name, buffer.copy_(tensor)
        buffer.fill_(-1)


async def as_coroutine(value):
    for pair in reused(value):
        await asyncio.sleep(0)
        yield pair


@pytest.mark.parametrize("stream", [reused, as_coroutine])
def test_rollouts_take_what_the_first_rank_sends(ends, stream):
    for value in (1, 2, 3):
        report = is_whole(one_round(ends, lambda value=value: stream(value), f"step-{value}"), value)
        assert report.version == f"step-{value}"
        assert len(report.committed) == 2
        connect(ends)  # verl does, each time.


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_rollout_that_stops_reading_is_named_and_nobody_takes_it(ends, first, stop_at):
    if not first:
        is_whole(one_round(ends, lambda: reused(1), 1), 1)
    sent, other, one, stopped = one_round(ends, lambda: reused(2), 2, stop_at=stop_at)
    assert isinstance(sent, hw.TransferAborted)
    assert "rollout 1 stopped reading" in str(sent)
    assert other is None
    assert isinstance(stopped, ValueError)
    assert isinstance(one, hw.TransferAborted)
    is_whole(one_round(ends, lambda: reused(3), 3), 3)


def failing(at):
    for number, pair in enumerate(reused(9)):
        if number == at:
            raise OSError("the trainer's disk is full")
        yield pair


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("at", [0, 3])
def test_a_trainer_that_fails_says_so_to_all(ends, first, at):
    if not first:
        is_whole(one_round(ends, lambda: reused(1), 1), 1)
    sent, other, *rollouts = one_round(ends, lambda: failing(at), 2)
    assert isinstance(sent, OSError)
    assert isinstance(other, OSError)
    for rollout in rollouts:
        assert isinstance(rollout, hw.TransferError)
        assert "disk is full" in str(rollout)
    is_whole(one_round(ends, lambda: reused(3), 3), 3)


@pytest.mark.parametrize("new", [lambda: state(2, 7).items(), lambda: state(2, 3).items()], ids=["more", "fewer"])
def test_a_trainer_that_sends_other_names_is_refused_once(ends, new):
    """What it sends next is known then; this one has been offered by the names of the last."""
    is_whole(one_round(ends, lambda: reused(1), 1), 1)
    sent, *_ = one_round(ends, new, 2)
    assert isinstance(sent, hw.HotweightsError)
    report, _, *found = one_round(ends, new, 3)
    assert report.version == 3
    assert [{*state_of} for state_of in found] == [{*dict(new())}] * 2


def test_a_new_trainer_is_found(ends):
    is_whole(one_round(ends, lambda: reused(1), 1), 1)
    ends[0].close()
    ends[0] = RefitEnd(timeout=20)
    connect(ends)
    is_whole(one_round(ends, lambda: reused(2), 2), 2)


def test_a_trainer_that_is_gone_is_not_waited_for(ends):
    ends[0].close()
    with pytest.raises(hw.PeerLost):
        asyncio.run(asyncio.wait_for(taken(ends[2]), 30))


def test_several_hosts_need_an_address(ends):
    said = [end.describe() for end in ends]
    said[3]["host"] = "elsewhere"
    with pytest.raises(hw.UsageError, match=r"several hosts: .*elsewhere.*; pass address='tcps://HOST:PORT'"):
        ends[2].connect(said, rank=2, trainers=2)


def test_the_address_can_be_given():
    """As the refusal advises."""
    address = free_address()
    made = [RefitEnd(timeout=20, address=address, insecure=True) for _ in range(2)]
    said = [{**end.describe(), "host": f"host {rank}"} for rank, end in enumerate(made)]
    made[0].connect(said, rank=0, trainers=1)
    made[0].close()


def test_an_address_that_only_its_sender_can_know_is_refused():
    with pytest.raises(hw.UsageError, match=r"port 0.*tcps://trainer:7600"):
        RefitEnd(address="tcps://trainer:0", insecure=True)


def test_nothing_is_left_in_the_folder_for_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    end = RefitEnd()
    connect([end], trainers=1)
    assert os.listdir(tmp_path)
    end.close()
    del end
    assert not os.listdir(tmp_path)


def test_workers_that_are_told_where_to_take_it():
    """Those of engines, one beside each rollout, which takes nothing itself."""
    made = [RefitEnd(timeout=20, direct=True) for _ in range(4)]
    with pytest.raises(hw.UsageError, match="connect was not called"):
        made[2].directions()
    connect(made)

    def take(end):
        told = end.directions()
        with hw.Receiver(told.address, timeout=told.timeout, keys=told.keys, insecure=told.insecure) as receiver:
            return dict(receiver.tensors())

    async def run():
        sending = [end.send(reused(4), "step-4") for end in made[:2]]
        return await asyncio.gather(*sending, *(asyncio.to_thread(take, end) for end in made[2:]))

    assert len(is_whole(asyncio.run(asyncio.wait_for(run(), 60)), 4).committed) == 2
    for end in made:
        end.close()


@pytest.mark.parametrize("options", [{"direct": "yes"}, {"timeout": 0}])
def test_options_are_checked(options):
    with pytest.raises(hw.UsageError, match=next(iter(options))):
        RefitEnd(**options)
