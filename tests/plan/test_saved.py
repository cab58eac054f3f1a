"""Saved plans: they come back as they were, and no file of other bytes is believed."""

import contextlib

import msgspec
import pytest
import torch
import xxhash
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from idioms import IDIOMS, Model, weights
from torch import nn

import hotweights as hw
from hotweights import LoadPlan, Manifest, OpaqueDtype, PlanError, PlanFileError, TensorSpec
from hotweights.boxes import Box, Memory, Region
from hotweights.plan.saved.operations import operations
from hotweights.plan.steps import Op, Program
from hotweights.testing import assert_same_bits

ALLOWED = {"allow_missing": "*", "allow_partial": "*", "allow_unexpected": "*"}
HEAD = len(b"hotweights plan\n") + 8


class Fused(nn.Module):
    """Query, key and value in one; a scale that is computed from two tensors."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Parameter(torch.zeros(12, 4), requires_grad=False)
        self.scaled = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16), requires_grad=False)

    def load_weights(self, pairs):
        kept = dict(pairs)
        for number, name in enumerate("qkv"):
            self.qkv[number * 4 : number * 4 + 4].copy_(kept[name])
        self.scaled.copy_(-torch.exp(kept["a"].float()) * torch.tensor([1.0, 2.0, 3.0, 4.0]))


def state():
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(4, 4, generator=generator) for name in "qkv"} | {"a": torch.arange(4.0)}


def manifest_of(tensors):
    return hw.open(tensors).manifest


def alike(one, other):
    """Field by field; constants by their bits."""
    for name in LoadPlan.__dataclass_fields__:
        if name == "constants":
            assert one.constants.keys() == other.constants.keys()
            for key, tensor in one.constants.items():
                found = other.constants[key]
                assert (found.dtype, found.shape, found.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
            assert_same_bits(
                {key: one.contiguous() for key, one in other.constants.items()},
                {key: one.contiguous() for key, one in one.constants.items()},
            )
        elif name == "manifest":
            assert list(one.manifest.values()) == list(other.manifest.values())
        else:
            assert getattr(one, name) == getattr(other, name), name


@pytest.fixture
def saved(tmp_path):
    plan = hw.trace(Fused(), manifest_of(state()))
    plan.save(tmp_path / "a.plan")
    return plan, tmp_path / "a.plan"


def test_a_plan_comes_back_as_it_was_and_loads(saved):
    plan, path = saved
    again = LoadPlan.load(path)
    alike(plan, again)
    assert any(isinstance(step, Program) for step in plan.steps), "or nothing interesting was saved"
    expected, found = Fused(), Fused()
    expected.load_weights(state().items())
    hw.load(found, state(), plan=again)
    assert_same_bits(dict(found.named_parameters()), dict(expected.named_parameters()))


def test_every_idiom_that_can_be_planned_can_be_saved(tmp_path):
    """The whole table of loaders: what has a plan comes back, or is refused with the operation's name."""
    count = 0
    for number, idiom in enumerate(IDIOMS):
        try:
            plan = hw.trace(Model(idiom.loader), manifest_of(weights(number)), **ALLOWED)
        except hw.HotweightsError:
            continue
        with contextlib.suppress(PlanFileError):
            plan.save(tmp_path / "one.plan")
            alike(plan, LoadPlan.load(tmp_path / "one.plan"))
            count += 1
    assert count > len(IDIOMS) // 2


def test_plans_by_name_with_ties_and_dtypes_that_torch_lacks(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3), "t": nn.Linear(3, 2)})
    model["b"].weight = model["a"].weight
    model["t"].weight = nn.Parameter(torch.zeros(3, 2).t())
    specs = [TensorSpec(name, one.dtype, tuple(one.shape)) for name, one in model.state_dict().items()]
    plan = hw.trace(model, Manifest([*specs, TensorSpec("x", OpaqueDtype("F6_E2M3", 6), (4,))]), allow_unexpected="x")
    plan.ordered("layer").save(tmp_path / "plan")
    alike(plan.ordered("layer"), LoadPlan.load(tmp_path / "plan"))


class TestRefusedToSave:
    @pytest.mark.parametrize(
        "func", [torch.ops.aten.from_file.default, torch.ops.aten.bernoulli_.float, torch.ops.aten.set_.source_Tensor]
    )
    def test_operations_that_no_file_may_name(self, func, tmp_path):
        assert str(func) not in operations()
        region = Region(Memory("model", "w"), Box(torch.float32, (2,), (1,), 0))
        step = Program((), (Op(func, (region,), {}, (), (region,), (region,)),), (region,))
        with pytest.raises(PlanFileError, match=f"can be used but not saved.*{func}"):
            LoadPlan((step,), (), {}, {}).save(tmp_path / "plan")
        assert not list(tmp_path.iterdir()), "something was left behind"

    def test_custom_operations(self, tmp_path):
        with torch.library._scoped_library("hotweights_test", "FRAGMENT") as library:
            library.define("twice(Tensor x) -> Tensor")
            library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
            library.impl("twice", lambda x: torch.empty_like(x), "Meta")

            class Doubled(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.w = nn.Parameter(torch.zeros(2), requires_grad=False)

                def load_weights(self, pairs):
                    for _, tensor in pairs:
                        self.w.copy_(torch.ops.hotweights_test.twice(tensor))

            plan = hw.trace(Doubled(), manifest_of({"w": torch.ones(2)}))
            with pytest.raises(PlanFileError, match=r"hotweights_test\.twice"):
                plan.save(tmp_path / "plan")


def test_nothing_in_the_list_has_side_effects():
    """No generator, no file, no ``out=``, no resizing, no operation of other libraries."""
    found = operations()
    assert len(found) > 200
    for name, func in found.items():
        assert func.namespace == "aten"
        assert not any(word in name for word in ("from_file", "rand", "bernoulli", "set_", "resize", "record_stream"))
        assert not any("Generator" in str(one.real_type) for one in func._schema.arguments)
        for one in func._schema.arguments:
            if one.alias_info is not None and one.alias_info.is_write:
                assert one.name == "self", f"{name} writes to {one.name}"


def signed(document):
    payload = msgspec.msgpack.encode(document)
    return b"hotweights plan\n" + xxhash.xxh3_64_intdigest(payload).to_bytes(8, "little") + payload


class TestRefusedToRead:
    def test_other_files(self, tmp_path):
        for content in (b"", b"hotweights plan\n", b"\x80\x04pickle", bytes(100)):
            (tmp_path / "x").write_bytes(content)
            with pytest.raises(PlanFileError, match="no saved plan"):
                LoadPlan.load(tmp_path / "x")
        with pytest.raises(FileNotFoundError):
            LoadPlan.load(tmp_path / "absent")

    def test_the_advice_can_be_followed(self, tmp_path):
        model, path = nn.Linear(2, 2), tmp_path / "x"
        manifest = hw.open(model.state_dict()).manifest
        path.write_bytes(b"other")
        with pytest.raises(PlanFileError) as caught:
            LoadPlan.load(path)
        advice = str(caught.value).partition("make one with ")[2]
        eval(advice, {"hw": hw, "model": model, "manifest": manifest, "path": path})
        assert LoadPlan.load(path).manifest == manifest

    def test_another_version(self, saved):
        document = msgspec.msgpack.decode(saved[1].read_bytes()[HEAD:])
        saved[1].write_bytes(signed({**document, "version": 1}))
        with pytest.raises(PlanFileError, match="version 1"):
            LoadPlan.load(saved[1])

    @pytest.mark.parametrize(
        ("where", "value", "words"),
        [
            (("steps", 3, 1, 0, 0), "aten.from_file.default", "no plan may name"),
            (("steps", 0, 1), 99, "not there"),
            (("steps", 0, 4, 3), 1 << 20, "not inside"),
            (("steps", 0, 4, 2), [-4, 1], "not inside"),
            (("steps", 0, 4, 0), "float33", "no dtype"),
            (("steps", 0, 4, 1), [3, 4], "copied into"),
            (("steps", 0, 4, 2), [0, 1], "several elements in one place"),
            (("targets", 0, 7), -1, "no memory has a byte"),
            (("targets", 0, 3), 7, "no tensor of a model"),
            (("fates", "nobody"), "written", "nobody"),
            (("manifest", 0, 2), [1 << 60], "no tensor has the shape"),
            (("manifest", 1, 0), "q", "twice"),
            (("levels",), [1], "levels"),
            (("constants", "0", 2), [9], "not inside"),
            (("constants", "0", 3), "cuda:77", "constant 0"),
        ],
    )
    def test_what_cannot_be(self, saved, where, value, words):
        document = msgspec.msgpack.decode(saved[1].read_bytes()[HEAD:])
        inner = document
        for key in where[:-1]:
            inner = inner[key]
        inner[where[-1]] = value
        saved[1].write_bytes(signed(document))
        with pytest.raises(PlanFileError, match=words):
            LoadPlan.load(saved[1])


BYTES = []


def whole_file(tmp_path_factory):
    if not BYTES:
        path = tmp_path_factory.mktemp("plans") / "a.plan"
        hw.trace(Fused(), manifest_of(state())).save(path)
        BYTES.append((path, path.read_bytes()))
    return BYTES[0]


@examples(300, derandomize=True)
@given(data=st.data())
def test_damaged_bytes_give_our_error(tmp_path_factory, data):
    path, good = whole_file(tmp_path_factory)
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(good) - 1))
        changed[at] = data.draw(st.integers(0, 255))
    changed = changed[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else changed
    path.write_bytes(bytes(changed))
    if changed == good:
        LoadPlan.load(path)
    else:
        with pytest.raises(PlanFileError):
            LoadPlan.load(path)


@examples(1000, derandomize=True)
@given(data=st.data())
def test_forged_bytes_give_our_error_or_a_plan_that_runs_or_is_refused(tmp_path_factory, data):
    """The digest is made to match, so that everything behind it is tried."""
    path, good = whole_file(tmp_path_factory)
    payload = bytearray(good[HEAD:])
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(good[: HEAD - 8] + xxhash.xxh3_64_intdigest(bytes(payload)).to_bytes(8, "little") + payload)
    try_to_use(path)


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=4), st.binary(max_size=4)
)
VALUES = st.recursive(
    LEAVES | st.sampled_from(["q", "w", "qkv", "0", "float32", "aten.copy_.default", "source", "model", "result"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["region", "list", "tuple", "dtype", "device", "layout", "complex", "memory_format", "x"]),
            inner,
            max_size=1,
        )
    ),
    max_leaves=6,
)


@examples(1000, derandomize=True)
@given(data=st.data())
def test_forged_documents_give_our_error_or_a_plan_that_runs_or_is_refused(tmp_path_factory, data):
    path, good = whole_file(tmp_path_factory)
    document = msgspec.msgpack.decode(good[HEAD:])
    for _ in range(data.draw(st.integers(1, 2))):
        spots = list(every_spot(document))
        container, key = spots[data.draw(st.integers(0, len(spots) - 1))]
        if isinstance(container[key], int) and data.draw(st.booleans()):
            container[key] += data.draw(st.sampled_from([-1, 1, 3, 4, 64]))
        else:
            container[key] = data.draw(VALUES)
    path.write_bytes(signed(document))
    try_to_use(path)


def every_spot(node):
    for key in node if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from every_spot(node[key])


def try_to_use(path):
    try:
        plan = LoadPlan.load(path)
    except PlanFileError:
        return
    str(plan)
    for name in plan.targets:
        plan.explain(name)
    try:
        hw.load(Fused(), state(), plan=plan)
    except (PlanError, hw.TiedWeightsDiffer):
        return


class TestFits:
    """A plan is for one model and one source; with another, every difference is named."""

    def test_every_difference_is_named(self, saved):
        class Other(Fused):
            def __init__(self):
                super().__init__()
                self.qkv = nn.Parameter(torch.zeros(4, 12).t())
                self.scaled = nn.Parameter(torch.zeros(4))
                self.extra = nn.Parameter(torch.zeros(1))

        tensors = {name: one for name, one in state().items() if name != "q"}
        tensors |= {"k": torch.zeros(2, 8), "v": torch.zeros(4, 4, dtype=torch.int32), "new": torch.zeros(1)}
        model = Other()
        with pytest.raises(PlanError) as caught:
            hw.load(model, tensors, plan=saved[0])
        assert caught.value.problems == (
            "model: extra: F32 [1] found, which the plan does not know",
            "model: qkv: F32 [12, 4] with strides [1, 12] found, the plan has F32 [12, 4]",
            "model: scaled: F32 [4] found, the plan has BF16 [4]",
            "source: k: F32 [2, 8] found, the plan has F32 [4, 4]",
            "source: new: F32 [1] found, which the plan does not know",
            "source: q: is not there; the plan has F32 [4, 4]",
            "source: v: I32 [4, 4] found, the plan has F32 [4, 4]",
        )
        assert not model.qkv.any()

    def test_ties_are_part_of_it(self):
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        plan = hw.trace(model, manifest_of(model.state_dict()))
        model["b"].weight = model["a"].weight
        with pytest.raises(PlanError, match=r"b\.weight: F32 \[2, 2\] tied with a\.weight found"):
            hw.load(model, model.state_dict(), plan=plan)

    def test_values_that_loading_code_asked_for_are_part_of_it(self):
        class Chosen(nn.Module):
            def __init__(self, index):
                super().__init__()
                self.w = nn.Parameter(torch.zeros(2), requires_grad=False)
                self.register_buffer("index", torch.tensor(index), persistent=False)

            def load_weights(self, pairs):
                for _, tensor in pairs:
                    self.w.copy_(tensor[self.index.item()])

        tensors = {"w": torch.arange(4.0).view(2, 2)}
        plan = hw.trace(Chosen(1), manifest_of(tensors))
        assert plan.state_read == ("index",)
        model = Chosen(1)
        hw.load(model, tensors, plan=plan)
        assert model.w.tolist() == [2.0, 3.0]
        with pytest.raises(PlanError, match="index: holds other values"):
            hw.load(Chosen(0), tensors, plan=plan)

    def test_a_model_on_meta(self):
        with torch.device("meta"):
            model = nn.Linear(2, 2)
        tensors = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
        plan = hw.trace(model, manifest_of(tensors), device="cpu")
        with pytest.raises(PlanError, match="lies on the meta device"):
            hw.load(model, tensors, plan=plan)
        hw.load(model, tensors, plan=plan, device="cpu")
        assert model.weight.sum() == 4
