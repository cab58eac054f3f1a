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
