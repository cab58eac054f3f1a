"""Our from_pretrained of diffusers gives what its own gives, component by component, bit for bit, or refuses."""

from __future__ import annotations

import functools
import logging
import os
import shutil

import accelerate
import diffusers
import pytest
import torch
from ends import Thread
from equal import assert_equal
from pipelines import COMPONENTS, NONE, save_pipeline, vae
from safetensors.torch import load_file, save_file

import hotweights as hw
from hotweights.engines import diffusers as engine


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny pipeline, with a variant of it in half precision; never changed."""
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def read(monkeypatch):
    """The classes of the models that were read by us so far."""
    from hotweights.engines import filling

    models = []
    original = filling.fill
    for package in ("diffusers", "transformers"):
        monkeypatch.setattr(
            f"hotweights.engines.{package}.pretrained.fill",
            lambda model, *rest: (models.append(type(model).__name__), original(model, *rest)),
        )
    return models


@pytest.mark.parametrize(
    "options",
    [{}, {"variant": "fp16"}, {"dtype": torch.bfloat16}, {"variant": "fp16", "dtype": torch.float16}],
    ids=str,
)
def test_a_pipeline(directory, options, read):
    expected = diffusers.DiffusionPipeline.from_pretrained(directory, **NONE, **options)
    assert read == []
    ours = engine.from_pretrained(directory, **NONE, **options)
    assert sorted(read) == ["AutoencoderKL", "CLIPTextModel", "UNet2DConditionModel"]
    assert type(ours) is type(expected) is diffusers.StableDiffusionPipeline
    for name in COMPONENTS:
        assert_equal(getattr(ours, name), getattr(expected, name))
        assert getattr(ours, name).training is False
        assert getattr(ours, name).config == getattr(expected, name).config or name == "text_encoder"


def test_a_dtype_for_each_component(directory, read):
    dtypes = {"unet": torch.bfloat16, "default": torch.float16}
    expected = diffusers.DiffusionPipeline.from_pretrained(directory, **NONE, dtype=dtypes)
    ours = engine.from_pretrained(directory, **NONE, dtype=dtypes)
    assert ours.unet.dtype == torch.bfloat16
    for name in COMPONENTS:
        assert_equal(getattr(ours, name), getattr(expected, name))


def test_one_model_and_its_report(directory, read):
    where = {"subfolder": "unet", "output_loading_info": True}
    expected, told = diffusers.UNet2DConditionModel.from_pretrained(directory, **where)
    ours, ours_told = engine.from_pretrained(directory, cls=diffusers.UNet2DConditionModel, **where)
    assert read == ["UNet2DConditionModel"]
    assert ours_told == told
    assert_equal(ours, expected)


def test_shards_and_a_device_map(directory, tmp_path, read):
    vae().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for options in ({}, {"device_map": "cpu"}, {"dtype": torch.float16}):
        expected = diffusers.AutoencoderKL.from_pretrained(tmp_path, **options)
        assert_equal(engine.from_pretrained(tmp_path, cls=diffusers.AutoencoderKL, **options), expected)
    assert len(read) == 3


def test_old_names_of_attention(directory, tmp_path, read):
    """Checkpoints of the first Stable Diffusion have them."""
    old = {}
    for name, tensor in load_file(directory / "vae/diffusion_pytorch_model.safetensors").items():
        for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(new, before) if "attentions." in name else name
        old[name] = tensor
    assert any("query" in name for name in old)
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    shutil.copy(directory / "vae/config.json", tmp_path)
    expected = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    assert_equal(engine.from_pretrained(tmp_path, cls=diffusers.AutoencoderKL), expected)
    assert read == ["AutoencoderKL"]


def test_what_stays_in_float32(tmp_path, read, monkeypatch):
    monkeypatch.setattr(diffusers.AutoencoderKL, "_keep_in_fp32_modules", ["conv_in", "norm1"])
    vae().save_pretrained(tmp_path)
    expected = diffusers.AutoencoderKL.from_pretrained(tmp_path, dtype=torch.float16)
    assert {tensor.dtype for tensor in expected.parameters()} == {torch.float16, torch.float32}
    assert_equal(engine.from_pretrained(tmp_path, cls=diffusers.AutoencoderKL, dtype=torch.float16), expected)


def test_other_code_and_other_threads(directory, read):
    with engine.reading(io="buffered", threads=1):
        diffusers.UNet2DConditionModel.from_pretrained(directory, subfolder="unet")
        Thread(lambda: diffusers.AutoencoderKL.from_pretrained(directory, subfolder="vae")).join()
    assert read == ["UNet2DConditionModel"]
    before = diffusers.ModelMixin.__dict__["_load_pretrained_model"]
    diffusers.UNet2DConditionModel.from_pretrained(directory, subfolder="unet")
    assert len(read) == 1
    assert diffusers.ModelMixin.__dict__["_load_pretrained_model"] is before


def test_what_is_left_to_diffusers(directory, caplog, read):
    options = {"subfolder": "vae", "low_cpu_mem_usage": False}
    with caplog.at_level(logging.WARNING, "hotweights"):
        ours = engine.from_pretrained(directory, cls=diffusers.AutoencoderKL, **options)
    assert "is read by diffusers itself: its parameters have memory already" in caplog.text
    assert read == []
    assert_equal(ours, diffusers.AutoencoderKL.from_pretrained(directory, **options))


def test_a_tensor_of_another_shape_that_may_stay_out(directory, tmp_path, caplog, read):
    """diffusers leaves it without bytes."""
    shutil.copytree(directory / "vae", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"encoder.conv_in.bias": torch.zeros(3)}, file, {"format": "pt"})
    models = [
        load(tmp_path, ignore_mismatched_sizes=True)
        for load in (
            diffusers.AutoencoderKL.from_pretrained,
            functools.partial(engine.from_pretrained, cls=diffusers.AutoencoderKL),
        )
    ]
    assert "is read by diffusers itself: tensors of another shape stay out of it" in caplog.text
    assert read == []
    for model in models:
        assert model.encoder.conv_in.bias.is_meta
        model.encoder.conv_in.bias = None
    assert_equal(*models)


class TestLive:
    def pipeline(self, directory, **options):
        return diffusers.DiffusionPipeline.from_pretrained(directory, **NONE, dtype=torch.float32, **options)

    def changed(self, directory, where, change):
        """A copy of the pipeline's directory in which the tensors of each component are changed."""
        for component in COMPONENTS:
            shutil.copytree(directory / component, where / component, ignore=shutil.ignore_patterns("*.fp16.*"))
            (file,) = (where / component).glob("*.safetensors")
            tensors = {name: tensor + 1 for name, tensor in load_file(file).items() if tensor.is_floating_point()}
            change(component, tensors)
            save_file(tensors, file, {"format": "pt"})
        return where

    def assert_is(self, pipeline, expected):
        for name in COMPONENTS:
            assert_equal(getattr(pipeline, name), getattr(expected, name))

    def test_all_components_are_one_version(self, directory, tmp_path):
        pipeline = self.pipeline(directory)
        live = engine.live(pipeline)
        with engine.weights(pipeline, directory) as weights:
            live.load(weights, version=0)
        self.assert_is(pipeline, self.pipeline(directory))
        addresses = [parameter.data_ptr() for parameter in live.model.parameters()]
        with engine.weights(pipeline, directory, variant="fp16") as weights:
            live.update(weights, version=1)
        self.assert_is(pipeline, self.pipeline(directory, variant="fp16"))
        assert [parameter.data_ptr() for parameter in live.model.parameters()] == addresses
        with engine.weights(pipeline, directory, components=["vae"]) as weights:
            live.update(weights, version=2, only="vae.*")
        assert_equal(pipeline.vae, self.pipeline(directory).vae)
        assert_equal(pipeline.unet, self.pipeline(directory, variant="fp16").unet)

    def test_what_does_not_fit_in_one_changes_none(self, directory, tmp_path):
        def cut(component, tensors):
            if component == "vae":
                tensors["encoder.conv_in.bias"] = tensors["encoder.conv_in.bias"][:-1].clone()

        pipeline = self.pipeline(directory)
        live = engine.live(pipeline)
        with engine.weights(pipeline, directory) as weights:
            live.load(weights, version=0)
        other = self.changed(directory, tmp_path, cut)
        with (
            pytest.raises(hw.UpdateAborted, match=r"vae\.encoder\.conv_in\.bias"),
            engine.weights(pipeline, other) as w,
        ):
            live.update(w, version=1)
        assert live.version == 0
        self.assert_is(pipeline, self.pipeline(directory))

    def test_a_file_that_breaks_in_the_midst_changes_none(self, directory, tmp_path):
        pipeline = self.pipeline(directory)
        live = engine.live(pipeline)
        with engine.weights(pipeline, directory) as weights:
            live.load(weights, version=0)
        other = self.changed(directory, tmp_path, lambda component, tensors: None)
        last = other / COMPONENTS[1] / "diffusion_pytorch_model.safetensors"
        with engine.weights(pipeline, other) as weights:
            os.truncate(last, last.stat().st_size // 2)
            with pytest.raises(hw.UpdateAborted):
                live.update(weights, version=1)
        assert live.version == 0
        self.assert_is(pipeline, self.pipeline(directory))

    def test_models_that_hooks_move(self, directory):
        pipeline = self.pipeline(directory)
        accelerate.cpu_offload_with_hook(pipeline.unet, execution_device="cpu")  # As enable_model_cpu_offload does.
        with pytest.raises(hw.UsageError, match="hooks move unet to the host and back"):
            engine.live(pipeline)
        pipeline.remove_all_hooks()  # As the message says.
        engine.live(pipeline)

    def test_wrong_arguments(self, directory, tmp_path):
        pipeline = self.pipeline(directory)
        with pytest.raises(hw.UnknownName, match="unet"), engine.weights(pipeline, directory, components=["nothing"]):
            pass
        with pytest.raises(hw.CheckpointError), engine.weights(pipeline, tmp_path):
            pass
        with pytest.raises(hw.UsageError, match="a pipeline is a DiffusionPipeline"):
            engine.live(vae())


class TestErrors:
    def test_a_wrong_shape(self, directory, tmp_path, read):
        shutil.copytree(directory / "vae", tmp_path, dirs_exist_ok=True)
        file = tmp_path / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors["encoder.conv_in.bias"] = tensors["encoder.conv_in.bias"][:-1].clone()
        save_file(tensors, file)
        with pytest.raises(hw.PlanError, match=r"encoder\.conv_in\.bias") as caught:
            engine.from_pretrained(tmp_path, cls=diffusers.AutoencoderKL)
        assert caught.value.advice == ""
        assert read == []

    def test_no_such_directory(self, tmp_path):
        with pytest.raises(hw.CheckpointError, match="if it is a name on the hub: `hf download nobody/nothing`"):
            engine.from_pretrained("nobody/nothing", cache_dir=tmp_path)

    def test_a_broken_file(self, directory, tmp_path):
        shutil.copytree(directory / "vae", tmp_path, dirs_exist_ok=True)
        file = tmp_path / "diffusion_pytorch_model.safetensors"
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(hw.CheckpointError):
            engine.from_pretrained(tmp_path, cls=diffusers.AutoencoderKL)

    def test_arguments(self, directory):
        with pytest.raises(hw.UsageError, match="cls= is a class with a from_pretrained"):
            engine.from_pretrained(directory, cls=7)
