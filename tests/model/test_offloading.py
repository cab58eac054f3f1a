"""Offloading: where hooks bring old weights back, nothing is loaded; other hooks are no obstacle."""

import functools
import types
from collections.abc import Mapping

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
