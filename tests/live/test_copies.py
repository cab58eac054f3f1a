"""A model that is copied, or let go of, while an update of it runs."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.testing import assert_same_bits

FIRST, SECOND = ({"weight": torch.full((4, 4), value), "bias": torch.full((4,), value)} for value in (1.0, 2.0))


def halved(layer):
    layer.weight = nn.Parameter(layer.weight / 2, requires_grad=False)


def loaded(**options):
    live = hw.LiveModel(nn.Linear(4, 4), **options)
    live.load(FIRST, version=1)
    return live


@pytest.mark.parametrize("process", [None, halved])
def test_a_copy_made_during_an_update_is_the_old_version_and_stays_it(process):
    live = loaded(process=process)
    before = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
    with live.begin() as update:
        for pair in SECOND.items():
            with live.serving():
                copied = copy.deepcopy(live.model)
            assert_same_bits(copied.state_dict(), before)
            update.feed([pair])
        update.prepare()
        with live.serving():
            copied = copy.deepcopy(live.model)
        update.commit(version=2)
    assert_same_bits(copied.state_dict(), before)
    again = hw.LiveModel(copied, process=process)  # The copy is a model like any other.
    assert again.state is hw.State.EMPTY
    assert_same_bits(live.model.state_dict(), {n: t / 2 if process and n == "weight" else t for n, t in SECOND.items()})


def test_a_live_model_that_was_let_go_of_is_kept_by_its_update():
    live = loaded()
    model, update = live.model, live.begin()
    del live
    gc.collect()
    with update:
        update.feed(SECOND)
        update.commit(version=2)
    assert_same_bits(model.state_dict(), SECOND)


@pytest.mark.parametrize("atomic", ["staged", "journal"])
@pytest.mark.filterwarnings("ignore:an update was neither committed nor aborted:ResourceWarning")
def test_when_all_is_let_go_of_nothing_stays(atomic):
    live = loaded(atomic=atomic)
    update = live.begin()
    update.feed({"weight": SECOND["weight"]})
    kept, model = weakref.ref(live), live.model
    tensors = [weakref.ref(tensor) for tensor in model.parameters()]
    del live, update
    gc.collect()
    assert kept() is None
    assert_same_bits(model.state_dict(), FIRST)
    del model
    gc.collect()
    assert [tensor() for tensor in tensors] == [None, None]
