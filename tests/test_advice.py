"""What errors advise can be followed as it stands. Each case makes its error for real, and then does as it says."""

import copy
import os
import re
import subprocess
import warnings

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.testing import write_checkpoint

HALF = torch.bfloat16
CASES = {}


def advice(error, *words):
    """Register a case: given a folder it returns what goes wrong, and what the error advises instead."""

    def register(case):
        CASES[case.__name__] = case, error, words
        return case

    return register


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_the_advice_works(name, tmp_path):
    case, error, words = CASES[name]
    wrong, advised = case(tmp_path)
    with pytest.raises(error) as caught:
        wrong()
    assert isinstance(caught.value, hw.HotweightsError)
    for part in words:
        assert part in str(caught.value)
    advised()


def linear(dtype=torch.float32):
    return nn.Linear(2, 2).to(dtype)


def state(dtype=torch.float32):
    return {"weight": torch.ones(2, 2, dtype=dtype), "bias": torch.ones(2, dtype=dtype)}


def live_of(model=None, given=None, **options):
    live = hw.LiveModel(model or linear())
    live.load(given or state(), **options)
    return live


def one_of(**arguments):
    return lambda: hw.load(linear(), {"weight": torch.ones(2, 2), "strange": torch.ones(1)}, **arguments)


# Loading.


@advice(hw.PlanError, 'cast="floats" allows it')
def lossy_cast(_):
    return lambda: hw.load(linear(HALF), state()), lambda: hw.load(linear(HALF), state(), cast="floats")


@advice(hw.PlanError, 'cast="floats" allows it')
def lossy_cast_in_a_trace(_):
    return lambda: hw.trace(linear(HALF), state()), lambda: hw.trace(linear(HALF), state(), cast="floats")


@advice(hw.PlanError, 'cast="floats" allows it')
def lossy_cast_at_a_first_load(_):
    live = hw.LiveModel(linear(HALF))
    return lambda: live.load(state()), lambda: live.load(state(), cast="floats")


@advice(hw.UpdateAborted, 'cast="floats" allows it')
def lossy_cast_in_an_update(_):
    live = live_of(linear(HALF), state(HALF), cast="error")
    return lambda: live.update(state()), lambda: live.update(state(), cast="floats")


def pushing(live, tensors):
    def push(**options):
        with live.begin(**options) as update:
            update.feed(tensors)
            update.commit()

    return push


@advice(hw.UpdateAborted, 'begin(cast="floats") allows it')
def lossy_cast_of_a_pushed_tensor(_):
    push = pushing(live_of(linear(HALF), state(HALF)), state())
    return lambda: push(cast="error"), lambda: push(cast="floats")


@advice(hw.UpdateAborted, 'begin(cast="loader") allows it')
def lossy_cast_of_a_pushed_tensor_to_a_byte(_):
    push = pushing(live_of(linear(torch.float8_e4m3fn), state(torch.float8_e4m3fn)), state())
    return push, lambda: push(cast="loader")


@advice(hw.PlanError, 'cast="floats" allows it')
def lossy_cast_of_a_component(_):
    tensors = {f"a.{name}": tensor for name, tensor in state().items()}

    def route(source=tensors, **options):
        hw.route(source, [hw.Component("a.", linear(HALF), **options)])

    def advised():
        route(cast="floats")
        route(tensors.items(), cast="floats")

    return route, advised


@advice(hw.PlanError, 'allow it: allow_missing="bias", allow_unexpected="strange"')
def missing_and_unexpected(_):
    return one_of(), one_of(allow_missing="bias", allow_unexpected="strange")


@advice(hw.UpdateAborted, 'allow_missing="bias"', "first load, LiveModel.load()")
def missing_in_an_update(_):
    lacking = {"weight": torch.zeros(2, 2)}
    return lambda: live_of().update(lacking), lambda: live_of(allow_missing="bias").update(lacking)


@advice(hw.PlanError, "say where it shall be made real with device=")
def on_meta(_):
    return lambda: hw.load(linear().to("meta"), state()), lambda: hw.load(linear().to("meta"), state(), device="cpu")


@advice(hw.PlanError, "init_missing=fn calls fn(name, tensor) to fill each in place")
def a_buffer_on_meta(_):
    def load(**options):
        model = linear()
        model.register_buffer("table", torch.empty(1, device="meta"), persistent=False)
        hw.load(model, state(), device="cpu", **options)

    return load, lambda: load(init_missing=lambda name, tensor: tensor.zero_())


@advice(hw.UsageError, "the model comes first, then the source")
def the_wrong_way_round(_):
    return lambda: hw.load(state(), linear()), lambda: hw.load(linear(), state())


@advice(hw.UsageError, "load the module that it was made from, and script or trace that afterwards")
def a_scripted_model(_):
    def advised():
        model = linear()
        hw.load(model, state())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(torch.jit.script(model).weight, torch.ones(2, 2))

    return lambda: hw.load(torch.jit.script(linear()), state()), advised


# Sources.


@advice(hw.NoManifest, "from_iterator(pairs, manifest=...)", "hotweights.open(path).manifest", ".collect()")
def an_iterator_without_a_manifest(path):
    write_checkpoint(path / "ckpt", state())

    def advised():
        with hw.open(path / "ckpt") as source:
            hw.trace(linear(), hw.from_iterator(iter(state().items()), manifest=source.manifest))
        hw.trace(linear(), hw.from_iterator(iter(state().items())).collect())

    return lambda: hw.trace(linear(), hw.from_iterator(iter(state().items()))), advised


@advice(hw.UsageError, "goes through hotweights.from_iterator")
def bare_pairs(_):
    return lambda: hw.load(linear(), iter(state().items())), lambda: hw.load(
        linear(), hw.from_iterator(iter(state().items()))
    )


@advice(hw.UsageError, "is an open source; use it as it is")
def opened_twice(_):
    source = hw.open(state())
    return lambda: hw.open(source), lambda: hw.load(linear(), source)


@advice(hw.CheckpointError, 'reader="torch" of hotweights.open, whose source load and update take, opens those')
def a_torch_file(path):
    file = path / "model.safetensors"
    torch.save(state(), file)
    named = path / "model.bin"
    torch.save(state(), named)

    def advised():
        with hw.open(named, reader="torch") as source:
            hw.load(linear(), source)
            live_of().update(source)

    return lambda: hw.load(linear(), file), advised


@advice(hw.UpdateAborted, 'reader="torch" of hotweights.open, whose source load and update take, opens .bin files')
def a_folder_of_torch_files(path):
    torch.save(state(), path / "pytorch_model.bin")

    def advised():
        with hw.open(path, reader="torch") as source:
            live_of().update(source)

    return lambda: live_of().update(path), advised


@advice(hw.CheckpointError, "holds several checkpoints", "open the one you mean")
def two_indexes(path):
    for name in ("a", "b"):
        write_checkpoint(path, state())
        os.replace(path / "model.safetensors", path / f"{name}-00001-of-00001.safetensors")
        index = '{"weight_map": {"weight": "%s", "bias": "%s"}}' % ((f"{name}-00001-of-00001.safetensors",) * 2)
        (path / f"{name}.safetensors.index.json").write_text(index)
    return lambda: hw.load(linear(), path), lambda: hw.load(linear(), path / "a.safetensors.index.json")


@advice(hw.CheckpointError, "holds several checkpoints", "list of files where they are one checkpoint together")
def two_files_that_are_one_checkpoint(path):
    for name, tensor in state().items():
        write_checkpoint(path, {name: tensor})
        os.replace(path / "model.safetensors", path / f"{name}.safetensors")
    return lambda: hw.load(linear(), path), lambda: hw.load(linear(), sorted(path.iterdir()))


@advice(hw.UsageError, "is the least")
def small_slots(path):
    directory = write_checkpoint(path / "ckpt", state())

    def load(nbytes):
        with hw.Pool(slot_nbytes=nbytes) as pool:
            hw.load(linear(), directory, pool=pool)

    def advised():
        with pytest.raises(hw.UsageError) as caught:
            load(64)
        load(int(re.search(r"Pool\(slot_nbytes=(\d+)\)", str(caught.value))[1]))

    return lambda: load(64), advised


# Live models.


@advice(hw.UsageError, "the first time, use load")
def an_update_before_the_first_load(_):
    live = hw.LiveModel(linear())
    return lambda: live.update(state()), lambda: live.load(state())


@advice(hw.UsageError, "use update")
def a_second_load(_):
    live = live_of()
    return lambda: live.load(state()), lambda: live.update(state())


@advice(hw.LiveModelError, "call load first")
def serving_nothing(_):
    live = hw.LiveModel(linear())

    def serve():
        with live.serving():
            pass

    return serve, lambda: (live.load(state()), serve())


def torn():
    live = live_of()
    with live.begin(atomic=False) as update:
        update.feed({"weight": torch.zeros(2, 2)})
    assert live.state is hw.State.TORN
    return live


@advice(hw.LiveModelError, "call update with a complete source")
def serving_a_torn_model(_):
    live = torn()

    def serve():
        with live.serving():
            pass

    return serve, lambda: (live.update(state()), serve())


@advice(hw.UsageError, "leave only= out")
def a_part_of_a_torn_model(_):
    live = torn()
    return lambda: live.update(state(), only="bias"), lambda: live.update(state())


@advice(hw.UsageError, "ends by its commit() or abort()")
def two_updates(_):
    live = live_of()
    update = live.begin()
    return live.begin, lambda: (update.abort(), live.update(state()))


@advice(hw.UsageError, "this update is over", "Begin another one")
def an_update_that_is_over(_):
    live = live_of()
    update = live.begin()
    update.abort()
    return lambda: update.feed(state()), lambda: live.begin().abort()


@advice(hw.UsageError, "[(name, tensor)]")
def one_pair(_):
    live = live_of()
    update = live.begin()
    return lambda: update.feed(("weight", torch.ones(2, 2))), lambda: (
        update.feed([("weight", torch.ones(2, 2))]),
        update.abort(),
    )


@advice(hw.UsageError, "module.state_dict()")
def a_module_to_feed(_):
    update = live_of().begin()
    return lambda: update.feed(linear()), lambda: (update.feed(linear().state_dict()), update.commit())


class Renaming(nn.Module):
    """Takes a name with and without the prefix of a wrapper."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2), requires_grad=False)

    def load_weights(self, pairs):
        for _, tensor in pairs:
            self.weight.data.copy_(tensor)


@advice(hw.UpdateAborted, "near it are weight", "begin(manifest) what will come: hw.open(tensors).manifest")
def another_name(_):
    live = live_of(Renaming(), {"weight": torch.ones(2)})
    tensors = {"module.weight": torch.ones(2)}

    def push(*manifest):
        with live.begin(*manifest) as update:
            update.feed(tensors)
            update.commit()

    return push, lambda: push(hw.open(tensors).manifest)


@advice(hw.UpdateAborted, "Say what will come: begin(hw.open(tensors).manifest)")
def a_wider_model_than_the_checkpoint(_):
    live = live_of(linear(), state(HALF))

    def push(*manifest):
        with live.begin(*manifest) as update:
            update.feed(state())
            update.commit()

    return push, lambda: push(hw.open(state()).manifest)


@advice(hw.UpdateAborted, "feed a copy", 'atomic="staged" or update()')
def the_models_own_memory(_):
    live = live_of()
    own = dict(live.model.named_parameters())

    def push(tensors, **options):
        with live.begin(**options) as update:
            update.feed(tensors)
            update.commit()

    def advised():
        push({name: tensor.detach().clone() for name, tensor in own.items()}, atomic="journal")
        push(own, atomic="staged")
        live.update(own, atomic="journal")

    return lambda: push(own, atomic="journal"), advised


@advice(hw.UpdateAborted, "put them back, or make a new live model")
def a_parameter_that_was_replaced(_):
    live = live_of()
    old = live.model.weight
    live.model.weight = nn.Parameter(torch.zeros(2, 2))

    def advised():
        live_of(copy.deepcopy(live.model))
        live.model.weight = old
        live.update(state())

    return lambda: live.update(state()), advised


@advice(hw.UpdateAborted, "was torch.float32, and is torch.float16 now", 'load(source, cast="floats")')
def a_model_that_was_cast(_):
    live = live_of()
    live.model.half()

    def advised():
        hw.LiveModel(linear().half()).load(state(), cast="floats")

    return lambda: live.update(state()), advised


# Routing.


@advice(hw.PlanError, "enabled=False leaves them alone")
def a_component_without_code(_):
    return (
        lambda: hw.route(state(), [hw.Component("", None)]),
        lambda: hw.route(state(), [hw.Component("", None, enabled=False)]),
    )


@advice(hw.PlanError, "required=False allows that")
def a_component_without_tensors(_):
    parts = [hw.Component("", linear())]
    return (
        lambda: hw.route(state(), [*parts, hw.Component("sound.", linear())]),
        lambda: hw.route(state(), [*parts, hw.Component("sound.", linear(), required=False)]),
    )


# Transfer.


@advice(hw.UsageError, "make it with: mkdir -p -m 700 ")
def a_directory_that_is_not_there(path):
    address = f"unix:{path}/one/two/socket"

    def listen():
        hw.Sender(address).close()

    def advised():
        with pytest.raises(hw.UsageError) as caught:
            listen()
        command = str(caught.value).partition("make it with: ")[2]
        subprocess.run(command, shell=True, check=True)
        listen()

    return listen, advised


@advice(hw.UsageError, "One that does not exist is made so")
def a_directory_of_everybody(path):
    os.chmod(path, 0o755)
    return lambda: hw.Sender(f"unix:{path}/socket").close(), lambda: hw.Sender(f"unix:{path}/new/socket").close()


@advice(hw.UsageError, "live.update(source) loads it", "live.plan and live.explain(name) tell of it")
def a_live_model_in_place_of_a_module(_):
    live = live_of()

    def advised():
        live.update(state())
        assert "weight" in live.explain("weight")
        assert live.plan is not None

    return lambda: hw.load(live, state()), advised


class Halves(nn.Module):
    """An engine: one weight of two names of the source, and processed layers."""

    def __init__(self):
        super().__init__()
        self.fused = nn.Linear(2, 4, bias=False)
        self.plain = nn.Linear(2, 2, bias=False)

    def load_weights(self, weights):
        for name, tensor in weights:
            if name == "plain.weight":
                self.plain.weight.data.copy_(tensor)
            else:
                start = {"q": 0, "k": 2}[name.removesuffix(".weight")]
                self.fused.weight.data[start : start + 2].copy_(tensor)


def halves(prefix=""):
    return {f"{prefix}{name}.weight": torch.rand(2, 2) for name in ("q", "k", "plain")}


class ByPlace(Halves):
    def load_weights(self, checkpoint):
        super().load_weights(checkpoint)


class WithPrefix(Halves):
    def load_weights(self, weights, prefix):
        super().load_weights((name.removeprefix(prefix), tensor) for name, tensor in weights)


class WithDefault(WithPrefix):
    def load_weights(self, weights, prefix=""):
        super().load_weights(weights, prefix)


@advice(hw.PlanError, "ByPlace.load_weights was not used: by its signature (checkpoint)", 'by="loader"')
def signature_of_a_place(folder):
    return lambda: hw.load(ByPlace(), halves()), lambda: hw.load(ByPlace(), halves(), by="loader")


@advice(hw.PlanError, "signature is (weights, prefix). Give the other arguments defaults")
def signature_of_two_arguments(folder):
    return lambda: hw.load(WithPrefix(), halves()), lambda: hw.load(WithDefault(), halves())


@advice(hw.UpdateAborted, 'by="name" leaves it out', "leave by= out. It is said in the first load")
def load_weights_left_out_by_name(folder):
    live, other = hw.LiveModel(Halves()), hw.LiveModel(Halves())
    live.load(live.model, by="name")
    other.load(halves())
    return lambda: live.update(halves()), lambda: other.update(halves())


@advice(hw.PlanError, 'rename={"base.model.": ""}')
def prefix_of_an_engine(folder):
    given = halves("base.model.")
    return lambda: hw.load(Halves(), given), lambda: hw.load(Halves(), given, rename={"base.model.": ""})


@advice(hw.PlanError, "has a load_weights of its own. Give load the checkpoint that it was loaded from")
def live_model_of_an_engine_that_holds_weights(folder):
    live = hw.LiveModel(Halves())
    return lambda: live.load(live.model), lambda: live.load(halves())


class Transposing:
    def process_weights_after_loading(self, layer):
        layer.weight = nn.Parameter(layer.weight.data[:1].clone(), requires_grad=False)


@advice(hw.PlanError, "make the LiveModel before that")
def live_model_of_an_engine_that_has_processed(folder):
    late, early = Halves(), Halves()
    late.plain.quant_method = early.plain.quant_method = Transposing()
    late.plain.quant_method.process_weights_after_loading(late.plain)
    return lambda: hw.LiveModel(late).load(halves()), lambda: hw.LiveModel(early).load(halves())


@advice(hw.PlanError, "load before that; hotweights.LiveModel, made before, loads into processed layers again")
def load_into_an_engine_that_has_processed(folder):
    late, early = Halves(), hw.LiveModel(Halves())
    late.plain.quant_method = early.model.plain.quant_method = Transposing()
    late.plain.quant_method.process_weights_after_loading(late.plain)
    return lambda: hw.load(late, halves()), lambda: (early.load(halves()), early.update(halves()))


def in_int8(layer):
    layer.weight = nn.Parameter((layer.weight * 10).to(torch.int8), requires_grad=False)


@advice(
    hw.PlanError, "plain: is not as in this checkpoint, but as processing may leave it", "make the LiveModel before"
)
def live_model_of_layers_that_were_quantised_by_hand(folder):
    def live(model):
        return hw.LiveModel(model, process=in_int8, layers="plain")

    late = Halves()
    in_int8(late.plain)
    return lambda: live(late).load(halves()), lambda: live(Halves()).load(halves())


class WantsDict(Halves):
    def load_weights(self, weights):
        super().load_weights(weights.items())


class MakesDict(Halves):
    def load_weights(self, weights):
        super().load_weights(dict(weights).items())


@advice(hw.PlanError, "weights = dict(weights)")
def load_weights_that_wants_a_dict(folder):
    return lambda: hw.load(WantsDict(), halves()), lambda: hw.load(MakesDict(), halves())


def test_an_engine_that_passes_over_every_name_is_told_that_nothing_fits():
    class Passing(Halves):
        def load_weights(self, weights):
            super().load_weights(pair for pair in weights if pair[0] in halves())

    with pytest.raises(hw.PlanError, match="Nothing of the source fits") as caught:
        hw.load(Passing(), {f"{name}s": tensor for name, tensor in halves().items()})
    assert "allow_missing" not in str(caught.value)
    hw.load(Passing(), halves("base."), rename={"base.": ""})
    with pytest.raises(hw.PlanError, match=r'rename=\{"base\."'):
        hw.load(Passing(), halves("base."))


def test_a_pattern_that_matches_nothing_is_told_where_something_does_not_fit():
    short = {name: tensor for name, tensor in halves().items() if name != "plain.weight"}
    misspelt = {"allow_missing": ["plane.weight", re.compile("none")], "allow_unexpected": "plain.*"}
    for load in (hw.load, lambda model, *args, **options: hw.LiveModel(model).load(*args, **options)):
        with pytest.raises(hw.PlanError) as caught:
            load(Halves(), short, **misspelt)
        said = str(caught.value)
        assert "allow_missing='plane.weight' matches no tensor of the model or the checkpoint; similar: plain.w" in said
        assert "allow_missing=re.compile('none') matches no" in said
        assert "allow_unexpected" not in said
        load(Halves(), halves(), **misspelt)  # Nothing is lost by it there.
