"""rollback: the version before is live again, by its bytes, its name and what the next update takes from it."""

import signal

import pytest
import torch
from served import WAYS, bias, live_model, output, runs, same, state, version_of
from torch import nn

import hotweights as hw


def keeping(atomic, **options):
    return live_model(atomic, keep_previous=True, **options)


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("atomic", WAYS)
def test_the_version_before_is_live_again(atomic, checked):
    live, called = keeping(atomic), []
    before, answer = state(live), output(live.model)
    live.update(version_of(2), version=2, check=runs if checked else None)
    then = state(live)
    live.on_commit(called.append)
    assert live.rollback() == live.version == 1
    same(state(live), before)
    assert output(live.model) == answer
    assert called == [1]
    assert live.state is hw.State.SERVING
    live.update(version_of(2), version=2)
    same(state(live), then)
    live.update(version_of(3), version=3)
    assert live.rollback() == 2
    same(state(live), then)


@pytest.mark.parametrize("atomic", WAYS)
def test_a_part_and_what_comes_and_goes(atomic):
    """What the next update puts back, and the names by which tensors come, are those of the version before too."""
    model = nn.ModuleDict({"cache": nn.BatchNorm1d(2), "head": nn.Linear(2, 2)})
    whole = {name: torch.full_like(tensor, 3) for name, tensor in model.state_dict().items()}
    plain = {name: tensor for name, tensor in whole.items() if name.startswith("head")}
    live = hw.LiveModel(model, atomic=atomic, keep_previous=True)
    live.load(plain, allow_missing="cache.*")
    started = model["cache"].running_var.clone()
    live.update(whole)
    live.rollback()
    assert torch.equal(model["cache"].running_var, started)
    assert not live.update(plain).restored
    longer = {f"new.{name}": tensor for name, tensor in plain.items()}
    live.update(longer, rename=lambda name: name.removeprefix("new."))
    live.rollback()
    with live.begin() as update:
        update.feed(plain)
        update.commit()
    live.update(longer, rename=lambda name: name.removeprefix("new."))
    live.update(plain)
    live.rollback()
    with live.begin() as update:
        update.feed(longer)
        update.commit()
    live.update({"head.bias": torch.zeros(2)}, only="head.bias")
    live.rollback()
    assert model["head"].bias.tolist() == [3, 3]


def test_where_none_is_kept_the_error_says_what_to_pass():
    live = live_model()
    live.update(version_of(2), version=2)
    with pytest.raises(hw.LiveModelError, match=r"version 2 is live.*LiveModel\(model, keep_previous=True\)"):
        live.rollback()
    live = keeping("staged")
    with pytest.raises(hw.LiveModelError, match="version 1 is live, and no version before is kept: only one version"):
        live.rollback()
    live.update(version_of(2), version=2)
    live.rollback()
    with pytest.raises(
        hw.LiveModelError, match=r"version 2 was taken back already.*live\.update\(source, version=2\) takes it again"
    ):
        live.rollback()
    live.update(version_of(2), version=2)
    with pytest.raises(hw.UpdateAborted):
        live.update({"strange": torch.zeros(1)})  # It never began: nothing was written over.
    assert live.rollback() == 1
    live.update(version_of(2), version=2)
    live.update(version_of(3), version=3, atomic=False)
    with pytest.raises(hw.LiveModelError, match='had atomic=False, and a commit with atomic="staged" or "journal"'):
        live.rollback()
    assert live.version == 3


@pytest.mark.parametrize("atomic", WAYS)
def test_an_update_that_wrote_nothing_leaves_the_way_back(atomic):
    live = keeping(atomic)
    before = state(live)
    live.update(version_of(2), version=2)
    live.begin().abort()
    live.begin(atomic=False).abort()
    with live.begin() as update:
        assert live.status()["can_roll_back_to"] is None
        with pytest.raises(hw.UpdateAborted, match="strange"):
            update.feed([("strange", torch.zeros(1))])
    assert live.status()["can_roll_back_to"] == 1
    assert live.rollback() == 1
    same(state(live), before)
    assert live.status()["can_roll_back_to"] is None


@pytest.mark.parametrize("end", ["refused", "Ctrl-C", "fed in part"])
@pytest.mark.parametrize("atomic", WAYS)
def test_what_used_up_the_version_before_is_named_and_the_advice_is_followed(atomic, end):
    def check(model):
        if end == "Ctrl-C":
            raise KeyboardInterrupt
        return False

    live, sources = keeping(atomic), {1: version_of(1)}
    before = state(live)
    live.update(version_of(2), version=2)
    then = state(live)
    if end == "fed in part":
        update = live.begin()
        update.feed([("head.bias", torch.zeros(4))])
        update.abort()
    else:
        with pytest.raises((hw.UpdateAborted, KeyboardInterrupt)):
            live.update(version_of(3), version=3, check=check)
    same(state(live), then)
    assert live.status()["can_roll_back_to"] is None
    named = "an update that was aborted" if end == "fed in part" else "version 3, which did not become live,"
    cure = r"live\.update\(source, version=1\) takes it again"
    told = rf"version 2 is live.*{named} used up the memory in which 1 was kept\. {cure}"
    with pytest.raises(hw.LiveModelError, match=told):
        live.rollback()
    live.update(sources[1], version=1)
    same(state(live), before)
    assert live.status()["can_roll_back_to"] == 2


def test_keeping_and_atomic_false_are_refused_together():
    with pytest.raises(hw.UsageError, match="Leave one of them out"):
        hw.LiveModel(nn.Linear(2, 2), keep_previous=True, atomic=False)
    with pytest.raises(hw.UsageError, match="keep_previous= is"):
        hw.LiveModel(nn.Linear(2, 2), keep_previous="no")


@pytest.mark.parametrize("atomic", WAYS)
def test_nobody_rolls_back_to_a_torn_model(atomic):
    live = keeping(atomic)
    update = live.begin(atomic=False)
    update.feed([("head.bias", torch.zeros(4))])
    with pytest.raises(hw.UpdateAborted):
        update.commit()
    with pytest.raises(hw.LiveModelError, match=r"the model is torn.*call update with a complete source"):
        live.rollback()
    live.update(version_of(2), version=2)
    with pytest.raises(hw.LiveModelError, match="no version before is kept: the model was torn before"):
        live.rollback()


def test_readers_are_waited_for_and_updates_come_first():
    live = keeping("staged")
    live.update(version_of(2), version=2)
    reading = live.serving()
    reading.__enter__()
    with pytest.raises(hw.UsageError, match=r"Leave serving\(\) first"):
        live.rollback(timeout=0)
    reading.__exit__(None, None, None)
    with live.begin(), pytest.raises(hw.UsageError, match="another update runs"):
        live.rollback()
    live.update(version_of(3), version=3)
    live.on_commit(lambda version: live.rollback())
    with pytest.raises(hw.CommitHookError, match="another update runs"):
        live.rollback()
    assert live.version == 2


def test_moved_tensors_and_failing_hooks():
    live = keeping("staged")
    live.update(version_of(2), version=2)
    kept, live.model.head.bias = live.model.head.bias, nn.Parameter(torch.zeros(4))
    with pytest.raises(hw.LiveModelError, match=r"head\.bias: something else replaced"):
        live.rollback()
    live.model.head.bias = kept
    live.on_commit(lambda version: 1 / 0)
    with pytest.raises(hw.CommitHookError, match="version 1 is live"):
        live.rollback()
    assert (live.version, bias(live.model)) == (1, 1.0)
    with live.serving(timeout=1):
        pass


def test_a_signal_in_a_hook_leaves_the_version_before_and_no_lock():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    live = keeping("journal")
    live.update(version_of(2), version=2)
    live.on_commit(lambda version: version == 1 and signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        live.rollback()
    assert (live.version, bias(live.model)) == (1, 1.0)
    live.update(version_of(3), version=3)


@pytest.mark.parametrize("atomic", WAYS)
def test_opaque_objects_come_back(atomic):
    """What a closure holds is another object in each version; the one of before is kept with it."""

    class Closed(nn.Linear):
        def forward(self, x):
            return self.run(x)

    def close(layer):
        weight = layer.weight.detach().clone()
        layer.run = lambda x: x @ weight.t()

    live = hw.LiveModel(nn.Sequential(Closed(2, 2, bias=False)), process=close, atomic=atomic, keep_previous=True)
    live.load({"0.weight": torch.ones(2, 2)})
    live.update({"0.weight": torch.full((2, 2), 2.0)})
    assert live.model(torch.ones(1, 2)).tolist() == [[4.0, 4.0]]
    live.rollback()
    assert live.model(torch.ones(1, 2)).tolist() == [[2.0, 2.0]]


def test_before_the_first_load_only_that_is_said():
    for options in ({"keep_previous": True}, {}):
        with pytest.raises(hw.LiveModelError) as caught:
            hw.LiveModel(nn.Linear(2, 2), **options).rollback()
        assert str(caught.value) == "nothing was loaded yet, so there is no version to go back from; call load first"
