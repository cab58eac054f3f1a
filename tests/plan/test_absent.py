"""Which tensors a source lacks, where a fused parameter is filled in part or not at all: named before any advice."""

import pytest
import torch
from torch import nn

import hotweights as hw


class Fused(nn.Module):
    """Layers of a fused projection, and of experts that lie in one stack."""

    def __init__(self, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(layers))
        for layer in self.layers:
            layer.qkv, layer.experts = nn.Parameter(torch.zeros(6, 2)), nn.Parameter(torch.zeros(3, 2, 2))

    def load_weights(self, pairs):
        for name, tensor in pairs:
            _, number, *which, part = name.split(".")
            layer = self.layers[int(number)]
            if part in "qkv":
                start = 2 * "qkv".index(part)
                layer.qkv.data[start : start + 2].copy_(tensor)
            elif part in ("up", "down"):
                layer.experts.data[int(which[1]), ("up", "down").index(part)].copy_(tensor)


def checkpoint(layers=2, without=()):
    names = [f"layers.{layer}.{part}" for layer in range(layers) for part in "qkv"]
    experts = [f"experts.{number}.{part}" for number in range(3) for part in ("up", "down")]
    made = {name: torch.randn(2, 2) for name in names}
    made |= {f"layers.{layer}.{name}": torch.randn(2) for layer in range(layers) for name in experts}
    return {name: tensor for name, tensor in made.items() if name not in without}


PARTS = [
    (2, ["layers.1.k"], "layers.1.qkv: partial; 8 of 12 elements would be written, from layers.1.q, layers.1.v"),
    (2, ["layers.0.experts.1.up", "layers.0.experts.1.down"], "layers.0.experts: partial; 8 of 12 elements"),
    (1, ["layers.0.experts.1.up", "layers.0.experts.1.down"], "layers.0.experts: partial; 8 of 12 elements"),
    (1, ["layers.0.experts.2.down"], "layers.0.experts: partial; 10 of 12 elements"),
    (3, [f"layers.2.{part}" for part in "qkv"], "layers.2.qkv: missing; F32 [6, 2] expected"),
]


@pytest.mark.parametrize(("layers", "without", "problem"), PARTS)
def test_what_the_source_lacks_is_named(layers, without, problem):
    with pytest.raises(hw.PlanError) as caught:
        hw.load(Fused(layers), checkpoint(layers, without))
    (said,) = caught.value.problems
    assert said.startswith(problem)
    assert said.endswith(f"; the source lacks {', '.join(sorted(without))}")
    assert "allow_" in caught.value.advice


def test_nobody_guesses_what_a_tensor_without_likes_lacks():
    """Of one layer alone, nothing tells that there are three of ``q``, ``k`` and ``v``."""
    with pytest.raises(hw.PlanError) as caught:
        hw.load(Fused(1), checkpoint(1, ["layers.0.k"]))
    assert "from layers.0.q, layers.0.v" in caught.value.problems[0]
    assert "lacks" not in str(caught.value)


def test_an_update_knows_what_the_live_version_had():
    live = hw.LiveModel(Fused(1))
    live.load(checkpoint(1), version="day-1")
    with pytest.raises(hw.UpdateAborted, match=r"version 'day-2' was refused; version 'day-1' is live: ") as caught:
        live.update(checkpoint(1, ["layers.0.k"]), version="day-2")
    assert caught.value.problems[0].endswith("; the source lacks layers.0.k")
    assert "first load" in caught.value.advice


def test_the_advice_can_be_typed():
    with pytest.raises(hw.PlanError) as caught:
        hw.load(Fused(), checkpoint(without=["layers.1.k", "layers.0.q", "layers.0.k", "layers.0.v"]))
    advised = caught.value.advice.partition("allow it: ")[2].removesuffix(".")
    hw.load(
        Fused(),
        checkpoint(without=["layers.1.k", "layers.0.q", "layers.0.k", "layers.0.v"]),
        **eval(f"dict({advised})"),
    )


def test_a_misspelled_name_is_told():
    """``load_weights`` passes over a name that it does not know."""
    tensors = checkpoint()
    tensors["layers.1.kay"] = tensors.pop("layers.1.k")
    with pytest.raises(hw.PlanError) as caught:
        hw.load(Fused(), tensors)
    assert "1 tensor of the source was not used by the model's own loading code: layers.1.kay." in str(caught.value)


def test_a_tensor_that_loading_code_passes_over_is_a_warning(caplog):
    extra = {**checkpoint(), "layers.1.scale_of_k": torch.ones(1)}
    told = "1 tensor of the source was not used by Fused.load_weights: layers.1.scale_of_k"
    report = hw.load(Fused(), extra)
    assert report.warnings == (told,)
    assert "1: layers.1.scale_of_k" in str(report)
    live = hw.LiveModel(Fused())
    live.load(checkpoint())
    for _ in range(2):  # In the report each time, in the log once.
        assert live.update(extra).warnings == (told,)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [f"version 2: {told}"]
    assert live.update(extra, only="layers.0.*").warnings == ()


class Rank(Fused):
    """A rank that has the first expert alone."""

    def load_weights(self, pairs):
        super().load_weights((name, tensor) for name, tensor in pairs if ".experts." not in name or ".0." in name[8:])
        for layer in self.layers:
            layer.experts.data[1:].fill_(0)


def test_what_a_rank_leaves_to_others_is_no_warning():
    report = hw.load(Rank(), checkpoint())
    assert len(report.tensors[hw.Fate.SKIPPED]) == 8
    assert report.warnings == ()


def test_bytes_that_two_write_are_told_with_both_shapes():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.qk = nn.Parameter(torch.zeros(4, 2))

        def load_weights(self, pairs):
            for name, weight in pairs:
                self.qk.data[:3].copy_(weight) if name == "q" else self.qk.data[2:].copy_(weight)

    with pytest.raises(hw.PlanError) as caught:
        hw.load(Twice(), {"q": torch.ones(3, 2), "k": torch.ones(2, 2)})
    assert caught.value.problems == ("qk: bytes written twice, from q [3, 2] and from k [2, 2]",)


class Slicing(nn.Module):
    """Each source tensor fills as many rows as it has."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 4, bias=False) for _ in range(3))

    def load_weights(self, pairs):
        for name, weight in pairs:
            layer, _, part = name.rpartition(".")
            own = self.get_submodule(layer).weight.data
            rows = own[: len(weight)] if part == "q" else own[2 : 2 + len(weight)]
            rows.copy_(weight)


def test_the_part_of_another_shape_than_its_likes_is_named_and_not_allowed():
    short = {f"layers.{layer}.{part}": torch.ones(2, 2) for layer in range(3) for part in "qk"}
    hw.load(Slicing(), short)
    short["layers.1.k"] = torch.ones(1, 2)
    with pytest.raises(hw.PlanError) as caught:
        hw.load(Slicing(), short)
    assert caught.value.problems == (
        "layers.1.weight: partial; 6 of 8 elements would be written, from layers.1.k, layers.1.q; "
        "layers.1.k is [1, 2], and [2, 2] in 2 other layers",
    )
    assert "allow_partial" not in caught.value.advice
