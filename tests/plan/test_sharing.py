"""Parameters that are views of others: their bytes are written once, under whatever name, and nobody is missing."""

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights import Fate, LoadPlan, PlanError
from hotweights.testing import assert_same_bits, write_checkpoint

SIZES = {"q": 4, "k": 2, "v": 3}


class Attention(nn.Module):
    """Query, key and value, each a parameter, and all of them one: registered before its parts or after them."""

    def __init__(self, first="qkv", dim=0, write=None):
        super().__init__()
        whole = torch.full((9, 9), 7.0)
        if first == "qkv":
            self.qkv = nn.Parameter(whole, requires_grad=False)
        for name, part in zip(SIZES, whole.split(tuple(SIZES.values()), dim), strict=True):
            setattr(self, name, nn.Parameter(part, requires_grad=False))
        if first != "qkv":
            self.qkv = nn.Parameter(whole, requires_grad=False)
        self.dim, self.write = dim, write

    def load_weights(self, pairs):
        for name, tensor in pairs:
            self.write(self, name, tensor)


class ByName(Attention):
    load_weights = property()  # It has none.


def by_views(model, name, tensor):
    getattr(model, name).data.copy_(tensor)


def by_whole(model, name, tensor):
    at = {"q": 0, "k": 4, "v": 6}[name]
    model.qkv.data.narrow(model.dim, at, SIZES[name]).copy_(tensor)


def by_both(model, name, tensor):
    (by_whole if name == "k" else by_views)(model, name, tensor)


def by_programs(model, name, tensor):
    getattr(model, name).data.copy_(tensor * 2)


def crossing(model, name, tensor):
    """Two parts at once, by a slice that is neither's."""
    if name == "q":
        return
    if name == "k":
        model.qkv.data[:5].copy_(torch.cat([tensor, tensor, tensor[:1]]))
    else:
        model.qkv.data[5:].copy_(torch.cat([tensor, tensor[:1]]))


def parts(dim=0):
    made = torch.Generator().manual_seed(1)
    return dict(zip(SIZES, torch.rand(9, 9, generator=made).split(tuple(SIZES.values()), dim), strict=True))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("first", ["qkv", "q"])
@pytest.mark.parametrize("write", [by_views, by_whole, by_both, by_programs, crossing])
def test_what_is_written_under_one_name_is_written_under_the_others(write, first, dim, tmp_path):
    if write is crossing and dim:
        return
    tensors = parts(dim)
    theirs = Attention(first, dim, write)
    theirs.load_weights((name, tensor.clone()) for name, tensor in tensors.items())
    plan = hw.trace(theirs, hw.open(tensors).manifest)
    plan.save(tmp_path / "plan")
    write_checkpoint(tmp_path / "file", tensors)
    for source in (tmp_path / "file", tensors):
        for again in (None, LoadPlan.load(tmp_path / "plan")):
            ours = Attention(first, dim, write)
            report = hw.load(ours, source, plan=again, verify="loader")
            assert_same_bits(ours.state_dict(), theirs.state_dict())
            assert ours.k.data_ptr() == ours.qkv.data.narrow(dim, 4, 2).data_ptr()
            assert not report.tensors[Fate.MISSING]
            assert not report.tensors[Fate.PARTIAL]


@pytest.mark.parametrize("first", ["qkv", "q"])
def test_explain_says_under_which_name(first):
    plan = hw.trace(Attention(first, 0, by_views), hw.open(parts()).manifest)
    assert plan.explain("qkv").splitlines() == [
        "qkv: F32 [9, 9] (shares memory with q, k, v)",
        "  [0:4, :] <- q",
        "  [4:6, :] <- k",
        "  [6:9, :] <- v",
    ]
    assert plan.explain("k").splitlines() == ["k: F32 [2, 9] (shares memory with qkv)", "  qkv[4:6, :] <- k"]


def test_what_is_written_in_part_is_partial():
    def two(model, name, tensor):
        if name != "k":
            by_views(model, name, tensor)

    for first in ("qkv", "q"):
        with pytest.raises(PlanError) as caught:
            hw.trace(Attention(first, 0, two), hw.open(parts()).manifest)
        assert caught.value.problems == (
            "k: missing; F32 [2, 9] expected",
            "qkv: partial; 63 of 81 elements would be written, from q, v",
        )
        plan = hw.trace(Attention(first, 0, two), hw.open(parts()).manifest, allow_missing="k", allow_partial="qkv")
        assert plan.names(Fate.PARTIAL) == ("qkv",)


def test_columns_beside_each_other_are_told_apart():
    """They interleave in memory: the first and last byte of one enclose bytes of the other."""

    def two(model, name, tensor):
        if name != "k":
            by_views(model, name, tensor)

    with pytest.raises(PlanError) as caught:
        hw.trace(Attention("qkv", 1, two), hw.open(parts(1)).manifest)
    assert caught.value.problems == (
        "k: missing; F32 [9, 2] expected",
        "qkv: partial; 63 of 81 elements would be written, from q, v",
    )


def test_an_element_is_written_when_all_its_bytes_are():
    class Bytes(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4, 4), requires_grad=False)

        def load_weights(self, pairs):
            for _, tensor in pairs:
                self.w.data.view(torch.uint8)[:, ::4].copy_(tensor)

    with pytest.raises(PlanError, match=r"w: missing"):
        hw.trace(Bytes(), hw.open({"bytes": torch.ones(4, 4, dtype=torch.uint8)}).manifest)


class TestByName:
    def test_the_parts_or_the_whole(self, tmp_path):
        whole = {"qkv": torch.cat([*parts().values()])}
        for number, state in enumerate((parts(), whole)):
            for source in (state, write_checkpoint(tmp_path / str(number), state)):
                ours = ByName()
                hw.load(ours, source)
                assert_same_bits(ours.state_dict(), parts() | whole)

    def test_not_both(self):
        """Which of them wins is chance."""
        for first in ("qkv", "q"):
            with pytest.raises(PlanError, match="shares memory with"):
                hw.load(ByName(first), ByName(first).state_dict())

    def test_on_meta_they_share_again(self, tmp_path):
        for first in ("qkv", "q"):
            with torch.device("meta"):
                ours, plain = ByName(first), nn.Linear(3, 2)
            hw.load(ours, parts(), device="cpu")
            assert_same_bits(ours.state_dict(), parts() | {"qkv": torch.cat([*parts().values()])})
            assert ours.v.untyped_storage()._cdata == ours.qkv.untyped_storage()._cdata
            with torch.device("meta"):
                both = ByName(first)
            with pytest.raises(PlanError, match="shares memory with"):
                hw.load(both, ByName(first).state_dict(), device="cpu")
            hw.load(plain, nn.Linear(3, 2), device="cpu")
            assert plain.weight.untyped_storage()._cdata != plain.bias.untyped_storage()._cdata


def test_a_plan_for_views_is_none_for_tensors_apart(tmp_path):
    """There the whole would keep its old values, in silence."""
    apart = ByName()
    apart.k = nn.Parameter(apart.k.data.clone(), requires_grad=False)
    whole = {"qkv": torch.rand(9, 9)}
    hw.trace(ByName(), hw.open(whole).manifest).save(tmp_path / "plan")
    with pytest.raises(
        PlanError, match=r"k: F32 \[2, 9\] found, the plan has F32 \[2, 9\] at byte 144 of the memory of qkv"
    ):
        hw.load(apart, whole, plan=LoadPlan.load(tmp_path / "plan"))


def test_a_kept_plan_is_not_used_when_they_have_come_apart(tmp_path):
    whole = {"qkv": torch.rand(9, 9)}
    for cache in ({}, {"cache_dir": tmp_path / "plans"}):
        ours = ByName()
        hw.load(ours, whole, **cache)
        ours.k = nn.Parameter(ours.k.data.clone(), requires_grad=False)
        with pytest.raises(PlanError, match="k: missing"):
            hw.load(ours, whole, **cache)


def test_many_views_of_one_buffer():
    """As flattening trainers keep them: finding who lies where must not cost each a look at all others."""
    flat = torch.zeros(4 * 3000)
    model = nn.Module()
    model.flat = nn.Parameter(flat)
    for number in range(3000):
        setattr(model, f"p{number}", nn.Parameter(flat[4 * number : 4 * number + 4]))
    plan = hw.trace(model, hw.open({f"p{number}": torch.full((4,), 1.0 * number) for number in range(3000)}).manifest)
    assert len(plan.steps) == 3000
    assert "p2999" in plan.explain("flat")
