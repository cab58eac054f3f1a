"""Tensors that one version brings and the next does not: scales, and buffers that code computes."""

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.live import optional

WAYS = ["staged", "journal", False]


class Layer(nn.Module):
    """Has a scale that some checkpoints bring; it is made before any of them."""

    def __init__(self, *, persistent=False, parameter=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        if parameter:
            self.scale = nn.Parameter(torch.tensor(0.25), requires_grad=False)
        else:
            self.register_buffer("scale", torch.tensor(0.25), persistent=persistent)


class Loading(Layer):
    def load_weights(self, pairs):
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, tensor in pairs:
            own[name].data.copy_(tensor)


KINDS = {
    "by name, a buffer": lambda: Layer(persistent=True),
    "by name, a parameter": lambda: Layer(parameter=True),
    "own code, a buffer": lambda: Loading(persistent=True),
    "own code, not persistent": Loading,
    "own code, a parameter": lambda: Loading(parameter=True),
}


def version(number, *, scale):
    tensors = {"weight": torch.full((2, 2), float(number))}
    return tensors | ({"scale": torch.tensor(0.5 + number)} if scale else {})


def scaled(layer):
    """Consumes the scale: the kernel has none."""
    layer.weight = nn.Parameter(layer.weight * layer.scale, requires_grad=False)


def by_update(live, tensors, **options):
    return live.update(tensors, **options)


def by_feed(live, tensors, **options):
    with live.begin(hw.open(tensors).manifest, **options) as update:
        update.feed(reversed([*tensors.items()]))
        return update.commit()


@pytest.mark.parametrize("first", [True, False], ids=["with first", "without first"])
@pytest.mark.parametrize("process", [None, scaled], ids=["in place", "processed"])
@pytest.mark.parametrize("atomic", WAYS)
@pytest.mark.parametrize("road", [by_update, by_feed])
@pytest.mark.parametrize("kind", KINDS)
def test_with_and_without_in_turn(kind, road, atomic, process, first):
    model = KINDS[kind]()
    live = hw.LiveModel(model, process=process, atomic=atomic)
    address = model.scale.data_ptr()
    live.load(version(1, scale=first), allow_missing="scale")
    had = first
    for number, brings in enumerate((not first, not first, first, True, False, False, True), 2):
        report = road(live, version(number, scale=brings))
        scale = 0.5 + number if brings else 0.25
        assert float(model.scale) == scale, number
        assert (model.weight == (number * scale if process else number)).all(), number
        assert report.restored == (("scale",) if had and not brings else ())
        assert "as before the first load" in str(report) or not report.restored
        had = brings
    assert model.scale.data_ptr() == address


@pytest.mark.parametrize("process", [None, scaled], ids=["in place", "processed"])
@pytest.mark.parametrize("atomic", ["staged", "journal"])
def test_an_abort_leaves_the_scale_that_came(atomic, process):
    model = Loading()
    live = hw.LiveModel(model, process=process, atomic=atomic)
    live.load(version(1, scale=False), allow_missing="scale")
    live.update(version(2, scale=True))
    digest = live.digest()
    with live.begin(hw.open(version(3, scale=False)).manifest) as update:
        update.feed(version(3, scale=False))
        update.prepare()
    assert live.digest() == digest
    live.update(version(4, scale=False))
    assert float(model.scale) == 0.25


def test_torn_then_without():
    """The failed update wrote the scale in place; the version that mends the model does not bring it."""
    model = Loading()
    live = hw.LiveModel(model, atomic=False)
    live.load(version(1, scale=False), allow_missing="scale")
    with live.begin(hw.open(version(2, scale=True)).manifest) as update:
        update.feed({"scale": torch.tensor(2.5)})
        with pytest.raises(hw.UpdateAborted, match="did not come: weight"):
            update.commit()
    assert live.state is hw.State.TORN
    assert float(model.scale) == 2.5
    live.update(version(3, scale=False))
    assert float(model.scale) == 0.25


def test_what_running_code_changes_is_left_alone():
    """A buffer that no version brings belongs to whoever changes it."""
    model = Layer(persistent=True)
    live = hw.LiveModel(model)
    live.load(version(1, scale=False), allow_missing="scale")
    model.scale.fill_(9)
    live.update(version(2, scale=False))
    assert float(model.scale) == 9
    model.scale = torch.tensor(8.0)  # replaced: nobody minds, as long as nothing brings it
    live.update(version(3, scale=False))
    with pytest.raises(hw.UpdateAborted, match="scale: something else replaced or moved it"):
        live.update(version(4, scale=True))


@pytest.mark.parametrize("first", [True, False])
def test_what_was_not_allowed_is_refused_with_the_way_out(first):
    model = Loading()
    live = hw.LiveModel(model)
    live.load(version(1, scale=first))
    digest = live.digest()
    with pytest.raises(hw.UpdateAborted, match=r"scale: . elements would be written.*allow_missing='scale'"):
        live.update(version(2, scale=not first))
    assert live.digest() == digest
    live = hw.LiveModel(Loading())  # as the error says
    live.load(version(1, scale=first), allow_missing="scale")
    live.update(version(2, scale=not first))


def test_by_name_the_way_out_is_an_argument_of_the_first_load():
    live = hw.LiveModel(Layer(persistent=True))
    live.load(version(1, scale=True))
    with pytest.raises(hw.UpdateAborted, match=r"scale: missing(.|\n)*allow_missing=(.|\n)*first load"):
        live.update(version(2, scale=False))


@pytest.mark.parametrize("process", [None, scaled], ids=["in place", "processed"])
def test_a_part_without_it_does_not_put_it_back(process):
    model = Loading()
    live = hw.LiveModel(model, process=process)
    live.load(version(1, scale=False), allow_missing="scale")
    live.update(version(2, scale=True))
    if process is None:
        live.update(version(3, scale=False), only="weight")
        assert float(model.scale) == 2.5
        assert (model.weight == 3).all()
    else:  # The scale that came is in the kernel's weight only: without it there is nothing to process with.
        with pytest.raises(hw.UpdateAborted, match=r"scale: layer .* is processed as one"):
            live.update(version(3, scale=False), only="weight")
    live.update(version(4, scale=True), only=["weight", "scale"])
    assert float(model.scale) == 4.5
    live.update(version(5, scale=False))
    assert float(model.scale) == 0.25


def test_deferred_layers_see_what_was_put_back():
    class Reader(nn.Module):
        def __init__(self, other):
            super().__init__()
            self.other = [other]
            self.w = nn.Parameter(torch.ones(1), requires_grad=False)
            self.register_buffer("seen", torch.zeros(()), persistent=False)

    def process(layer):
        layer.seen.copy_(layer.other[0].scale)

    for atomic in WAYS:
        model = nn.Module()
        model.layer = Layer(persistent=True)
        model.reader = Reader(model.layer)
        live = hw.LiveModel(model, process=process, layers="reader", deferred="reader", atomic=atomic)
        rest = {"reader.w": torch.ones(1)}
        given = [{f"layer.{n}": t for n, t in version(i, scale=i % 2 == 0).items()} | rest for i in range(4)]
        live.load(given[1], allow_missing="*scale")
        for number in (2, 3):
            live.update(given[number])
            assert float(model.reader.seen) == (2.5 if number == 2 else 0.25)


def test_a_failed_first_load_puts_it_back(monkeypatch):
    model = Loading()
    live = hw.LiveModel(model, process=lambda layer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        live.load(version(1, scale=True), allow_missing="scale")
    assert float(model.scale) == 0.25


def test_what_is_kept_is_bounded(monkeypatch):
    """``allow_missing="*"`` keeps no second model. What was not kept must come again."""
    monkeypatch.setattr(optional, "_KEPT_NBYTES", 4)
    model = Loading()
    live = hw.LiveModel(model)
    live.load(version(1, scale=True), allow_missing="*")
    live.update(version(2, scale=False))  # the smaller one was kept
    assert float(model.scale) == 0.25
    with pytest.raises(hw.UpdateAborted, match=r"weight: .*was not kept.* Let them match fewer names"):
        live.update({"scale": torch.tensor(1.0)})
    live = hw.LiveModel(Loading())  # as the error says
    live.load(version(1, scale=True), allow_missing="scale")


def test_what_was_on_meta_has_no_value_to_go_back_to():
    model = Loading(parameter=True)
    model.scale = nn.Parameter(torch.empty((), device="meta"), requires_grad=False)
    live = hw.LiveModel(model)
    live.load(version(1, scale=True), device="cpu", allow_missing="scale")
    with pytest.raises(hw.UpdateAborted, match=r"scale: .*on meta before the first load"):
        live.update(version(2, scale=False))


def test_memory_that_others_see_is_not_put_back():
    """A scale that is a view into the weight: putting it back would write into what came."""
    model = Loading()
    model.scale = model.weight.data[0, 0]
    live = hw.LiveModel(model)
    live.load(version(1, scale=False), allow_missing="scale")
    live.update(version(2, scale=False))
    assert (model.weight == 2).all()


@pytest.mark.parametrize("first", [True, False])
def test_buffers_that_code_computes(first):
    """transformers lets position_ids be missing; checkpoints of old versions bring them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
    )
    model = transformers.CLIPTextModel(config)
    (name,) = (name for name, _ in model.named_buffers() if name.endswith("position_ids"))
    computed = dict(model.named_buffers())[name].clone()
    without = {key: tensor.clone() for key, tensor in model.state_dict().items() if key != name}
    module, key = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    module._non_persistent_buffers_set.discard(key)  # as old versions registered it
    kept = without | {name: computed + 1}
    live = hw.LiveModel(model)
    live.load(kept if first else without, allow_missing=f"*{key}")
    for brings in (not first, first, not first):
        live.update(kept if brings else without)
        assert torch.equal(module._buffers[key], computed + 1 if brings else computed)


# Tied weights: the head is in one of two versions.


@pytest.mark.parametrize("first", [True, False])
def test_a_tied_head_is_filled_compared_or_refused(first):
    def tied(number, *, head, other=None):
        tensors = {"embed.weight": torch.full((2, 2), float(number))}
        return tensors | ({"head.weight": torch.full((2, 2), float(other or number))} if head else {})

    model = nn.ModuleDict({"embed": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 2, bias=False)})
    model["head"].weight = model["embed"].weight
    live = hw.LiveModel(model)
    live.load(tied(1, head=first))
    for number, head in ((2, not first), (3, first), (4, not first)):
        live.update(tied(number, head=head))
        assert (model["head"].weight == number).all()
    with pytest.raises(hw.UpdateAborted, match=r"embed\.weight and head\.weight are one tensor"):
        live.update(tied(5, head=True, other=6))
    assert (model["head"].weight == 4).all()


def test_an_untied_head_that_does_not_come_is_named():
    model = nn.ModuleDict({"embed": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 2, bias=False)})
    live = hw.LiveModel(model)
    live.load({name: torch.ones(2, 2) for name in ("embed.weight", "head.weight")})
    with pytest.raises(hw.UpdateAborted, match=r"head\.weight: missing"):
        live.update({"embed.weight": torch.zeros(2, 2)})


class Heads(nn.Module):
    def __init__(self, labels):
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, labels)


def doubled(layer):
    """Keeps another thing than it was given, under the same name."""
    layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)


@pytest.mark.parametrize("process", [None, doubled], ids=["in place", "processed"])
@pytest.mark.parametrize("atomic", WAYS)
@pytest.mark.parametrize("road", [by_update, by_feed])
@pytest.mark.parametrize("first", [5, 2], ids=["first fits", "first does not"])
def test_another_head_and_the_models_own_in_turn(first, road, atomic, process):
    model = Heads(5)
    before = {name: tensor.clone() for name, tensor in model.head.state_dict().items()}
    live = hw.LiveModel(model, process=process, atomic=atomic)
    live.load(Heads(first).state_dict(), allow_mismatched="head.*")
    addresses = [tensor.data_ptr() for tensor in model.parameters()]
    fitted = first == 5
    for labels in (7 - first, 7 - first, first, 3, 5, 5, 2):
        source = Heads(labels).state_dict()
        report = road(live, source)
        factor = 2 if process else 1
        weight, bias = (
            (source["head.weight"], source["head.bias"]) if labels == 5 else (before["weight"], before["bias"])
        )
        assert torch.equal(model.head.weight, weight * factor)
        assert torch.equal(model.head.bias, bias)
        assert torch.equal(model.body.weight, source["body.weight"] * factor)
        assert report.restored == (("head.bias", "head.weight") if fitted and labels != 5 else ())
        assert sorted(report.mismatched) == ([] if labels == 5 else ["head.bias", "head.weight"])
        fitted = labels == 5
    assert [tensor.data_ptr() for tensor in model.parameters()] == addresses


@pytest.mark.parametrize("process", [None, doubled], ids=["in place", "processed"])
@pytest.mark.parametrize("atomic", ["staged", "journal"])
def test_an_abort_leaves_the_head_that_was_kept(atomic, process):
    model = Heads(5)
    live = hw.LiveModel(model, process=process, atomic=atomic)
    live.load(Heads(2).state_dict(), allow_mismatched="head.*")
    digest = live.digest()
    with pytest.raises(hw.UpdateAborted, match="returned False"):
        live.update(Heads(5).state_dict(), check=lambda model: False)
    assert live.digest() == digest
    source = Heads(5).state_dict()
    live.update(source)
    assert torch.equal(model.head.bias, source["head.bias"])


def test_a_head_too_large_to_keep_is_refused_and_the_advice_works(monkeypatch):
    monkeypatch.setattr(optional, "_KEPT_NBYTES", 16)
    model, source = Heads(50), Heads(50).state_dict()
    live = hw.LiveModel(model)
    live.load(Heads(2).state_dict(), allow_mismatched="head.*")
    before = live.digest()
    with pytest.raises(hw.UpdateAborted, match=r"head\.weight: .*was not kept.* or make a new live model for versions"):
        live.update(source)
    assert live.digest() == before
    live = hw.LiveModel(model)
    live.load(source)
    assert torch.equal(model.head.weight, source["head.weight"])
