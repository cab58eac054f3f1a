"""Adapters of PEFT, and the model under them: what load_adapter puts in place is what peft loads, or it is refused."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers as tf
from architectures import fresh, save
from equal import assert_equal, everything
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import hotweights as hw
from hotweights.engines.peft import load_adapter, load_base

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it.

LORA = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
CONFIGS = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "bias, a head, a rank of its own": lambda: peft.LoraConfig(
        **LORA, modules_to_save=["lm_head"], rank_pattern={"layers.1.self_attn.q_proj": 3}, use_rslora=True
    ),
    "embeddings": lambda: peft.LoraConfig(target_modules=["embed_tokens", "down_proj"], init_lora_weights=False),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "tokens": lambda: peft.LoraConfig(**LORA, trainable_token_indices=[1, 5]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj"], r=2, init_weights=False),
    "lokr": lambda: peft.LoKrConfig(target_modules=["q_proj"], r=2, init_weights=False),
    "oft": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, init_weights=False),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=2, init_weights=False),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4, target_r=2),
    "prompts in front of attention": lambda: peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1
    ),
    "one tensor in all layers": lambda: peft.VBLoRAConfig(
        target_modules=["q_proj"], r=2, num_vectors=4, vector_length=8, topk=2
    ),
    "one tensor in all layers, saved for each": lambda: peft.RandLoraConfig(target_modules=["q_proj"], r=2),
}


FIXED = ("vera_A", "vera_B", "randlora_A", "randlora_B")  # They are drawn by the number that a configuration has.


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.rand_like(parameter))
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two checkpoints of one base model."""
    return [save(fresh("llama"), tmp_path_factory.mktemp("base")) for _ in range(2)]


def base_of(directory):
    return tf.LlamaForCausalLM.from_pretrained(directory)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, bases):
    """Directories of two adapters of a kind, for the first base."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = []
            for seed in range(2):
                torch.manual_seed(seed)
                model = randomised(peft.get_peft_model(base_of(bases[0]), CONFIGS[kind]()))
                made[kind].append(tmp_path_factory.mktemp("adapter"))
                model.save_pretrained(made[kind][-1], save_embedding_layers=False)
        return made[kind]

    return get


def theirs(base, adapter):
    return peft.PeftModel.from_pretrained(base_of(base), adapter)


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_what_peft_loads(kind, bases, saved):
    first, second = saved(kind)
    model = theirs(bases[0], first)
    addresses = {name: tensor.data_ptr() for name, tensor in everything(model).items()}
    load_adapter(model, second)
    assert_equal(model, theirs(bases[0], second))
    assert {name: tensor.data_ptr() for name, tensor in everything(model).items()} == addresses


def test_names_and_values_of_every_kind_are_really_others(saved):
    for kind in CONFIGS:
        first, second = (load_file(directory / "adapter_model.safetensors") for directory in saved(kind))
        assert first.keys() == second.keys()
        assert not any(torch.equal(first[name], second[name]) for name in first if name.split(".")[-1] not in FIXED)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.MissConfig(target_modules=["q_proj"], r=2),
        lambda: peft.C3AConfig(target_modules=["q_proj"], block_size=8),
        lambda: peft.RoadConfig(target_modules=["q_proj"], group_size=4),
        lambda: peft.HRAConfig(target_modules=["q_proj"], r=2),
    ],
    ids=["miss", "c3a", "road", "hra"],
)
def test_where_the_model_has_none_the_error_says_what_it_is(config, bases, tmp_path):
    peft.get_peft_model(base_of(bases[0]), config()).save_pretrained(tmp_path)
    with pytest.raises(hw.PlanError, match="of a PEFT adapter, and the model has none"):
        hw.load(base_of(bases[0]), tmp_path)


class TestEmbeddings:
    """peft saves them whole beside an adapter that is one of theirs, or if the vocabulary has another size by now."""

    KINDS = {  # noqa: RUF012
        "of the embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, 96),
        "of the head": ({"target_modules": ["lm_head", "q_proj"]}, 96),
        "of a resized vocabulary": ({}, 104),
    }

    @pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Could not find a config")
    @pytest.mark.parametrize("kind", KINDS)
    def test_what_peft_saves_beside_the_adapter(self, kind, bases, tmp_path, caplog):
        config, words = self.KINDS[kind]

        def base():
            torch.manual_seed(0)
            model = base_of(bases[0])
            if words != 96:
                model.resize_token_embeddings(words)
            return model

        for number in (1, 2):
            model = randomised(peft.get_peft_model(base(), peft.LoraConfig(**{**LORA, **config})))
            with torch.no_grad():
                for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                    layer.weight.add_(number)
            model.save_pretrained(tmp_path / str(number))
        assert any("embed_tokens" in name for name in load_file(tmp_path / "1" / "adapter_model.safetensors")) or (
            kind == "of the head"
        )
        first, expected = (peft.PeftModel.from_pretrained(base(), tmp_path / number) for number in "12")
        load_adapter(first, tmp_path / "2")
        assert_equal(first, expected)
        live = hw.LiveModel(peft.PeftModel.from_pretrained(base(), tmp_path / "1"))
        live.load(first.state_dict(), version=0)
        load_adapter(live, tmp_path / "1", version=1)
        assert_equal(live.model, peft.PeftModel.from_pretrained(base(), tmp_path / "1"))

    def test_another_tensor_beside_it_is_refused(self, bases, saved):
        model = theirs(bases[0], saved("embeddings")[0])
        tensors = load_file(saved("embeddings")[1] / "adapter_model.safetensors")
        tensors["base_model.model.model.norm.weight"] = torch.ones(32)
        with pytest.raises(hw.PlanError, match=r"model\.norm\.weight: unexpected; the model's adapter has none"):
            load_adapter(model, tensors)


class TestBases:
    """What lies under adapters of a kind is taken, or the kind has been computed of it."""

    @pytest.mark.parametrize("kind", ["tokens", "adalora", "one tensor in all layers", "vera", "ia3"])
    def test_of_every_kind(self, kind, bases, saved):
        first, second = saved(kind)
        live = hw.LiveModel(theirs(bases[1], first))
        load_base(live, bases[0], version=0)
        assert_equal(live.model, theirs(bases[0], first))
        load_adapter(live, second, base=bases[1], version=1)
        assert_equal(live.model, theirs(bases[1], second))
        load_base(live, bases[0], version=2)
        assert_equal(live.model, theirs(bases[0], second))

    def test_rows_that_are_put_back(self, bases, saved):
        model, expected = (theirs(base, saved("tokens")[0]) for base in reversed(bases))
        load_base(model, bases[0])
        for each in (model, expected):
            each.merge_adapter()
            each.unmerge_adapter()
        assert_equal(model, expected)

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            (
                lambda: peft.LoraConfig(**{**LORA, "init_lora_weights": "pissa"}),
                "init_lora_weights='pissa' has changed",
            ),
            (
                lambda: peft.LoraConfig(**{**LORA, "init_lora_weights": "olora"}),
                "init_lora_weights='olora' has changed",
            ),
            (lambda: peft.TinyLoraConfig(target_modules=["q_proj"]), "adapters of TINYLORA begin with a decomposition"),
        ],
        ids=["pissa", "olora", "tinylora"],
    )
    def test_an_adapter_that_was_made_of_its_base(self, config, words, bases, tmp_path):
        """With other weights under it, it would compute something that nobody has trained."""
        model = randomised(peft.get_peft_model(base_of(bases[0]), config()))
        model.save_pretrained(tmp_path)
        before = {name: tensor.clone() for name, tensor in everything(model).items()}
        for act in (
            lambda: load_base(model, bases[1]),
            lambda: load_adapter(model, tmp_path, base=bases[1]),
            lambda: load_base(hw.LiveModel(model), bases[1]),
        ):
            with pytest.raises(hw.PlanError, match=words):
                act()
        assert all(torch.equal(tensor, before[name]) for name, tensor in everything(model).items())
        again = peft.PeftModel.from_pretrained(base_of(bases[0]), tmp_path)
        randomised(again)
        load_adapter(again, tmp_path)
        assert_equal(again, model)

    def test_one_on_changed_weights_into_one_that_is_not(self, bases, saved, tmp_path):
        config = peft.LoraConfig(**{**LORA, "init_lora_weights": "pissa"})
        peft.get_peft_model(base_of(bases[0]), config).save_pretrained(tmp_path)
        model = peft.get_peft_model(base_of(bases[0]), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
        with pytest.raises(hw.PlanError, match="init_lora_weights: True expected, 'pissa' found"):
            load_adapter(model, tmp_path)

    @pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
    def test_the_advice_for_it(self, bases, tmp_path):
        """An adapter that peft has converted lies on the weights as they were."""
        model = peft.get_peft_model(base_of(bases[0]), peft.LoraConfig(**{**LORA, "init_lora_weights": "pissa"}))
        model.peft_config["default"].init_lora_weights = True  # As peft says, before the beginning is saved.
        model.save_pretrained(tmp_path / "begin")
        model.peft_config["default"].init_lora_weights = "pissa"
        begin = tmp_path / "begin"
        randomised(model).save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=begin)
        plain = theirs(bases[1], tmp_path / "plain")
        load_base(plain, bases[0])
        assert_equal(plain, theirs(bases[0], tmp_path / "plain"))


class TestWhichModels:
    def test_a_part_of_a_pipeline(self):
        """diffusers writes the names of a component's adapter with the component's own before them."""
        from pipelines import unet

        model = unet()
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"]))
        tensors = {f"unet.{name}": tensor + 1 for name, tensor in get_peft_model_state_dict(model).items()}
        load_adapter(model, tensors)
        assert all(torch.equal(tensors[f"unet.{name}"], it) for name, it in get_peft_model_state_dict(model).items())

    def test_one_of_several_adapters(self, bases, saved):
        first, second = saved("lora")
        model = theirs(bases[0], first)
        model.load_adapter(first, adapter_name="other")
        load_adapter(model, second, adapter_name="other")
        expected = theirs(bases[0], first)
        expected.load_adapter(second, adapter_name="other")
        assert_equal(model, expected)

    def test_a_model_of_transformers_that_holds_it_itself(self, bases, saved):
        first, second = saved("lora")
        model, expected = base_of(bases[0]), base_of(bases[0])
        model.load_adapter(str(first))
        expected.load_adapter(str(second))
        load_adapter(model, second)
        assert_equal(model, expected)

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
    def test_in_wrappers(self, bases, saved):
        first, second = saved("lora")
        model = theirs(bases[0], first)
        load_adapter(torch.nn.DataParallel(torch.compile(model)), second)
        assert_equal(model, theirs(bases[0], second))

    def test_the_tensors_of_a_trainer(self, bases, saved):
        first, second = saved("lora")
        model, trained = theirs(bases[0], first), theirs(bases[0], second)
        load_adapter(model, get_peft_model_state_dict(trained, save_embedding_layers=False))
        assert_equal(model, trained)

    def test_beside_the_weights_of_its_base(self, bases, saved, tmp_path):
        first, second = saved("lora")
        shutil.copytree(second, tmp_path, dirs_exist_ok=True)
        save_file({"unrelated": torch.zeros(1)}, tmp_path / "model.safetensors")
        model = theirs(bases[0], first)
        load_adapter(model, tmp_path)
        assert_equal(model, theirs(bases[0], second))

    @pytest.mark.parametrize("kind", ["bias, a head, a rank of its own", "prompts in front of attention"])
    def test_base_and_adapter_of_a_module(self, kind, bases, saved):
        first, second = saved(kind)
        model = theirs(bases[0], first)
        load_adapter(model, second, base=bases[1])
        assert_equal(model, theirs(bases[1], second))
        load_base(model, bases[0])
        assert_equal(model, theirs(bases[0], second))


class TestLive:
    KIND = "bias, a head, a rank of its own"

    @pytest.fixture
    def live(self, bases, saved):
        model = theirs(bases[1], saved(self.KIND)[0])
        model.load_adapter(saved("lora")[0], adapter_name="other")
        live = hw.LiveModel(model)
        load_base(live, bases[0], version=0)
        return live

    def expected(self, base, adapter, other):
        model = theirs(base, adapter)
        model.load_adapter(other, adapter_name="other")
        return model

    def test_each_alone_and_both_as_one_version(self, live, bases, saved):
        (first, second), (other, another) = saved(self.KIND), saved("lora")
        addresses = {name: tensor.data_ptr() for name, tensor in everything(live.model).items()}
        assert_equal(live.model, self.expected(bases[0], first, other))
        report = load_adapter(live, second, version=1)
        assert live.version == 1
        assert (
            report.bytes_written
            < 2 * sum(tensor.nbytes for tensor in load_file(second / "adapter_model.safetensors").values()) + 1
        )
        assert_equal(live.model, self.expected(bases[0], second, other))
        load_adapter(live, another, adapter_name="other", version=2)
        assert_equal(live.model, self.expected(bases[0], second, another))
        load_adapter(live, first, base=bases[1], version=3)
        assert_equal(live.model, self.expected(bases[1], first, another))
        load_base(live, bases[0], version=4)
        assert_equal(live.model, self.expected(bases[0], first, another))
        assert {name: tensor.data_ptr() for name, tensor in everything(live.model).items()} == addresses

    def test_both_as_the_first_version(self, bases, saved):
        first, second = saved("lora")
        live = hw.LiveModel(theirs(bases[0], first))
        with pytest.raises(hw.UsageError, match="nothing was loaded yet: give base= as well"):
            load_adapter(live, second)
        load_adapter(live, second, base=bases[1], version=0)
        assert_equal(live.model, theirs(bases[1], second))

    def test_a_wrong_shape_changes_nothing(self, live, bases, saved, tmp_path):
        first, second = saved(self.KIND)
        tensors = load_file(second / "adapter_model.safetensors")
        name = next(name for name in sorted(tensors) if "lora_B" in name)
        shutil.copytree(second, tmp_path, dirs_exist_ok=True)
        save_file(tensors | {name: tensors[name][:-1].clone()}, tmp_path / "adapter_model.safetensors")
        for options in ({}, {"base": bases[1]}):
            with pytest.raises(hw.UpdateAborted, match="expected"):
                load_adapter(live, tmp_path, version=1, **options)
            assert live.version == 0
            assert_equal(live.model, self.expected(bases[0], first, saved("lora")[0]))

    def test_a_merged_adapter(self, live, saved):
        live.model.merge_adapter()
        with pytest.raises(hw.UpdateAborted, match="merged"):
            load_adapter(live, saved(self.KIND)[1], version=1)


class TestRefused:
    def check(self, model, adapter, error, words, **options):
        before = {name: tensor.clone() for name, tensor in everything(model).items()}
        with pytest.raises(error, match=words) as caught:
            load_adapter(model, adapter, **options)
        assert all(torch.equal(tensor, before[name]) for name, tensor in everything(model).items())
        return caught.value

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"lora_alpha": 4}, "lora_alpha: 8 expected, 4 found"),
            ({"use_rslora": True}, "use_rslora: False expected, True found"),
            ({"peft_type": "LOHA"}, "peft_type: 'LORA' expected, 'LOHA' found"),
            ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ],
    )
    def test_what_computes_otherwise(self, bases, saved, tmp_path, change, words):
        first, second = saved("lora")
        shutil.copytree(second, tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        self.check(theirs(bases[0], first), tmp_path, hw.PlanError, words)

    def test_another_rank_or_kind(self, bases, saved):
        model = theirs(bases[0], saved("lora")[0])
        self.check(model, saved("dora")[0], hw.PlanError, "use_dora")
        file = saved("bias, a head, a rank of its own")[0] / "adapter_model.safetensors"
        error = self.check(model, file, hw.PlanError, "lm_head.weight: unexpected; the model's adapter has none")
        assert len(error.problems) == 1

    def test_a_part_of_it(self, bases, saved):
        model = theirs(bases[0], saved("lora")[0])
        tensors = load_file(saved("lora")[1] / "adapter_model.safetensors")
        gone = sorted(tensors)[0]
        del tensors[gone]
        assert self.check(model, tensors, hw.PlanError, "missing").problems == (
            f"{gone.removeprefix('base_model.model.')}: missing",
        )

    def test_what_peft_computes(self, bases, saved):
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        model = peft.get_peft_model(base_of(bases[0]), config)
        self.check(model, saved("lora")[0], hw.PlanError, "load it by peft itself")

    def test_no_such_adapter(self, bases, saved):
        first, second = saved("lora")
        model = theirs(bases[0], first)
        self.check(model, second, hw.UsageError, "no adapter 'another'; it has default", adapter_name="another")
        model.load_adapter(first, adapter_name="another")  # As the message says.
        load_adapter(model, second, adapter_name="another")

    def test_no_adapters(self, bases, saved):
        self.check(
            base_of(bases[0]), saved("lora")[0], hw.UsageError, "has no adapters; peft.PeftModel.from_pretrained"
        )
        with pytest.raises(hw.UsageError, match="has no adapters"):
            load_base(base_of(bases[0]), bases[0])

    def test_no_model(self, saved):
        with pytest.raises(hw.UsageError, match=r"a model is a torch\.nn\.Module"):
            load_adapter("model", saved("lora")[0])

    def test_base_beside_tensors(self, bases, saved):
        tensors = load_file(saved("lora")[1] / "adapter_model.safetensors")
        self.check(theirs(bases[0], saved("lora")[0]), tensors, hw.UsageError, "base= goes with", base=bases[0])

    def test_no_configuration(self, bases, saved, tmp_path):
        shutil.copy(saved("lora")[1] / "adapter_model.safetensors", tmp_path)
        self.check(theirs(bases[0], saved("lora")[0]), tmp_path, hw.CheckpointError, "adapter_config.json")
