"""Wrapper subclasses: torchao's int8 tensors are looked into, compared, journaled, staged and kept in place."""

import itertools
import sys

import pytest
import torch
import whole
from torch import nn

import hotweights as hw
from hotweights.engines.torchao import quantise
from hotweights.memory import host

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's own, about itself
WAYS = ("journal", "staged", False)


def configs():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    return {"weight-only": Int8WeightOnlyConfig(), "dynamic": Int8DynamicActivationInt8WeightConfig()}


def plain():
    return nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 12,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))


def checkpoint(make, seed):
    model, made = make(), torch.Generator().manual_seed(seed)
    return {name: torch.rand(one.shape, generator=made) for name, one in model.named_parameters()}


def cold(make, kind, seed):
    """Loaded and quantised as people do it, without hotweights."""
    from torchao.quantization import quantize_

    model = make()
    model.load_state_dict(checkpoint(make, seed), strict=False)  # without the tied name
    quantize_(model, configs()[kind])
    return model


def loaded(make, kind, process=None, **options):
    model = make()
    live = hw.LiveModel(model, process=process or quantise(configs()[kind]), **options)
    live.load(checkpoint(make, 0))
    return model, live


def answer(model):
    with torch.no_grad():
        out = model(torch.arange(12).view(2, 6))
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("atomic", WAYS)
@pytest.mark.parametrize("kind", ["weight-only", "dynamic"])
@pytest.mark.parametrize("make", [plain, llama])
def test_an_update_is_a_cold_load(make, kind, atomic):
    model, live = loaded(make, kind, atomic=atomic)
    where, held, digests = whole.addresses(model), whole.objects(model), set()
    for seed in (1, 2):
        live.update(checkpoint(make, seed))
        expected = cold(make, kind, seed)
        assert whole.values(model) == whole.values(expected)
        assert torch.equal(answer(model), answer(expected))
        assert whole.addresses(model) == where
        assert whole.objects(model) == held
        digests.add(live.digest().whole)
    assert len(digests) == 2
    assert any(name.endswith("weight.qdata") for name in live.digest().tensors)


class Fault:
    def __init__(self, at):
        self.at, self.happened = at, False

    def __call__(self):
        self.at -= 1
        if self.at == -1:
            self.happened = True
            raise RuntimeError("injected")


def interrupted(tensors, fault):
    for pair in tensors.items():
        fault()
        yield pair


def failing(fault, work):
    def done(*args):
        result = work(*args)
        fault[0]()
        return result

    return done


@pytest.mark.parametrize("atomic", WAYS[:2])
@pytest.mark.parametrize("step", ["process", "write", "read"])
def test_an_abort_at_every_step_puts_everything_back(monkeypatch, atomic, step):
    fault = [lambda: None]
    process = quantise(configs()["weight-only"])
    model, live = loaded(plain, "", failing(fault, process) if step == "process" else process, atomic=atomic)
    live.update(checkpoint(plain, 1))
    before, digest = whole.everything(model), live.digest()
    if step == "write":
        copy = host.copy_bytes
        monkeypatch.setattr(host, "copy_bytes", failing(fault, copy))
    for k in itertools.count():
        fault[0] = Fault(k)
        source = checkpoint(plain, 2)
        try:
            with live.begin() as update:
                update.feed(interrupted(source, fault[0]) if step == "read" else source)
                update.commit()
        except hw.UpdateAborted:
            fault[0] = lambda: None
        else:
            break
        assert whole.everything(model) == before
        assert live.digest() == digest
    assert k > 2
    assert whole.values(model) == whole.values(cold(plain, "weight-only", 2))


def test_only_one_layer_of_quantised_ones():
    model, live = loaded(plain, "weight-only")
    live.update(checkpoint(plain, 1), only="1.*")
    mixed = {**checkpoint(plain, 0), **{n: t for n, t in checkpoint(plain, 1).items() if n.startswith("1.")}}
    live_values = whole.values(model)
    live.update(mixed)
    assert whole.values(model) == live_values


def test_another_quantisation_than_the_first_time_is_refused():
    quantisers = [quantise(configs()["weight-only"])]
    model, live = loaded(plain, "", lambda layer: quantisers[0](layer))
    before = whole.everything(model)
    quantisers[0] = quantise(configs()["dynamic"])
    with pytest.raises(hw.UpdateAborted, match=r"1\.weight: .* is live, processing made"):
        live.update(checkpoint(plain, 1))
    assert whole.everything(model) == before
    quantisers[0] = lambda layer: None
    with pytest.raises(hw.UpdateAborted, match=r"1\.weight\.qdata: is gone"):
        live.update(checkpoint(plain, 1))
    assert whole.everything(model) == before


def test_torchao_is_imported_when_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(hw.MissingPackage, match=r"hotweights\[torchao\]"):
        quantise(object())


def test_a_config_of_another_library_is_refused():
    with pytest.raises(hw.UsageError, match="config of torchao's"):
        quantise("int8")


# Into each other: a model that is quantised already takes weights that are quantised in the same way.


def every_config():
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    return configs() | {
        "grouped": Int8WeightOnlyConfig(granularity=PerGroup(4)),
        "float8": Float8WeightOnlyConfig(),
        "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(4)),
    }


KINDS = ("weight-only", "dynamic", "grouped", "float8", "int4")


def quantised(kind, seed=0, make=plain):
    from torchao.quantization import quantize_

    model = make()
    model.load_state_dict(checkpoint(make, seed), strict=False)
    quantize_(model, every_config()[kind])
    return model


def wider():
    return nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4, bias=False))


def versions(model):
    return [parameter._version for parameter in model.parameters()]


@pytest.mark.parametrize("given", [lambda model: model, lambda model: model.state_dict(), hw.open])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_takes_one_of_the_same_kind(kind, given):
    model, source = quantised(kind, 0), quantised(kind, 1)
    where, held, before = whole.addresses(model), whole.objects(model), versions(model)
    report = hw.load(model, given(source))
    assert whole.values(model) == whole.values(source)
    assert torch.equal(answer(model), answer(source))
    assert (whole.addresses(model), whole.objects(model)) == (where, held)
    assert all(new > old for new, old in zip(versions(model), before, strict=True))
    assert "1.weight.qdata" in report.tensors[hw.Fate.WRITTEN]


def test_quantised_models_of_transformers_take_each_other():
    model, source = quantised("weight-only", 0, llama), quantised("weight-only", 1, llama)
    hw.load(model, source)
    assert whole.values(model) == whole.values(source)
    live = hw.LiveModel(model)
    live.load(source)
    live.update(quantised("weight-only", 2, llama))
    assert whole.values(model) == whole.values(quantised("weight-only", 2, llama))


@pytest.mark.parametrize("atomic", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_live_quantised_model_takes_updates_of_its_kind(kind, atomic):
    model = quantised(kind)
    live = hw.LiveModel(model, atomic=atomic)
    where, held = whole.addresses(model), whole.objects(model)
    live.load(quantised(kind, 1))
    for seed in (2, 3):
        before, digest = versions(model), live.digest()
        live.update(quantised(kind, seed).state_dict())
        assert whole.values(model) == whole.values(quantised(kind, seed))
        assert (whole.addresses(model), whole.objects(model)) == (where, held)
        assert all(new > old for new, old in zip(versions(model), before, strict=True))
        assert live.digest() != digest


@pytest.mark.parametrize("atomic", WAYS[:2])
def test_an_aborted_update_of_quantised_weights_leaves_none(monkeypatch, atomic):
    model = quantised("grouped")
    live = hw.LiveModel(model, atomic=atomic)
    live.load(quantised("grouped", 1))
    before, digest = whole.everything(model), live.digest()
    fault = [lambda: None]
    borrow = hw.open({}).__class__.borrow
    monkeypatch.setattr(hw.open({}).__class__, "borrow", lambda self, name: (fault[0](), borrow(self, name))[1])
    for k in itertools.count():
        fault[0] = Fault(k)
        try:
            live.update(quantised("grouped", 2))
        except hw.UpdateAborted:
            assert whole.everything(model) == before
            assert live.digest() == digest
        else:
            break
    assert k > 6
    assert whole.values(model) == whole.values(quantised("grouped", 2))


@pytest.mark.parametrize(
    ("kind", "other", "words"),
    [
        ("weight-only", "dynamic", r"act_quant_kwargs None expected, QuantizeTensorToInt8Kwargs.* found"),
        ("dynamic", "weight-only", r"act_quant_kwargs .* expected, None found"),
        ("weight-only", "grouped", r"block_size \[1, 8\] expected, \[1, 4\] found"),
        ("float8", "weight-only", r".*Float8Tensor expected, .*Int8Tensor found"),
        ("grouped", "int4", r".*Int8Tensor expected, .*IntxUnpackedToInt8Tensor found"),
    ],
)
def test_another_kind_is_refused_and_what_differs_is_named(kind, other, words):
    model = quantised(kind)
    before = whole.everything(model)
    with pytest.raises(hw.PlanError, match=r"1\.weight: wrapped tensors are not of one kind: " + words):
        hw.load(model, quantised(other, 1))
    live = hw.LiveModel(model)
    live.load(quantised(kind))
    with pytest.raises(hw.UpdateAborted, match=words):
        live.update(quantised(other, 1))
    assert whole.everything(model) == before


def test_a_kept_plan_does_not_take_another_kind(tmp_path):
    model, source = quantised("weight-only"), quantised("weight-only", 1)
    plan = hw.trace(model, source)
    for cache_dir in (None, tmp_path, tmp_path):
        hw.load(model, source, cache=True, cache_dir=cache_dir)
        with pytest.raises(hw.PlanError, match="act_quant_kwargs"):
            hw.load(model, quantised("dynamic", 1), cache=True, cache_dir=cache_dir)
        with pytest.raises(hw.PlanError, match="act_quant_kwargs"):
            hw.load(quantised("dynamic"), source, cache=True, cache_dir=cache_dir)
    model[3].weight, weight = quantised("dynamic")[3].weight, model[3].weight
    with pytest.raises(hw.PlanError, match=r"3\.weight: .*act_quant_kwargs"):
        hw.load(model, source, cache=True)
    model[3].weight = weight
    for other, given in ((quantised("dynamic"), source), (model, quantised("dynamic", 1))):
        with pytest.raises(hw.PlanError, match="the plan was made for another"):
            hw.load(other, given, plan=plan)
    hw.load(model, quantised("weight-only", 2), plan=plan)
    assert whole.values(model) == whole.values(quantised("weight-only", 2))
    with pytest.raises(hw.PlanFileError, match=r"wrapper tensors: 1\.weight and 3\.weight|1\.weight, 3\.weight"):
        plan.save(tmp_path / "plan")


def test_tensors_inside_of_another_form_are_refused():
    model, source = quantised("weight-only"), quantised("weight-only", 1)
    source[3].weight.scale = source[3].weight.scale.to(torch.float64)
    before = whole.everything(model)
    with pytest.raises(
        hw.PlanError, match=r"3\.weight: scale: F32 \[4, 1\] expected inside, scale: F64 \[4, 1\] found"
    ):
        hw.load(model, source, cast="loader")
    assert whole.everything(model) == before


def test_plain_and_quantised_weights_do_not_go_into_each_other():
    source, model = quantised("weight-only"), plain()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    advice = r"1\.weight: is a Int8Tensor in the source and plain in the model; give .*its dequantize\(\)"
    for use in (lambda source: hw.load(model, source), lambda source: hw.LiveModel(model).load(source)):
        with pytest.raises(hw.PlanError, match=advice):
            use(source)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    held = whole.everything(source)
    with pytest.raises(hw.PlanError, match=r"1\.weight: is a Int8Tensor in the model, which has no plain bytes"):
        hw.load(source, before)
    assert whole.everything(source) == held
    state = source.state_dict()
    state |= {name: state[name].dequantize() for name in ("1.weight", "3.weight")}  # what the message says
    hw.load(model, state)
    assert torch.equal(model[1].weight, state["1.weight"])


def test_an_update_of_a_layer_that_is_quantised_by_processing_takes_plain_weights_only():
    model, live = loaded(plain, "weight-only")
    before = whole.everything(model)
    with pytest.raises(hw.UpdateAborted, match=r"1\.weight: is a Int8Tensor in the source and plain"):
        live.update(quantised("weight-only", 1))
    assert whole.everything(model) == before


def test_names_of_quantised_weights_are_those_of_the_wrapper():
    source = quantised("weight-only", 1)
    expected = whole.values(source)
    state = source.state_dict()
    there = {f"old.{name}": name for name in state}
    old = {f"old.{name}": tensor for name, tensor in state.items()}
    for given, rename in ((old, {"old.": ""}), (old, there.__getitem__), (torch.compile(source), None)):
        model = quantised("weight-only")
        hw.load(torch.compile(model), given, rename=rename)
        assert whole.values(model) == expected
    with pytest.raises(hw.PlanError, match=r'all 4 names of the source begin with "old\."'):
        hw.load(quantised("weight-only"), old)


@pytest.mark.parametrize("pattern", ["3.weight", "3.weight.scale"])
def test_patterns_take_a_whole_wrapper(pattern):
    """A scale without its data would be a wrong weight."""
    model, more = quantised("weight-only"), quantised("weight-only", 1)
    live = hw.LiveModel(model)
    live.load({name: tensor for name, tensor in more.state_dict().items() if name != "3.weight"}, allow_missing=pattern)
    first = whole.values(quantised("weight-only"))
    mixed = whole.values(more) | {name: value for name, value in first.items() if "['3']" in name}
    assert whole.values(model) == mixed
    live.update(quantised("weight-only", 2))
    assert whole.values(model) == whole.values(quantised("weight-only", 2))
    live.update(more, only=pattern)
    third = whole.values(more)
    expected = whole.values(quantised("weight-only", 2))
    expected |= {name: value for name, value in third.items() if "['3']" in name}
    assert whole.values(model) == expected
    report = live.update({name: tensor for name, tensor in more.state_dict().items() if name != "3.weight"})
    assert whole.values(model) == mixed
    assert {name.rpartition(".")[0] for name in report.restored} == {"3.weight"}


def test_a_quantised_head_of_another_size_is_kept_whole():
    model, source = quantised("weight-only"), quantised("weight-only", 1, wider)
    before = whole.everything(model)
    with pytest.raises(
        hw.PlanError, match=r"1\.weight: shape \[16, 8\] expected, \[24, 8\] found[\s\S]*allow_mismatched"
    ):
        hw.load(model, source)
    assert whole.everything(model) == before
    report = hw.load(model, source, allow_mismatched="*")
    assert report.tensors[hw.Fate.WRITTEN] == ("0.weight",)
    assert "3.weight.zero_point" in report.mismatched


def test_what_is_absent_or_too_much_is_named_by_the_wrapper():
    model = quantised("weight-only")
    state = quantised("weight-only", 1).state_dict()
    state["head.weight"] = state.pop("3.weight")
    with pytest.raises(hw.PlanError) as error:
        hw.load(model, state)
    assert error.value.problems == (
        "3.weight: missing; F32 [4, 16] expected",
        "head.weight: unexpected; the model has no such name",
    )
    hw.load(model, state, allow_missing="3.weight", allow_unexpected="head.weight")


def test_tied_quantised_weights_are_one():
    def tied(seed):
        model = quantised("weight-only", seed)
        model.append(nn.Linear(16, 4, bias=False))
        model[4].weight = model[3].weight
        return model

    model, source = tied(0), tied(1)
    hw.load(model, source)
    assert whole.values(model) == whole.values(source)
    state = source.state_dict()
    del state["4.weight"]
    model = tied(0)
    hw.load(model, state)
    assert whole.values(model) == whole.values(source)
    state["4.weight"] = tied(2)[3].weight
    with pytest.raises(hw.TiedWeightsDiffer, match=r"3\.weight\.qdata and 4\.weight\.qdata"):
        hw.load(model, state)


def test_quantised_layers_change_places():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantise(configs()["weight-only"])(model[0])
    quantise(configs()["weight-only"])(model[1])
    before, state = whole.values(model), model.state_dict()
    swapped = {name.translate(str.maketrans("01", "10")): tensor for name, tensor in state.items()}
    hw.load(model, swapped)
    assert whole.values(model) == {name.translate(str.maketrans("01", "10")): value for name, value in before.items()}


def test_what_only_streams_refuses_quantised_weights(tmp_path):
    model, source = quantised("weight-only"), quantised("weight-only", 1)
    live = hw.LiveModel(model)
    live.load(source)
    before = whole.everything(model)
    inner = [(name, tensor) for name, tensor in source[1].weight.__dict__.items() if isinstance(tensor, torch.Tensor)]

    def feed(pairs):
        with live.begin() as update:
            update.feed(pairs)

    refusals = {
        "plain tensors are needed": (
            lambda: list(hw.open(source).tensors()),
            lambda: hw.save(source, tmp_path / "model.safetensors"),
        ),
        r"'1\.weight' is a Int8Tensor": (
            lambda: hw.load(model, hw.from_iterator(source.state_dict().items())),
            lambda: feed(source.state_dict()),
        ),
        "lies in a Int8Tensor of the model": (
            lambda: feed({f"1.weight.{key}": tensor for key, tensor in inner if key == "qdata"}),
        ),
        "leave verify= out": (lambda: hw.load(model, source, verify="loader"),),
    }
    for words, uses in refusals.items():
        for use in uses:
            with pytest.raises((hw.UsageError, hw.UpdateAborted), match=words):
                use()
    assert whole.everything(model) == before


class Loads(nn.Sequential):
    def load_weights(self, pairs):
        for name, tensor in pairs:
            self.get_parameter(name).data.copy_(tensor)


def test_loading_code_of_a_models_own_gets_no_quantised_weights():
    model, source = Loads(*quantised("weight-only")), quantised("weight-only", 1)
    before = whole.everything(model)
    with pytest.raises(hw.PlanError, match=r'1\.weight: is a Int8Tensor.*load by name \(by="name"\)'):
        hw.load(model, source)
    assert whole.everything(model) == before
    hw.load(model, source, by="name")
    assert whole.values(model) == whole.values(source)


def test_a_quantised_model_on_meta_is_refused():
    with torch.device("meta"):
        model = plain()
    quantise(configs()["weight-only"])(model[1])
    quantise(configs()["weight-only"])(model[3])
    source = quantised("weight-only", 1)
    with pytest.raises(hw.PlanError, match=r"1\.weight: lies on the meta device, where no Int8Tensor"):
        hw.load(model, source, device="cpu")
    model.load_state_dict(source.state_dict(), assign=True)  # what the message says
    assert torch.equal(answer(model), answer(source))
