"""check=: code of the user sees a new version before it is committed, and nobody else does."""

import json
import threading

import pytest
import torch
from served import WAYS, Model, bias, live_model, output, process, runs, same, state, version_of
from torch import nn

import hotweights as hw
from hotweights.live.layout import MemoryLayout, Mirror
from hotweights.live.strategy import Staged
from hotweights.memory import host
from hotweights.memory.exchange import exchange_bytes
from hotweights.testing import assert_same_bits, bits


def by_update(live, number, check):
    return live.update(version_of(number), version=number, check=check)


def by_stream(live, number, check):
    pairs = iter(version_of(number).items())
    return live.update(hw.from_iterator(pairs, hw.open(version_of(number)).manifest), version=number, check=check)


def by_pushes(live, number, check):
    with live.begin(check=check) as update:
        for pair in version_of(number).items():
            update.feed([pair])
        update.prepare()
        assert live.version != number
        return update.commit(number)


ACTS = (by_update, by_stream, by_pushes)


def loaded(number):
    live = hw.LiveModel(Model(), process=process, layers="processed")
    live.load(version_of(number), allow_missing="tied.weight")
    return live.model


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("atomic", WAYS)
def test_a_check_sees_what_will_be_live_at_the_addresses_of_the_live_tensors(atomic, act):
    live = live_model(atomic)
    seen, _, before = [], output(live.model), state(live)[1]

    def check(model):
        assert model is live.model
        assert live.version == 1
        seen.append((state(live), output(model)))

    act(live, 2, check)
    assert live.version == 2
    ((then, answer),) = seen
    same(then, state(live))
    assert then[1] == before
    assert answer == output(live.model)


def refuses(model):
    return False


def raises(model):
    raise ValueError("a norm of 1e30")


def answers_by_tensor(model):
    return torch.isnan(next(model.parameters())).any()


async def awaits(model):
    return True


def finite(model):
    return torch.stack([tensor.isfinite().all() for tensor in model.parameters()]).all()


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("atomic", WAYS)
@pytest.mark.parametrize(
    ("check", "cause", "said"),
    [
        (refuses, hw.LiveModelError, r"check=refuses: returned False"),
        (raises, ValueError, "a norm of 1e30"),
        (answers_by_tensor, hw.LiveModelError, r"returned tensor\(False\)"),
        (awaits, hw.UsageError, "give a function that is not async"),
        (lambda model: float("nan"), hw.UsageError, r"returned nan; a check returns True or None where"),
        (lambda model: "no", hw.UsageError, "returned 'no'; a check returns True or None"),
        (lambda model: 0.3, hw.UsageError, r"returned 0\.3; .* Of a number return a comparison"),
        (
            lambda model: torch.tensor([True, False]),
            hw.UsageError,
            r"returned Tensor; .*values bool\(values\.all",
        ),
        (lambda model: torch.tensor(float("nan")), hw.UsageError, "returned Tensor"),
    ],
)
def test_a_version_that_is_refused_leaves_no_bit(atomic, act, check, cause, said):
    live = live_model(atomic)
    before, answer = state(live), output(live.model)
    with pytest.raises(hw.UpdateAborted, match=said) as caught:
        act(live, 2, check)
    assert type(caught.value.__cause__) is cause
    assert (live.version, live.state) == (1, hw.State.SERVING)
    same(state(live), before)
    assert output(live.model) == answer
    live.update(version_of(3), version=3, check=finite)
    assert output(live.model) != answer


@pytest.mark.parametrize("atomic", WAYS)
def test_readers_see_only_what_is_live(atomic):
    """A reader that is there keeps the check out; one that comes waits; the check itself may read."""
    live, said = live_model(atomic), []
    inside, may_leave = threading.Event(), threading.Event()

    def reader():
        with live.serving() as version:
            inside.set()
            assert may_leave.wait(30)
            said.append((version, bias(live.model)))

    def check(model):
        assert said == [(1, 1.0)], "it looks while somebody reads"
        with live.serving() as version:
            assert version == 1
            assert bias(model) == 2.0
        thread = threading.Thread(target=late)
        thread.start()
        thread.join()

    def late():
        with pytest.raises(TimeoutError), live.serving(timeout=0.01):
            pass

    threads = [threading.Thread(target=reader), threading.Thread(target=lambda: (inside.wait(30), may_leave.set()))]
    threads[0].start()
    assert inside.wait(30)
    threads[1].start()
    live.update(version_of(2), version=2, check=check)
    for thread in threads:
        thread.join()
    with live.begin(atomic="journal", check=runs) as update:  # Afterwards its thread is no reader any more.
        update.feed(version_of(3))
        update.prepare()
        with pytest.raises(hw.UsageError, match="writing the model"), live.serving():
            pass


def test_staged_readers_read_on_between_the_check_and_the_commit():
    live = live_model("staged")
    before = state(live)
    with live.begin(check=runs) as update:
        update.feed(version_of(2))
        update.prepare()
        with live.serving() as version:
            assert version == 1
            same(state(live), before)
        update.commit(2)
    assert bias(live.model) == 2.0


def test_without_a_way_back_a_check_is_refused_before_anything_is_read():
    live = live_model(atomic=False)

    def never():
        raise AssertionError("it was read")
        yield

    for begin in (lambda: live.update(never(), check=runs), lambda: live.begin(check=output)):
        with pytest.raises(hw.UsageError, match=r'atomic=False keeps nothing.*use atomic="staged" or "journal"'):
            begin()
    live.update(version_of(2), atomic="staged", check=runs)
    with pytest.raises(hw.UsageError, match="check= is a function, or None; found 3"):
        live.update(version_of(2), check=3)


def test_a_torn_model_is_mended_by_a_version_that_was_checked():
    live = live_model(atomic=False)
    update = live.begin()
    update.feed([("head.bias", torch.zeros(4))])
    with pytest.raises(hw.UpdateAborted):
        update.commit()
    assert live.state is hw.State.TORN

    def check(model):
        with live.serving():
            return bias(model) == 2.0

    live.update(version_of(2), version=2, atomic="journal", check=check)
    assert (live.version, live.state) == (2, hw.State.SERVING)


def test_what_a_check_replaces_ends_the_update():
    live = live_model()
    before = state(live)
    with pytest.raises(hw.UpdateAborted, match=r"head\.bias: something else replaced"):
        live.update(version_of(2), check=lambda model: setattr(model.head, "bias", nn.Parameter(torch.zeros(4))))
    assert live.version == 1
    assert_same_bits({"w": before[0]["head.weight"]}, {"w": bits(live.model.head.weight)})


def test_caches_keyed_by_version_counters_see_the_check_come_and_go():
    live, seen = live_model(), []
    tensor = live.model.head.bias  # Alone in its memory: its bytes are moved without torch.
    seen.append(tensor._version)
    with pytest.raises(hw.UpdateAborted):
        live.update(version_of(2), check=lambda model: seen.append(tensor._version) or False)
    seen.append(tensor._version)
    assert len(set(seen)) == 3


def test_a_report_names_the_check():
    report = live_model().update(version_of(2), check=runs)
    assert "check" in [event.what for event in report.events]
    assert json.dumps(report.as_dict())


# The first load.


@pytest.mark.parametrize("refusal", [refuses, lambda model: 1 / 0])
def test_a_first_load_that_is_refused_leaves_a_model_that_loads_the_version_before(refusal):
    live, seen = hw.LiveModel(Model(), process=process, layers="processed"), []

    def check(model):
        with live.serving():  # It is let in, though nothing is live.
            seen.append(output(model))
        return refusal(model)

    with pytest.raises((hw.LiveModelError, ZeroDivisionError)) as caught:
        live.load(version_of(2), version=2, allow_missing="tied.weight", check=check)
    assert "check=" in str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))
    assert (live.version, live.state) == (None, hw.State.EMPTY)
    assert "check=" in live.status()["last_error"]
    with pytest.raises(hw.LiveModelError, match="nothing was loaded yet"), live.serving():
        pass
    live.load(version_of(1), version=1, allow_missing="tied.weight", check=runs)
    assert seen == [output(loaded(2))]
    assert output(live.model) == output(loaded(1))
    live.update(version_of(3), version=3, check=finite)
    assert output(live.model) == output(loaded(3))


def test_a_first_load_on_the_meta_device_is_checked_with_its_values():
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    live, source = hw.LiveModel(model), nn.Linear(4, 4)
    with pytest.raises(hw.LiveModelError):
        live.load(source, device="cpu", check=refuses)
    assert live.model.weight.is_meta
    live.load(source, device="cpu", check=lambda model: torch.equal(model.weight, source.weight))
    assert live.state is hw.State.SERVING


def test_a_first_check_that_makes_no_sense_is_refused_before_anything_is_read():
    live = hw.LiveModel(nn.Linear(4, 4))
    with pytest.raises(hw.UsageError, match="check"):
        live.load("nowhere", check="finite")


# The exchange.


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("nbytes", [0, 1, 7, 4 * 1024 * 1024, 9 * 1024 * 1024 + 3])
def test_bytes_are_exchanged(nbytes, threads, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    monkeypatch.setattr("hotweights.memory.copies._WORTH", 1024 * 1024)
    one = torch.arange(nbytes, dtype=torch.int64).to(torch.uint8)
    first, second = one.clone(), one.flip(0).clone()
    exchange_bytes(first, second)
    assert torch.equal(second, one)
    assert torch.equal(first, one.flip(0))


@pytest.mark.parametrize("at", range(30))
def test_an_exchange_that_fails_leaves_both(at, monkeypatch):
    """Of tensors that are not one block, as on a device."""
    size = 2 * 1024 * 1024
    first, second, left = torch.zeros(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8), [at]
    copy = host.copy_bytes

    def failing(*arguments):
        left[0] -= 1
        if left[0] == -1:
            raise RuntimeError("injected")
        copy(*arguments)

    monkeypatch.setattr("hotweights.memory.exchange.is_one_block", lambda first, second: False)
    monkeypatch.setattr("hotweights.memory.exchange.copy_bytes", failing)
    try:
        exchange_bytes(first, second)
    except RuntimeError:
        assert first.eq(0).all()
        assert second.eq(1).all()
    else:
        assert at >= 24
        assert second.eq(0).all()


def test_overlapping_tensors_are_shown_and_hidden_together():
    memory = torch.arange(8.0)
    live = {"low": memory[:4], "high": memory[2:6], "low again": memory[:4], "other": memory[5:]}
    staged = Staged(live, Mirror(MemoryLayout(live), host.host_copy))
    staged.deliver([("low", torch.full((4,), 7.0))])
    staged.deliver([("low again", torch.full((4,), 7.0))])
    staged.deliver([("high", torch.full((4,), 9.0))])
    for _ in range(2):
        staged.show()
        assert memory.tolist() == [7, 7, 9, 9, 9, 9, 6, 7]
        staged.hide()
        assert memory.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    staged.commit()
    assert memory.tolist() == [7, 7, 9, 9, 9, 9, 6, 7]
