"""What a load leaves on meta is initialised, or named before the first byte; a head of another shape is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights import Fate


def on_meta():
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.BatchNorm1d(2))


BODY = {"0.weight": torch.ones(3, 3), "0.bias": torch.ones(3)}
REST = ("1.*", "2.*")


def load(model, source=BODY, **options):
    return hw.load(model, source, device="cpu", allow_missing=REST, **options)


def loaded_live(model, source=BODY, **options):
    return hw.LiveModel(model).load(source, device="cpu", allow_missing=REST, **options)


both = pytest.mark.parametrize("load", [load, loaded_live], ids=["load", "LiveModel"])


class TestWhatStaysOnMeta:
    @both
    def test_is_named_before_the_first_byte(self, load):
        model = on_meta()
        model[1].reset_parameters = None
        with pytest.raises(hw.PlanError, match="init_missing=fn") as caught:
            load(model)
        assert [problem.split(":")[0] for problem in caught.value.problems] == [
            "1.bias", "1.weight", "2.bias", "2.running_mean", "2.running_var", "2.weight",
        ]  # fmt: skip
        assert all(tensor.is_meta for tensor in model.state_dict().values())

    @both
    def test_is_made_by_its_modules_where_it_was_allowed(self, load):
        model = on_meta()
        report = load(model)
        assert torch.isfinite(model(torch.ones(2, 3))).all()
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
        if load is not loaded_live:
            assert "1.weight" in report.warnings[0]
            assert "reset_parameters gave them new ones" in report.warnings[0]

    @both
    def test_is_filled_by_a_function_that_gets_its_name(self, load):
        model, asked = on_meta(), []

        def fill(name, tensor):
            asked.append(name)
            tensor.fill_(len(asked))

        report = load(model, init_missing=fill)
        assert asked == ["1.weight", "1.bias", "2.weight", "2.bias", "2.running_mean", "2.running_var"]
        assert model[1].bias.tolist() == [2, 2]
        assert model[0].weight.tolist() == torch.ones(3, 3).tolist()
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
        assert set(asked) <= set(report.tensors[Fate.MISSING])

    @both
    def test_is_what_its_modules_make_of_it(self, load):
        model = on_meta()
        load(model, init_missing=True)
        assert model[1].weight.std() > 0
        assert model[2].running_var.tolist() == [1, 1]
        assert model[2].running_mean.tolist() == [0, 0]

    def test_resetting_leaves_what_is_real_alone(self):
        model = on_meta()
        model[1].bias = nn.Parameter(torch.full((2,), 7.0))
        load(model, init_missing=True)
        assert model[1].bias.tolist() == [7, 7]
        assert not model[1].weight.is_meta

    def test_a_module_that_cannot_is_named(self):
        class Bare(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.empty(2, device="meta"))

        model = Bare()
        with pytest.raises(hw.PlanError, match="scale: Bare has no reset_parameters"):
            hw.load(model, {}, device="cpu", allow_missing="*", init_missing=True)
        hw.load(model, {}, device="cpu", allow_missing="*", init_missing=lambda name, tensor: tensor.fill_(3))
        assert model.scale.tolist() == [3, 3]

    def test_a_tied_tensor_is_filled_once_and_stays_tied(self):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        asked = []
        hw.load(model, {}, device="cpu", allow_missing="*", init_missing=lambda name, tensor: asked.append(name))
        assert asked == ["0.weight", "0.bias", "1.bias"]
        assert model[1].weight is model[0].weight

    @both
    def test_a_function_that_fails_leaves_everything_on_meta(self, load):
        model = on_meta()
        with pytest.raises(ZeroDivisionError):
            load(model, init_missing=lambda name, tensor: 1 / 0)
        assert all(tensor.is_meta for tensor in model.state_dict().values())

    def test_a_buffer_that_no_checkpoint_carries(self):
        model = on_meta()
        model.register_buffer("table", torch.empty(2, device="meta"), persistent=False)
        with pytest.raises(hw.PlanError, match="table: is a non-persistent buffer on the meta device"):
            load(model)
        load(model, init_missing=lambda name, tensor: tensor.fill_(5))
        assert model.table.tolist() == [5, 5]

    def test_a_transient_view_of_what_is_loaded_is_not_asked_for(self):
        with torch.device("meta"):
            model = nn.Linear(3, 2, bias=False)
            model.register_buffer("view", model.weight.detach()[:1], persistent=False)
        hw.load(model, {"weight": torch.ones(2, 3)}, device="cpu")
        assert model.view.tolist() == [[1, 1, 1]]

    def test_the_rest_of_a_part_is_filled_too(self):
        class Fused(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.empty(4, device="meta"))

            def load_weights(self, pairs):
                for _, tensor in pairs:
                    self.weight.data[:2].copy_(tensor)

        model = Fused()
        options = {"device": "cpu", "allow_partial": "weight"}
        with pytest.raises(hw.PlanError, match="weight: partial"):
            hw.load(model, {"half": torch.ones(2)}, **options)
        hw.load(model, {"half": torch.ones(2)}, **options, init_missing=lambda name, tensor: tensor.fill_(7))
        assert model.weight.tolist() == [1, 1, 7, 7]

    def test_what_is_real_is_not_asked_for(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        before = model[1].weight.clone()
        hw.load(model, BODY, allow_missing="1.*", init_missing=lambda name, tensor: tensor.fill_(9))
        assert torch.equal(model[1].weight, before)

    def test_another_kind_of_value_is_refused(self):
        with pytest.raises(hw.UsageError, match=r"fn\(name, tensor\)"):
            load(on_meta(), init_missing="zeros")


def heads(labels):
    return nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, labels)})


class TestAnotherHead:
    def test_the_error_says_what_to_type(self):
        model, source = heads(5), heads(2).state_dict()
        with pytest.raises(hw.PlanError) as caught:
            hw.load(model, source)
        assert "head.weight: shape [5, 3] expected, [2, 3] found" in str(caught.value)
        assert 'allow_mismatched="head.*"' in str(caught.value)
        before = model["head"].weight.clone()
        report = hw.load(model, source, allow_mismatched="head.*")
        assert report.tensors[Fate.MISMATCHED] == ("head.bias", "head.weight")
        assert report.mismatched["head.weight"] == "[2, 3] in the source, [5, 3] in the model"
        assert "[2, 3] in the source" in str(report)
        assert torch.equal(model["head"].weight, before)
        assert torch.equal(model["body"].weight, source["body.weight"])

    def test_one_tensor_is_advised_by_its_name(self):
        with pytest.raises(hw.PlanError, match='allow_mismatched="weight"'):
            hw.load(nn.Linear(3, 2, bias=False), {"weight": torch.ones(5, 3)})

    def test_a_pattern_for_others_allows_nothing(self):
        with pytest.raises(hw.PlanError, match=r"head.weight: shape \[5, 3\] expected"):
            hw.load(heads(5), heads(2).state_dict(), allow_mismatched="body.*")

    def test_a_shape_that_fits_is_loaded_though_it_matches(self):
        model, source = heads(2), heads(2).state_dict()
        report = hw.load(model, source, allow_mismatched="*")
        assert not report.tensors[Fate.MISMATCHED]
        assert torch.equal(model["head"].weight, source["head.weight"])

    def test_tied_names_stay_tied_and_keep_their_value(self):
        def tied(rows):
            model = nn.ModuleDict({"embed": nn.Embedding(rows, 3), "head": nn.Linear(3, rows, bias=False)})
            model["head"].weight = model["embed"].weight
            return model

        model = tied(5)
        before = model["head"].weight.clone()
        report = hw.load(model, tied(2).state_dict(), allow_mismatched="*.weight")
        assert report.tensors[Fate.MISMATCHED] == ("embed.weight", "head.weight")
        assert torch.equal(model["embed"].weight, before)
        assert model["embed"].weight is model["head"].weight

    def test_all_three_that_allow_both_sides_allow_another_head(self):
        model, pattern = heads(5), "head.*"
        before, options = model["head"].weight.clone(), {"allow_missing": pattern, "allow_unexpected": pattern}
        with pytest.raises(hw.PlanError, match="allow_mismatched"):
            hw.load(model, heads(2).state_dict(), **options)
        report = hw.load(model, heads(2).state_dict(), **options, allow_partial=pattern)
        assert report.tensors[Fate.MISMATCHED] == ("head.bias", "head.weight")
        assert torch.equal(model["head"].weight, before)

    def test_on_meta_it_is_initialised_or_named(self):
        with torch.device("meta"):
            model = heads(5)
        model["head"].reset_parameters = None
        options = {"device": "cpu", "allow_mismatched": "head.*"}
        with pytest.raises(hw.PlanError, match=r"head.weight: mismatched \(\[2, 3\] in the source"):
            hw.load(model, heads(2).state_dict(), **options)
        del model["head"].reset_parameters
        hw.load(model, heads(2).state_dict(), **options, init_missing=True)
        assert model["head"].weight.shape == (5, 3)
        assert not model["head"].weight.is_meta

    def test_load_state_dict_with_a_hook_of_its_own(self):
        model = heads(5)
        model["body"].register_load_state_dict_pre_hook(lambda *_: None)
        source = heads(2).state_dict()
        with pytest.raises(hw.PlanError, match='allow_mismatched="head'):
            hw.load(model, source)
        report = hw.load(model, source, allow_mismatched="head.*", verify="loader")
        assert report.tensors[Fate.MISMATCHED] == ("head.bias", "head.weight")
        assert torch.equal(model["body"].weight, source["body.weight"])

    def test_a_live_model_keeps_its_head_at_every_update(self):
        model = heads(5)
        before = model["head"].weight.clone()
        live = hw.LiveModel(model)
        live.load(heads(2).state_dict(), allow_mismatched="head.*")
        for labels in (2, 4):
            source = heads(labels).state_dict()
            report = live.update(source)
            assert report.tensors[Fate.MISMATCHED] == ("head.bias", "head.weight")
            assert report.mismatched["head.bias"] == f"[{labels}] in the source, [5] in the model"
            assert torch.equal(model["head"].weight, before)
            assert torch.equal(model["body"].weight, source["body.weight"])

    def test_a_plan_keeps_it_when_it_is_saved(self, tmp_path):
        model, source = heads(5), heads(2).state_dict()
        plan = hw.trace(model, source, allow_mismatched="head.*")
        plan.save(tmp_path / "plan")
        again = hw.LoadPlan.load(tmp_path / "plan")
        assert dict(again.mismatched) == dict(plan.mismatched) != {}
        assert hw.load(model, source, plan=again).mismatched == plan.mismatched

    def test_load_weights_decides_itself(self):
        class Own(nn.Linear):
            def load_weights(self, pairs):
                for name, tensor in pairs:
                    getattr(self, name).data.copy_(tensor)

        with pytest.raises(Exception, match="size"):
            hw.load(Own(3, 5), {"weight": torch.ones(2, 3), "bias": torch.ones(5)}, allow_mismatched="*")


class TestFillingInPlace:
    @pytest.mark.parametrize("fn", [lambda name, tensor: torch.ones_like(tensor), lambda name, tensor: swapped(tensor)])
    def test_another_tensor_instead_is_refused(self, fn):
        model = on_meta()
        with pytest.raises(hw.UsageError, match=r"fill 1\.weight in place.*tensor\.copy_"):
            load(model, init_missing=fn)
        assert all(tensor.is_meta for tensor in model.state_dict().values())

    def test_what_returns_the_same_tensor_is_fine(self):
        model = on_meta()
        load(model, init_missing=lambda name, tensor: nn.init.ones_(tensor))
        assert model[1].bias.tolist() == [1, 1]

    @pytest.mark.filterwarnings("ignore:for parametrizations:UserWarning")  # torch's, of load_state_dict on meta
    def test_modules_that_are_parametrised_reset_what_is_not(self):
        with torch.device("meta"):
            model = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
        state = {name: torch.ones(tensor.shape) for name, tensor in model.state_dict().items() if name != "bias"}
        hw.load(model, state, device="cpu", allow_missing="bias", init_missing=True)
        assert model.bias.abs().max() <= 1
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items() if name != "bias")


def swapped(tensor):
    tensor.data = torch.ones_like(tensor)


def test_the_advice_keeps_what_is_allowed_already():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    source = {"embed.weight": torch.ones(5, 3), "head.weight": torch.ones(5, 3)}
    with pytest.raises(hw.PlanError, match=r'allow_mismatched="\*"'):
        hw.load(model, source, allow_mismatched="head.weight")


def test_what_is_processed_is_not_sent_to_build():
    class Processed(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(2, 2, bias=False)
            self.register_buffer("angles", torch.arange(2.0), persistent=False)

        def process_weights_after_loading(self):
            pass

    weights = {"mix.weight": torch.ones(2, 2)}
    with torch.device("meta"):
        model = Processed()
    with pytest.raises(hw.PlanError) as caught:
        hw.LiveModel(model).load(weights, device="cpu")
    assert "make the model on its device instead" in str(caught.value)
    assert "hotweights.build" not in str(caught.value)
    hw.LiveModel(Processed()).load(weights)
