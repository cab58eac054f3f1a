"""Processing that changes what a layer is made of: children, hooks, its class. Updates against cold loads."""

import pytest
import torch
import whole
from torch import nn

import hotweights as hw

X = torch.linspace(-1, 1, 8).view(2, 4)
WAYS = ("journal", "staged", False)


def frozen(tensor):
    return nn.Parameter(tensor, requires_grad=False)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = frozen(torch.zeros(4, 4))

    def forward(self, x):
        return x @ self.weight.t()


class AddsChild(Layer):
    def process(self):
        self.inner = nn.Linear(4, 4)
        self.inner.weight, self.inner.bias = frozen(self.weight.t() * 2), frozen(self.weight[0].clone())
        del self.weight

    def forward(self, x):
        return self.inner(x)


class AddsDeepChildren(Layer):
    def process(self):
        self.parts = nn.ModuleList([nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))])
        self.parts[0][0].weight = frozen(self.weight * 3)
        self.parts[0][1].running_mean = self.weight[1].clone()
        self.parts[0].tables = {"row": self.weight[2].clone()}

    def forward(self, x):
        return self.parts[0](x) + self.parts[0].tables["row"]


class AddsLists(Layer):
    def process(self):
        self.listed = nn.ParameterList([self.weight * 2])
        self.named = nn.ParameterDict({"a": self.weight * 3})

    def forward(self, x):
        return x @ self.listed[0] + x @ self.named["a"]


class KernelInMethod(Layer):
    """The kernel is a module that hangs on ``quant_method``; vLLM's modular kernels do."""

    def __init__(self):
        super().__init__()
        self.method = type("Method", (), {})()

    def process(self):
        self.method.kernel = nn.Linear(4, 4, bias=False)
        self.method.kernel.weight = frozen(self.weight.flip(0))

    def forward(self, x):
        return self.method.kernel(x)


class Hooked(Layer):
    def process(self):
        scale = self.weight.amax().clone()
        self.register_forward_hook(lambda module, args, out: out * scale)
        self.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + scale,), kwargs), with_kwargs=True)


class Packed(Layer):
    def forward(self, x):
        return x @ self.weight


class ChangesClass(Layer):
    def process(self):
        self.weight.data = self.weight.data.t().contiguous() * 2
        self.__class__ = Packed


class ChangesChildClass(Layer):
    def process(self):
        if not hasattr(self, "inner"):
            self.inner = Layer()
            self.inner.__class__ = Packed
            self.inner.weight.data.copy_(self.weight)

    def forward(self, x):
        return self.inner(x)


class Expanded(Layer):
    """One scale for all channels, without memory for each."""

    def process(self):
        self.scale = frozen(self.weight.amax().expand(4))
        self.rows = self.weight[:1].clone().expand(4, 4)

    def forward(self, x):
        return x @ self.weight.t() * self.scale + x @ self.rows


LAYERS = [
    AddsChild,
    AddsDeepChildren,
    AddsLists,
    KernelInMethod,
    Hooked,
    ChangesClass,
    ChangesChildClass,
    Expanded,
]
REPLACED = {Hooked}


def process(layer):
    if hasattr(layer, "process"):
        layer.process()


def tensors(seed):
    made = torch.Generator().manual_seed(seed)
    return {f"{number}.weight": torch.rand(4, 4, generator=made) for number in range(2)}


def cold(kind, seed):
    model = nn.Sequential(kind(), kind())
    model.load_state_dict(tensors(seed))
    with torch.no_grad():
        for layer in model:
            layer.process()
    return model.eval()


def loaded(kind, processing=process, **options):
    model = nn.Sequential(kind(), kind())
    live = hw.LiveModel(model, process=processing, **options)
    live.load(tensors(0))
    return model.eval(), live


@pytest.mark.parametrize("atomic", WAYS)
@pytest.mark.parametrize("kind", LAYERS)
def test_an_update_is_a_cold_load(kind, atomic):
    model, live = loaded(kind, atomic=atomic)
    assert torch.equal(model(X), cold(kind, 0)(X))
    where, modules = whole.addresses(model, ("hooks",)), [id(module) for module in model.modules()]
    for seed in (1, 2, 0):
        report = live.update(tensors(seed))
        assert torch.equal(model(X), cold(kind, seed)(X))
        assert whole.addresses(model, ("hooks",)) == where
        assert [id(module) for module in model.modules()] == modules
        assert not any(module.training for module in model.modules())  # That is the caller's.
        assert bool(report.replaced) == (kind in REPLACED)


@pytest.mark.parametrize("atomic", WAYS[:2])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_abort_puts_everything_back(kind, atomic, at):
    calls = []

    def failing(layer):
        process(layer)
        calls.append(layer)
        if len(calls) == at:
            raise RuntimeError("injected")

    current = [process]
    model, live = loaded(kind, lambda layer: current[0](layer), atomic=atomic)
    live.update(tensors(1))
    before, answer = whole.everything(model), model(X)
    kinds = [type(module) for module in model.modules()]
    current[0] = failing
    with live.begin() as update:
        if at < 3:
            with pytest.raises(hw.UpdateAborted, match="injected"):
                update.feed(tensors(2))
        else:
            update.feed(tensors(2))
    assert whole.everything(model) == before
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(model(X), answer)
    current[0] = process
    live.update(tensors(2))
    assert torch.equal(model(X), cold(kind, 2)(X))


def test_hooks_of_others_stay():
    model, live = loaded(Hooked)
    calls = []
    handle = model[0].register_forward_hook(lambda *args: calls.append(args))
    live.update(tensors(1))
    model(X)
    assert len(calls) == 1
    handle.remove()
    live.update(tensors(2))
    assert torch.equal(model(X), cold(Hooked, 2)(X))
    assert len(calls) == 1


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Layer()
        self.quant_method = Replacing()

    def forward(self, x):
        return self.inner(x)


class Replacing:
    def process_weights_after_loading(self, layer):
        layer.inner = Packed()


def test_a_child_that_is_loaded_may_not_be_replaced():
    """Nothing could be loaded into it the second time. The model is as it was."""
    model = nn.Sequential(Parent())
    live, child = hw.LiveModel(model), model[0].inner
    with pytest.raises(hw.HotweightsError, match=r"0\.inner: processing replaced a module .* loaded into"):
        live.load({"0.inner.weight": torch.ones(4, 4)})
    assert model[0].inner is child
    assert live.state is hw.State.EMPTY
    del model[0].quant_method
    live.load({"0.inner.weight": torch.ones(4, 4)})
    assert torch.equal(model(X), X @ torch.ones(4, 4))


class Grand(nn.Module):
    """Replaces what lies in a block that is no layer itself."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(Layer())
        self.quant_method = ReplacingDeep()


class ReplacingDeep:
    def process_weights_after_loading(self, layer):
        layer.block[0] = Packed()


def test_neither_may_a_grandchild():
    model = nn.Sequential(Grand())
    live, child = hw.LiveModel(model), model[0].block[0]
    with pytest.raises(hw.HotweightsError, match=r"replaced.*: 0\.block\.0"):
        live.load({"0.block.0.weight": torch.ones(4, 4)})
    assert model[0].block[0] is child


@pytest.mark.filterwarnings("ignore")
def test_a_part_that_was_scripted_cannot_be_processed():
    def model():
        return nn.ModuleDict({"part": torch.jit.script(nn.Linear(2, 2)), "head": nn.Linear(2, 2)})

    weights = {"head.weight": torch.ones(2, 2), "head.bias": torch.ones(2)}
    live = hw.LiveModel(model(), process=lambda layer: None)
    with pytest.raises(hw.UsageError, match=r"part: is a TorchScript module.*leave it out of layers="):
        live.load(weights, allow_missing="part.*")
    assert live.state is hw.State.EMPTY
    live = hw.LiveModel(model(), process=lambda layer: None, layers="head")  # as the error says
    live.load(weights, allow_missing="part.*")
    part = {"part.weight": torch.ones(2, 2), "part.bias": torch.ones(2)}
    live.update({**weights, **part})  # another manifest: the model is traced anew, its parts as they are
    assert (live.model["part"].weight == 1).all()


def test_a_pattern_that_matches_no_module_is_named(caplog):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(hw.UsageError, match=r"layers='nobody\.\*' matches no module of the model"):
        hw.LiveModel(model, layers=["0", "nobody.*"])
    hw.LiveModel(model, layers=["0", "1"], deferred=["0", "1"])
    assert not caplog.messages
    hw.LiveModel(model, deferred=["0", "nobody.*"])
    assert "deferred='nobody.*' matches no module" in caplog.text
    live = hw.LiveModel(model, deferred="nobody")
    (warning,) = live.load(model).warnings
    assert warning.startswith("deferred='nobody' matches no module")
    assert caplog.text.count("deferred='nobody' matches") == 1


def test_a_function_that_takes_no_module_alone_is_refused():
    with pytest.raises(hw.UsageError, match="layers= is a function of one argument, a module"):
        hw.LiveModel(nn.Linear(2, 2), layers=lambda name, layer: True)
    hw.LiveModel(nn.Linear(2, 2), layers=lambda layer: True)
