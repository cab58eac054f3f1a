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


def test_quantised_weights_are_neither_source_nor_target_of_a_plain_load():
    source, model = cold(plain, "weight-only", 0), plain()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for use in (hw.open, lambda source: hw.load(model, source), lambda source: hw.LiveModel(model).load(source)):
        with pytest.raises(hw.UsageError, match=r"'1\.weight' is a Int8Tensor.*give its dequantize\(\)"):
            use(source)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(hw.PlanError, match=r"1\.weight: is a Int8Tensor, which has no plain bytes"):
        hw.load(source, before)
    state = source.state_dict()
    state |= {name: state[name].dequantize() for name in ("1.weight", "3.weight")}  # what the message says
    hw.load(model, state)
    assert torch.equal(model[1].weight, state["1.weight"])
