"""Every way in which loading code treats its tensors, in live models: an update is a cold load by that code."""

import warnings

import pytest
from idioms import IDIOMS, Model, weights

import hotweights as hw
from hotweights.testing import bits

ALLOWED = {"allow_missing": "*", "allow_partial": "*", "allow_unexpected": "*"}


def by_source(live, tensors):
    live.update(tensors)


def by_pushes(live, tensors):
    with live.begin() as update:
        update.feed(reversed(list(tensors.items())))
        update.commit()


def fingerprint(model):
    return {name: bits(tensor.resolve_conj()).tolist() for name, tensor in model.all_tensors().items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("atomic", ["journal", "staged"])
@pytest.mark.parametrize("idiom", IDIOMS, ids=[idiom.name for idiom in IDIOMS])
def test_an_update_is_a_cold_load(idiom, atomic, processed):
    model = Model(idiom.loader)
    live = hw.LiveModel(model, atomic=atomic, process=(lambda layer: None) if processed else None)
    try:
        live.load(weights(1), **ALLOWED)
    except hw.HotweightsError:
        assert "refused" in idiom.outcome
        assert live.state is hw.State.EMPTY
        return
    for seed, feed in ((2, by_source), (3, by_pushes)):
        feed(live, weights(seed))
        cold = Model(idiom.loader)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cold.load_weights(weights(seed).items())
        assert fingerprint(model) == fingerprint(cold)
