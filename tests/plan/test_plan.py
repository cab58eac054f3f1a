"""Plans by name: every problem at once, and the fate of every name."""

import pickle
import re

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hotweights as hw
from hotweights import Fate, LoadPlan, Manifest, OpaqueDtype, PlanError, TensorSpec, UnknownName, load, trace
from hotweights.boxes import Box, pieces, slices
from hotweights.dtypes import FORMAT_DTYPES, is_lossless
from hotweights.plan.draft import Allowed, draft
from hotweights.plan.patterns import matches
from hotweights.plan.rules import Rules
from hotweights.plan.steps import Copy, Target
from hotweights.testing import assert_same_bits, write_checkpoint


def manifest(**tensors):
    return Manifest(TensorSpec(name, dtype, shape) for name, (dtype, shape) in tensors.items())


def targets(owner=None, **tensors):
    owner = owner or {}
    return {n: Target(TensorSpec(n, dtype, shape), owner.get(n, n)) for n, (dtype, shape) in tensors.items()}


F32, BF16, I64 = torch.float32, torch.bfloat16, torch.int64


def test_fates():
    plan = draft(
        manifest(a=(F32, (2,)), b=(BF16, (2,)), skipped=(F32, (1,)), extra=(F32, (1,))),
        targets(a=(F32, (2,)), b=(F32, (2,)), absent=(F32, (2,))),
        rules=Rules(skip="skip*"),
        allowed=Allowed(unexpected=["ext*"], missing=re.compile("^abs")),
    )
    assert plan.fates == {
        "a": Fate.WRITTEN,
        "b": Fate.CAST,
        "skipped": Fate.SKIPPED,
        "extra": Fate.UNEXPECTED,
        "absent": Fate.MISSING,
    }
    assert plan.casts == {"b": "BF16 -> F32"}
    assert plan.steps == (Copy("a", "a"), Copy("b", "b"))
    assert plan.names(Fate.MISSING) == ("absent",)


def test_every_problem_is_reported_at_once_and_sorted():
    with pytest.raises(PlanError) as caught:
        draft(
            manifest(
                shape=(F32, (2,)),
                lossy=(F32, (2,)),
                fractions=(F32, (2,)),
                extra=(F32, ()),
                odd=(OpaqueDtype("F6_E2M3", 6), (4,)),
            ),
            targets(shape=(F32, (3,)), lossy=(BF16, (2,)), fractions=(I64, (2,)), absent=(F32, (5,)), odd=(F32, (4,))),
            problems=["zzz: found before"],
        )
    assert caught.value.problems == (
        "absent: missing; F32 [5] expected",
        "extra: unexpected; the model has no such name",
        "fractions: F32 -> I64 cuts off fractions",
        'lossy: F32 -> BF16 loses information; cast="floats" allows it',
        f"odd: F6_E2M3 -> F32: torch {torch.__version__} has no such type",
        "shape: shape [3] expected, [2] found",
        "zzz: found before",
    )
    assert "7 problems" in str(caught.value)


def test_broadcasts_are_problems():
    """``copy_`` of [4] into [4, 4] succeeds in silence."""
    naive = torch.zeros(4, 4)
    naive.copy_(torch.arange(4.0))  # the naive way is bitten: no error, 16 elements out of 4
    assert naive.count_nonzero() == 12
    for found, expected in (((4,), (4, 4)), ((1,), (4,)), ((), (1,)), ((2, 2), (4,)), ((4,), (2, 2))):
        with pytest.raises(PlanError, match="shape"):
            draft(manifest(w=(F32, found)), targets(w=(F32, expected)))
    draft(manifest(w=(F32, (1,))), targets(w=(F32, ())))  # load_state_dict takes this too


def test_lossy_casts_are_problems_unless_asked_for():
    """Copied naively, int64 383 into bf16 is 384; an fp32 router loses its last bits in bf16."""
    assert torch.tensor([383]).to(BF16).item() == 384  # the naive way is bitten
    for found, expected in ((I64, BF16), (F32, BF16), (I64, torch.int32), (BF16, torch.float16), (torch.int32, F32)):
        with pytest.raises(PlanError, match="loses information"):
            draft(manifest(w=(found, (2,))), targets(w=(expected, (2,))))
        plan = draft(manifest(w=(found, (2,))), targets(w=(expected, (2,))), allowed=Allowed(cast="loader"))
        assert plan.fates["w"] is Fate.CAST
    for cast in ("error", "floats", "loader"):
        with pytest.raises(PlanError, match="cuts off fractions"):
            draft(manifest(w=(F32, (2,))), targets(w=(I64, (2,))), allowed=Allowed(cast=cast))
    with pytest.raises(UnknownName, match="'maybe'; known are: error, floats, loader"):
        draft(manifest(), {}, allowed=Allowed(cast="maybe"))


class TestTies:
    TIED = targets({"head": "embed"}, embed=(F32, (2,)), head=(F32, (2,)))

    @pytest.mark.parametrize("present", ["embed", "head"])
    def test_one_name_is_enough(self, present):
        plan = draft(manifest(**{present: (F32, (2,))}), self.TIED)
        assert plan.steps == (Copy(present, present),)
        assert plan.fates == {present: Fate.WRITTEN}

    def test_the_second_is_compared(self):
        plan = draft(manifest(head=(F32, (2,)), embed=(F32, (2,))), self.TIED)
        assert plan.steps == (Copy("head", "head"),)
        assert plan.ties == ((Copy("head", "head"), Copy("embed", "embed")),)
        assert plan.fates == {"head": Fate.WRITTEN, "embed": Fate.TIED}

    def test_none_is_missing_once(self):
        with pytest.raises(PlanError) as caught:
            draft(manifest(), self.TIED)
        assert caught.value.problems == ("embed: missing; F32 [2] expected (tied with head)",)
        assert draft(manifest(), self.TIED, allowed=Allowed(missing="head")).names(Fate.MISSING) == ("embed", "head")

    def test_two_that_cannot_be_equal_are_a_problem(self):
        with pytest.raises(PlanError, match="one tensor with embed"):
            draft(manifest(embed=(F32, (2,)), head=(F32, (3,))), self.TIED)


def test_overlapping_targets_are_a_problem_when_both_are_written():
    both = targets(a=(F32, (4,)), view=(F32, (2,)))
    with pytest.raises(PlanError, match="view: shares memory with a"):
        draft(manifest(a=(F32, (4,)), view=(F32, (2,))), both, overlapping=[("a", "view")])
    draft(manifest(a=(F32, (4,))), both, overlapping=[("a", "view")], allowed=Allowed(missing="view"))


def test_patterns():
    chosen = matches(["*.inv_freq", re.compile(r"layers\.\d+$")])
    assert [name for name in ("a.inv_freq", "inv_freq", "model.layers.3", "layers.3.w") if chosen(name)] == [
        "a.inv_freq",
        "model.layers.3",
    ]
    assert not matches(())("anything")


PLAIN = [getattr(torch, name) for _, name in FORMAT_DTYPES.values() if name and "float4" not in name]


@pytest.mark.parametrize("found", [dtype for dtype in PLAIN if dtype.itemsize <= 2], ids=str)
def test_lossless_means_that_every_value_survives(found):
    """Every bit pattern of every small dtype, there and back."""
    if found == torch.bool:
        values = torch.tensor([False, True])
    else:
        pattern = torch.arange(256**found.itemsize)
        values = pattern.to(torch.uint8 if found.itemsize == 1 else torch.uint16).view(found)
    for expected in PLAIN:
        if found == expected or expected.is_complex:
            continue
        there = values.to(expected)
        back = there.to(found)
        if found.is_floating_point:
            survives = same_floats(back, values)
        else:
            # Through float64, in which each of these is exact: a saturating there and back must not hide a loss.
            survives = torch.equal(back, values) and torch.equal(there.to(torch.float64), values.to(torch.float64))
        assert is_lossless(found, expected) == survives, f"{found} -> {expected}"


def same_floats(back, values):
    back, values = back.to(torch.float64), values.to(torch.float64)
    same = (back == values) & (back.signbit() == values.signbit())
    return bool((same | back.isnan() & values.isnan()).all())


def test_lossless_for_the_large_ones():
    yes = [(I64, I64), (torch.int32, torch.float64), (F32, torch.float64), (F32, torch.complex64), (torch.int32, I64)]
    no = [(I64, torch.float64), (torch.float64, F32), (torch.complex64, F32), (I64, torch.uint64), (torch.uint64, I64)]
    assert all(is_lossless(*pair) for pair in yes)
    assert not any(is_lossless(*pair) for pair in no)


@examples(200, derandomize=True)
@given(st.lists(st.integers(0, 7), max_size=4), st.integers(1, 40))
def test_pieces_cover_a_tensor_once_and_in_order(shape, limit):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    flat, seen = whole.reshape(-1), []
    for index, first, box in pieces(tuple(shape), limit):
        piece = whole[index]
        assert tuple(piece.shape) == box
        assert piece.numel() <= max(limit, 0)
        assert torch.equal(piece.reshape(-1), flat[first : first + piece.numel()])
        seen += piece.reshape(-1).tolist()
    assert seen == flat.tolist()


class TestFused:
    """One parameter of three sources, as engines have it, and what its plan says of itself."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.Linear(4, 4, bias=False)
            self.qkv_proj = nn.Linear(4, 12, bias=False)
            self.scale = nn.Parameter(torch.zeros(4), requires_grad=False)

        def load_weights(self, pairs):
            with torch.no_grad():
                for name, tensor in pairs:
                    if name in ("q", "k", "v"):
                        self.qkv_proj.weight["qkv".index(name) * 4 :][:4].copy_(tensor)
                    elif name == "a":
                        self.scale.copy_(-torch.exp(tensor))
                    else:
                        self.norm.weight[:, 1:].copy_(tensor[:, 1:])
                        self.norm.weight[:, :1].copy_(tensor[:, :1])

    @pytest.fixture
    def plan(self):
        return trace(
            self.Attention(),
            manifest(v=(F32, (4, 4)), a=(F32, (4,)), n=(F32, (4, 4)), q=(F32, (4, 4)), k=(F32, (4, 4))),
        )

    def test_explain(self, plan):
        assert plan.explain("qkv_proj.weight").splitlines() == [
            "qkv_proj.weight: F32 [12, 4]",
            "  [0:4, :] <- q",
            "  [4:8, :] <- k",
            "  [8:12, :] <- v",
        ]
        assert "  [:, 1:4] <- n[:, 1:4]" in plan.explain("norm.weight")
        assert plan.explain("scale") == "scale: F32 [4]\n  all of it <- a program of a: exp, neg, copy_"
        assert plan.explain("q") == "q: F32 [4, 4] (of the source)\n  all of it -> qkv_proj.weight[0:4, :]"
        with pytest.raises(UnknownName, match=r"'weight'; known are: norm\.weight, qkv_proj\.weight"):
            plan.explain("weight")

    def test_printed(self, plan):
        assert str(plan).splitlines() == [
            "    copies  5, 5 of them of slices",
            "  programs  1 of 3 operations: 1 exp, 1 neg, 1 copy_",
            "   written  5 tensors",
        ]

    def test_order(self, plan):
        def sources(made):
            return [step.sources[0] for step in made.steps]

        assert sources(plan.ordered("given")) == sources(plan)
        assert sources(plan.ordered("file")) == ["v", "a", "n", "n", "q", "k"]
        assert sources(plan.ordered("layer")) == ["a", "n", "n", "v", "q", "k"]
        backwards = {"v": (1, 0), "a": (0, 9), "n": (0, 5), "q": (0, 3), "k": (0, 1)}
        assert sources(plan.ordered("file", backwards.__getitem__)) == ["k", "q", "n", "n", "a", "v"]
        assert [len(batch) for batch in plan.ordered("layer").batches()] == [1, 2, 3]
        assert [len(batch) for batch in plan.ordered("file").batches()] == [6]
        with pytest.raises(UnknownName, match="known are: file, given, layer"):
            plan.ordered("size")

    def test_levels_come_first(self):
        steps = (Copy("b", "x.b"), Copy("a", "x.a"), Copy("c", "w.c"))
        plan = LoadPlan(steps, (), {}, {}, levels=(1, 0, 0), manifest=manifest(a=(F32, ()), b=(F32, ()), c=(F32, ())))
        for order in ("layer", "file"):
            made = plan.ordered(order)
            assert made.levels == (0, 0, 1)
            assert made.steps[-1] == steps[0]

    @pytest.mark.parametrize("order", ["layer", "file", "given"])
    def test_every_order_loads_the_same(self, order, tmp_path):
        tensors = {name: torch.randn(4, 4) for name in ("v", "n", "q", "k")} | {"a": torch.randn(4)}
        ours, theirs = self.Attention(), self.Attention()
        theirs.load_weights(tensors.items())
        load(ours, write_checkpoint(tmp_path, tensors, shards=2), order=order)
        assert_same_bits(ours.state_dict(), theirs.state_dict())


def test_boxes_as_slices():
    def box(shape, stride, offset=0):
        return Box(F32, shape, stride, offset * 4)

    whole = box((6, 4), (4, 1))
    assert slices(whole, whole) == [(0, 6), (0, 4)]
    assert slices(box((2, 4), (4, 1), 8), whole) == [(2, 4), (0, 4)]
    assert slices(box((8,), (1,), 8), whole) == [(2, 4), (0, 4)]
    assert slices(box((6, 2), (4, 1), 1), whole) == [(0, 6), (1, 3)]
    assert slices(box((3,), (4,), 5), whole) == [(1, 4), (1, 2)]
    assert slices(box((2,), (1,), 5), whole) == [(1, 2), (1, 3)]
    assert slices(box((3, 4), (8, 1)), whole) is None  # every other row
    assert slices(box((4, 6), (1, 4)), whole) is None  # transposed
    assert slices(box((6,), (1,), 2), whole) is None  # around a corner
    assert slices(box((2, 2), (4, 1), 3), whole) is None
    assert slices(box((), ()), box((), ())) == []


def test_nothing_is_allowed_where_nothing_fits():
    with pytest.raises(PlanError, match=r"Nothing of the source fits the model: it has x; the model has w\.") as caught:
        draft(manifest(x=(F32, (1,))), targets(w=(F32, (1,))))
    assert "allow_" not in str(caught.value), "that would load nothing"


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        (dict.fromkeys("abcde", (F32, (2,))), 5),  # all of another shape
        ({**dict.fromkeys("vwxyz", (F32, (1,))), "a": (F32, (1,))}, 4),  # one name is the same
        ({"a": (F32, (1,)), "b": (F32, (2,)), "c": (F32, (2,)), "y": (F32, (1,)), "z": (F32, (1,))}, 4),  # of both
    ],
)
def test_the_checkpoint_of_another_model_is_told_as_that(source, kept):
    """To allow what differs would keep the old weights, and call them by the new version's name."""
    model = targets(**dict.fromkeys("abcde", (F32, (1,))))
    with pytest.raises(PlanError) as caught:
        draft(manifest(**source), model)
    assert f"This looks like another model's checkpoint: {kept} of 5 names of the model would" in caught.value.advice
    assert "allow_" not in str(caught.value)


@pytest.mark.parametrize("source", [{"a": (F32, (1,))}, {}])
def test_a_part_of_a_model_is_not_another_models(source):
    with pytest.raises(PlanError) as caught:
        draft(manifest(**source), targets(**dict.fromkeys("abcdef", (F32, (1,)))))
    assert "another model" not in caught.value.advice


def test_what_would_allow_a_difference_is_said_once():
    both = {"same": (F32, (1,))}
    with pytest.raises(PlanError) as caught:
        draft(manifest(a=(F32, (1,)), b=(F32, (1,)), **both), targets(c=(F32, (1,)), d=(F32, (1,)), **both))
    said = 'If that is meant, allow it: allow_missing=["c", "d"], allow_unexpected=["a", "b"].'
    assert str(caught.value).splitlines()[-1] == said
    assert len(caught.value.problems) == 4
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(PlanError) as caught:
        draft(manifest(b=(F32, (1,))), targets(b=(F32, (1,)), c=(F32, (1,))))
    assert str(caught.value).splitlines()[-1] == 'If that is meant, allow it: allow_missing="c".'
    with pytest.raises(PlanError) as caught:
        draft(manifest(c=(F32, (2,))), targets(c=(F32, (1,))))
    assert "allow it" not in str(caught.value)
    live = hw.LiveModel(nn.Linear(2, 2))
    live.load(nn.Linear(2, 2))
    with pytest.raises(hw.UpdateAborted) as aborted:
        live.update({"weight": torch.zeros(2, 2)})
    assert str(aborted.value).splitlines()[-1].startswith('If that is meant, allow it: allow_missing="bias". ')
    assert "in the first load" in str(aborted.value), "an update takes no such argument"
