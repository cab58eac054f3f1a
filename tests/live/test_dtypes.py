"""Updates in other dtypes than the first load: a trainer's float32 masters, sent to an engine in bfloat16."""

import threading

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.testing import assert_same_bits

HALF, WAYS = torch.bfloat16, ["staged", "journal", False]


def masters(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return {"a.weight": torch.randn(3, 3).to(dtype), "b.weight": torch.randn(3, 3).to(dtype)}


def model_of(dtype=HALF):
    return nn.ModuleDict({name: nn.Linear(3, 3, bias=False, dtype=dtype) for name in "ab"})


def loaded(dtype=HALF, **options):
    model = model_of(dtype)
    live = hw.LiveModel(model)
    live.load(masters(0, HALF), **options)
    return model, live


def by_update(live, tensors, **options):
    return live.update(tensors, **options)


def by_feed(live, tensors, **options):
    with live.begin(**options) as update:
        update.feed(tensors.items())
        return update.commit()


def by_manifest(live, tensors, **options):
    with live.begin(hw.open(tensors).manifest, **options) as update:
        update.feed(tensors)
        return update.commit()


ROADS = pytest.mark.parametrize("road", [by_update, by_feed, by_manifest])


@pytest.mark.parametrize("atomic", WAYS)
@ROADS
def test_masters_are_cast_to_what_the_engine_holds(road, atomic):
    model, live = loaded()
    report = road(live, masters(1), atomic=atomic)
    assert_same_bits(dict(model.named_parameters()), {name: t.to(HALF) for name, t in masters(1).items()})
    assert report.casts == dict.fromkeys(masters(1), "F32 -> BF16")
    assert report.tensors[hw.Fate.CAST] == ("a.weight", "b.weight")
    assert "F32 -> BF16" in str(report)
    assert road(live, masters(2, HALF)).casts == {}
    assert_same_bits(dict(model.named_parameters()), masters(2, HALF))


@pytest.mark.parametrize("options", [{"cast": "error"}, {"cast": "error", "atomic": "journal"}])
@ROADS
def test_none_is_done_where_none_may_be(road, options):
    _, live = loaded()
    live.update(masters(1))
    digest = live.digest()
    with pytest.raises(hw.UpdateAborted, match=r'a\.weight: F32 -> BF16 loses information.*cast="floats"'):
        road(live, masters(1), **options)
    assert live.digest() == digest
    road(live, masters(2), **options | {"cast": "loader"})  # as the error says


def test_what_the_first_load_was_given_holds_for_updates():
    _, live = loaded(cast="error")
    with pytest.raises(hw.UpdateAborted, match="loses information"):
        live.update(masters(1))
    live.update(masters(1), cast="floats")


def test_the_first_load_casts_nothing_that_loses():
    live = hw.LiveModel(model_of())
    with pytest.raises(hw.PlanError, match="F32 -> BF16 loses information"):
        live.load(masters(0))
    live.load(masters(0), cast="floats")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_only_floats_are_cast(dtype):
    """Integers and floats of eight bits come with a scale; a cast alone makes something else of them."""
    _, live = loaded()
    wrong = {name: torch.full((3, 3), 383, dtype=dtype) for name in masters(1)}
    digest = live.digest()
    for road in (by_update, by_manifest):
        with pytest.raises(hw.UpdateAborted, match=r"a\.weight: .* loses information"):
            road(live, wrong)
    with pytest.raises(hw.UpdateAborted, match=r"a\.weight: "):
        by_feed(live, wrong)
    assert live.digest() == digest


def test_floats_of_eight_bits_are_not_made_by_a_cast():
    model = model_of()
    for layer in model.values():
        layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    live = hw.LiveModel(model)
    live.load(masters(0, torch.float8_e4m3fn))
    for road in ROADS.args[1]:
        with pytest.raises(hw.UpdateAborted, match="F32 -> F8_E4M3 loses information"):
            road(live, masters(1))
        road(live, masters(1), cast="loader")
        live.update(masters(0, torch.float8_e4m3fn))


def test_what_the_model_could_hold_is_not_cut_off():
    """The checkpoint was bfloat16, the model is float32. A cast to the checkpoint's dtype would lose what both have."""
    model, live = loaded(torch.float32)
    with pytest.raises(hw.UpdateAborted, match=r"came as BF16; .*begin\(hw\.open\(tensors\)\.manifest\)"):
        by_feed(live, masters(1))
    by_manifest(live, masters(1))  # as the error says
    assert_same_bits(dict(model.named_parameters()), masters(1))


class Decay(nn.Module):
    """Computes what it loads, in the dtype that comes."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(4, dtype=HALF), requires_grad=False)
        self.w = nn.Parameter(torch.zeros(4, dtype=HALF), requires_grad=False)

    def load_weights(self, pairs):
        for name, tensor in pairs:
            getattr(self, name).data.copy_(-torch.exp(tensor) if name == "a" else tensor)


def test_code_that_computes_gets_what_came():
    wide, narrow = ({n: torch.linspace(0.1, 3, 4).to(dtype) for n in "aw"} for dtype in (torch.float32, HALF))
    model, cold = Decay(), Decay()
    live = hw.LiveModel(model)
    live.load(narrow)
    with live.begin() as update:
        update.feed({"w": wide["w"]})
        with pytest.raises(
            hw.UpdateAborted,
            match=r"a: F32 came, and the live version came as BF16; .*begin\(hw\.open\(tensors\)\.manifest\)",
        ):
            update.feed({"a": wide["a"]})
    by_manifest(live, wide)
    cold.load_weights(wide.items())
    assert_same_bits(dict(model.named_parameters()), dict(cold.named_parameters()))


def test_slices_and_ties_are_cast_too():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qk = nn.Parameter(torch.zeros(4, 2, dtype=HALF), requires_grad=False)

        def load_weights(self, pairs):
            for name, tensor in pairs:
                self.qk.data.narrow(0, 2 * "qk".index(name), 2).copy_(tensor)

    torch.manual_seed(0)
    wide = {name: torch.randn(2, 2) for name in "qk"}
    model = Fused()
    live = hw.LiveModel(model)
    live.load({name: tensor.to(HALF) for name, tensor in wide.items()})
    by_feed(live, wide)
    assert torch.equal(model.qk, torch.cat([*wide.values()]).to(HALF))

    tied = model_of()
    tied["b"].weight = tied["a"].weight
    live = hw.LiveModel(tied)
    same = dict.fromkeys(("a.weight", "b.weight"), wide["q"])
    tied["a"].weight.data = torch.zeros(2, 2, dtype=HALF)
    live.load({name: tensor.to(HALF) for name, tensor in same.items()})
    for road in (by_update, by_feed, by_manifest):
        road(live, same)
        assert torch.equal(tied["a"].weight, wide["q"].to(HALF))
        with pytest.raises(hw.UpdateAborted, match="tied weights differ"):
            road(live, {**same, "b.weight": wide["k"]})


def test_masters_are_sent_once_and_cast_at_the_worker(tmp_path):
    address = f"unix:{tmp_path}/sock"
    model, live = loaded()
    failures = []

    def work():
        try:
            with hw.Receiver(address, timeout=30) as receiver:
                failures.append(live.update(receiver))
        except Exception as error:
            failures.append(error)

    with hw.Sender(address, timeout=30) as sender:
        worker = threading.Thread(target=work)
        worker.start()
        sent = sender.send(masters(1), version="step-1")
        worker.join(30)
    (report,) = failures
    assert report.casts == dict.fromkeys(masters(1), "F32 -> BF16"), report
    assert sent.nbytes == sum(tensor.nbytes for tensor in masters(1).values())
    assert_same_bits(dict(model.named_parameters()), {name: t.to(HALF) for name, t in masters(1).items()})


def test_an_unknown_cast_is_named():
    _, live = loaded()
    for act in (live.begin, lambda cast: live.update(masters(1), cast=cast)):
        for cast in ("maybe", ""):
            with pytest.raises(hw.UnknownName, match="known are: error, floats, loader"):
                act(cast=cast)


# What feed takes.


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (3, "pairs of a name and a tensor, or as a mapping of them; found 3"),
        (("a.weight", torch.ones(3, 3)), r"a single pair, which goes into a list: \[\(name, tensor\)\]"),
        ("a.weight", "found 'a.weight'"),
        (torch.ones(3, 3), "found Tensor"),
        (model_of(), r"module.state_dict\(\)"),
        ([("a.weight", torch.ones(3, 3)), (3, None)], "found a pair of 3 and None"),
        (["a.weight"], "found 'a.weight' among them"),
    ],
    ids=["number", "pair", "name", "tensor", "module", "no tensor", "no pair"],
)
def test_what_cannot_be_fed_is_said_and_the_update_goes_on(wrong, words):
    model, live = loaded()
    with live.begin() as update:
        with pytest.raises(hw.UsageError, match=words):
            update.feed(wrong)
        update.feed([*masters(1).items()])  # as the error says
        update.commit()
    assert_same_bits(dict(model.named_parameters()), {name: t.to(HALF) for name, t in masters(1).items()})


def test_what_cannot_be_fed_from_an_iterator_ends_the_update():
    _, live = loaded()
    digest = live.digest()
    with live.begin() as update, pytest.raises(hw.UpdateAborted, match="found a pair of 3 and None") as caught:
        update.feed(iter([(3, None)]))
    assert isinstance(caught.value.__cause__, hw.UsageError)
    assert live.digest() == digest


def test_a_wrong_name_is_told_with_those_that_come_near():
    _, live = loaded()
    with (
        live.begin() as update,
        pytest.raises(hw.UpdateAborted, match=r"module\.a\.weight: unexpected.*a\.weight") as e,
    ):
        update.feed({"module.a.weight": torch.ones(3, 3)})
    assert "hw.open(tensors).manifest" in str(e.value)
    with live.begin() as update, pytest.raises(hw.UpdateAborted, match=r"it has a\.weight, b\.weight"):
        update.feed({"__": torch.ones(3, 3)})


def test_by_name_a_load_weights_does_not_cast():
    """Its loading code is not asked, so that it would cast says nothing."""

    class Loading(nn.Linear):
        def load_weights(self, pairs):
            raise AssertionError("called")

    live = hw.LiveModel(Loading(2, 2, bias=False))
    live.load({"weight": torch.zeros(2, 2)}, by="name")
    whole = {"weight": torch.full((2, 2), 2**60 + 1)}
    with pytest.raises(hw.UpdateAborted, match="I64 -> F32 loses information"):
        live.update(whole)
    assert live.update({"weight": torch.ones(2, 2).double()}).casts == {"weight": "F64 -> F32"}
    assert live.update(whole, cast="loader").casts == {"weight": "I64 -> F32"}
