"""What a live model says of its tensors after processing, and what a plan of a processed model says of itself."""

import pytest
import torch
from torch import nn

import hotweights as hw


class Packed:
    """Packs a weight, so that the layer's own tensor is empty and others hold it."""

    def process_weights_after_loading(self, layer):
        layer.scale = layer.weight.abs().amax() / 127
        layer.tables = {"packed": (layer.weight / layer.scale).round().to(torch.int8)}
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class Model(nn.Module):
    """One layer that is processed and made of two tensors of a checkpoint, and one that is not."""

    def __init__(self):
        super().__init__()
        self.packed, self.plain = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
        self.packed.quant_method = Packed()

    def load_weights(self, pairs):
        own = dict(self.named_parameters())
        for name, tensor in pairs:
            if name in ("up", "down"):
                start = 2 * (name == "down")
                own["packed.weight"].data[start : start + 2].copy_(tensor)
            else:
                own[name].data.copy_(tensor)


def version():
    plain = nn.Linear(4, 2)
    return {
        "up": torch.rand(2, 4),
        "down": torch.rand(2, 4),
        "plain.weight": plain.weight.detach(),
        "plain.bias": plain.bias.detach(),
    }


def loaded(**options):
    live = hw.LiveModel(Model(), **options)
    live.load(version())
    return live


AFTERWARDS = """\
  layer packed is processed then; live, it holds
    packed.weight: F32 [0]
    packed.scale: F32 [] (made by processing)
    packed.tables['packed']: I8 [4, 4] (made by processing)"""
LOADED = """\
packed.weight: F32 [4, 4]
  [0:2, :] <- up
  [2:4, :] <- down"""


def test_a_tensor_that_is_processed():
    assert loaded().explain("packed.weight") == f"{LOADED}\n{AFTERWARDS}"


def test_a_tensor_of_the_checkpoint():
    assert (
        loaded().explain("up") == f"up: F32 [2, 4] (of the source)\n  all of it -> packed.weight[0:2, :]\n{AFTERWARDS}"
    )


@pytest.mark.parametrize(("name", "spec"), [("packed.scale", "F32 []"), ("packed.tables['packed']", "I8 [4, 4]")])
def test_what_processing_made(name, spec):
    indented = "\n".join(f"    {line}" for line in LOADED.splitlines())
    assert loaded().explain(name) == f"{name}: {spec} (live)\n  processing layer packed makes it of\n{indented}"


def test_a_tensor_that_is_not_processed():
    assert loaded().explain("plain.bias") == "plain.bias: F32 [2]\n  all of it <- plain.bias"


def test_a_deferred_layer_that_holds_no_tensor_afterwards():
    def hide(layer):
        layer.weight = None

    live = hw.LiveModel(Model(), process=hide, layers="packed", deferred="packed")
    live.load(version())
    assert live.explain("packed.weight").splitlines()[-1] == (
        "  layer packed is processed then, after all that are not deferred; live, it holds no tensor that can be seen"
    )


def test_tied_tensors_are_processed_wherever_they_hang():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    live = hw.LiveModel(model, process=lambda layer: None, layers="1")
    live.load({"0.weight": torch.rand(4, 4)}, allow_missing="1.weight")
    assert "layer 1 is processed then" in live.explain("0.weight")


def test_names_of_wrappers_and_renamed_ones():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    live = hw.LiveModel(nn.DataParallel(model))
    live.load({"old.weight": torch.rand(2, 2)}, rename={"old.": "0."})
    for name in ("0.weight", "module.0.weight", "old.weight"):
        assert live.explain(name) == "0.weight: F32 [2, 2]\n  all of it <- 0.weight"


def test_an_unknown_name_is_told_with_those_like_it():
    with pytest.raises(hw.UnknownName, match=r"'scale'; known are: packed\.scale"):
        loaded().explain("scale")


def test_before_the_first_load():
    live = hw.LiveModel(Model())
    assert live.plan is None
    with pytest.raises(hw.UsageError, match="nothing was loaded yet") as told:
        live.explain("up")
    advice = "hotweights.trace(model, source).explain(name)"
    assert advice in str(told.value)
    assert eval(advice, {"hotweights": hw, "model": live.model, "source": version(), "name": "up"})


def test_the_plan_is_that_of_the_live_version():
    live = loaded()
    first = live.plan
    assert str(first) == str(hw.trace(Model(), version()))
    live.update(version())
    assert live.plan is first
    live.update(version(), only="plain.*")
    assert live.plan is first
    live.update(version() | {"plain.bias": torch.rand(2).double()})
    assert live.plan.casts == {"plain.bias": "F64 -> F32"}
    assert live.plan.processed == ()


def test_a_plan_of_a_processed_model_says_so(tmp_path):
    live = hw.LiveModel(nn.Sequential(nn.Linear(4, 4, bias=False)), process=transposed, layers="0")
    live.load({"0.weight": torch.rand(4, 4)})
    plan = hw.trace(live.model, {"0.weight": torch.rand(4, 4)})
    assert "1: 0 by a LiveModel" in str(plan)
    plan.save(tmp_path / "plan")
    assert hw.LoadPlan.load(tmp_path / "plan").processed == plan.processed == ("0",)
    assert "LiveModel" not in str(live.plan)
    (warning,) = hw.load(live.model, {"0.weight": torch.rand(4, 4)}).warnings
    assert "0: processed by a LiveModel" in warning


def transposed(layer):
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous(), requires_grad=False)


def test_a_plan_that_fails_for_processing_says_what_to_use():
    live = loaded()
    with pytest.raises(hw.PlanError, match="packed: processed by a LiveModel") as told:
        hw.trace(live.model, version())
    for advice in ("live.plan", "live.explain(name)", "live.update"):
        assert advice in str(told.value)
        assert eval(advice, {"live": live, "name": "up"})
    with pytest.raises(hw.UpdateAborted) as aborted:
        live.update({"up": torch.rand(3, 4)})
    assert "processed by" not in str(aborted.value)  # Inside it is in checkpoint format.
    with pytest.raises(hw.PlanError, match="processed by"):
        hw.trace(live.model, version())


def test_a_first_load_that_fails_leaves_nothing_processed():
    live = hw.LiveModel(Model(), process=lambda layer: 1 / 0, layers="packed")
    with pytest.raises(ZeroDivisionError):
        live.load(version())
    assert hw.trace(live.model, version()).processed == ()


def test_a_misspelt_name_of_either_side_finds_those_near_it():
    live = hw.LiveModel(Renaming())
    live.load({f"{part}_proj.weight": torch.zeros(2, 2) for part in "qk"})
    for name, near in (("q_prj.weight", "q_proj.weight"), ("fusd.weight", "fused.weight")):
        for explain in (live.explain, live.plan.explain):
            with pytest.raises(hw.UnknownName, match=near):
                explain(name)
    pushed = {f"{part}_proj.weight": torch.ones(2, 2) for part in "qk"}
    with pytest.raises(hw.UpdateAborted, match=r"matches in the source goes into fused\.weight$"):
        live.update(pushed, only="*q_proj*")
    live.update(pushed, only="fused.weight")


class Renaming(nn.Module):
    def __init__(self):
        super().__init__()
        self.fused, self.other = nn.Linear(2, 4, bias=False), nn.Linear(2, 2)

    def load_weights(self, weights):
        for name, tensor in weights:
            start = 2 * name.startswith("k")
            self.fused.weight.data[start : start + 2].copy_(tensor)
        self.other.weight.data.zero_()
        self.other.bias.data.zero_()


def test_a_problem_of_the_live_tensors_names_no_file(tmp_path):
    live = hw.LiveModel(nn.Linear(2, 2))
    live.load(nn.Linear(2, 2))
    live.model.weight = nn.Parameter(torch.zeros(2, 2))
    hw.save(nn.Linear(2, 2), tmp_path / "1")
    with pytest.raises(hw.UpdateAborted, match=r"something else replaced or moved it$"):
        live.update(tmp_path / "1")
