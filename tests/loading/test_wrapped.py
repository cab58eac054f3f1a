"""Models and checkpoints whose names differ by wrappers of torch and PEFT, and ``rename=``."""

import itertools
import re

import pytest
import torch
from tests.support.wrapping import DISTRIBUTED, WRAPPED, Named, inside
from torch import distributed, nn

import hotweights as hw
from hotweights.model.survey import survey

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch.compile's own


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    where = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{where}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def check(into, out_of):
    """Whatever has the names of the wrapped source is loaded into the wrapped model."""
    model, origin = Named(), Named()
    held, wanted = [*model.parameters(), *model.buffers()], [*origin.parameters(), *origin.buffers()]
    with torch.no_grad():
        for tensor in wanted:
            tensor.fill_(1 + len(held)) if tensor.dtype is torch.int64 else tensor.normal_()
    wanted = [tensor.clone() for tensor in wanted]
    target, source = into(model), out_of(origin)
    named = dict([*source.named_parameters(), *source.named_buffers()])
    for given in (source, source.state_dict(), named, survey(source).tensors):
        with torch.no_grad():
            for tensor in held:
                tensor.zero_()
        report = hw.load(target, given)
        assert all(map(torch.equal, held, wanted))
        assert len(report.tensors[hw.Fate.WRITTEN]) == len(held)


@pytest.mark.parametrize(("into", "out_of"), [*itertools.product(WRAPPED, WRAPPED)])
def test_wrappers_are_looked_through_on_either_side(into, out_of):
    check(WRAPPED[into], WRAPPED[out_of])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("wrapped", DISTRIBUTED)
def test_distributed_wrappers_are_looked_through_on_either_side(wrapped, group):
    every = WRAPPED | DISTRIBUTED
    for other in ("bare", "data parallel of compiled", "fsdp of fsdp"):
        check(every[wrapped], every[other])
        check(every[other], every[wrapped])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_flattened_parameters_are_refused_and_the_advice_works(group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, state = (
        FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu")),
        nn.Linear(2, 2).state_dict(),
    )
    with pytest.raises(hw.PlanError, match=r"flattened(.|\n)*summon_full_params\(model\)"):
        hw.load(model, state)
    with FullyShardedDataParallel.summon_full_params(model):
        hw.load(model, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_parts_that_are_data_parallel_are_looked_through_by_class_and_not_by_a_name():
    check(inside(nn.DataParallel), WRAPPED["bare"])
    source = inside(nn.DataParallel)(Named())
    hw.load(Named(), source)
    with pytest.raises(hw.PlanError, match=r"rename=") as refused:
        hw.load(Named(), source.state_dict())
    follow(refused.value, Named(), source.state_dict())


def follow(error, model, source, **options):
    """Type what the error says."""
    (advice,) = {match for line in str(error).splitlines() for match in re.findall(r"rename=(.*)$", line)}
    hw.load(model, source, rename=eval(advice), **options)


def test_the_names_of_a_model_are_never_taken_for_a_wrapper():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.module = nn.ParameterDict({"weight": nn.Parameter(torch.ones(2))})

    own = Own()
    model = Own()
    hw.load(model, nn.DataParallel(own).state_dict())  # it has a module.weight, which is not the model's
    assert [*model.weight, *model.module["weight"]] == [0, 0, 1, 1]
    hw.load(model, own.state_dict())
    assert [*model.weight, *model.module["weight"]] == [0, 0, 1, 1]
    with pytest.raises(hw.PlanError, match=r"^[^\n]*: weight: missing"):
        hw.load(model, {"module.weight": torch.ones(2)})


def test_a_name_that_fits_goes_before_one_that_is_looked_through():
    zero, one = torch.zeros(2), torch.ones(2)
    model = nn.ParameterDict({"weight": nn.Parameter(zero.clone())})
    with pytest.raises(hw.PlanError, match=r"_orig_mod\.weight: unexpected"):
        hw.load(model, {"weight": one, "_orig_mod.weight": zero})
    hw.load(model, {"weight": one, "_orig_mod.weight": zero}, allow_unexpected="_orig_mod.*")
    assert torch.equal(model["weight"], one)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "base_model.model.", "transformer."])
def test_the_advice_of_one_line_loads_every_prefix_in_both_directions(prefix):
    bare = {name: tensor.clone() for name, tensor in Named().state_dict().items()}
    longer = {prefix + name: tensor for name, tensor in bare.items()}
    if prefix in ("model.", "transformer."):
        with pytest.raises(hw.PlanError) as refused:
            hw.load(Named(), longer)
        words = {
            "model.": 'begin with another "model." than the model\'s',  # which has a part of that name
            "transformer.": 'begin with "transformer."; the model\'s do not',
        }
        assert refused.value.problems == (f'all 11 names of the source {words[prefix]}: rename={{"{prefix}": ""}}',)
        follow(refused.value, Named(), longer)
    else:
        hw.load(Named(), longer)
    outer = nn.Module()
    part = outer
    for name in prefix.split(".")[:-1]:
        part.add_module(name, nn.Module())
        inner, part = part, part.get_submodule(name)
    inner._modules[name] = Named()
    with pytest.raises(hw.PlanError) as refused:
        hw.load(outer, bare)
    assert refused.value.problems == (
        f'all 11 names of the source do not begin with "{prefix}"; the model\'s do: rename={{"": "{prefix}"}}',
    )
    follow(refused.value, outer, bare)
    assert all(torch.equal(tensor, bare[name.removeprefix(prefix)]) for name, tensor in outer.state_dict().items())


def test_where_two_parts_could_be_either_nothing_is_advised():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    upper = {name.capitalize(): tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(hw.PlanError, match=r"A\.bias: unexpected") as refused:
        hw.load(model, upper)  # A. could be b. too: what follows a wrong advice loads without a word
    assert "rename={" not in str(refused.value)
    one = {"A.weight": upper["A.weight"], "A.bias": upper["A.bias"]}
    with pytest.raises(hw.PlanError) as refused:
        hw.load(model["a"], one)
    follow(refused.value, model["a"], one)


def test_a_rename_that_is_not_needed_is_named():
    state = {name: torch.ones_like(tensor) for name, tensor in nn.Linear(2, 2).state_dict().items()}
    with pytest.raises(hw.PlanError, match="all 2 names of the source fit as they are") as refused:
        hw.load(nn.Linear(2, 2), state, rename={"": "x."})
    assert "leave rename= out" in str(refused.value)
    assert 'rename={"":' not in str(refused.value)
    hw.load(nn.Linear(2, 2), state)


def test_names_that_fit_are_left_alone_by_the_advice():
    state = Named().state_dict()
    moved = {name.replace("module.0.", "encoder.module.0."): tensor for name, tensor in state.items()}
    with pytest.raises(hw.PlanError) as refused:
        hw.load(Named(), moved)
    follow(refused.value, Named(), moved)
    both = {
        name.replace("module.", "x.module.").replace("first.", "y.first."): tensor for name, tensor in state.items()
    }
    with pytest.raises(hw.PlanError) as refused:
        hw.load(Named(), both)
    assert len(refused.value.problems) == 1
    follow(refused.value, Named(), both)


def test_very_many_names_of_one_beginning_are_counted():
    state = {f"encoder.{number}.weight": torch.ones(1) for number in range(300)}
    with pytest.raises(hw.PlanError) as refused:
        hw.load(nn.Linear(2, 2), state)
    assert [line for line in refused.value.problems if "encoder" in line] == [
        "encoder.*: 300 names are unexpected: encoder.0.weight, encoder.1.weight, encoder.2.weight and 297 more"
    ]


def test_parametrised_tensors_are_named_with_what_to_do():
    plain, normed = nn.Linear(2, 2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    for model, source in ((plain, normed.state_dict()), (normed, plain.state_dict())):
        with pytest.raises(hw.PlanError, match=r"remove_parametrizations"):
            hw.load(model, source)
    nn.utils.parametrize.remove_parametrizations(normed, "weight")
    hw.load(plain, normed)


def test_the_code_of_a_wrapped_model_loads_it():
    class Engine(nn.Linear):
        def load_weights(self, weights):
            for name, tensor in weights:
                self.get_parameter(name.removeprefix("own.")).data.copy_(2 * tensor)

    model, state = Engine(2, 2), {f"own.{name}": tensor for name, tensor in nn.Linear(2, 2).state_dict().items()}
    hw.load(nn.DataParallel(model), state)
    assert torch.equal(model.weight, 2 * state["own.weight"])
    hw.load(nn.DataParallel(model), {f"my.{name}": t for name, t in state.items()}, rename={"my.": ""})
    with pytest.raises(hw.PlanError):
        hw.load(nn.DataParallel(model), {f"module.{name}": tensor for name, tensor in state.items()})


def test_patterns_match_names_with_wrappers_and_without():
    model = torch.compile(inside(torch.compile)(Named()))
    state = Named().state_dict()
    for pattern in ("_orig_mod.first._orig_mod.bias", "first._orig_mod.bias", "first.bias"):
        for spelling in ("", "_orig_mod."):
            some = {spelling + name: tensor for name, tensor in state.items() if name != "first.bias"}
            report = hw.load(model, some, allow_missing=pattern)
            assert report.tensors[hw.Fate.MISSING] == ("first._orig_mod.bias",)
    more = {f"module.{name}": tensor for name, tensor in (state | {"extra": torch.ones(1)}).items()}
    for pattern in ("extra", "module.extra"):
        assert hw.load(model, more, allow_unexpected=pattern).tensors[hw.Fate.UNEXPECTED] == ("extra",)


@pytest.mark.parametrize("rename", [{"old.": ""}, {"o": "x", "old.": ""}, lambda name: name.removeprefix("old.")])
def test_rename_serves_plans_files_and_streams(rename, tmp_path):
    from safetensors.torch import save_file

    state = {f"old.{name}": tensor.clone() for name, tensor in Named().state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    manifest = hw.open(state).manifest

    def loads(source, **options):
        model = Named()
        report = hw.load(model, source, **options)
        assert all(torch.equal(tensor, state[f"old.{name}"]) for name, tensor in model.state_dict().items())
        return report

    loads(state, rename=rename)
    assert loads(tmp_path, rename=rename, io="buffered").bytes_by_io["buffered"]
    loads(tmp_path, rename=rename, verify="loader", plan=hw.trace(Named(), tmp_path, rename=rename))
    for options in ({}, {"manifest": manifest}):
        with hw.from_iterator(iter(state.items()), **options) as source:
            loads(source, rename=rename)
    for reader in ("hotweights", "safetensors"):
        with hw.open(tmp_path, reader=reader, rename=rename) as source:
            assert {*source.manifest} == {name.removeprefix("old.") for name in manifest}
            loads(source)
            assert dict(source.tensors()).keys() == source.manifest.keys()


def test_names_that_rename_spoils_are_named_with_both_names():
    state = {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2), "c": torch.ones(2)}
    with pytest.raises(hw.PlanError) as refused:
        hw.load(nn.Linear(2, 2), state, rename={"a.": "", "b.": "", "c": ""})
    assert refused.value.problems == (
        "a.weight and b.weight both become weight",
        "c would become ''; a prefix ends with its dot",
    )
    with pytest.raises(hw.PlanError, match=r"bias2 \(c in the source\): unexpected"):
        hw.load(nn.Linear(2, 2, bias=False), state, rename={"a.": "", "c": "bias2"}, allow_unexpected="b.*")
    with pytest.raises(hw.UsageError, match=r"rename= is a mapping of prefixes or a function"):
        hw.load(nn.Linear(2, 2), state, rename="a.")
    with pytest.raises(hw.UsageError, match=r"rename= maps prefixes"):
        hw.open(state, rename={"a.": None})


def test_a_wrapped_model_with_an_adapter_is_a_source_for_its_like():
    peft = pytest.importorskip("peft")

    def adapted():
        model = nn.ModuleDict({"q": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
        config = peft.LoraConfig(target_modules=["q"], r=1, modules_to_save=["head"])
        return peft.get_peft_model(nn.Sequential(model), config)

    model, source = adapted(), adapted()
    for wrap in (lambda inner: inner, torch.compile, nn.DataParallel):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.normal_()
        hw.load(model, wrap(source))
        state = source.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_views_whose_bytes_are_not_their_values_are_refused():
    model = nn.Module()
    model.register_buffer("turned", torch.zeros(2, dtype=torch.complex64).conj())
    state = {"turned": torch.tensor([1 + 2j, 3 + 4j])}
    for load in (hw.load, lambda model, source: hw.LiveModel(model).load(source)):
        with pytest.raises(hw.PlanError, match=r"turned: is a conjugated or negated view.*resolve_conj"):
            load(model, state)
    model.turned = model.turned.resolve_conj().resolve_neg()
    hw.load(model, state)
    assert torch.equal(model.turned, state["turned"])


def test_merged_adapters_are_refused_and_the_advice_works():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(3, 3)), peft.LoraConfig(target_modules=["0"], r=1))
    new = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    live = hw.LiveModel(model)
    live.load(model.state_dict(), version=1)
    model.merge_adapter()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(hw.PlanError, match="unmerge_adapter") as caught:
        hw.load(model, new)
    assert "0" in caught.value.problems[0]
    with pytest.raises(hw.UpdateAborted, match="merged adapters"):
        live.update(new)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.unmerge_adapter()  # as the error says
    live.update(new, version=2)
    assert all(torch.equal(new[name], tensor) for name, tensor in model.state_dict().items())


def test_a_plan_with_a_swapping_rename_is_refused_without_it(tmp_path):
    """Names and shapes fit without it too: each tensor would go where the other belongs."""

    def pair(first, second):
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        nn.init.constant_(model[0].weight, first)
        nn.init.constant_(model[1].weight, second)
        return model

    swap = {"0.": "1.", "1.": "0."}
    source = pair(1, 2).state_dict()
    made = hw.trace(pair(0, 0), source, rename=swap)
    made.save(tmp_path / "plan")
    for plan in (made, hw.LoadPlan.load(tmp_path / "plan")):
        model = pair(0, 0)
        with pytest.raises(
            hw.PlanError, match=r"1\.weight: the plan takes it from 0\.weight, by rename=; give the same"
        ):
            hw.load(model, source, plan=plan)
        assert not any(parameter.any() for parameter in model.parameters())
        hw.load(model, source, plan=plan, rename=swap)
        assert [layer.weight[0, 0].item() for layer in model] == [2, 1]
    # A prefix that is there or not means the same tensors.
    prefixed = {f"old.{name}": tensor for name, tensor in source.items()}
    plan = hw.trace(pair(0, 0), prefixed, rename={"old.": ""})
    model = pair(0, 0)
    hw.load(model, source, plan=plan)
    assert [layer.weight[0, 0].item() for layer in model] == [1, 2]


def test_an_adapter_of_another_rank_is_no_other_head():
    peft = pytest.importorskip("peft")

    def adapted(rank):
        config = peft.LoraConfig(r=rank, target_modules=["0"])
        return peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)

    with pytest.raises(hw.PlanError, match="adapter in the source has another rank") as error:
        hw.load(adapted(2), adapted(4))
    assert "head" not in str(error.value)
    hw.load(adapted(4), adapted(4))  # what the message says


def test_a_parametrised_model_on_meta_loads_without_a_word_of_torch():
    """Torch warns that nothing is copied to meta; the tests make an error of that."""

    def parametrised():
        return nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))

    source = parametrised()
    with torch.device("meta"):
        model = parametrised()
    hw.load(model, source, device="cpu")
    assert torch.equal(model.weight, source.weight)


class Trunk(nn.Module):
    def __init__(self, head: str, trunk: str = "trunk"):
        super().__init__()
        self.add_module(trunk, nn.Sequential(*(nn.Linear(2, 2) for _ in range(8))))
        self.add_module(head, nn.ModuleDict({"dense": nn.Linear(2, 2), "norm": nn.LayerNorm(2)}))


@pytest.mark.parametrize("trunk", ["trunk", "body"])
def test_no_head_is_advised_for_another_because_its_names_end_alike(trunk):
    model, source = Trunk("pooler"), Trunk("transform", trunk).state_dict()
    with pytest.raises(hw.PlanError, match="pooler") as refused:
        hw.load(model, source)
    said = str(refused.value)
    assert '"pooler' not in said.partition("If that is meant")[0]
    assert "transform.dense.bias: unexpected" in said
    if trunk == "body":  # Most of the source; what that advises is true of the trunk.
        assert 'begin with "body." where the model\'s begin with "trunk.": rename={"body.": "trunk."}' in said
    else:
        assert "rename={" not in said
