"""Compiled models: an update is seen without a recompilation, and no constant is stale."""

import sys

import pytest
import torch
from torch._dynamo.utils import counters

import hotweights as hw
from hotweights.testing import PROCESSED_LAYERS, Processed, processed_checkpoint

NUMBERS = {
    "other class",
    "attention",
}  # a number in the layer is a constant of the code, so another one needs other code
COMPILED = [kind for kind in PROCESSED_LAYERS if kind != "pointing"]  # Its library is none of torch's operations.
X = torch.linspace(-1, 1, 16).view(2, 8)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def loaded(kind, **options):
    model = Processed([kind])
    live = hw.LiveModel(model, deferred=model.deferred, **options)
    live.load(processed_checkpoint([kind], seed=0), allow_missing=model.allow_missing)
    return model, live


def cold(kind, seed):
    model = Processed([kind])
    model.load_state_dict(processed_checkpoint([kind], seed=seed), strict=False)
    model.process()
    return model


@pytest.mark.parametrize("atomic", ["journal", "staged"])
@pytest.mark.parametrize("kind", COMPILED)
def test_an_update_is_seen_without_a_recompilation(kind, atomic):
    model, live = loaded(kind, atomic=atomic)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(X)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 1
    for seed in (1, 2):
        live.update(processed_checkpoint([kind], seed=seed))
        assert torch.equal(compiled(X), cold(kind, seed)(X))
    assert (counters["stats"]["unique_graphs"] == graphs) == (kind not in NUMBERS)


@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("kind", ["hidden", "fp8", "prepacked"])
def test_inductors_code_sees_it_too(kind):
    model, live = loaded(kind)
    compiled = torch.compile(model)
    old = compiled(X)
    graphs = counters["stats"]["unique_graphs"]
    live.update(processed_checkpoint([kind], seed=1))
    torch.testing.assert_close(compiled(X), cold(kind, 1)(X))
    assert not torch.allclose(compiled(X), old)
    assert counters["stats"]["unique_graphs"] == graphs == 1


def test_frozen_weights_are_refused():
    import torch._inductor.config

    _, live = loaded("plain")
    digest = live.digest()
    with torch._inductor.config.patch(freezing=True), pytest.raises(hw.UpdateAborted, match="compile anew"):
        live.update(processed_checkpoint(["plain"], seed=1))
    assert live.digest() == digest
    assert live.state is hw.State.SERVING
    live.update(processed_checkpoint(["plain"], seed=1))


@pytest.fixture
def forgotten():
    """Afterwards nothing is frozen, and no later update of this process looks for what might be."""
    yield
    torch._dynamo.reset()
    sys.modules.pop("torch._inductor.freezing", None)


def frozen(model):
    compiled = torch.compile(model)
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        compiled(X)
    return compiled


@pytest.mark.usefixtures("forgotten")
@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("compiling", [frozen, lambda model: frozen(lambda x: model(x))], ids=["model", "function"])
def test_weights_that_were_frozen_when_freezing_was_on_are_refused(compiling):
    model, live = loaded("plain")
    compiled = compiling(model)
    model.layers[0].weight.data.mul_(2)
    with torch.no_grad():
        assert not torch.allclose(compiled(X), model(X))  # This is what must not happen to an update.
    model.layers[0].weight.data.div_(2)
    digest = live.digest()
    with pytest.raises(hw.UpdateAborted, match=r"inductor froze .* torch\._dynamo\.reset"):
        live.update(processed_checkpoint(["plain"], seed=1))
    assert live.digest() == digest
    torch._dynamo.reset()
    del compiled
    live.update(processed_checkpoint(["plain"], seed=1))
    assert torch.equal(model(X), cold("plain", 1)(X))


def by_options(model):
    return torch.compile(model, options={"freezing": True})


def by_method(model):
    model.compile(options={"freezing": True})
    return model


@pytest.mark.usefixtures("forgotten")
@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("compiling", [by_options, by_method, lambda model: by_options(lambda x: model(x))])
@pytest.mark.parametrize("kind", ["plain", "hidden", "derived"])
def test_what_was_asked_to_freeze_is_right_or_refused(kind, compiling):
    """Today torch hands weights to such code as inputs, so nothing is frozen; it may do otherwise tomorrow."""
    model, live = loaded(kind)
    compiled = compiling(model)
    refused = ""
    with torch.no_grad():
        old = compiled(X)
        try:
            live.update(processed_checkpoint([kind], seed=1))
        except hw.UpdateAborted as error:
            refused = str(error)
        torch.testing.assert_close(compiled(X), old if refused else cold(kind, 1)(X))
    assert not refused or "inductor froze" in refused
