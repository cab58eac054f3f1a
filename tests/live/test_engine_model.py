"""LiveModel on the engine-style model: every way, every kind of feeding, against a cold load."""

import pytest
from torch import nn

import hotweights as hw
from hotweights.testing import Engine, ReusedBuffer, assert_same_bits, engine_checkpoint

WAYS = ("journal", "staged", False)


def transposed(layer):
    """Processing that changes the format of some layers, square ones among them."""
    if type(layer).__name__ in ("_Sliced", "_Fused"):
        layer.weight = nn.Parameter(layer.weight.t().contiguous() * 2, requires_grad=False)


def everything(model):
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {**named, **{f"listed.{number}": one for number, one in enumerate(model.listed)}}


def cold(seed, process=None):
    model = Engine()
    hw.LiveModel(model, process=process).load(engine_checkpoint(seed))
    return everything(model)


def addresses(model):
    return {name: (one.data_ptr(), type(one), one.stride()) for name, one in everything(model).items()}


def by_source(live, checkpoint):
    live.update(checkpoint)


def by_pushes(live, checkpoint):
    with live.begin() as update:
        items = list(checkpoint.items())
        update.feed(reversed(items[5:]))
        update.feed(dict(items[:5]))
        update.commit()


def borrowed(live, checkpoint):
    with live.begin() as update:
        update.feed(ReusedBuffer(checkpoint))
        update.commit()


@pytest.mark.parametrize("feed", [by_source, by_pushes, borrowed])
@pytest.mark.parametrize("process", [None, transposed])
@pytest.mark.parametrize("atomic", WAYS)
def test_an_update_is_a_cold_load_at_the_same_addresses(atomic, process, feed):
    model = Engine()
    live = hw.LiveModel(model, process=process, atomic=atomic)
    live.load(engine_checkpoint(0), version="a")
    before, digest = addresses(model), live.digest()
    for seed in (1, 2, 2):
        feed(live, engine_checkpoint(seed))
        assert_same_bits(everything(model), cold(seed, process))
        assert addresses(model) == before
    feed(live, engine_checkpoint(0))
    assert live.digest() == digest
    assert live.state is hw.State.SERVING


def test_the_first_load_is_a_plain_load():
    model = Engine()
    hw.load(model, engine_checkpoint(3))
    assert_same_bits(cold(3), everything(model))
