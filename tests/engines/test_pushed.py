"""Updates that others push by callbacks: what fails is kept until they have ended, and the model has whole versions."""

import os
import weakref
from functools import partial

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.engines.checkpoint_engine import Callbacks
from hotweights.engines.pushed import PushedUpdate


def state(value):
    return {
        f"{n}.{part}": torch.full(shape, value) for n in "01" for part, shape in (("weight", (4, 4)), ("bias", (4,)))
    }


@pytest.fixture
def live():
    live = hw.LiveModel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    live.load(state(1.0), version="one")
    return live


def holds(live, value):
    return all(tensor.eq(value).all() for tensor in live.model.state_dict().values())


def test_all_that_was_pushed_is_taken(live):
    with PushedUpdate(live.begin) as pushed:
        for pair in state(2.0).items():
            pushed.feed([pair])
        report = pushed.finish("two")
        assert pushed.finish() is report
    assert (live.version, live.state) == ("two", hw.State.SERVING)
    assert holds(live, 2.0)


def unknown(pushed):
    pushed.feed({**state(2.0), "2.weight": torch.ones(4)}.items())
    pushed.feed(state(3.0).items())  # Forgotten.


def missing(pushed):
    pushed.feed([*state(2.0).items()][:-1])


def broken(pushed):
    pushed.feed([*state(2.0).items()][:1])
    pushed.fail(ConnectionError("the pipe broke"))


@pytest.mark.parametrize(("push", "words"), [(unknown, "2.weight"), (missing, "1.bias"), (broken, "the pipe broke")])
def test_what_fails_is_kept_until_the_end(live, push, words):
    with PushedUpdate(live.begin) as pushed:
        push(pushed)
        for _ in range(2):
            with pytest.raises(Exception, match=words):
                pushed.finish("two")
    assert (live.version, live.state) == ("one", hw.State.SERVING)
    assert holds(live, 1.0)
    live.update(state(3.0))
    assert holds(live, 3.0)


def test_an_update_that_cannot_begin_fails_at_its_end(live):
    with live.begin(), PushedUpdate(live.begin) as pushed:  # One at a time.
        pushed.feed(state(2.0).items())
        with pytest.raises(hw.HotweightsError):
            pushed.finish()
    assert holds(live, 1.0)


def test_leaving_it_gives_it_up(live):
    with PushedUpdate(live.begin) as pushed:
        pushed.feed(state(2.0).items())
    assert live.state is hw.State.SERVING
    assert holds(live, 1.0)


@pytest.mark.parametrize("own", [None, ValueError("here")])
def test_others_may_object(live, own):
    asked = []

    def agree(problem):
        asked.append(problem)
        raise problem or RuntimeError("there")

    with PushedUpdate(live.begin, agree=agree) as pushed:
        pushed.feed(state(2.0).items())
        if own is not None:
            pushed.fail(own)
        for _ in range(2):  # They are asked once: they answer once.
            with pytest.raises((ValueError, RuntimeError), match="there" if own is None else "here"):
                pushed.finish()
    assert asked == [own]
    assert holds(live, 1.0)


def test_what_failed_holds_no_tensor_of_theirs(live):
    """They close the shared memory that it lies in, which cannot be done while a tensor is left."""

    def their_loop(pushed, name, shape):
        weights = [("0.bias", torch.ones(4)), (name, torch.ones(shape))]
        pushed.feed(pair for pair in weights)
        gone = [weakref.ref(tensor) for _, tensor in weights]
        del weights
        assert pushed.problem is not None
        return [tensor() for tensor in gone]

    for name, shape in (("0.weight", 3), ("zz", 3)):
        with PushedUpdate(live.begin) as pushed:
            assert their_loop(pushed, name, shape) == [None, None]


def twins(promised):
    assert "0.weight" in promised
    return {"head.weight": "0.weight"}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("same", [True, False])
def test_a_tied_weight_may_come_twice_if_it_is_the_same(live, order, same):
    new = state(2.0)
    new["model.head.weight"] = new["0.weight"].clone() if same else torch.zeros(4, 4)
    with PushedUpdate(live.begin, twins=twins) as pushed:
        for pair in [*new.items()][::order]:
            pushed.feed([pair])
        if same:
            pushed.finish("two")
        else:
            with pytest.raises(hw.TiedWeightsDiffer, match=r"model\.head\.weight: other bytes than 0\.weight"):
                pushed.finish("two")
    assert holds(live, 2.0 if same else 1.0)


# The callbacks of checkpoint-engine, called as it calls them.


def test_callbacks_commit_in_the_last_one(live):
    with Callbacks(live, version="two") as callbacks:
        callbacks.run([*state(2.0).items()])
        assert holds(live, 1.0)
        callbacks.post_hook()
        assert live.version == "two"
    assert callbacks.report.version == "two"
    assert holds(live, 2.0)


def test_a_bucket_that_cannot_be_taken_raises_at_once(live):
    with pytest.raises(hw.UpdateAborted, match="zz"), Callbacks(live) as callbacks:
        callbacks.run([("zz", torch.ones(1))])
    assert holds(live, 1.0)


def test_the_first_failure_is_the_one_that_is_told(live):
    def their_round(callbacks):
        with callbacks:
            with pytest.raises(hw.UpdateAborted):
                callbacks.run([("zz", torch.ones(1))])
            raise RuntimeError("some workers failed")

    with pytest.raises(hw.UpdateAborted, match="zz"):
        their_round(Callbacks(live))


def test_the_last_callback_never_raises(live):
    def their_round(callbacks):
        with callbacks:
            callbacks.run([*state(2.0).items()][:-1])
            callbacks.post_hook()

    with pytest.raises(hw.UpdateAborted, match=r"1\.bias"):
        their_round(Callbacks(live))
    assert holds(live, 1.0)


def test_without_the_last_callback_nothing_is_taken(live):
    with pytest.raises(hw.PeerLost, match="did not send all"), Callbacks(live) as callbacks:
        callbacks.run([*state(2.0).items()])
    assert holds(live, 1.0)


def in_a_group(rank, directory, given, pipe):
    """One of two ranks, of which the second may get less."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    live = hw.LiveModel(nn.Linear(4, 4))
    live.load({"weight": torch.zeros(4, 4), "bias": torch.zeros(4)}, version="one")
    words = None
    try:
        with Callbacks(live, version="two", group=torch.distributed.group.WORLD) as callbacks:
            callbacks.run([(name, torch.ones(shape)) for name, shape in given[rank]])
            callbacks.post_hook()
    except hw.HotweightsError as error:
        words = str(error)
    pipe.send((live.version, words))
    torch.distributed.destroy_process_group()
    os._exit(0)  # On a busy machine a thread of gloo's that still lets go of its last work would abort Python's end.


ALL, LESS = [("weight", (4, 4)), ("bias", (4,))], [("weight", (4, 4))]


@pytest.mark.parametrize("second", [ALL, LESS])
def test_ranks_take_it_together(tmp_path, second, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    context = torch.multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    work = partial(in_a_group, directory=tmp_path, given=[ALL, second])
    ranks = [context.Process(target=work, kwargs={"rank": n, "pipe": pipes[n][1]}) for n in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(500)
        assert rank.exitcode == 0
    (first, told), (last, words) = [pipe[0].recv() for pipe in pipes]
    if second is ALL:
        assert (first, told, last, words) == ("two", None, "two", None)
    else:
        assert first == last == "one"
        assert "rank 1: UpdateAborted" in told
        assert "bias" in told
        assert "bias" in words
