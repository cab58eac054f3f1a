"""Every class of transformers that can be made tiny: hw.load of what it saved, and our from_pretrained, give what its
from_pretrained gives, bit for bit.
"""

from __future__ import annotations

import inspect
import signal

import pytest
import torch
import transformers as tf
from architectures import randomised
from equal import assert_equal, everything
from tiny import names, tiny

import hotweights as hw
from hotweights.engines import transformers as engine

SAMPLE = (
    "AlbertForMaskedLM", "BartForConditionalGeneration", "BertModel", "BloomForCausalLM", "CLIPModel",
    "CohereForCausalLM",
    "DebertaV2ForMaskedLM", "DistilBertForMaskedLM", "ElectraForPreTraining", "Gemma2ForCausalLM", "GPTNeoXForCausalLM",
    "ViTModel", "LlamaForSequenceClassification", "MT5ForConditionalGeneration", "OPTForCausalLM", "PhiForCausalLM",
    "Qwen2MoeForCausalLM", "RobertaForMaskedLM", "SiglipModel", "T5EncoderModel",
)  # fmt: skip

# What from_pretrained sets anew after loading, because _init_weights writes to it past the flag that it is loaded.
# There hw.load gives what the checkpoint holds.
OVERWRITTEN = {
    "ChineseCLIPModel": ("word_embeddings.weight", 0, 0.0),  # the row of the padding
    "ZayaForCausalLM": ("balancing_biases", -1, -1.0),
    "ZayaModel": ("balancing_biases", -1, -1.0),
}
SECONDS = 60


@pytest.fixture(autouse=True)
def in_time():
    """A class of which something never ends fails alone. Counted is what this process computes: others may be busy."""

    def late(*_):
        raise TimeoutError(f"it computed for more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def restore(expected, saved, suffix, index, value):
    """Put back what was saved. Fails where from_pretrained did not overwrite it: then it needs no exception."""
    tensors = [name for name in everything(expected) if name.endswith(suffix)]
    assert tensors
    with torch.no_grad():
        for name in tensors:
            before, after = everything(saved)[name][index], everything(expected)[name][index]
            assert (after == value).all()
            assert not torch.equal(before, after)
            after.copy_(before)


def check(kind, config, directory):
    torch.manual_seed(1)
    saved = randomised(kind._from_config(config))
    saved.save_pretrained(directory)
    torch.manual_seed(3)
    try:
        expected, told = kind.from_pretrained(directory, output_loading_info=True)
    except Exception as error:  # Its own classes refuse some configurations that others of them saved.
        pytest.skip(f"from_pretrained refuses it: {type(error).__name__}: {str(error)[:100]}")
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    torch.manual_seed(3)
    ours, ours_told = engine.from_pretrained(directory, cls=kind, output_loading_info=True)
    assert ours_told == told
    assert_equal(ours, expected)
    if kind.__name__ in OVERWRITTEN:
        restore(expected, saved, *OVERWRITTEN[kind.__name__])
    config = kind.config_class.from_pretrained(directory)
    torch.manual_seed(2)
    real = kind._from_config(config)
    hw.load(real, directory)
    assert_equal(real, expected)
    built = engine.build(directory)
    hw.load(built, directory, device="cpu")
    assert_equal(built, expected)
    assert_equal(hw.build(directory), expected)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # A tiny model may have some.
@pytest.mark.parametrize("name", [*SAMPLE, *OVERWRITTEN])
def test_a_sample(name, tmp_path):
    kind = getattr(tf, name)
    check(kind, tiny(kind), tmp_path)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", [name for name in names() if name not in (*SAMPLE, *OVERWRITTEN)])
def test_every_class(name, tmp_path):
    kind = getattr(tf, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, tf.PreTrainedModel)):
        pytest.skip("it is no model of this version of transformers")
    try:
        config = tiny(kind)
    except Exception as error:
        pytest.skip(f"cannot be made tiny: {error}"[:200])
    check(kind, config, tmp_path)
