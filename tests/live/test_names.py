"""Live models within wrappers and adapters, ``rename=``, and ``by=``."""

import copy
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hotweights as hw

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.compile's and peft's own


def state(value):
    return {name: torch.full_like(tensor, value) for name, tensor in nn.Linear(2, 2).state_dict().items()}


def holds(model, value):
    return all((tensor == value).all() for tensor in model.parameters())


def test_a_wrapped_live_model_is_updated_and_fed_under_every_name():
    inner = nn.Linear(2, 2)
    live = hw.LiveModel(torch.compile(inner))
    live.load(state(0))
    live.update({f"module.{name}": tensor for name, tensor in state(1).items()})
    assert holds(inner, 1)
    with live.begin() as update:  # as the last version came
        assert [*update.manifest] == ["module.weight", "module.bias"]
        update.feed({f"module.{name}": tensor for name, tensor in state(2).items()})
        update.commit()
    assert holds(inner, 2)
    with live.begin(hw.open(state(3)).manifest) as update:
        update.feed(state(3))
        update.commit()
    assert holds(inner, 3)
    live.update({f"net.{name}": tensor for name, tensor in state(4).items()}, rename={"net.": ""})
    with live.begin(hw.open(state(5)).manifest, rename=lambda name: name) as update:
        update.feed(state(5))
        update.commit()
    with live.begin(rename={"x.": ""}) as update:
        update.feed({f"x.{name}": tensor for name, tensor in state(6).items()})
        update.commit()
    assert holds(inner, 6)
    live.update({"bias": torch.zeros(2)}, only="_orig_mod.bias")
    assert inner.bias.sum() == 0
    assert (inner.weight == 6).all()
    bare = hw.LiveModel(copy.deepcopy(inner))
    bare.load(inner)
    assert bare.digest() == live.digest()


@pytest.mark.parametrize("before", [None, {"a.": "b.", "b.": "a."}], ids=["as they are", "swapped"])
def test_what_is_fed_under_new_names_means_the_same_whatever_the_last_version_was_called(before):
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["a", "b"]))
    live = hw.LiveModel(adapted)
    weights = {f"{part}.{name}": tensor for part in "ab" for name, tensor in state(0).items()}
    live.load(weights, rename=before, allow_missing="*lora_*")
    with live.begin(rename={"a.": "b.", "b.": "a."}) as update:
        update.feed({name: torch.full_like(tensor, ord(name[0])) for name, tensor in weights.items()})
        update.commit()
    assert holds(model["a"].base_layer, ord("b"))
    assert holds(model["b"].base_layer, ord("a"))
    with live.begin(rename={"trainer.": ""}) as update:
        update.feed({f"trainer.{name}": torch.full_like(tensor, ord(name[0])) for name, tensor in weights.items()})
        update.commit()
    assert holds(model["a"].base_layer, ord("a"))


def test_an_adapters_file_goes_into_a_live_model(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted(*names):
        config = peft.LoraConfig(r=1, target_modules=["0"], init_lora_weights=False)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        return model

    trained, model = adapted("default"), adapted("default")
    trained.save_pretrained(tmp_path)
    live = hw.LiveModel(model)
    live.load(model.state_dict())
    base = {f"0.{name}": tensor for name, tensor in state(1).items()}
    live.update(tmp_path, only="*lora_*")
    wanted = peft.get_peft_model_state_dict(trained)
    assert all(torch.equal(peft.get_peft_model_state_dict(model)[name], tensor) for name, tensor in wanted.items())
    live.update(base, only="*base_layer*")
    assert holds(model.base_model.model[0].base_layer, 1)
    two = adapted("default", "second")
    with pytest.raises(hw.PlanError, match=r"fits 0\.lora_A\.default\.weight and 0\.lora_A\.second\.weight") as refused:
        hw.load(two, tmp_path, allow_missing="*")
    advice = re.search(r"rename=(.*\))", str(refused.value).splitlines()[0])[1]
    hw.load(two, tmp_path, allow_missing="*", rename=eval(advice))
    assert all(torch.equal(peft.get_peft_model_state_dict(two)[name], tensor) for name, tensor in wanted.items())


class Reads(nn.Linear):
    def load_weights(self, weightfile):
        raise AssertionError("called")


class Typed(nn.Linear):
    def load_weights(self, weights: str):
        raise AssertionError("called")


class Unclear(nn.Linear):
    def load_weights(self, what):
        return open(what).read()


@pytest.mark.parametrize("kind", [Reads, Typed])
def test_code_that_takes_a_path_is_not_called(kind):
    model = kind(2, 2)
    hw.load(model, state(1))
    assert holds(model, 1)
    live = hw.LiveModel(model)
    live.load(state(2))
    live.update(state(3))
    assert holds(model, 3)
    with pytest.raises((hw.PlanError, AssertionError), match="called"):
        hw.load(model, state(1), by="loader")


def test_what_cannot_be_told_is_said_by_hand():
    model = Unclear(2, 2)
    with pytest.raises(hw.PlanError, match=r'load by name: by="name"\.$'):
        hw.load(model, state(1))
    hw.load(model, state(1), by="name")
    hw.load(model, state(2), plan=hw.trace(model, state(2), by="name"), by="name")
    live = hw.LiveModel(model)
    live.load(state(2), by="name")
    live.update(state(3))
    assert holds(model, 3)
    with pytest.raises(hw.UsageError, match=r'by="loader" asks for a load_weights'):
        hw.load(nn.Linear(2, 2), state(1), by="loader")


def test_problems_name_the_file_of_a_renamed_tensor(tmp_path):
    save_file({"module.weight": torch.ones(2, 2), "module.bias": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(hw.PlanError, match=r"bias.*in model.safetensors"):
        hw.load(nn.Linear(2, 2), tmp_path, rename={"module.": ""})
    live = hw.LiveModel(nn.Linear(2, 2))
    live.load(nn.Linear(2, 2))
    with pytest.raises(hw.UpdateAborted, match=r"bias.*in model.safetensors"):
        live.update(tmp_path, rename={"module.": ""})


SWAP = {"a.": "b.", "b.": "a."}


def pair(first, second):
    return {"a.weight": torch.full((2, 2), float(first)), "b.weight": torch.full((2, 2), float(second))}


def test_feeding_under_new_names_renames_once():
    """The names of the live version came by the same rename: a second one on top would swap the values back."""
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "ab"})
    live = hw.LiveModel(model)
    live.load(pair(1, 2), rename=SWAP)
    for options in ({"rename": SWAP}, {}):
        with live.begin(**options) as update:
            update.feed(pair(3, 4))
            update.commit()
        assert (float(model["a"].weight[0, 0]), float(model["b"].weight[0, 0])) == (4, 3)


def test_what_did_not_come_is_called_as_this_update_calls_it():
    live = hw.LiveModel(nn.Linear(2, 2))
    live.load({f"x.{name}": tensor for name, tensor in state(1).items()}, rename={"x.": ""})
    manifest = hw.open({f"y.{name}": tensor for name, tensor in state(2).items()}).manifest
    for begin, prefix in (
        (lambda: live.begin(manifest, rename={"y.": ""}), "y."),
        (lambda: live.begin(hw.open(state(2)).manifest), ""),
        (live.begin, "x."),
    ):
        said = f"did not come: bias{' (' + prefix + 'bias in the source)' if prefix else ''}"
        with begin() as update:
            update.feed({f"{prefix}weight": state(2)["weight"]})
            with pytest.raises(hw.UpdateAborted, match=re.escape(said) + "$"):
                update.prepare()


@pytest.mark.parametrize("name", [None, [], "", ".weight"])
def test_a_rename_that_gives_no_name_ends_what_is_fed(name):
    live = hw.LiveModel(nn.Linear(2, 2))
    live.load(state(1))
    with live.begin(rename=lambda _: name) as update, pytest.raises(hw.UpdateAborted, match="weight would become"):
        update.feed(state(2))
    assert holds(live.model, 1)


def test_a_rename_that_raises_says_so():
    def rename(name):
        raise KeyError(name)

    live = hw.LiveModel(nn.Linear(2, 2))
    live.load(state(1))
    for act in (
        lambda: live.update(state(2), rename=rename),
        lambda: live.begin(hw.open(state(2)).manifest, rename=rename),
    ):
        with pytest.raises(
            hw.UpdateAborted, match=r"version 1 is live: rename=.*for 'weight' raised KeyError: 'weight'"
        ):
            act()
    assert holds(live.model, 1)


def test_a_name_that_is_misspelt_is_told_with_the_one_that_is_meant_and_the_advice_is_followed():
    def layers():
        return nn.ModuleDict({"head": nn.Linear(2, 2), "l1": nn.Linear(2, 3), "l2": nn.Linear(2, 3)})

    live = hw.LiveModel(layers())
    live.load(layers())
    new = layers()
    good = new.state_dict()
    wrong = {{"head.weight": "head.weigth"}.get(name, name): tensor for name, tensor in good.items()}
    with pytest.raises(hw.UpdateAborted) as caught:
        live.update(wrong)
    problem = next(problem for problem in caught.value.problems if "unexpected" in problem)
    assert problem.endswith('did you mean head.weight? rename={"head.weigth": "head.weight"}')
    live.update(wrong, rename=eval(problem.partition("rename=")[2]))
    assert torch.equal(live.model["head"].weight, new["head"].weight)
    with pytest.raises(hw.UpdateAborted) as caught:  # Who renames already is not told to type another rename=.
        live.update({f"m.{name}": tensor for name, tensor in wrong.items()}, rename={"m.": ""})
    assert any(problem.endswith("did you mean head.weight?") for problem in caught.value.problems)
    for name, tensor in {"l3.bias": torch.zeros(3), "head.weigth": torch.zeros(3)}.items():
        absent = {"l3.bias": "l2.bias", "head.weigth": "head.weight"}[name]
        others = {other: tensor for other, tensor in good.items() if other != absent}
        with pytest.raises(hw.UpdateAborted) as caught:  # Another layer, another shape: nobody knows.
            live.update({**others, name: tensor})
        assert "did you mean" not in str(caught.value)
