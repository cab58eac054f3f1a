"""Blocks of models for the tests of live models, each with a checkpoint, loading code and a way of processing.

``Model(spec)`` is made of blocks; ``cold(spec, seed)`` loads and processes one as an engine does, without hotweights.
"""

from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn

import hotweights as hw
from hotweights.model.places import places

N = 4


def parameter(*shape, value=torch.nan, dtype=torch.float32):
    return nn.Parameter(torch.full(shape, value, dtype=dtype), requires_grad=False)


class Marked(nn.Parameter):
    """A parameter of another class."""


# What processing does to a layer with a ``weight``. Each depends on the weight alone.


def transpose(layer):
    layer.weight = nn.Parameter(layer.weight.t().contiguous() * 2, requires_grad=False)


def in_place(layer):
    layer.weight.data.mul_(3).add_(1)


def quantise(layer):
    scale = layer.weight.abs().amax()
    layer.register_parameter("scale", nn.Parameter(scale.clone(), requires_grad=False))
    layer.register_buffer("sums", layer.weight.amax(dim=0), persistent=False)
    layer.weight = Marked((layer.weight / scale * 127).round().to(torch.int8), requires_grad=False)
    layer.weight.largest = float(scale)
    layer.kind = "int8"


def empty(layer):
    layer.packed = layer.weight.flip(0).contiguous()
    layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)


def once(layer):
    if layer.done:
        return
    layer.done = True
    layer.times += 1
    layer.total = float(layer.weight.amax())
    layer.weight.data.copy_(layer.weight.data.t().clone())


def derived(layer):
    layer.weight.data.mul_(layer.constant)
    layer.derived.copy_(layer.weight[0] * 2)


def nothing(layer):
    pass


MODES = {one.__name__: one for one in (nothing, transpose, in_place, quantise, empty, once, derived)}


class QuantMethod:
    def process_weights_after_loading(self, layer):
        MODES[layer.mode](layer)


def process(layer):
    """Every layer, each in its mode."""
    MODES[getattr(layer, "mode", "nothing")](layer)


class Weight(nn.Module):
    """One square weight, a constant buffer and one that is derived, an attribute and a flag."""

    def __init__(self, mode="nothing", weight=None):
        super().__init__()
        self.mode = mode
        self.done, self.times, self.total = False, 0, 0.0
        self.weight = parameter(N, N) if weight is None else weight
        self.weight.weight_loader = plainly
        self.register_buffer("constant", torch.tensor(0.0188), persistent=False)
        self.register_buffer("derived", torch.zeros(N), persistent=False)


def plainly(param, one):
    param.data.copy_(one)


class Plain(nn.Module):
    shapes = MappingProxyType({"weight": (N, N)})

    def __init__(self, mode):
        super().__init__()
        self.inner = Weight(mode)

    def take(self, name, one):
        self.inner.weight.weight_loader(self.inner.weight, one)


class Fused(Plain):
    shapes = MappingProxyType({"q": (1, N), "k": (1, N), "v": (2, N)})

    def take(self, name, one):
        start = {"q": 0, "k": 1, "v": 2}[name]
        self.inner.weight.data[start : start + one.shape[0]] = one


class Padded(Plain):
    """The rest is filled with zeros."""

    shapes = MappingProxyType({"weight": (N - 1, N)})

    def take(self, name, one):
        self.inner.weight.data[: N - 1].copy_(one)
        self.inner.weight.data[N - 1 :].fill_(0)


class Kept(Plain):
    """The rest is as it was made."""

    shapes = MappingProxyType({"weight": (N - 1, N)})
    partial = ("inner.weight",)

    def __init__(self, mode):
        super().__init__(mode)
        self.inner.weight.data.fill_(0.25)

    def take(self, name, one):
        self.inner.weight.data[: N - 1].copy_(one)


class Composed(Plain):
    shapes = MappingProxyType({"weight": (N, N), "extra": (N, N)})

    def __init__(self, mode):
        super().__init__(mode)
        self.inner.extra = parameter(N, N)

    def take(self, name, one):
        param = getattr(self.inner, name)
        param.data.copy_(one)
        if name == "weight":
            param.data.copy_(-torch.exp(param.data.float()))


class Scaled(Plain):
    """Waits for its scale."""

    shapes = MappingProxyType({"weight": (N, N), "weight_scale": (1,)})

    def __init__(self, mode):
        super().__init__(mode)
        self.waiting = {}

    def take(self, name, one):
        self.waiting[name] = one
        if len(self.waiting) == 2:
            self.inner.weight.data.copy_(self.waiting["weight"] * self.waiting["weight_scale"])
            self.waiting.clear()


class Asking(Plain):
    """Reads a value while it loads: no plan can do that, and it falls back."""

    def take(self, name, one):
        self.inner.weight.data.copy_(one if float(one.amax()) < 0.9 else one * 2)


class Sum(Plain):
    """Adds to what is there: zeros, the first time."""

    shapes = MappingProxyType({"one": (N, N), "two": (N, N)})

    def __init__(self, mode):
        super().__init__(mode)
        self.inner.weight.data.zero_()

    def take(self, name, one):
        self.inner.weight.data[(0 if name == "one" else 2) :][:2] += one[:2]


class Tied(nn.Module):
    shapes = MappingProxyType({"weight": (N, N)})

    def __init__(self, mode, other="nothing"):
        super().__init__()
        self.embed = Weight(mode)
        self.head = Weight(other, self.embed.weight)

    def take(self, name, one):
        self.embed.weight.data.copy_(one)


class Aliased(nn.Module):
    """Buffers that view a weight: of the same module, of a child, of a sibling; whole, partial, strided."""

    shapes = MappingProxyType({"weight": (N, N), "other": (N, N)})

    def __init__(self, mode):
        super().__init__()
        self.inner = Weight(mode)
        self.other = Weight("nothing")
        self.inner.register_buffer("own", self.inner.weight.data.view(-1), persistent=False)
        self.register_buffer("rows", self.inner.weight.data[1:3], persistent=False)
        self.other.register_buffer("columns", self.inner.weight.data[:, ::2], persistent=False)

    def take(self, name, one):
        (self.inner if name == "weight" else self.other).weight.data.copy_(one)


class Foreign(nn.Module):
    """Memory that is not torch's, seen twice."""

    shapes = MappingProxyType({"weight": (N, N)})

    def __init__(self, mode):
        super().__init__()
        memory = bytearray(N * N * 4)
        self.inner = Weight(mode, nn.Parameter(torch.frombuffer(memory, dtype=torch.float32).view(N, N), False))
        self.register_buffer("again", torch.frombuffer(memory, dtype=torch.float32)[2:7], persistent=False)

    def take(self, name, one):
        self.inner.weight.data.copy_(one)


class Odd(nn.Module):
    """Tensors without bytes, a late scale, a loaded buffer, a cast."""

    shapes = MappingProxyType({"buffer": (N,), "narrow": (N,)})

    def __init__(self, mode):
        super().__init__()
        self.nothing = parameter(0, N)
        self.lazy = nn.UninitializedParameter()
        self.register_buffer("buffer", torch.zeros(N))
        self.narrow = parameter(N, dtype=torch.bfloat16)

    def take(self, name, one):
        getattr(self, name).data.copy_(one)


class Shared(nn.Module):
    """One module under two names."""

    shapes = MappingProxyType({"weight": (N, N)})

    def __init__(self, mode):
        super().__init__()
        self.one = Weight(mode)
        self.two = self.one

    def take(self, name, one):
        self.two.weight.data.copy_(one)


class Attention(nn.Module):
    """Its scale is read by processing together with another layer's weight: it must come last."""

    shapes = MappingProxyType({"weight": (N, N), "scale": ()})

    def __init__(self, mode):
        super().__init__()
        self.late = _Late(self)
        self.inner = Weight(mode)

    def take(self, name, one):
        (self.inner.weight if name == "weight" else self.late.scale).data.copy_(one)


class _Late(nn.Module):
    def __init__(self, owner):
        super().__init__()
        self.scale = parameter()
        self.mode = "late"
        self.others = [lambda: owner.inner]  # Not a child, and not seen as one.


def late(layer):
    inner = layer.others[0]()
    found = inner.packed if hasattr(inner, "packed") else inner.weight
    layer.register_buffer("product", found.float().amax() * layer.scale, persistent=False)
    layer.scale.data.mul_(2)


MODES["late"] = late

BLOCKS = {
    one.__name__: one
    for one in (
        Plain,
        Fused,
        Padded,
        Kept,
        Composed,
        Scaled,
        Sum,
        Asking,
        Tied,
        Aliased,
        Foreign,
        Odd,
        Shared,
        Attention,
    )
}


class Spec(NamedTuple):
    """Pairs of a block's kind and its mode; and who is processed: ``"none"``, ``"all"`` or by ``"quant_method"``."""

    blocks: tuple
    processed: str = "all"


class Model(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.spec = spec
        for number, (kind, *modes) in enumerate(spec.blocks):
            self.add_module(f"{kind.lower()}{number}", BLOCKS[kind](*modes))
        if spec.processed == "quant_method":
            for module in self.modules():
                if getattr(module, "mode", "nothing") != "nothing":
                    module.quant_method = QuantMethod()

    def load_weights(self, pairs):
        for name, one in pairs:
            block, _, key = name.partition(".")
            getattr(self, block).take(key, one)

    def partial(self):
        return [f"{name}.{key}" for name, block in self.named_children() for key in getattr(block, "partial", ())]


def checkpoint(spec, seed):
    made = torch.Generator().manual_seed(seed)
    return {
        f"{kind.lower()}{number}.{key}": torch.rand(shape, generator=made)
        for number, (kind, *_) in enumerate(spec.blocks)
        for key, shape in BLOCKS[kind].shapes.items()
    }


def live_model(model, **options):
    processing = {"process": process} if model.spec.processed == "all" else {}
    late = {layer for name, layer in model.named_modules() if name.endswith(".late")}
    return hw.LiveModel(model, deferred=lambda layer: layer in late, **processing, **options)


def allowed(model):
    return {"allow_partial": model.partial(), "allow_missing": ["*.lazy", "*.nothing"]}


def cold(spec, seed):
    """Load and process as an engine does."""
    model = Model(spec)
    model.load_weights(checkpoint(spec, seed).items())
    layers = [one for one in model.modules() if hasattr(one, "mode")] if spec.processed != "none" else []
    for layer in sorted(layers, key=lambda one: one.mode == "late"):
        process(layer)
    return model


PRIVATE = set(nn.Module().__dict__) | {"spec", "quant_method", "others"}


def state(model):
    """Every tensor by name, in parameters, buffers and attributes, but for uninitialised ones."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for store in (module._parameters, module._buffers, module.__dict__):
            for key, one in store.items():
                if isinstance(one, torch.Tensor) and not nn.parameter.is_lazy(one):
                    found[f"{name}.{key}"] = one
    return found


def words(model):
    """Everything else that a model holds: classes, attributes, names."""
    found = {"keys": [place.name for place in places(model) if place.persistent]}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = {
            key: one for key, one in module.__dict__.items() if key not in PRIVATE and not isinstance(one, torch.Tensor)
        }
        found[f"{name} transient"] = sorted(module._non_persistent_buffers_set)
    for name, one in state(model).items():
        found[f"{name} tensor"] = (type(one), one.requires_grad, dict(one.__dict__))
    return found


def addresses(model):
    return {name: (one.data_ptr(), one.stride(), id(one)) for name, one in state(model).items()}
