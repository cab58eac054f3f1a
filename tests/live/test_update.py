"""The handle and its rules: begin, feed, prepare, commit, abort; versions, manifests, partial updates, lifetimes."""

import gc
import warnings
import weakref

import pytest
import torch
import zoo
from torch import nn

import hotweights as hw
from hotweights.testing import assert_same_bits, write_checkpoint

WAYS = ("journal", "staged", False)
SPEC = zoo.Spec(
    (("Plain", "transpose"), ("Tied", "in_place", "nothing"), ("Aliased", "quantise"), ("Plain", "nothing"))
)


def loaded(spec=SPEC, **options):
    model = zoo.Model(spec)
    live = zoo.live_model(model, **options)
    live.load(zoo.checkpoint(spec, 0), version="N", **zoo.allowed(model))
    return model, live


def holds(model, seed, spec=SPEC):
    assert_same_bits(zoo.state(model), zoo.state(zoo.cold(spec, seed)))


# Rules.


def test_the_life_of_an_update():
    model, live = loaded()
    with live.begin() as update:
        assert live.state is hw.State.UPDATING
        assert set(update.manifest) == set(zoo.checkpoint(SPEC, 0))
        update.feed(zoo.checkpoint(SPEC, 1))
        update.prepare()
        assert (live.state, live.version) == (hw.State.PREPARED, "N")
        update.prepare()
        with pytest.raises(hw.UsageError, match="prepared"):
            update.feed({})
        report = update.commit("M")
    assert (report.version, report.previous, live.version, live.state) == ("M", "N", "M", hw.State.SERVING)
    holds(model, 1)
    for act in (update.commit, update.prepare, lambda: update.feed({})):
        with pytest.raises(hw.UsageError, match="over"):
            act()
    update.abort()
    holds(model, 1)


@pytest.mark.parametrize("atomic", ["journal", "staged"])
def test_leaving_the_block_aborts(atomic):
    model, live = loaded(atomic=atomic)
    for prepared in (False, True):
        with live.begin() as update:
            update.feed(zoo.checkpoint(SPEC, 1))
            if prepared:
                update.prepare()
        holds(model, 0)
        assert (live.state, live.version) == (hw.State.SERVING, "N")
        with pytest.raises(hw.UsageError, match="over"):
            update.commit()


def test_a_forgotten_update_is_told_and_aborted():
    model, live = loaded()
    update = live.begin()
    update.feed(zoo.checkpoint(SPEC, 1))
    with pytest.warns(ResourceWarning, match="neither committed nor aborted"):
        del update
    holds(model, 0)
    live.update(zoo.checkpoint(SPEC, 1))


def test_one_update_at_a_time():
    model, live = loaded()
    with live.begin() as update:
        for act in (live.begin, lambda: live.update(zoo.checkpoint(SPEC, 1))):
            with pytest.raises(hw.UsageError, match="another update runs"):
                act()
        update.feed(zoo.checkpoint(SPEC, 2))
        update.commit()
    holds(model, 2)


WRONG = {
    "name": ("unexpected", lambda one: {"nobody": torch.zeros(1)}),
    "shape": ("is expected, as in the live version", lambda one: {"plain0.weight": torch.zeros(1)}),
    "dtype": ("I32 came, and the live version came as F32", lambda one: {"plain0.weight": one["plain0.weight"].int()}),
    "twice": ("came twice", lambda one: {"plain0.weight": one["plain0.weight"]}),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("atomic", WAYS)
def test_what_was_not_promised_is_refused(atomic, wrong):
    model, live = loaded(atomic=atomic)
    words, pairs = WRONG[wrong]
    tensors = zoo.checkpoint(SPEC, 1)
    with live.begin() as update:
        update.feed({name: one for name, one in tensors.items() if name != "plain0.weight" or wrong == "twice"})
        with pytest.raises(hw.UpdateAborted, match=words):
            update.feed(pairs(tensors))
    if atomic:
        holds(model, 0)
        assert live.state is hw.State.SERVING
    else:
        assert live.state is hw.State.TORN
    live.update(tensors)
    holds(model, 1)


@pytest.mark.parametrize("atomic", WAYS)
def test_what_did_not_come_is_named(atomic):
    model, live = loaded(atomic=atomic)
    with live.begin() as update:
        update.feed({name: one for name, one in zoo.checkpoint(SPEC, 1).items() if name != "aliased2.other"})
        with pytest.raises(hw.UpdateAborted, match=r"1 tensors .* aliased2.other"):
            update.commit()
    assert live.state is (hw.State.SERVING if atomic else hw.State.TORN)
    live.update(zoo.checkpoint(SPEC, 0))
    holds(model, 0)


def test_a_manifest_that_does_not_fit_changes_nothing():
    """Every problem at once, before anything is written."""
    model, live = loaded()
    tensors = zoo.checkpoint(SPEC, 1)
    del tensors["tied1.weight"], tensors["aliased2.other"]
    for atomic in WAYS:
        with pytest.raises(hw.UpdateAborted) as error:
            live.update(tensors, atomic=atomic)
        assert {"tied1.embed.weight", "aliased2.other.weight"} <= set(str(error.value).replace(":", " ").split())
        assert live.state is hw.State.SERVING
        holds(model, 0)
    with pytest.raises(hw.UpdateAborted, match="cannot be opened"):
        live.update("/nowhere/at/all")
    holds(model, 0)


def test_casts_and_broadcasts_are_problems():
    """Copied naively, 383 becomes 384 and four numbers become sixteen."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)})
    naive = model["a"].weight.detach().clone()
    assert float(naive.copy_(torch.full((4,), 383))[0, 0]) == 384
    live = hw.LiveModel(model)
    live.load({"a.weight": torch.ones(4, 4, dtype=torch.bfloat16)})
    digest = live.digest()
    for wrong in (torch.full((4, 4), 383), torch.ones(4, dtype=torch.bfloat16), torch.ones(4, 4)):
        with pytest.raises(hw.UpdateAborted, match=r"a\.weight"):
            live.update({"a.weight": wrong}, cast="error")
        assert live.digest() == digest


def test_the_order_of_the_manifest_says_nothing():
    """A loader that trusts it writes the wrong tensors."""
    tensors = {"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(2, 2)}
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "ab"})
    live = hw.LiveModel(model)
    live.load(tensors)
    turned = hw.Manifest(list(hw.open(tensors).manifest.values())[::-1])
    naive = dict(zip(turned, tensors.values(), strict=True))
    assert not torch.equal(naive["a.weight"], tensors["a.weight"])
    live.update(hw.from_iterator(tensors.items(), manifest=turned))
    assert_same_bits(dict(model.named_parameters()), tensors)


def test_versions():
    _, live = loaded()
    tensors = zoo.checkpoint(SPEC, 1)
    assert live.update(tensors).version == "2"  # The second commit, as text like the name before.
    assert live.update(tensors, version=0).version == 0
    source = hw.open(tensors)
    source.version = "the source's"
    assert live.update(source).version == "the source's"
    assert live.update(source, version="mine").version == "mine"
    for wrong in (1.5, True, ("a",)):
        with pytest.raises(hw.UsageError, match="a version is"):
            live.update(tensors, version=wrong)
        with live.begin() as update:
            update.feed(tensors)
            with pytest.raises(hw.UsageError, match="a version is"):
                update.commit(wrong)
    assert live.version == "mine"


def test_what_an_empty_model_and_a_loaded_one_refuse():
    live = zoo.live_model(zoo.Model(SPEC))
    for act in (live.begin, lambda: live.update(zoo.checkpoint(SPEC, 0))):
        with pytest.raises(hw.UsageError, match="use load"):
            act()
    live.load(zoo.checkpoint(SPEC, 0))
    with pytest.raises(hw.UsageError, match="use update"):
        live.load(zoo.checkpoint(SPEC, 0))
    for wrong in ("all", None.__class__, 1, True):
        with pytest.raises(hw.UsageError, match="atomic"):
            live.begin(atomic=wrong)
    live.update(zoo.checkpoint(SPEC, 1))


def test_a_load_onto_meta_that_fails_can_be_repeated():
    class Failing(nn.Linear):
        fails = True

    def process(layer):
        layer.weight = nn.Parameter(layer.weight.t().contiguous(), requires_grad=False)
        if Failing.fails and layer is model[1]:
            raise RuntimeError("injected")

    with torch.device("meta"):
        model = nn.Sequential(*(Failing(3, 3, bias=False) for _ in range(3)))
    tensors = {f"{n}.weight": torch.rand(3, 3) for n in range(3)}
    live = hw.LiveModel(model, process=process)
    with pytest.raises(RuntimeError, match="injected"):
        live.load(tensors, device="cpu")
    assert all(one.is_meta for one in model.parameters())
    assert live.state is hw.State.EMPTY
    Failing.fails = False
    live.load(tensors, device="cpu")
    assert_same_bits(dict(model.named_parameters()), {name: one.t().contiguous() for name, one in tensors.items()})


# Partial updates.


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("atomic", WAYS)
def test_a_declared_part_is_updated_and_nothing_else(atomic, whole):
    model, live = loaded(atomic=atomic)
    new = zoo.checkpoint(SPEC, 1)
    part = new if whole else {"plain0.weight": new["plain0.weight"], "tied1.weight": new["tied1.weight"]}
    report = live.update(part, only=["plain0.*", "tied1.head.*"], version="part")  # Tied: under any of its names.
    mixed = {**zoo.checkpoint(SPEC, 0), **{name: new[name] for name in ("plain0.weight", "tied1.weight")}}
    expected = zoo.Model(SPEC)
    zoo.live_model(expected).load(mixed)
    assert_same_bits(zoo.state(model), zoo.state(expected))
    assert live.version == "part"
    assert report.bytes_read == 2 * zoo.N * zoo.N * 4
    live.update(zoo.checkpoint(SPEC, 2))
    holds(model, 2)


def promised(live):
    with live.begin() as update:
        return list(update.manifest)


def test_a_push_of_a_part_promises_only_that():
    _, live = loaded()
    with live.begin(only="plain0.*") as update:
        assert list(update.manifest) == ["plain0.weight"]
        update.feed({"plain0.weight": zoo.checkpoint(SPEC, 1)["plain0.weight"]})
        update.commit()
    assert promised(live) == list(zoo.checkpoint(SPEC, 0))


@pytest.mark.parametrize(
    ("only", "given", "named"),
    [
        ("fused0.*", ("fused0.q",), "fused0.inner.weight"),
        ("composed1.inner.weight", ("composed1.weight",), "composed1.inner.extra"),
        ("nothing.*", ("fused0.q", "fused0.k", "fused0.v"), "matches no tensor"),
    ],
)
@pytest.mark.parametrize("atomic", WAYS)
def test_a_part_of_a_layer_is_refused_by_name(atomic, only, given, named):
    spec = zoo.Spec((("Fused", "transpose"), ("Composed", "transpose")))
    model, live = loaded(spec)
    tensors = zoo.checkpoint(spec, 1)
    with pytest.raises(hw.UpdateAborted, match=named):
        live.update({name: tensors[name] for name in given}, only=only, atomic=atomic)
    holds(model, 0, spec)
    assert live.state is hw.State.SERVING


# Other manifests.


class Renaming(zoo.Model):
    """Takes its own names, older ones, and other dtypes."""

    def load_weights(self, pairs):
        super().load_weights((name.removeprefix("model."), one) for name, one in pairs)


@pytest.mark.parametrize("processed", ["all", "quant_method", "none"])
def test_another_manifest_is_traced_anew(processed):
    spec = SPEC._replace(processed=processed)
    model = Renaming(spec)
    live = zoo.live_model(model)
    live.load(zoo.checkpoint(spec, 0))
    before = zoo.addresses(model)
    for seed, change in enumerate(
        (
            lambda name, one: (f"model.{name}", one),
            lambda name, one: (name, one.bfloat16()),
            lambda name, one: (f"model.{name}", one.double()),
        ),
        1,
    ):
        tensors = dict(change(name, one) for name, one in zoo.checkpoint(spec, seed).items())
        for _ in range(2):
            live.update(tensors)
            expected = Renaming(spec)
            expected.load_weights(tensors.items())
            for layer in expected.modules() if processed != "none" else ():
                zoo.process(layer)
            assert_same_bits(zoo.state(model), zoo.state(expected))
            assert zoo.words(model) == zoo.words(expected)
            assert zoo.addresses(model) == before
        assert promised(live) == list(tensors)
        with live.begin(hw.open(zoo.checkpoint(spec, 0)).manifest):
            pass
        assert promised(live) == list(tensors), "an update that was aborted leaves no manifest"


class Mapped(nn.Module):
    """Reads a table of the model while it loads, as expert maps are read."""

    def __init__(self):
        super().__init__()
        self.experts = zoo.parameter(2, 4)
        self.register_buffer("table", torch.tensor([0, 1]), persistent=False)

    def load_weights(self, pairs):
        for name, one in pairs:
            self.experts.data[self.table[int(name)].item()] = one


@pytest.mark.parametrize("process", [None, lambda layer: layer.experts.data.mul_(2)])
def test_a_plan_holds_for_the_values_that_it_read(process):
    model = Mapped()
    live = hw.LiveModel(model, process=process)
    tensors = {"0": torch.full((4,), 1.0), "1": torch.full((4,), 2.0)}
    live.load(tensors)
    factor = 1 if process is None else 2
    assert model.experts[:, 0].tolist() == [factor, 2 * factor]
    model.table.copy_(torch.tensor([1, 0]))
    live.update(tensors)
    assert model.experts[:, 0].tolist() == [2 * factor, factor]
    assert model.table.tolist() == [1, 0]


def test_an_update_covers_what_the_first_load_covered():
    model = zoo.Model(zoo.Spec((("Kept", "nothing"),), "none"))
    live = hw.LiveModel(model)
    tensors = {"kept0.weight": torch.rand(zoo.N - 1, zoo.N)}
    live.load(tensors, allow_partial="*")
    digest = live.digest()
    zoo.Kept.take, whole = lambda self, name, one: self.inner.weight.data.copy_(one), zoo.Kept.take
    try:
        with pytest.raises(hw.UpdateAborted, match="16 elements would be written, not the 12"):
            live.update({"kept0.weight": torch.rand(zoo.N, zoo.N)})
    finally:
        zoo.Kept.take = whole
    assert live.digest() == digest


# What is live.


@pytest.mark.parametrize("atomic", WAYS)
def test_tied_weights_that_differ_are_refused(atomic):
    """A loader by name keeps whichever comes last."""
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    live = hw.LiveModel(model, atomic=atomic)
    both = {"embed.weight": torch.rand(4, 3)} | {"head.weight": torch.rand(4, 3)}
    live.load(dict.fromkeys(both, both["embed.weight"]))
    digest = live.digest()
    with pytest.raises(hw.UpdateAborted, match="differ"):
        live.update(both)
    assert live.digest() == digest
    assert live.state is hw.State.SERVING
    both["embed.weight"] += 1
    with live.begin() as update, pytest.raises(hw.UpdateAborted, match="differ"):
        update.feed(both)
    assert (live.digest() == digest) == (atomic is not False)
    assert live.state is (hw.State.SERVING if atomic else hw.State.TORN)
    live.update(dict.fromkeys(both, both["head.weight"]))
    assert model["head"].weight is model["embed"].weight
    assert torch.equal(model["embed"].weight, both["head.weight"])


@pytest.mark.parametrize("atomic", WAYS)
def test_a_tensor_that_was_moved_is_named(atomic):
    model, live = loaded(atomic=atomic)
    digest = live.digest()
    before = model.plain0.inner.weight.data  # Kept: tensors of the checkpoint might be made in its memory.
    model.plain0.inner.weight.data = before.clone()
    with pytest.raises(hw.UpdateAborted, match=r"plain0\.inner\.weight"):
        live.update(zoo.checkpoint(SPEC, 1))
    assert live.digest() == digest


@pytest.mark.parametrize("atomic", WAYS)
@pytest.mark.parametrize("process", [None, lambda layer: None])
def test_its_own_tensors_can_be_its_source(atomic, process):
    """Written layer by layer, a swap would read what it has just written."""
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "ab"})
    live = hw.LiveModel(model, process=process, atomic=atomic)
    tensors = {"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(2, 2)}
    live.load(tensors)
    live.update({"a.weight": model["b"].weight, "b.weight": model["a"].weight})
    assert_same_bits(dict(model.named_parameters()), {"a.weight": tensors["b.weight"], "b.weight": tensors["a.weight"]})


@pytest.mark.parametrize("atomic", WAYS)
def test_what_serving_changed_is_kept(atomic):
    """Counters, caches and frozen parameters that neither the update nor processing touches."""
    spec = zoo.Spec((("Plain", "once"), ("Plain", "derived")))
    model, live = loaded(spec, atomic=atomic)
    inner = model.plain0.inner
    inner.constant.fill_(7)
    inner.served = 5
    inner.cache = torch.ones(3)
    inner.weight.requires_grad_(True)
    inner.weight.seen = "by the server"
    cache = inner.cache
    live.update(zoo.checkpoint(spec, 1))
    assert (float(inner.constant), inner.served, inner.cache is cache) == (7.0, 5, True)
    assert inner.weight.requires_grad
    assert inner.weight.seen == "by the server"
    assert inner.times == 1
    assert torch.equal(model.plain1.inner.weight, zoo.cold(spec, 1).plain1.inner.weight)
    inner.cache = torch.ones(9)  # Others may replace what is theirs.
    live.update(zoo.checkpoint(spec, 2))
    assert inner.cache.shape == (9,)


def test_another_shape_after_processing_is_an_error_before_the_commit():
    widths = [4]

    def process(layer):
        layer.weight = nn.Parameter(layer.weight.new_zeros(widths[0]), requires_grad=False)

    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    live = hw.LiveModel(model, process=process)
    live.load({"0.weight": torch.rand(4, 4)})
    digest, widths[0] = live.digest(), 5
    with pytest.raises(hw.UpdateAborted, match=r"0\.weight: torch.float32 \[4\] is live, processing made .*\[5\]"):
        live.update({"0.weight": torch.rand(4, 4)})
    assert live.digest() == digest


@pytest.mark.parametrize("atomic", WAYS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("then", [True, False])
def test_inference_mode(atomic, first, then):
    model = zoo.Model(SPEC)
    live = zoo.live_model(model, atomic=atomic)
    with torch.inference_mode(first):
        live.load(zoo.checkpoint(SPEC, 0))
    for seed in (1, 2):
        with torch.inference_mode(then):
            live.update(zoo.checkpoint(SPEC, seed))
        holds(model, seed)
        with torch.inference_mode(then), live.begin() as update:
            update.feed(zoo.checkpoint(SPEC, 0))
            update.commit()
        holds(model, 0)


@pytest.mark.parametrize("process", [None, lambda layer: layer.weight.data.mul_(2)])
def test_models_made_under_inference_mode(process):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(2, 2, bias=False))
    live = hw.LiveModel(model, process=process)
    live.load({"0.weight": torch.ones(2, 2)})
    live.update({"0.weight": torch.full((2, 2), 3.0)})
    assert float(model[0].weight[0, 0]) == (3 if process is None else 6)


def test_a_root_module_with_tensors_of_its_own():
    model = nn.Linear(2, 2)
    model.add_module("child", nn.Linear(2, 2))
    live = hw.LiveModel(model, process=lambda layer: layer.weight.data.mul_(2))
    tensors = {name: torch.rand(one.shape) for name, one in model.state_dict().items()}
    live.load(tensors)
    for number in (2, 3):
        with live.begin() as update:
            update.feed({name: one * number for name, one in tensors.items()})
            update.commit()
        assert torch.equal(model.weight, tensors["weight"] * number * 2)
        assert torch.equal(model.child.weight, tensors["child.weight"] * number * 2)
        assert torch.equal(model.bias, tensors["bias"] * number)


# Lifetimes.


class Plain(nn.Module):
    """No cycles of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)


@pytest.mark.parametrize("process", [None, lambda layer: layer.weight.data.mul_(2)])
@pytest.mark.parametrize("atomic", WAYS)
def test_a_dropped_live_model_is_freed_at_once(tmp_path, atomic, process):
    """No cycle: not after updates, aborts, failing hooks or pushes."""
    tensors = {"layer.weight": torch.rand(2, 2)}
    path = write_checkpoint(tmp_path, tensors)
    gc.collect()
    gc.disable()
    try:
        model = Plain()
        live = hw.LiveModel(model, process=process, atomic=atomic)
        live.load(path)
        failing = [True]

        def hook(version):
            if failing[0]:
                raise RuntimeError("injected")

        live.on_commit(hook)
        with pytest.raises(hw.CommitHookError):
            live.update(path)
        failing[0] = False
        with live.begin() as update:
            update.feed(tensors)
            update.commit()
        with pytest.raises(hw.UpdateAborted):
            live.update({})
        with pytest.raises(hw.UpdateAborted), live.begin() as update:
            update.feed({"nobody": torch.zeros(1)})
        with live.begin() as update:
            update.feed(tensors)
        found = weakref.ref(live), weakref.ref(model.layer.weight)
        del live, model, update, hook
        assert [one() for one in found] == [None, None]
    finally:
        gc.enable()


def test_the_report_prints_and_its_timeline_is_saved(tmp_path):
    _, live = loaded()
    report = live.update(zoo.checkpoint(SPEC, 1), version="M")
    assert "N -> M" in str(report)
    report.save_timeline(tmp_path / "t.json")
    assert '"traceEvents"' in (tmp_path / "t.json").read_text()
    assert {"read", "process", "write", "prepare", "commit"} <= {event.what for event in report.events}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "SERVING".lower() in repr(live)


def test_what_processing_makes_is_new_also_when_it_is_as_at_first():
    """A buffer that no checkpoint carries: by chance it gets the value that it had before the first load."""

    def process(layer):
        layer.largest.copy_(layer.weight.data.max())

    model = nn.Module()
    model.weight = zoo.parameter(2, 2)
    model.register_buffer("largest", torch.zeros(()), persistent=False)
    live = hw.LiveModel(model, process=process)
    live.load({"weight": torch.ones(2, 2)})
    for value in (0.0, 3.0, 0.0):
        live.update({"weight": torch.full((2, 2), value)})
        assert float(model.largest) == value


# What ends an update.


def linear(**options):
    model = nn.Linear(2, 2)
    live = hw.LiveModel(model, **options)
    live.load({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, allow_missing="bias")
    return model, live


@pytest.mark.parametrize("only", ["*", "bias", ["weight", "bias"]])
@pytest.mark.parametrize("process", [None, lambda layer: None])
def test_only_asks_for_what_does_not_come(only, process):
    model, live = linear(process=process)
    weights = {"weight": torch.ones(2, 2)}
    manifest = hw.open(weights).manifest
    for act in (lambda: live.update(weights, only=only), lambda: live.begin(manifest, only=only)):
        with pytest.raises(hw.UpdateAborted, match="bias: ") as caught:
            act()
        assert isinstance(caught.value.__cause__, hw.PlanError)
    assert (live.state, live.version) == (hw.State.SERVING, 1)
    assert (model.weight == 0).all()


class Strange(Exception):
    """An error of the trainer's own."""


def raising(error):
    yield "weight", torch.ones(2, 2)
    raise error


ENDS = [Strange("the trainer is gone"), KeyError("weight"), OSError(5, "Input/output error"), MemoryError()]


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("promised", [True, False])
@pytest.mark.parametrize("atomic", ["staged", "journal"])
def test_whatever_an_iterator_raises_is_the_cause(error, promised, atomic):
    model, live = linear()
    with (
        hw.from_iterator(raising(error), hw.open(model).manifest if promised else None) as source,
        pytest.raises(hw.UpdateAborted, match=f"version 1 is live.*{type(error).__name__}") as caught,
    ):
        live.update(source, atomic=atomic)
    assert caught.value.__cause__ is error
    assert (live.state, live.version) == (hw.State.SERVING, 1)
    assert (model.weight == 0).all()


@pytest.mark.parametrize("promised", [True, False])
def test_an_iterator_that_gives_no_tensors_ends_the_update_too(promised):
    model, live = linear()
    with (
        hw.from_iterator([("weight", "no tensor")], hw.open(model).manifest if promised else None) as source,
        pytest.raises(hw.UpdateAborted, match="is a str") as caught,
    ):
        live.update(source)
    assert isinstance(caught.value.__cause__, hw.UsageError)


def test_an_interruption_is_no_failure_of_the_update():
    _, live = linear()
    with hw.from_iterator(raising(KeyboardInterrupt())) as source, pytest.raises(KeyboardInterrupt):
        live.update(source)
    assert live.version == 1


class Moody(nn.Linear):
    """Its loading code works once."""

    loads = 0

    def load_weights(self, pairs):
        if self.loads:
            raise Strange("not again")
        for name, tensor in pairs:
            self.get_parameter(name).data.copy_(tensor)


def test_what_the_models_own_code_raises_while_it_is_traced_is_the_cause():
    model = Moody(2, 2)
    live = hw.LiveModel(model)
    live.load({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)})
    model.loads = 1
    with pytest.raises(hw.UpdateAborted, match="not again"):
        live.update({"weight": torch.ones(2, 2), "bias": torch.zeros(2), "scale": torch.ones(1)})
    assert live.state is hw.State.SERVING


def test_advice_that_the_first_load_could_not_follow_either_does_not_point_there():
    live = hw.LiveModel(nn.Linear(2, 2))
    live.load(nn.Linear(2, 2))
    with pytest.raises(hw.UpdateAborted, match="use from_pretrained for this one") as refused:
        live.update({"bias": torch.zeros(2), "net.qweight": torch.zeros(2, 2)})
    assert "first load" not in refused.value.advice
    with pytest.raises(hw.UpdateAborted, match="first load") as refused:
        live.update({"weight": torch.zeros(2, 2)})
    assert "allow_missing=" in refused.value.advice


class Larger(nn.Module):
    """Keeps the larger of what it has and what comes, as loading code of shards does with their scales."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(2), requires_grad=False)

    def load_weights(self, pairs):
        for _, tensor in pairs:
            self.scale.data.copy_(torch.maximum(self.scale.data, tensor))


@pytest.mark.parametrize("process", [None, lambda layer: None])
def test_what_loading_code_writes_is_read_as_before_the_first_load(process):
    """Else a version would hold what the one before it was."""
    live = hw.LiveModel(Larger(), process=process)
    for value in (3.0, 2.0, 4.0, 1.0):
        scales = {f"{shard}.scale": torch.full((2,), value + number) for number, shard in enumerate("qk")}
        live.update(scales) if live.version else live.load(scales)
        assert live.model.scale.tolist() == [value + 1] * 2
    with pytest.raises(hw.UpdateAborted, match="scale: is read as it was before the first load"):
        live.update({name: tensor.double() for name, tensor in scales.items()})
    assert live.model.scale.tolist() == [2.0] * 2
