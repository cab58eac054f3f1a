"""What is said to a worker that is offered names of PEFT, and that each advice works."""

import copy

import peft
import pytest
import torch
from ends import Thread, receiver, sender
from torch import nn

import hotweights as hw
from hotweights.engines.peft import load_adapter, load_base

CONFIG = {"r": 2, "target_modules": ["0"], "init_lora_weights": False}


def plain():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def adapted(base=None, **config):
    return peft.get_peft_model(copy.deepcopy(base or plain()), peft.LoraConfig(**{**CONFIG, **config}))


class Engine(nn.Module):
    """It passes over names that it does not know."""

    def __init__(self):
        super().__init__()
        self.layers = plain()

    def load_weights(self, pairs):
        own = dict(self.layers.named_parameters())
        for name, tensor in pairs:
            if name in own:
                own[name].data.copy_(tensor)


def served(model):
    live = hw.LiveModel(model)
    live.load(plain() if isinstance(model, Engine) else model, version="day-1")
    return live


def whole(trained):
    return trained.state_dict()


def alone(trained):
    return peft.get_peft_model_state_dict(trained)


@pytest.mark.parametrize("source", [whole, alone, lambda trained: trained])
@pytest.mark.parametrize("model", [plain, Engine])
def test_a_worker_without_adapters_is_told_what_these_names_are(model, source):
    live, trained = served(model()), adapted()
    with pytest.raises(hw.UpdateAborted) as caught:
        live.update(source(trained), version="day-2")
    said = str(caught.value)
    assert "2 names of the source are of a PEFT adapter, and the model has none: " in said
    assert "allow_" not in said, "it would serve the base alone"
    assert "copy.deepcopy(peft_model).merge_and_unload()" in said
    live.update(copy.deepcopy(trained).merge_and_unload(), version="day-2")
    inputs = torch.randn(3, 4)
    torch.testing.assert_close((live.model.layers if model is Engine else live.model)(inputs), trained(inputs))


@pytest.mark.parametrize("source", [whole, alone, lambda trained: trained])
@pytest.mark.parametrize(("theirs", "ours"), [(["0", "1"], ["0"]), (["1"], ["0"]), (["0"], ["0", "1"])])
def test_adapters_on_other_layers_are_called_that_and_the_advice_works(theirs, ours, source):
    base = plain()
    trained, live = adapted(base, target_modules=theirs), served(adapted(base, target_modules=ours))
    taking = {"only": "*lora_*"} if source is alone else {}
    with pytest.raises(hw.UpdateAborted) as caught:
        live.update(source(trained), **taking)
    said = str(caught.value)
    assert f"The source's adapter is on {', '.join(theirs)}, the model's on {', '.join(ours)}. Give the model" in said
    for other in ("under the adapters", "load_adapter", "allow_"):
        assert other not in said
    live = served(adapted(base, target_modules=theirs))
    live.update(source(trained), **taking)
    inputs = torch.randn(3, 4)
    torch.testing.assert_close(live.model(inputs), trained(inputs))


def test_who_means_the_model_under_an_adapter_may_say_so():
    live = hw.LiveModel(Engine())
    report = live.load(adapted(), allow_unexpected="*lora_*")
    assert "of a PEFT adapter" in report.warnings[0]


@pytest.mark.parametrize("source", [whole, alone])
def test_or_the_model_is_given_the_adapter(source):
    base = plain()
    trained = adapted(base)
    with pytest.raises(hw.PlanError, match=r"fill it by hotweights.engines.peft.load_base and load_adapter"):
        hw.load(plain(), source(trained))
    live = hw.LiveModel(adapted())
    load_base(live, base)
    load_adapter(live, alone(trained))
    inputs = torch.randn(3, 4)
    assert torch.equal(live.model(inputs), trained(inputs))


def test_a_part_for_a_model_with_adapters():
    base = plain()
    trained = adapted(base)
    live = served(adapted())
    with pytest.raises(hw.UpdateAborted, match=r"hotweights.engines.peft.load_base\(model, source\)"):
        live.update(base)
    load_base(live, base)
    with pytest.raises(hw.UpdateAborted, match=r"hotweights.engines.peft.load_adapter\(model, source\)"):
        live.update(alone(trained))
    load_adapter(live, alone(trained))
    inputs = torch.randn(3, 4)
    assert torch.equal(live.model(inputs), trained(inputs))


@pytest.mark.parametrize("source", [whole, lambda trained: trained])
def test_a_whole_model_in_place_of_an_adapter(source):
    live, trained = served(adapted()), adapted()
    with pytest.raises(hw.PlanError, match=r"a whole model with adapters, not the adapter 'default' alone") as caught:
        load_adapter(live, source(trained))
    assert "peft.get_peft_model_state_dict(model, adapter_name='default', save_embedding_layers=False)" in str(
        caught.value
    )
    load_adapter(live, peft.get_peft_model_state_dict(trained, adapter_name="default"))


def test_adapters_stay_when_the_model_under_them_is_updated():
    """They were allowed to be missing, and are no values of the model under them to go back to."""
    model, trained = adapted(), adapted()
    live = hw.LiveModel(model)
    live.load(plain(), allow_missing="*lora_*")
    load_adapter(live, alone(trained))
    base = plain()
    report = live.update(base)
    assert report.restored == ()
    inputs = torch.randn(3, 4)
    trained.base_model.model[0].base_layer.load_state_dict(base[0].state_dict())
    trained.base_model.model[1].load_state_dict(base[1].state_dict())
    assert torch.equal(model(inputs), trained(inputs))


def test_what_was_offered_and_does_not_fit_is_refused_as_an_update_refuses_it(tmp_path):
    """A loop that catches ``UpdateAborted`` goes on, and the trainer is told why at once."""
    address = f"unix:{tmp_path}/own/socket"
    other = peft.get_peft_model(plain(), peft.LoraConfig(r=2, target_modules=["1"]))
    live, trained = served(adapted()), adapted()

    def work():
        with receiver(address) as source:
            while source.poll() is None:
                source.connect(0.1)
            with pytest.raises(hw.UpdateAborted, match=r"version 'other' was refused; version 'day-1' is live") as told:
                load_adapter(live, source)
            assert "other" in live.status()["last_error"]
            assert "rename" not in str(told.value)
            report = load_adapter(live, source)
            assert {"wait for the sender", "wait for the group"} <= {event.what for event in report.events}
            return told.value

    with sender(address) as sending:
        worker = Thread(work)
        with pytest.raises(hw.TransferAborted) as caught:
            sending.send(alone(other), version="other")
        sending.send(alone(trained), version="day-2")
        said = worker.result()
    assert said.problems
    assert all(problem in str(caught.value) for problem in said.problems)
    assert live.version == "day-2"


def test_an_adapter_before_the_model_under_it_is_told_what_can_be_done():
    base = plain()
    live, trained = hw.LiveModel(adapted()), adapted(base)
    with pytest.raises(hw.UsageError, match=r"nothing was loaded yet: load the model under the adapters first") as told:
        load_adapter(live, alone(trained))
    assert "base=" not in str(told.value), "it is for an adapter in files"
    load_base(live, base)
    load_adapter(live, alone(trained))


def test_the_trainer_is_told_to_merge(tmp_path):
    address = f"unix:{tmp_path}/own/socket"
    live = served(plain())

    def work():
        with receiver(address) as source, pytest.raises(hw.UpdateAborted):
            live.update(source)

    with sender(address) as sending:
        worker = Thread(work)
        with pytest.raises(hw.TransferAborted, match=r"Merge it before saving or sending"):
            sending.send(alone(adapted()), version="day-2")
        worker.result()


def test_half_of_a_base_is_warned_of():
    live, base = served(adapted()), plain()
    (warning,) = live.update(base, only="*base_layer*").warnings
    assert "left out 2 tensors of the source: " in warning
    assert "1.weight" in warning
    assert load_base(live, base).warnings == ()  # As it says.


def test_merged_weights_for_a_model_with_adapters():
    live = served(adapted())
    merged = copy.deepcopy(adapted()).merge_and_unload()
    with pytest.raises(hw.UpdateAborted, match=r"If adapters are merged into it they would count twice"):
        live.update(merged)
