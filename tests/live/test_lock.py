"""Readers in other threads see N or M, never a mix. Nothing here sleeps: threads meet at events."""

import contextlib
import copy
import itertools
import threading
import time

import pytest
import torch
import zoo
from torch import nn

import hotweights as hw
from hotweights.live.lock import ReadWriteLock, WriteTurn

WAYS = ("journal", "staged", False)
WAIT = 30  # seconds after which a test is wrong, not slow


class Yielding(nn.Module):
    """Its forward stops between two layers until it is told to go on."""

    def __init__(self):
        super().__init__()
        self.first, self.second = zoo.Weight(), zoo.Weight()
        self.between, self.go_on = threading.Event(), threading.Event()

    def forward(self):
        first = self.first.weight.clone()
        self.between.set()
        assert self.go_on.wait(WAIT)
        return first, self.second.weight.clone()


def weights(value):
    return {f"{layer}.weight": torch.full((zoo.N, zoo.N), float(value)) for layer in ("first", "second")}


def live_model(**options):
    model = Yielding()
    live = hw.LiveModel(model, **options)
    live.load(weights(1), version=1)
    return model, live


class Thread(threading.Thread):
    """Runs at once; ``result`` waits for it."""

    def __init__(self, act):
        super().__init__(daemon=True)
        self.act, self.found, self.error = act, None, None
        self.start()

    def run(self):
        try:
            self.found = self.act()
        except BaseException as error:
            self.error = error

    def result(self):
        self.join(WAIT)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.found


def values(pair):
    return {float(one) for tensor in pair for one in tensor.view(-1)}


@pytest.mark.parametrize("process", [None, zoo.process])
@pytest.mark.parametrize("atomic", WAYS)
def test_a_forward_sees_one_version(atomic, process):
    model, live = live_model(atomic=atomic, process=process)

    def forward():
        with live.serving(WAIT) as version:
            return version, values(model())

    reader = Thread(forward)
    assert model.between.wait(WAIT)
    waits, begin_writing = threading.Event(), ReadWriteLock.begin_writing

    def told(*given, **options):
        waits.set()  # From here on the update can only wait for the reader.
        return begin_writing(live._current.guard, *given, **options)

    live._current.guard.begin_writing = told
    writer = Thread(lambda: live.update(weights(2), version=2))
    assert waits.wait(WAIT)
    model.go_on.set()
    assert reader.result() == (1, {1.0})
    writer.result()
    assert Thread(forward).result() == (2, {2.0})


def test_without_the_guard_it_sees_a_mix():
    """The same without ``serving``: what the test above would find."""
    model, live = live_model(atomic=False)
    reader = Thread(lambda: values(model()))
    assert model.between.wait(WAIT)
    live.update(weights(2))
    model.go_on.set()
    assert reader.result() == {1.0, 2.0}


@pytest.mark.parametrize("atomic", WAYS)
def test_while_an_update_runs(atomic):
    """Staged, N serves on until the commit; otherwise readers wait, as long as they will."""
    model, live = live_model(atomic=atomic)
    model.go_on.set()

    def forward():
        with live.serving(0.01) as version:
            return version, values(model())

    with live.begin() as update:
        update.feed(weights(2))
        if atomic == "staged":
            assert Thread(forward).result() == (1, {1.0})
            update.prepare()
            assert live.state is hw.State.PREPARED
            assert Thread(forward).result() == (1, {1.0})
        else:
            with pytest.raises(TimeoutError, match="an update is writing"):
                Thread(forward).result()
            with pytest.raises(hw.UsageError, match="this thread is writing"), live.serving():
                pass
        update.commit(2)
    assert Thread(forward).result() == (2, {2.0})


def test_a_reader_that_waits_gets_the_new_version():
    model, live = live_model(atomic="journal")  # From its first write on, nobody may read.
    model.go_on.set()
    with live.begin() as update:
        update.feed(weights(2))

        def forward():
            with live.serving(WAIT) as version:
                return version, values(model())

        reader = Thread(forward)
        update.commit(2)
    assert reader.result() == (2, {2.0})


def test_no_reader_comes_between_the_commit_and_its_hooks():
    """A cache that holds the old weights is dropped before anybody reads the new ones."""
    model, live = live_model()
    model.go_on.set()
    cache, tried = {}, []

    def serve():
        with live.serving(0.01) as version:
            return version, cache.setdefault("values", values(model()))

    assert Thread(serve).result() == (1, {1.0})

    def hook(version):
        with pytest.raises(TimeoutError):
            Thread(serve).result()
        with live.serving() as seen:  # The hook itself may read.
            assert seen == version
        cache.clear()
        tried.append(version)

    live.on_commit(hook)
    live.update(weights(2), version=2)
    assert tried == [2]
    assert Thread(serve).result() == (2, {2.0})


def test_who_reads_cannot_update():
    """It would wait for itself."""
    _, live = live_model()
    with live.serving(), pytest.raises(hw.UsageError, match="cannot update"):
        live.update(weights(2))
    assert live.state is hw.State.SERVING
    live.update(weights(2))


def test_a_hook_cannot_update():
    _, live = live_model()
    live.on_commit(lambda version: live.update(weights(3)))
    with pytest.raises(hw.CommitHookError, match="another update runs"):
        live.update(weights(2), version=2)
    assert (live.version, live.state) == (2, hw.State.SERVING)


@contextlib.contextmanager
def reading(lock, timeout):
    hold = lock.begin_reading(timeout)
    try:
        yield
    finally:
        lock.end_reading(hold)


def test_who_reads_may_read_again_before_a_writer_that_waits():
    serving = ReadWriteLock()

    def read():
        with reading(serving, 0):
            pass

    with reading(serving, WAIT):
        serving._waiting += 1  # a writer, in another thread
        with reading(serving, 0):
            pass
        with pytest.raises(TimeoutError):
            Thread(read).result()
        serving._waiting -= 1
    Thread(read).result()


def test_before_the_first_load_there_is_nothing_to_serve():
    with pytest.raises(hw.HotweightsError, match="nothing was loaded yet"), hw.LiveModel(Yielding()).serving():
        pass


def test_no_wall_clock_decides_anything(monkeypatch):
    """The host's clock is set back or forward at every look."""
    jumps = itertools.cycle((0.0, 4e9))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    _, live = live_model()
    with live.serving(WAIT), pytest.raises(hw.UpdateAborted, match="being read"):
        Thread(lambda: live.update(weights(2), timeout=0.01)).result()
    live.update(weights(2), version=2, timeout=WAIT)
    with live.serving(0) as version:
        assert version == 2


@pytest.mark.parametrize("atomic", ["staged", "journal"])
def test_a_model_that_is_copied_while_an_update_runs(atomic):
    """The copy is of one version where it is made by a reader, and no update reaches it."""
    model, live = live_model(atomic=atomic)

    def copied():
        with live.serving(0.01):
            return copy.deepcopy([model.first, model.second])

    with live.begin() as update:
        update.feed({"first.weight": weights(2)["first.weight"]})
        if atomic == "staged":
            copies = Thread(copied).result()
        else:
            with pytest.raises(TimeoutError):
                Thread(copied).result()
            copies = None
        update.feed({"second.weight": weights(2)["second.weight"]})
        update.commit(2)
    if copies is not None:
        assert values([one.weight for one in copies]) == {1.0}
    assert values([one.weight for one in copied()]) == {2.0}


def test_a_timeout_ends_the_wait_for_a_writer():
    serving = ReadWriteLock()
    hold = serving.begin_writing()

    def read():
        with reading(serving, 0):
            pass

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        Thread(read).result()
    assert time.monotonic() - began < WAIT
    serving.end_writing(hold)
    Thread(read).result()


def test_who_is_interrupted_when_the_lock_was_just_taken_lets_readers_in():
    """Ctrl-C while the wait is noted: an update that had not begun kept the lock for ever."""

    def note(*event):
        raise KeyboardInterrupt

    lock = ReadWriteLock()
    turn = WriteTurn(lock, None, note)
    with pytest.raises(KeyboardInterrupt), turn.briefly():
        pass
    assert not turn.held
    lock.end_reading(lock.begin_reading(10))


@contextlib.contextmanager
def somebody_reading(live):
    """Inside, a thread reads; what is given lets it go."""
    inside, may_leave = threading.Event(), threading.Event()

    def reader():
        with live.serving():
            inside.set()
            assert may_leave.wait(WAIT)

    thread = threading.Thread(target=reader)
    thread.start()
    assert inside.wait(WAIT)
    yield may_leave.set
    thread.join()


def loaded_linear():
    live = hw.LiveModel(nn.Linear(2, 2))
    live.load(nn.Linear(2, 2), version=1)
    return live


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_version_like_the_one_before_waits_for_readers_only_at_its_end(by_hand):
    """Its plan is known, so that nobody has to leave the model for it."""
    live, weights = loaded_linear(), dict(nn.Linear(2, 2).state_dict())
    with somebody_reading(live) as let_go:

        def pairs():
            for pair in weights.items():
                with live.serving(timeout=WAIT):  # More readers come in meanwhile.
                    yield pair
            let_go()

        if by_hand:
            with live.begin(timeout=WAIT) as update:
                update.feed(pairs())
                update.commit(2)
        else:
            live.update(hw.from_iterator(pairs(), hw.open(weights).manifest), version=2, timeout=WAIT)
    assert live.version == 2


def test_a_version_of_other_dtypes_is_planned_when_nobody_reads():
    live = loaded_linear()
    with somebody_reading(live) as let_go:
        with pytest.raises(hw.UpdateAborted, match="not taken"):
            live.begin(hw.open(nn.Linear(2, 2).half()).manifest, timeout=0.01)
        let_go()
    live.update(nn.Linear(2, 2).half(), timeout=WAIT)


def test_a_timeout_that_several_waits_share_is_told_whole():
    live = loaded_linear()
    turn = WriteTurn(live._current.guard, 0.01)
    turn.take()
    turn.give_back()
    with somebody_reading(live) as let_go:
        with pytest.raises(TimeoutError, match=r"waited 0\.01 seconds(, all waits together)?: the model is being read"):
            turn.take()
        let_go()


def test_a_part_like_one_before_is_planned_once():
    live, part = loaded_linear(), {"bias": torch.ones(2)}
    live.update(part, only="bias")
    with somebody_reading(live) as let_go, live.begin(hw.open(part).manifest, only="bias", timeout=WAIT) as update:
        let_go()
        update.feed({"bias": torch.full((2,), 3.0)})
        update.commit()
    assert live.model.bias.tolist() == [3.0, 3.0]
    with pytest.raises(hw.UpdateAborted, match="weight"):  # What is asked for is another part.
        live.update(part, only="*")
