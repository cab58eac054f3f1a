"""Checkpoints that transformers dequantises, the models it makes of them, and models of quantised layers."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from architectures import fresh, randomised
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

import hotweights as hw
from hotweights.engines.transformers import from_pretrained

BLOCK = 16
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}


def rewritten(model, directory, change, quantisation):
    model.to(torch.bfloat16).save_pretrained(directory)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        tensors |= change(name, tensor)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    return tensors


def fp8(name, weight):
    if not name.endswith("proj.weight"):
        return {name: weight}
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scale[:, None, :, None]).reshape(rows, columns)
    return {name: values.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def mxfp4(name, weight):
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: weight}
    experts, inner, outer = weight.shape
    return {
        f"{name}_blocks": torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8),
        f"{name}_scales": torch.randint(115, 125, (experts, outer, inner // 32), dtype=torch.uint8),
    }


def gpt_oss():
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tf.GptOssForCausalLM(
        tf.GptOssConfig(**sizes, vocab_size=96, num_hidden_layers=1, head_dim=16, num_local_experts=2)
    )


KINDS = {
    "fp8, block by block": (lambda: fresh("llama"), fp8, FP8, lambda: tf.FineGrainedFP8Config(dequantize=True)),
    "mxfp4": (gpt_oss, mxfp4, {"quant_method": "mxfp4"}, lambda: tf.Mxfp4Config(dequantize=True)),
}


@pytest.mark.parametrize("method", KINDS)
def test_a_dequantised_model_takes_the_checkpoint_and_plain_weights(method, tmp_path):
    """transformers leaves in the model how it dequantised; a class that it has not made refuses the checkpoint."""
    make, change, quantisation, dequantised = KINDS[method]
    rewritten(make(), tmp_path, change, quantisation)
    model = type(make()).from_pretrained(tmp_path, quantization_config=dequantised())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for source in (tmp_path, before):
        randomised(model)
        hw.load(model, source)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(hw.PlanError, match=f"is quantised by {method} "):
        hw.load(make(), tmp_path)


def test_a_model_of_fp8_layers_takes_the_checkpoint_as_it_is(tmp_path):
    tensors = rewritten(fresh("llama"), tmp_path, fp8, FP8)
    model = replace_with_fp8_linear(
        fresh("llama").to(torch.bfloat16),
        modules_to_not_convert=["lm_head"],
        quantization_config=tf.FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK)),
        pre_quantized=True,
    )
    hw.load(model, tmp_path, device="cpu")
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_model_that_its_quantiser_holds_is_refused_and_the_advice_works(tmp_path):
    """Its quantiser may have repacked what it holds under the checkpoint's names."""
    model = fresh("llama")
    state = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}
    model.hf_quantizer = object()
    with pytest.raises(hw.PlanError, match=r"model\.load_state_dict takes what model\.state_dict\(\) gave"):
        hw.load(model, state)
    model.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# By hand: what each method writes for one weight, and its quantization_config.

SIZE = 128


def words(*shape):
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def by_group(*shape):
    return torch.rand(*shape).half()


def of_compressed_tensors(form, bits, kind, strategy, group=None):
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": group, "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": form}}
    said = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    return said | {"ignore": ["lm_head"], "config_groups": groups}


def nf4():
    facts = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [SIZE, SIZE]}
    return {
        "weight": torch.randint(0, 255, (SIZE * SIZE // 2, 1), dtype=torch.uint8),
        "weight.absmax": torch.rand(SIZE * SIZE // 64),
        "weight.quant_map": torch.rand(16),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8),
    }


METHODS = {
    "gptq": (
        lambda: {
            "qweight": words(SIZE // 8, SIZE),
            "qzeros": words(4, SIZE // 8),
            "scales": by_group(4, SIZE),
            "g_idx": torch.arange(SIZE, dtype=torch.int32) // 32,
        },
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
        "gptq",
    ),
    "awq": (
        lambda: {"qweight": words(SIZE, SIZE // 8), "qzeros": words(4, SIZE // 8), "scales": by_group(4, SIZE)},
        {"quant_method": "awq", "bits": 4, "group_size": 32},
        "awq or gptq",
    ),
    "compressed-tensors, packed": (
        lambda: {
            "weight_packed": words(SIZE, SIZE // 8),
            "weight_scale": torch.rand(SIZE, 4).bfloat16(),
            "weight_shape": torch.tensor([SIZE, SIZE]),
        },
        of_compressed_tensors("pack-quantized", 4, "int", "group", 32),
        "compressed-tensors",
    ),
    "compressed-tensors, int8": (
        lambda: {
            "weight": torch.randint(-128, 127, (SIZE, SIZE), dtype=torch.int8),
            "weight_scale": torch.rand(SIZE, 1).bfloat16(),
        },
        of_compressed_tensors("int-quantized", 8, "int", "channel"),
        "compressed-tensors or fp8",
    ),
    "compressed-tensors, float8": (
        lambda: {
            "weight": torch.randn(SIZE, SIZE).to(torch.float8_e4m3fn),
            "weight_scale": torch.rand(SIZE, 1).bfloat16(),
        },
        of_compressed_tensors("float-quantized", 8, "float", "channel"),
        "compressed-tensors or fp8",
    ),
    "bitsandbytes, 4 bits": (
        nf4,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "bitsandbytes",
    ),
    "bitsandbytes, 8 bits": (
        lambda: {
            "weight": torch.randint(-128, 127, (SIZE, SIZE), dtype=torch.int8),
            "SCB": torch.rand(SIZE),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        },
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "bitsandbytes",
    ),
    "fp8": (
        lambda: {
            "weight": torch.randn(SIZE, SIZE).to(torch.float8_e4m3fn),
            "weight_scale_inv": torch.rand(SIZE // BLOCK, SIZE // BLOCK),
        },
        FP8,
        "fp8, block by block",
    ),
    "bitnet": (
        lambda: {
            "weight": torch.randint(0, 255, (SIZE // 4, SIZE), dtype=torch.uint8),
            "weight_scale": torch.rand(1).bfloat16(),
        },
        {"quant_method": "bitnet"},
        "compressed-tensors or fp8",
    ),
}


def square():
    sizes = {"hidden_size": SIZE, "intermediate_size": SIZE, "num_attention_heads": 4, "num_key_value_heads": 4}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, vocab_size=96, num_hidden_layers=1)).bfloat16()


def written(method, directory):
    made, quantisation, _ = METHODS[method]

    def change(name, weight):
        if not name.endswith("proj.weight"):
            return {name: weight}
        return {name.removesuffix("weight") + key: tensor for key, tensor in made().items()}

    rewritten(square(), directory, change, quantisation)
    return quantisation["quant_method"]


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_model_and_build_refuse_it_by_its_name_in_one_line(method, tmp_path):
    said = written(method, tmp_path)
    model = square()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(hw.PlanError) as caught:
        hw.load(model, tmp_path)
    (line,) = str(caught.value).splitlines()
    assert f"the checkpoint is quantised by {METHODS[method][2]} (model.layers.0." in line
    with pytest.raises(hw.PlanError) as caught:
        hw.build(tmp_path)
    (line,) = str(caught.value).splitlines()
    assert f"has a quantization_config ({said})" in line
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")  # Those of the packages that transformers calls.
@pytest.mark.parametrize("method", METHODS)
def test_from_pretrained_gives_what_transformers_gives_or_says_what_it_needs(method, tmp_path):
    written(method, tmp_path)
    try:
        theirs = tf.LlamaForCausalLM.from_pretrained(tmp_path)
    except ImportError as error:
        first = str(error).partition("\n")[0]
        with pytest.raises(hw.CheckpointError) as caught:
            from_pretrained(tmp_path)
        assert str(caught.value) == f"{tmp_path}: transformers makes no model of it: {first}"
        return
    expected, found = theirs.state_dict(), from_pretrained(tmp_path).state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_a_method_that_transformers_does_not_know_is_passed_over_as_there(tmp_path):
    rewritten(square(), tmp_path, lambda name, weight: {name: weight}, {"quant_method": "strange"})
    expected = tf.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    for model in (from_pretrained(tmp_path), hw.build(tmp_path)):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
