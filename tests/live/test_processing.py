"""Layers as engines process them: every update against a cold load, and every abort against what was before."""

import itertools
import random
import weakref

import pytest
import torch
import whole
from torch import nn

import hotweights as hw
from hotweights.live.strategy import InPlace, Staged
from hotweights.memory import host
from hotweights.testing import PROCESSED_LAYERS, Processed, processed_checkpoint, write_checkpoint

WAYS = ("journal", "staged", False)
KINDS = list(PROCESSED_LAYERS)
X = torch.linspace(-1, 1, 16).view(2, 8)
MOVES = ("handle", "kernel.func")  # closures and what they close over


def cold(kinds, seed):
    """Loaded and processed without hotweights."""
    model = Processed(kinds)
    model.load_state_dict(processed_checkpoint(kinds, seed=seed), strict=False)
    model.process()
    return model


def loaded(kinds, **options):
    model = Processed(kinds)
    live = hw.LiveModel(model, deferred=model.deferred, **options)
    live.load(processed_checkpoint(kinds, seed=0), allow_missing=model.allow_missing)
    return model, live


def by_mapping(live, tensors):
    return live.update(tensors)


def by_pushes(live, tensors):
    items = list(tensors.items())
    random.Random(3).shuffle(items)
    with live.begin() as update:
        for pair in items:
            update.feed([pair])
        return update.commit()


def check(model, kinds, seed):
    expected = cold(kinds, seed)
    assert whole.values(model) == whole.values(expected)
    assert whole.plain(model) == whole.plain(expected)
    assert torch.equal(model(X), expected(X))


@pytest.mark.parametrize("road", [by_mapping, by_pushes])
@pytest.mark.parametrize("atomic", WAYS)
@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), KINDS], ids=lambda kinds: "+".join(kinds)[:20])
def test_an_update_is_a_cold_load(kinds, atomic, road):
    model, live = loaded(kinds, atomic=atomic)
    check(model, kinds, 0)
    where, holders = whole.addresses(model, MOVES), whole.holders(model)
    for seed in (1, 2, 0):
        report = road(live, processed_checkpoint(kinds, seed=seed))
        check(model, kinds, seed)
        assert whole.addresses(model, MOVES) == where
        assert whole.holders(model) == holders
        assert bool(report.replaced) == bool({"prepacked", "pointing", "tied head"} & set(kinds))


def test_what_others_put_into_a_layer_after_loading_stays_theirs():
    model, live = loaded(["remade"])
    cache = model.layers[0].cache = torch.ones(3, 5)
    for seed in (1, 0):
        live.update(processed_checkpoint(["remade"], seed=seed))
        assert model.layers[0].cache is cache
        assert torch.equal(cache, torch.ones(3, 5))


@pytest.mark.parametrize("source", ["mapping", "files", "stream"])
def test_the_first_load_holds_no_weight_that_processing_has_replaced(source, tmp_path):
    """Else loading a model that is repacked takes twice its memory."""
    tensors = processed_checkpoint(["prepacked"] * 3, seed=0)
    given = {
        "mapping": lambda: tensors,
        "files": lambda: write_checkpoint(tmp_path, tensors, shards=1),
        "stream": lambda: hw.from_iterator(tensors.items(), manifest=hw.open(tensors).manifest),
    }[source]()
    weights, alive = [], []

    def process(layer):
        alive.append(sum(one() is not None for one in weights))
        weights.append(weakref.ref(layer.weight.untyped_storage()))
        layer.quant_method.process_weights_after_loading(layer)

    hw.LiveModel(Processed(["prepacked"] * 3), process=process).load(given)
    assert alive == [0, 0, 0]


def test_a_table_that_others_replace_is_none_of_ours():
    """Nothing writes it and no layer has it: vLLM's rotary embeddings cast theirs when they are first used."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Module())
    model[1].register_buffer("table", torch.ones(3), persistent=False)
    live = hw.LiveModel(model)
    weights = {name: torch.rand(one.shape) for name, one in model.state_dict().items()}
    live.load(weights)
    model[1].table = model[1].table.to(torch.bfloat16)
    live.update({name: one * 2 for name, one in weights.items()})
    assert model[1].table.dtype is torch.bfloat16
    model[0].weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(hw.UpdateAborted, match=r"not the tensors that they were.*0\.weight"):
        live.update(weights)


def test_the_report_names_what_was_replaced():
    model, live = loaded(["plain", "prepacked"])
    kernel = model.layers[1].kernel
    report = live.update(processed_checkpoint(["plain", "prepacked"], seed=1))
    assert sorted(report.replaced) == ["layers.1.handle", "layers.1.kernel"]
    assert "layers.1.kernel" in str(report)
    assert model.layers[1].kernel is not kernel


class Fault:
    """Raises at the time number ``at``, counted from 0."""

    def __init__(self, at):
        self.at = at

    def __call__(self):
        self.at -= 1
        if self.at == -1:
            raise RuntimeError("injected")


def interrupted(tensors, fault):
    for pair in tensors.items():
        fault()
        yield pair


@pytest.mark.parametrize("step", ["read", "process", "half", "write", "attribute"])
@pytest.mark.parametrize("atomic", WAYS[:2])
def test_an_abort_at_every_step_puts_everything_back(monkeypatch, atomic, step):
    fault = [Fault(-1)]

    def process(layer):
        if hasattr(layer, "quant_method"):
            fault[0]() if step == "process" else None
            layer.quant_method.process_weights_after_loading(layer)
            fault[0]() if step == "half" else None

    model, live = loaded(KINDS, atomic=atomic, process=process)
    live.update(processed_checkpoint(seed=1))
    before, digest = whole.everything(model), live.digest()
    if step == "write":
        copy = host.copy_bytes
        monkeypatch.setattr(host, "copy_bytes", lambda *args: (fault[0](), copy(*args)))
    if step == "attribute":
        for way in (InPlace, Staged):
            real = way.attribute
            monkeypatch.setattr(way, "attribute", lambda *args, real=real: (real(*args), fault[0]()))
    for k in itertools.count():
        fault[0] = Fault(k)
        tensors = processed_checkpoint(seed=2)
        try:
            with live.begin() as update:
                update.feed(interrupted(tensors, fault[0]) if step == "read" else tensors)
                update.prepare()
                fault[0] = Fault(-1)
                update.commit()
        except hw.UpdateAborted:
            fault[0] = Fault(-1)
        else:
            break
        assert whole.everything(model) == before
        assert live.digest() == digest
    assert k > 10
    check(model, KINDS, 2)


def test_a_naive_reload_leaves_a_tied_head_with_its_old_copy():
    """Only layers whose own names come are processed again, and the head has none."""
    naive = cold(["tied head"], 0)
    new = processed_checkpoint(["tied head"], seed=1)
    naive.load_state_dict(new, strict=False)
    for name in new:
        naive.get_submodule(name.rpartition(".")[0]).process()
    assert not torch.equal(naive(X), cold(["tied head"], 1)(X))


def test_what_serving_caches_is_left_alone():
    """A cache that a forward pass fills belongs to nobody's processing."""
    model, live = loaded(["plain", "hidden"])
    cache = model.layers[0].cache = {"keys": [torch.ones(3)]}
    kept = cache["keys"][0]
    live.update(processed_checkpoint(["plain", "hidden"], seed=1))
    assert model.layers[0].cache is cache
    assert cache["keys"][0] is kept
    assert torch.equal(kept, torch.ones(3))


def test_hidden_state_of_another_shape_is_refused():
    model, live = loaded(["hidden"])
    before = whole.everything(model)
    model.layers[0].process = lambda: (
        type(model.layers[0]).process(model.layers[0]) or model.layers[0].table.pop("first")
    )
    before = whole.everything(model)
    with pytest.raises(hw.UpdateAborted, match=r"layers\.0\.table\['first'\]: is gone after processing"):
        live.update(processed_checkpoint(["hidden"], seed=1))
    assert whole.everything(model) == before


@pytest.mark.parametrize("atomic", WAYS)
def test_a_dropped_model_takes_its_hidden_state_with_it(atomic):
    import gc
    import weakref

    model, live = loaded(KINDS, atomic=atomic)
    live.update(processed_checkpoint(seed=1))
    gc.collect()
    gone = weakref.ref(model.layers[KINDS.index("hidden")].kernel)
    gc.disable()
    try:
        del model, live
        assert gone() is None
    finally:
        gc.enable()


class Scaled(nn.Module):
    """A model with a buffer of its own, so that it is a layer, and a part of itself."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(2))
        self.part = nn.Linear(2, 2, bias=False)


def halve(layer):
    if isinstance(layer, nn.Linear):
        layer.weight = nn.Parameter(layer.weight.detach() / 2, requires_grad=False)


def test_a_process_that_walks_into_the_parts_of_a_layer_is_refused():
    def walking(model):
        for module in model.modules():
            halve(module)

    weights = {"scale": torch.ones(2), "part.weight": torch.ones(2, 2)}
    live = hw.LiveModel(Scaled(), process=walking)
    with pytest.raises(hw.LiveModelError, match="the processing of Scaled replaced tensors of part, which would be"):
        live.load(weights)
    assert live.state is hw.State.EMPTY
    for advised in ({"process": halve}, {"process": walking, "layers": "part"}):
        live = hw.LiveModel(Scaled(), **advised)
        live.load(weights)
        assert live.model.part.weight.tolist() == [[0.5, 0.5], [0.5, 0.5]]
