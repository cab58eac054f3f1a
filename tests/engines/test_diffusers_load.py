"""``load`` of diffusers: the models of a pipeline that is there get the weights of a directory, all of them or none."""

from __future__ import annotations

import os
import re
import shutil

import diffusers
import peft
import pytest
import torch
import transformers as tf
from equal import assert_equal
from pipelines import COMPONENTS, NONE, save_pipeline, tiny_pipeline, unet
from safetensors.torch import load_file, save_file

import hotweights as hw
from hotweights.engines import diffusers as engine


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Never changed."""
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


def blank(dtype=torch.float32):
    """A pipeline of the same classes with random weights of its own."""
    return tiny_pipeline(7).to(dtype)


def expected_of(where, **options):
    return diffusers.DiffusionPipeline.from_pretrained(where, **NONE, **options)


def assert_same(pipeline, expected, components=COMPONENTS):
    for name in components:
        assert_equal(getattr(pipeline, name), getattr(expected, name))


@pytest.fixture
def copy(directory, tmp_path):
    """A copy of the pipeline's directory that a test may change, and how to change the tensors of a component."""
    where = tmp_path / "pipeline"
    shutil.copytree(directory, where)

    def change(component, function):
        (file,) = (path for path in (where / component).glob("*.safetensors") if ".fp16." not in path.name)
        tensors = load_file(file)
        save_file(function(tensors), file, {"format": "pt"})

    return where, change


def shorter(tensors):
    """The first tensor that has a shape loses its last row."""
    name = next(name for name, tensor in tensors.items() if tensor.ndim and tensor.is_floating_point())
    return tensors | {name: tensors[name][:-1].clone()}


def untouched(pipeline, **others):
    assert_same(pipeline, blank(), [name for name in COMPONENTS if name not in others])


def test_every_component_in_place(directory):
    pipeline = blank()
    before = [tensor.data_ptr() for name in COMPONENTS for tensor in getattr(pipeline, name).parameters()]
    reports = engine.load(pipeline, directory)
    assert [*reports] == [name for name in pipeline.components if name in COMPONENTS]
    assert all(type(report) is hw.LoadReport for report in reports.values())
    assert_same(pipeline, expected_of(directory, dtype=torch.float32))
    assert [tensor.data_ptr() for name in COMPONENTS for tensor in getattr(pipeline, name).parameters()] == before


def test_variant_dtype_subfolder_and_components(directory):
    pipeline = blank(torch.float16)
    engine.load(pipeline, directory.parent, subfolder=directory.name, variant="fp16", threads=1, io="buffered")
    assert_same(pipeline, expected_of(directory, variant="fp16", dtype=torch.float16))
    engine.load(pipeline, directory, components=["vae"])  # float32 in the file, as the pipeline has it in memory
    assert_same(pipeline, expected_of(directory, dtype=torch.float16), ["vae"])
    assert_same(pipeline, expected_of(directory, variant="fp16", dtype=torch.float16), ["unet", "text_encoder"])
    with pytest.raises(hw.PlanError, match=r"unet\..*F32 -> F16 loses information"):
        engine.load(pipeline, directory, components="unet", cast="error")


def test_a_variant_that_some_components_have(copy):
    where, _ = copy
    for file in (where / "vae").glob("*.fp16.*"):
        file.unlink()
    pipeline = blank()
    engine.load(pipeline, where, variant="fp16")
    assert_same(pipeline, expected_of(where, variant="fp16", dtype=torch.float32))
    with engine.weights(pipeline, where, variant="fp16") as weights:
        engine.live(pipeline).load(weights, version=0, cast="floats")
    with pytest.raises(hw.CheckpointError, match=r'unet: .*no model\.ema\.safetensors .*; give variant="fp16"'):
        engine.load(pipeline, where, variant="ema")


def test_old_names_of_attention(copy):
    where, change = copy
    names = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))

    def old(tensors):
        def renamed(name):
            for new, before in names:
                name = name.replace(new, before) if "attentions." in name else name
            return name

        return {renamed(name): tensor for name, tensor in tensors.items()}

    expected = expected_of(where, dtype=torch.float32)
    change("vae", old)
    pipeline = blank()
    engine.load(pipeline, where)
    assert_same(pipeline, expected)


def test_what_a_class_passes_over(copy, monkeypatch):
    where, change = copy
    change("unet", lambda tensors: tensors | {"norm_added_q.weight": torch.ones(3)})
    pipeline = blank()
    with pytest.raises(hw.PlanError, match=r"unet\.norm_added_q"):
        engine.load(pipeline, where)
    untouched(pipeline)
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "_keys_to_ignore_on_load_unexpected", ["norm_added_q"])
    engine.load(pipeline, where)
    assert_same(pipeline, expected_of(where, dtype=torch.float32))
    with engine.weights(pipeline, where) as weights:
        engine.live(pipeline).load(weights, version=0)


@pytest.mark.parametrize("broken", COMPONENTS)
def test_one_that_does_not_fit_leaves_all(copy, broken):
    where, change = copy
    change(broken, shorter)
    pipeline = blank()
    with pytest.raises(hw.PlanError, match=rf"{broken}\..*") as caught:
        engine.load(pipeline, where)
    untouched(pipeline)
    advised = re.search(r"components=(\[.*\])", caught.value.advice)[1]
    fit = [name.strip("' []") for name in advised.split(",")]
    assert sorted([*fit, broken]) == sorted(COMPONENTS)
    engine.load(pipeline, where, components=fit)  # As the message says.


def test_all_problems_together(copy):
    where, change = copy
    change("vae", shorter)
    shutil.rmtree(where / "unet")
    (file,) = (path for path in (where / "text_encoder").glob("*.safetensors") if ".fp16." not in path.name)
    os.truncate(file, file.stat().st_size - 1)
    pipeline = blank()
    with pytest.raises(hw.CheckpointError) as caught:
        engine.load(pipeline, where)
    said = str(caught.value)
    assert all(name in said for name in ("vae.", "unet: ", "text_encoder: "))
    assert caught.value.advice == ""
    untouched(pipeline)


def test_ties_that_differ_in_the_last_component_leave_all(tmp_path):
    """The names of one tensor: of one component, and of two."""

    def encoder():
        torch.manual_seed(3)
        sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        return tf.T5EncoderModel(tf.T5Config(**sizes))

    class Two(diffusers.DiffusionPipeline):
        def __init__(self, unet, first, second):
            super().__init__()
            self.register_modules(unet=unet, first=first, second=second)

    saved = Two(unet(), encoder(), encoder())
    with torch.no_grad():
        saved.second.shared.weight.add_(1)
    saved.save_pretrained(tmp_path)
    same = encoder()
    shared = Two(unet(), same, same)
    before = {name: tensor.clone() for name, tensor in shared.unet.state_dict().items()}
    with pytest.raises(hw.TiedWeightsDiffer, match=r"first\..*second\..*are one tensor in the pipeline"):
        engine.load(shared, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in shared.unet.state_dict().items())
    apart = Two(unet(), encoder(), encoder())
    apart.second.shared = apart.first.shared
    apart.second.encoder.embed_tokens = apart.first.shared
    with pytest.raises(hw.TiedWeightsDiffer, match=r"first\..*second\..*are one tensor in the pipeline"):
        engine.load(apart, tmp_path)
    with torch.no_grad():
        saved.second.shared.weight.sub_(1)
        for one, other in zip(saved.second.parameters(), saved.first.parameters(), strict=True):
            one.copy_(other)
    saved.save_pretrained(tmp_path)
    reports = engine.load(shared, tmp_path)
    assert reports["first"] is reports["second"]
    assert_equal(shared.first, saved.first)
    engine.load(apart, tmp_path)
    assert_equal(apart.second, saved.second)


def test_components_that_are_none_and_compiled_ones(copy):
    where, _ = copy
    pipeline = blank()
    pipeline.text_encoder = None
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    reports = engine.load(pipeline, where)
    assert sorted(reports) == ["unet", "vae"]
    assert_equal(pipeline.unet._orig_mod, expected_of(where, dtype=torch.float32).unet)


def controlnet():
    return diffusers.ControlNetModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(16, 32),
        cross_attention_dim=32,
        norm_num_groups=8,
    )


def controlled(seed):
    """A pipeline one of whose components is two models, each of which diffusers saves in a folder of its own."""
    parts = {name: getattr(tiny_pipeline(seed), name) for name in (*COMPONENTS, "scheduler")}
    return diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=[controlnet(), controlnet()], **NONE)


def test_a_component_of_several_models(tmp_path):
    first, second = controlled(1), controlled(2)
    first.save_pretrained(tmp_path / "1")
    second.save_pretrained(tmp_path / "2")
    pipeline = controlled(3)
    assert [*engine.load(pipeline, tmp_path / "1")][-2:] == ["controlnet", "controlnet_1"]
    assert_same(pipeline, first, (*COMPONENTS, "controlnet"))
    engine.load(pipeline, tmp_path / "2", components="controlnet")
    assert_same(pipeline, second, ["controlnet"])
    assert_same(pipeline, first)
    live = engine.live(pipeline)
    for version, expected in (("1", first), ("2", second)):
        with engine.weights(pipeline, tmp_path / version) as weights:
            (live.update if live.version else live.load)(weights, version=version)
        assert_same(pipeline, expected, (*COMPONENTS, "controlnet"))
    made = engine.from_pretrained(tmp_path / "1", **NONE)
    assert_same(made, first, (*COMPONENTS, "controlnet"))


def test_adapters_stay_over_new_weights(directory):
    pipeline = blank()
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    tensors = pipeline.unet.state_dict()
    before = {name: tensor.clone() for name, tensor in tensors.items() if "lora_" in name}
    assert before
    engine.load(pipeline, directory)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())
    expected = expected_of(directory, dtype=torch.float32).unet.state_dict()
    found = {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items() if name not in before}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_models_on_meta(directory):
    pipeline = blank()
    with torch.device("meta"):
        pipeline.register_modules(unet=unet())
    with pytest.raises(hw.PlanError, match=r"unet\..*lies on the meta device; .* device="):
        engine.load(pipeline, directory)
    assert_same(pipeline, blank(), ["vae", "text_encoder"])
    engine.load(pipeline, directory, device="cpu")  # As the message says.
    assert_same(pipeline, expected_of(directory, dtype=torch.float32))


def test_a_buffer_that_stays_on_meta_leaves_all(directory):
    pipeline = blank()
    with torch.device("meta"):
        pipeline.unet.register_buffer("table", torch.empty(3), persistent=False)
    with pytest.raises(hw.PlanError, match=r"unet\.table"):
        engine.load(pipeline, directory, device="cpu")
    pipeline.unet.table = None
    untouched(pipeline)


def test_a_read_that_fails_names_what_was_loaded(copy, monkeypatch):
    where, _ = copy
    pipeline = blank()
    last = [name for name in pipeline.components if name in COMPONENTS][-1]
    load = hw.load

    def failing(model, source, **options):
        if model is getattr(pipeline, last):
            raise hw.CheckpointChanged("the disk failed")
        return load(model, source, **options)

    monkeypatch.setattr("hotweights.engines.diffusers.pipeline.load_model", failing)
    with pytest.raises(hw.CheckpointChanged) as caught:
        engine.load(pipeline, where)
    assert f"this was {last}; loaded before it: " in caught.value.__notes__[-1]


def test_places_that_are_no_pipeline(directory, tmp_path, monkeypatch):
    pipeline = blank()
    with pytest.raises(hw.CheckpointError, match="there is no such directory"):
        engine.load(pipeline, tmp_path / "nothing")
    with pytest.raises(hw.CheckpointError, match="if it is a name on the hub: `hf download nobody/nothing`"):
        engine.load(pipeline, "nobody/nothing")
    monkeypatch.chdir(directory)
    with pytest.raises(hw.CheckpointError, match=r"holds one model and no pipeline; .*") as caught:
        engine.load(pipeline, "unet", components=["unet"])
    exec(re.search(r"hotweights\.load\(.*\)", str(caught.value))[0], {"hotweights": hw, "pipeline": pipeline})
    assert_same(pipeline, expected_of(directory, dtype=torch.float32), ["unet"])
    with pytest.raises(hw.UnknownName, match="unet"):
        engine.load(pipeline, directory, components=["transformer"])
    with pytest.raises(hw.UsageError, match="a pipeline is a DiffusionPipeline"):
        engine.load(pipeline.unet, directory)
    with pytest.raises(hw.UsageError, match="cast"):
        engine.load(pipeline, directory, cast="some")


def test_a_name_in_the_cache_of_the_hub(directory, tmp_path, monkeypatch):
    cache = tmp_path / "models--org--name"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    (cache / "snapshots").mkdir()
    shutil.copytree(directory, cache / "snapshots" / ("0" * 40))
    expected = expected_of(directory, dtype=torch.float32)
    for where in (cache, "org/name"):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        pipeline = blank()
        engine.load(pipeline, where)
        assert_same(pipeline, expected)
