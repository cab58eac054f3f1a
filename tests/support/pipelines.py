"""A tiny pipeline of Stable Diffusion, of diffusers' and transformers' real classes."""

from __future__ import annotations

import diffusers
import torch
import transformers as tf

COMPONENTS = ("unet", "vae", "text_encoder")


def unet():
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
    )


def vae():
    return diffusers.AutoencoderKL(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=8,
    )


def text_encoder():
    return tf.CLIPTextModel(
        tf.CLIPTextConfig(
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=2,
            vocab_size=1000,
            projection_dim=32,
            bos_token_id=0,
            eos_token_id=2,
        )
    )


NONE = {"tokenizer": None, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def tiny_pipeline(seed):
    """One in float32, whose weights are random, and the same for the same seed."""
    torch.manual_seed(seed)
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        **NONE,
    )


def save_pipeline(where):
    """Save one there, with a variant of it in half precision; return where."""
    pipeline = tiny_pipeline(0)
    pipeline.save_pretrained(where)
    with torch.no_grad():
        for component in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            for parameter in component.parameters():
                parameter.add_(1)
    pipeline.to(torch.float16).save_pretrained(where, variant="fp16")
    return where
