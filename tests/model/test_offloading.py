"""Offloading: what accelerate keeps in memory is loaded there; where old weights would come back, nothing is loaded."""

import functools
import types
from collections.abc import Mapping

import accelerate
import accelerate.hooks
import pytest
import torch
from torch import nn

import hotweights as hw

NEW = {"body.weight": torch.ones(2, 2), "body.bias": torch.ones(2), "head.weight": torch.ones(1, 2)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.head = nn.Linear(2, 1, bias=False)

    def forward(self, x):
        return self.head(self.body(x))


def to_meta(module):
    for key, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[key] = nn.Parameter(torch.empty_like(parameter, device="meta"))


class Aligning:
    """As accelerate's hook: the module's tensors are on meta but during its forward."""

    def __init__(self, module, offload=True, kept=dict):
        self.offload = offload
        self.weights_map = kept({name: tensor.detach() for name, tensor in module.named_parameters()})
        if offload:
            to_meta(module)

    def pre_forward(self, module):
        for name in list(module._parameters) if self.offload else ():
            if module._parameters[name] is not None:
                module._parameters[name] = nn.Parameter(self.weights_map[name])

    def attach(self, module):
        def forward(module, *args):
            module._hf_hook.pre_forward(module)
            return old(*args)

        module._hf_hook, old = self, module.forward
        module.forward = functools.partial(forward, module)


class Several:
    """As accelerate's hook that holds others."""

    def __init__(self, *hooks):
        self.hooks = hooks


class OnDisk(Mapping):
    """Reads a file for each tensor; nobody may ask for one only to see whether it is there."""

    def __init__(self, tensors):
        self._names = list(tensors)

    def __getitem__(self, name):
        raise AssertionError("a file was read")

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)


def aligned(module):
    Aligning(module).attach(module)


def aligned_on_disk(module):
    Aligning(module, kept=OnDisk).attach(module)


def aligned_in_a_sequence(module):
    hook = Aligning(module)
    hook.attach(module)
    module._hf_hook = Several(Aligning(nn.Linear(1, 1), offload=False), hook)


def by_closure(module):
    kept = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}

    def bring_back(module, args):
        for name, tensor in module.named_parameters():
            tensor.data.copy_(kept[name])

    module.register_forward_pre_hook(bring_back)


class Keeper:
    def __init__(self, module):
        self.kept = {tensor: tensor.detach().clone() for tensor in module.parameters()}

    def bring_back(self, module, args):
        for tensor, value in self.kept.items():
            tensor.data = value


def by_method_and_tensor(module):
    module.register_forward_pre_hook(Keeper(module).bring_back)


def by_another_forward(module):
    kept = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}

    def forward(self, *args):
        return torch.func.functional_call(self.inner, kept, args)

    module.__dict__["inner"] = None
    module.forward = types.MethodType(forward, module)


def by_files_and_meta(module):
    kept = OnDisk(dict(module.named_parameters()))
    to_meta(module)
    module.register_forward_pre_hook(functools.partial(lambda kept, module, args: None, kept))


def beside_the_tensors(module):
    module.offloaded_here = {name: tensor.detach() for name, tensor in module.named_parameters()}
    to_meta(module)
    module.register_forward_pre_hook(lambda module, args: None)


OFFLOADED = [
    *(aligned, aligned_on_disk, aligned_in_a_sequence, by_closure, by_method_and_tensor),
    *(by_another_forward, by_files_and_meta, beside_the_tensors),
]
ROADS = {
    "load": lambda model: hw.load(model, NEW, device="cpu"),
    "without device=": lambda model: hw.load(model, NEW),
    "a plan": lambda model: hw.load(model, NEW, plan=hw.trace(Net(), NEW), device="cpu"),
    "trace": lambda model: hw.trace(model, NEW, device="cpu"),
    "live": lambda model: hw.LiveModel(model).load(NEW, device="cpu"),
    "route": lambda model: hw.route(NEW, [hw.Component("", model)]),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("offload", OFFLOADED)
def test_what_a_hook_keeps_elsewhere_is_refused(offload, road):
    model = Net()
    offload(model.body)
    with pytest.raises(hw.PlanError, match=r"body: .* brings the old ones back .* load the model before it is disp"):
        ROADS[road](model)


@pytest.mark.parametrize("offload", [aligned, by_closure, by_method_and_tensor])
def test_a_hook_of_the_whole_model_is_found_too(offload):
    model = Net()
    offload(model)
    with pytest.raises(hw.PlanError, match=r"Net: .* keeps these weights elsewhere"):
        hw.load(model, NEW, device="cpu")


def test_the_advice_can_be_followed():
    model = Net()
    hw.load(model, NEW)
    for module in model.children():
        aligned(module)
    assert model(torch.ones(1, 2)).item() == 6


@pytest.mark.parametrize("offload", OFFLOADED)
def test_a_live_model_that_was_offloaded_takes_no_update(offload):
    model = Net()
    live = hw.LiveModel(model)
    live.load(NEW)
    offload(model.body)
    with pytest.raises(hw.UpdateAborted, match="keeps these weights elsewhere"):
        live.update(NEW)


def moved_whole(model):
    accelerate.cpu_offload_with_hook(model, "cpu")


def moved_among_other_hooks(model):
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
    moved_whole(model)
    assert isinstance(model._hf_hook, accelerate.hooks.SequentialHook)


def cast_layer_by_layer(model):
    for module in model.children():
        hook = accelerate.hooks.LayerwiseCastingHook(torch.bfloat16, torch.float32, non_blocking=False)
        accelerate.hooks.add_hook_to_module(module, hook)


@pytest.mark.parametrize("hook", [moved_whole, moved_among_other_hooks, cast_layer_by_layer])
def test_a_live_model_does_not_take_one_that_hooks_move(hook):
    model = Net()
    hook(model)
    with pytest.raises(hw.PlanError, match="moves or casts these weights at each forward") as refused:
        hw.LiveModel(model).load(NEW, cast="floats")
    hw.load(model, NEW, cast="floats")  # What is moved is what was loaded.
    assert model(torch.ones(1, 2)).item() == 6
    advice = "accelerate.hooks.remove_hook_from_submodules(model)"
    assert advice in str(refused.value)
    eval(advice)
    hw.LiveModel(model).load(NEW, cast="floats")


def test_a_live_model_that_hooks_move_takes_no_update():
    model = Net()
    live = hw.LiveModel(model)
    live.load(NEW)
    moved_whole(model)
    with pytest.raises(hw.UpdateAborted, match="Net: CpuOffload moves or casts"):
        live.update(NEW)


@pytest.mark.parametrize("kind", ["LayerwiseCastingHook", "GroupOffloadingHook"])
def test_hooks_of_diffusers_that_move_are_known_too(kind):
    hooks = pytest.importorskip("diffusers.hooks")
    model = Net()
    if kind == "LayerwiseCastingHook":
        hooks.apply_layerwise_casting(model, torch.bfloat16, torch.float32)
    else:
        hooks.apply_group_offloading(model, HERE, offload_type="leaf_level")
    with pytest.raises(hw.PlanError, match=f"body, head: {kind} moves or casts"):
        hw.LiveModel(model).load(NEW, cast="floats")


def only_moved(module):
    Aligning(module, offload=False).attach(module)


def watched_afterwards(module):
    before = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    module.register_forward_hook(lambda module, args, output: print(before))


def named_beforehand(module):
    """It refers to the module's own tensors, and to numbers for each of them."""
    own, scales = dict(module.named_parameters()), {"weight": torch.ones(()), "bias": torch.ones(())}
    module.register_forward_pre_hook(lambda module, args: print(own, scales))


def normed(module):
    torch.nn.utils.parametrizations.spectral_norm(module)


def pruned(module):
    torch.nn.utils.prune.identity(module, "bias")


def another_forward(module):
    module.forward = functools.partial(nn.Linear.forward, module)


@pytest.mark.parametrize("hook", [only_moved, watched_afterwards, named_beforehand, normed, pruned, another_forward])
def test_other_hooks_are_no_obstacle(hook):
    import torch.nn.utils.prune

    model = Net()
    hook(model.body)
    state = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    hw.load(model, state)
    live = hw.LiveModel(model)
    live.load(state)
    live.update(state)
    assert all((tensor == 1).all() for tensor in model.state_dict().values())


# accelerate itself: what its hooks keep in the host's memory is written there.


class Deep(nn.Module):
    """Persistent and other buffers, tied parameters, and a module that has two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.again = self.first[0]
        self.embedding = nn.Linear(3, 3, bias=False)
        self.last = nn.Linear(3, 3)
        self.last.weight = self.embedding.weight
        self.last.register_buffer("shift", torch.full((3,), 0.5), persistent=False)
        self.eval()

    def forward(self, x):
        return self.last(self.embedding(self.again(self.first(x)))) + self.last.shift


X = torch.arange(6.0).reshape(2, 3)
HERE = torch.device("cpu")  # For accelerate another device than "cpu": this one computes, that one keeps.


def state_of(seed):
    torch.manual_seed(seed)
    model = Deep()
    with torch.no_grad():
        for tensor in (*model.parameters(), model.first[1].running_mean, model.first[1].running_var):
            tensor.uniform_()
    return model.state_dict()


def computed(state):
    model = Deep()
    model.load_state_dict(state)
    with torch.no_grad():
        return model(X)


def by_hooks_of_ones_own(model):
    for module in (*model.first, model.embedding, model.last):
        hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", offload=True, place_submodules=True)
        accelerate.hooks.add_hook_to_module(module, hook)


def among_other_hooks(model):
    accelerate.hooks.add_hook_to_module(model.last, accelerate.hooks.ModelHook())
    accelerate.cpu_offload(model, "cpu")
    accelerate.hooks.add_hook_to_module(model.last, accelerate.hooks.ModelHook(), append=True)
    assert isinstance(model.last._hf_hook.hooks[0], accelerate.hooks.SequentialHook)


def dispatched(keeping):
    def dispatch(model):
        devices = {name: "cpu" if name in keeping else HERE for name in ("first", "embedding", "last")}
        with pytest.warns(UserWarning, match="do not match any submodules"):  # It asks for the second name, and warns.
            accelerate.dispatch_model(model, devices | {"again": devices["first"]}, HERE, force_hooks=True)

    return dispatch


KEPT = {
    "cpu_offload": lambda model: accelerate.cpu_offload(model, "cpu"),
    "with buffers": lambda model: accelerate.cpu_offload(model, "cpu", offload_buffers=True),
    "with submodules": lambda model: accelerate.cpu_offload(model, "cpu", preload_module_classes=["Sequential"]),
    "the whole model": lambda model: accelerate.cpu_offload(model, "cpu", preload_module_classes=["Deep"]),
    "hooks of one's own": by_hooks_of_ones_own,
    "among other hooks": among_other_hooks,
    "dispatched": dispatched(["first", "embedding", "last"]),
    "dispatched, one tied": dispatched(["last"]),
    "dispatched, the other tied": dispatched(["embedding"]),
}


@pytest.mark.parametrize("keep", KEPT)
def test_what_hooks_keep_in_memory_is_loaded_there(keep):
    model = Deep()
    KEPT[keep](model)
    with torch.no_grad():
        for turn, options in enumerate(({}, {"device": "cpu"}, {})):
            state = state_of(turn)
            before = [name for name, tensor in model.named_parameters() if tensor.is_meta]
            hw.load(model, state, **options)
            assert [name for name, tensor in model.named_parameters() if tensor.is_meta] == before
            torch.testing.assert_close(model(X), computed(state))
    assert any(parameter.is_meta for parameter in model.parameters())
    accelerate.hooks.remove_hook_from_submodules(model)
    for name, value in model.state_dict().items():
        if not value.is_meta:  # Where one hook brought tied tensors, accelerate leaves the second name on meta.
            torch.testing.assert_close(value, state[name])


def test_what_was_written_there_has_a_new_version():
    model = accelerate.cpu_offload(Deep(), "cpu")
    kept = model.last._hf_hook.weights_map.dataset["last.weight"]
    before = kept._version, kept.data_ptr()
    hw.load(model, state_of(1))
    assert kept._version > before[0]
    assert kept.data_ptr() == before[1]


def test_copies_that_come_back_with_the_hooks_are_renewed():
    """Where the device of a forward is not the host, the map has another copy of a buffer that stays on the device."""
    model, state = Deep(), state_of(1)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    kept["last.weight"] = kept["embedding.weight"]
    accelerate.cpu_offload(model, "cpu", state_dict=kept)
    buffer = model.first[1].running_mean
    hw.load(model, state)
    assert model.first[1].running_mean is buffer
    assert torch.equal(buffer, state["first.1.running_mean"])
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model.first[1].running_mean, state["first.1.running_mean"])
    torch.testing.assert_close(model(X), computed(state))


def test_of_tied_parameters_the_one_on_the_device_is_loaded_for_all():
    """A forward takes it from ``tied_params_map``, and not what the map of weights has."""
    model, state = Deep(), state_of(1)
    KEPT["dispatched, one tied"](model)
    hook = model.last._hf_hook.hooks[0] if hasattr(model.last._hf_hook, "hooks") else model.last._hf_hook
    value = hook.weights_map["weight"]
    on_device = nn.Parameter(value.detach().clone())  # As embedding.weight is, on another device than the host.
    model.embedding.weight = model.last.weight = hook.tied_params_map[value.data_ptr()][HERE] = on_device
    hw.load(model, {name: value for name, value in state.items() if name != "last.weight"})
    with torch.no_grad():
        torch.testing.assert_close(model(X), computed(state))
    assert torch.equal(value, state["last.weight"])


def test_after_a_forward_that_failed_what_it_brought_is_not_what_is_loaded():
    model, state = accelerate.cpu_offload(Deep(), "cpu"), state_of(1)
    with pytest.raises(RuntimeError):
        model.last(torch.ones(1, 7))
    assert not model.last.weight.is_meta
    model.last.weight = nn.Parameter(model.last.weight.detach().clone())  # As it is on another device than the host.
    hw.load(model, state)
    with torch.no_grad():
        torch.testing.assert_close(model(X), computed(state))


def test_a_plan_made_before_serves_the_offloaded_model():
    model, state = Deep(), state_of(1)
    plan = hw.trace(model, state)
    accelerate.cpu_offload(model, "cpu")
    hw.load(model, state, plan=plan)
    with torch.no_grad():
        torch.testing.assert_close(model(X), computed(state))


def test_what_the_load_leaves_out_keeps_its_value():
    model = Deep()
    old, state = model.last.bias.detach().clone(), state_of(1)
    accelerate.cpu_offload(model, "cpu")
    del state["last.bias"]
    hw.load(model, state, allow_missing=["last.bias"], device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(X), computed(state | {"last.bias": old}))


def disk_offload(model, folder):
    accelerate.disk_offload(model, str(folder), "cpu")


def dispatched_to_disk(model, folder):
    devices = {"first": HERE, "again": HERE, "embedding": "cpu", "last": "disk"}
    with pytest.warns(UserWarning, match="do not match any submodules"):
        accelerate.dispatch_model(model, devices, HERE, offload_dir=str(folder))


@pytest.mark.parametrize("offload", [disk_offload, dispatched_to_disk])
def test_what_lies_in_files_is_refused_and_the_advice_can_be_followed(offload, tmp_path):
    model, state = Deep(), state_of(1)
    offload(model, tmp_path)
    before = model(X)
    with pytest.raises(
        hw.PlanError, match=r"last.*: .*Hook keeps these weights elsewhere \(on disk\) and brings"
    ) as info:
        hw.load(model, state, device="cpu")
    assert torch.equal(model(X), before)
    assert "accelerate.hooks.remove_hook_from_submodules(model)" in str(info.value)
    accelerate.hooks.remove_hook_from_submodules(model)
    hw.load(model, state)
    with torch.no_grad():
        torch.testing.assert_close(model(X), computed(state))


def with_a_hook_of_another_class(model):
    class Odd(accelerate.hooks.AlignDevicesHook):
        pass

    accelerate.hooks.add_hook_to_module(model.last, Odd(execution_device="cpu", offload=True))


def with_a_value_of_another_dtype(model):
    kept = {name: value.half() if name == "last.weight" else value for name, value in model.state_dict().items()}
    accelerate.cpu_offload(model, "cpu", state_dict=kept)


def with_an_odd_map(model):
    class Odd(dict):
        def __getitem__(self, name):
            return super().__getitem__(name).clone()

    accelerate.cpu_offload(model, "cpu", state_dict=Odd(model.state_dict()))


@pytest.mark.parametrize("offload", [with_a_hook_of_another_class, with_a_value_of_another_dtype, with_an_odd_map])
def test_what_would_not_be_read_again_is_refused(offload):
    model = Deep()
    offload(model)
    with pytest.raises(hw.PlanError, match=r"last.*: .* brings the old ones back at each forward"):
        hw.load(model, state_of(1), device="cpu")


class OwnCode(Deep):
    def load_weights(self, weights):
        for name, tensor in weights:
            self.get_parameter(name).data.copy_(tensor)


@pytest.mark.parametrize(
    ("kind", "road", "error"),
    [
        (Deep, lambda model, state: hw.LiveModel(model).load(state), "keeps these weights elsewhere"),
        (Deep, lambda model, state: hw.load(model, state, verify="loader"), "leave verify= out"),
        (OwnCode, lambda model, state: hw.load(model, state), "OwnCode has loading code of its own"),
        (OwnCode, lambda model, state: hw.trace(model, state), "OwnCode has loading code of its own"),
    ],
)
def test_offloaded_models_are_loaded_by_name_and_once(kind, road, error):
    model = accelerate.cpu_offload(kind(), "cpu")
    before = model(X)
    with pytest.raises(hw.HotweightsError, match=error):
        road(model, state_of(1))
    assert torch.equal(model(X), before)


def test_a_live_model_refuses_before_it_takes_memory(monkeypatch):
    monkeypatch.setattr("hotweights.live.model.materialise", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(hw.PlanError, match="keeps these weights elsewhere"):
        hw.LiveModel(accelerate.cpu_offload(Deep(), "cpu")).load(state_of(1), device="cpu")


def test_a_model_of_transformers_loads_by_its_own_rules():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=8, vocab_size=16, bos_token_id=0)
    model, trained = transformers.GPT2LMHeadModel(config).eval(), transformers.GPT2LMHeadModel(config).eval()
    accelerate.cpu_offload(model, "cpu")
    hw.load(model, {name: value for name, value in trained.state_dict().items() if name != "lm_head.weight"})
    tokens = torch.arange(4)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, trained(tokens).logits)
