"""What a model's own loading code refuses is told with the tensor, what was expected, what was found, and the file."""

import contextlib

import pytest
import torch
from torch import nn

import hotweights as hw


class Model(nn.Module):
    """Loads in the ways that engines do, each with a check of its own."""

    def __init__(self):
        super().__init__()
        self.fused, self.checked = nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.zeros(2, 2))

    def load_weights(self, pairs):
        for name, tensor in pairs:
            self.take(name, tensor)

    def take(self, name, tensor):
        if name == "checked":
            assert self.checked.shape == tensor.shape, "another shape"
            self.checked.data.copy_(tensor)
        else:
            start = {"upper": 0, "lower": 2}[name]
            self.fused.data.narrow(0, start, 2).copy_(tensor)


class Slicing(Model):
    def take(self, name, tensor):
        super().take(name, tensor if name == "checked" else tensor.narrow(0, 0, 2))


class AllAtOnce(Model):
    def load_weights(self, pairs):
        for name, tensor in sorted(dict(pairs).items()):
            self.take(name, tensor)


def tensors(**other):
    return {"upper": torch.ones(2, 2), "lower": torch.ones(2, 2), "checked": torch.ones(2, 2), **other}


CASES = [
    (Model, {"lower": torch.ones(2, 3)}, "lower: [2, 2] expected for fused, F32 [2, 3] found; RuntimeError: "),
    (Model, {"lower": torch.ones(3, 2)}, "lower: [2, 2] expected for fused, F32 [3, 2] found; RuntimeError: "),
    (AllAtOnce, {"lower": torch.ones(2, 3)}, "lower: [2, 2] expected for fused, F32 [2, 3] found; RuntimeError: "),
    (
        Slicing,
        {"lower": torch.ones(4, 3)},
        "lower: [2, 2] expected for fused, F32 [4, 3] found, of which the code takes",
    ),
    (Slicing, {"lower": torch.ones(1, 2)}, "lower: F32 [1, 2] found; RuntimeError: start"),
    (Model, {"checked": torch.ones(2, 3)}, "checked: F32 [2, 2] expected, F32 [2, 3] found; AssertionError: another"),
    (Model, {"strange": torch.ones(1)}, "strange: F32 [1] found; KeyError: 'strange'"),
    (Model, {"lower": torch.ones(1, 2)}, "fused: [1, 2] would be broadcast, silently, into [2, 2] (from lower"),
]


@pytest.mark.parametrize(("model", "other", "problem"), CASES)
def test_the_tensor_is_named(model, other, problem, tmp_path):
    for source, file in ((tensors(**other), ""), (tmp_path, " in model.safetensors")):
        hw.save(tensors(**other), tmp_path)
        with pytest.raises(hw.PlanError) as caught:
            hw.load(model(), source)
        (said,) = caught.value.problems
        assert said.startswith(problem)
        assert file.strip() in said
        assert "broadcast" in said or f"{__file__}:" in said


def test_an_update_says_what_the_live_version_had():
    live = hw.LiveModel(Slicing())
    live.load(tensors(), version="day-1")
    with pytest.raises(hw.UpdateAborted) as caught:
        live.update(tensors(lower=torch.ones(1, 2)), version="day-2")
    assert caught.value.problems[0].endswith("; in the live version's checkpoint it is F32 [2, 2]")


def test_what_the_code_catches_is_not_blamed():
    """An operation that failed and was survived is not what the error is about."""

    class Trying(Model):
        def load_weights(self, pairs):
            for name, tensor in pairs:
                with contextlib.suppress(RuntimeError):
                    self.fused.data.copy_(tensor)
                if name == "checked":
                    raise ValueError("of its own")

    with pytest.raises(hw.PlanError) as caught:
        hw.load(Trying(), tensors(lower=torch.ones(3, 3)))
    assert caught.value.problems[0].startswith("checked: F32 [2, 2] found; ValueError: of its own")


class Early(nn.Linear):
    """Its loading code ends with the first tensor, or takes none."""

    count = 1

    def load_weights(self, weights):
        for number, (name, tensor) in enumerate(weights if self.count else ()):
            self.get_parameter(name).data.copy_(tensor)
            if number + 1 == self.count:
                return


def test_loading_code_that_ends_early_is_the_cause():
    model, source = Early(2, 2), Early(2, 2).state_dict()
    with pytest.raises(hw.PlanError) as caught:
        hw.load(model, source)
    (said,) = caught.value.problems
    first, second, *_ = source
    assert said.startswith(
        f"Early.load_weights ended after 1 of {len(source)} tensors; the last that it took is {first}."
    )
    assert f"never looked at {second}" in said
    assert f"So {second}" in said
    assert "rename=" not in str(caught.value)
    assert "allow_" not in str(caught.value)
    model.count = 0
    with pytest.raises(hw.PlanError, match=f"took none of the {len(source)} tensors of the source"):
        hw.load(model, source)
    model.count = len(source)  # It need not ask for the tensor behind the last.
    hw.load(model, source)
    with pytest.raises(hw.PlanError) as caught:
        hw.load(model, {**source, "other": torch.ones(1)})
    assert 'If that is meant, allow it: allow_unexpected="other".' in str(caught.value)
    hw.load(model, {**source, "other": torch.ones(1)}, allow_unexpected="other")


class Lenient(Model):
    def take(self, name, tensor):
        if name in ("upper", "lower", "checked"):
            super().take(name, tensor)


def test_a_misspelt_part_is_named_before_what_would_lose_it():
    source = tensors()
    source["lowerr"] = source.pop("lower")
    with pytest.raises(hw.PlanError) as caught:
        hw.load(Lenient(), source)
    assert "did you mean" not in str(caught.value)  # Nobody knows yet what fills the rest.

    class Layers(nn.ModuleDict):
        def load_weights(self, pairs):
            for name, tensor in pairs:
                layer, _, part = name.partition(".")
                self[layer].take(part, tensor)

    several = {f"{layer}.{name}": tensor for layer in "01" for name, tensor in tensors().items()}
    several["1.lowerr"] = several.pop("1.lower")
    with pytest.raises(hw.PlanError) as caught:
        hw.load(Layers({"0": Lenient(), "1": Lenient()}), several)
    said = str(caught.value)
    assert '1.lowerr was not used; did you mean 1.lower? rename={"1.lowerr": "1.lower"}' in said
    assert said.index("did you mean") < said.index("allow_partial")
    hw.load(Layers({"0": Lenient(), "1": Lenient()}), several, rename={"1.lowerr": "1.lower"})
