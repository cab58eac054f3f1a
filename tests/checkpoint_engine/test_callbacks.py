"""A live model takes what checkpoint-engine's parameter server sends, and it is answered whatever comes of it."""

import multiprocessing
import threading

import pytest
import torch
from parameter_server import CPU, serve
from torch import nn

import hotweights as hw
from hotweights.engines import watched
from hotweights.engines.checkpoint_engine import Callbacks

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]  # What their packages warn of.

WIDTH = 32


@pytest.fixture
def live():
    live = hw.LiveModel(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6))))
    live.load(state_of(live, 1.0), version="one")
    return live


def state_of(live, value):
    return {name: torch.full_like(tensor, value) for name, tensor in live.model.state_dict().items()}


def holds(live, value):
    return all(tensor.eq(value).all() for tensor in live.model.state_dict().values())


def one_round(live, state, dies_at=None, version="two"):
    """What the worker has raised; what the server has, and how many messages it had sent."""
    from checkpoint_engine import worker

    worker.DeviceManager = CPU
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(state, theirs, dies_at))
    server.start()
    theirs.close()
    try:
        assert ours.poll(200)
        ((_, address),) = ours.recv()
        raised = None
        try:
            with Callbacks(live, version=version) as callbacks:
                worker.update_weights_from_ipc(
                    watched.watched_context(), address, None, run=callbacks.run, post_hook=callbacks.post_hook
                )
        except Exception as error:
            raised = error
        told = None
        if dies_at is None:
            assert ours.poll(60), "the server waits for an answer"
            told = ours.recv()
            ours.send("goodbye")
        server.join(60)
        assert server.exitcode == (0 if dies_at is None else -9)
        return raised, told
    finally:
        server.kill()
        server.join()
        server.close()
        ours.close()


def test_versions_are_taken_whole_and_every_failure_is_answered(live):
    raised, (told, messages) = one_round(live, state_of(live, 2.0))
    assert (raised, told, live.version) == (None, None, "two")
    assert holds(live, 2.0)
    assert messages >= 5, "there are several buckets"

    # A tensor of the first bucket that nobody knows: the server is told, and ends the round for all.
    unknown = {"0.a": torch.ones(3), **state_of(live, 3.0)}
    raised, (told, _) = one_round(live, unknown)
    assert isinstance(raised, hw.UpdateAborted)
    assert "0.a" in str(raised)
    assert "remote errors" in told
    # One that is missing: it was all sent by then, and the server is not told.
    missing = state_of(live, 3.0)
    del missing["3.weight"]
    raised, (told, _) = one_round(live, missing)
    assert isinstance(raised, hw.UpdateAborted)
    assert "3.weight" in str(raised)
    assert told is None
    assert live.version == "two"
    assert holds(live, 2.0)

    # A server that dies before each of its messages.
    for dies_at in range(1, messages):
        raised, _ = one_round(live, state_of(live, 3.0), dies_at=dies_at)
        assert isinstance(raised, hw.PeerLost), dies_at
        assert live.version == "two"
        assert holds(live, 2.0), dies_at
    raised, (told, _) = one_round(live, state_of(live, 4.0), version="three")
    assert (raised, told, live.version) == (None, None, "three")
    assert holds(live, 4.0)


def test_a_server_that_never_comes_is_not_waited_for_for_ever(live, tmp_path, monkeypatch):
    from checkpoint_engine import worker

    monkeypatch.setattr(worker, "DeviceManager", CPU)
    monkeypatch.setattr(watched.WatchedSocket, "first_seconds", 0.2)
    failures = []

    def take():
        try:
            with Callbacks(live) as callbacks:
                worker.update_weights_from_ipc(
                    watched.watched_context(),
                    f"ipc://{tmp_path}/nobody",
                    None,
                    run=callbacks.run,
                    post_hook=callbacks.post_hook,
                )
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=take, daemon=True)  # Its own handler of failures waits for an answer.
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert isinstance(failures[0], hw.TransferTimeout)
    assert holds(live, 1.0)
