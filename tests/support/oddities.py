"""Odd models, odd sources and odd arguments: what callers really pass, each made anew by a function."""

import collections
import pathlib
import types
import warnings

import numpy
import torch
from safetensors.torch import save_file
from torch import nn

import hotweights as hw


class Mine(Exception):
    """What the caller's own code raises: it may come through, as itself or as a cause."""


def linear():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(3, 3)


def with_parameter(value):
    model = nn.Module()
    model.weight = nn.Parameter(value, requires_grad=False)
    return model


def with_buffer(value):
    model = nn.Module()
    model.register_buffer("weight", value)
    return model


def tied():
    model = nn.Sequential(linear(), linear())
    model[1].weight = model[0].weight
    return model


def overlapping():
    model = nn.Module()
    base = torch.zeros(12)
    model.weight = nn.Parameter(base[:9].view(3, 3))
    model.bias = nn.Parameter(base[6:9])
    return model


def listed():
    model = nn.Module()
    model.weight = nn.ParameterList([torch.zeros(3, 3), torch.zeros(3)])
    model.more = nn.ParameterDict({"a": torch.zeros(2)})
    return model


def on_meta():
    return nn.Linear(3, 3, device="meta")


def holds_itself():
    model = linear()
    object.__setattr__(model, "friend", model)
    model.items = [model]
    return model


class LoadsByWeights(nn.Linear):
    """Loading code of its own, given by ``how``."""

    how = staticmethod(lambda self, pairs: None)

    def __init__(self):
        super().__init__(3, 3)

    def load_weights(self, weights):
        return type(self).how(self, weights)


def loading(how):
    return type("Loads", (LoadsByWeights,), {"how": staticmethod(how)})


def raises(*_, **__):
    raise Mine("by loading code")


def keeps_everything(self, pairs):
    self.kept = list(pairs)


def casts_to_float(self, pairs):
    for name, tensor in pairs:
        getattr(self, name).data.fill_(float(tensor.flatten()[0]))


def looks_for_keys(self, pairs):
    own = dict(self.named_parameters())
    for name, tensor in pairs:
        own[name].data.copy_(tensor)


def as_generator(self, pairs):
    for name, tensor in pairs:
        getattr(self, name).data.copy_(tensor)
        yield name


class NoArguments(nn.Linear):
    def load_weights(self):
        pass


class NotCallable(nn.Linear):
    load_weights = 3


class Coroutine(nn.Linear):
    async def load_weights(self, pairs):
        pass


class BadProperty(nn.Linear):
    @property
    def broken(self):
        raise Mine("by a property")


class BadHook(nn.Linear):
    def _load_from_state_dict(self, *args, **kwargs):
        raise Mine("by a hook")


class BadNames(nn.Linear):
    def named_parameters(self, *args, **kwargs):
        raise Mine("by named_parameters")


class ExtraState(nn.Linear):
    def get_extra_state(self):
        return {"some": [1, 2]}

    def set_extra_state(self, state):
        self.extra = state


class OddAttributes(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)
        self.numbers = {1: torch.ones(2), None: "x", (1, 2): [torch.zeros(1)]}
        self.deque = collections.deque([torch.ones(1)])
        self.namespace = types.SimpleNamespace(weight=self.weight)
        self.array = numpy.zeros(3)
        self.function = lambda: self.weight


def quiet(make):
    """What torch makes, without its warnings that it will not for long."""

    def made(*arguments):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(*arguments)

    return made


def traced_part():
    return nn.Sequential(torch.jit.trace(linear(), torch.ones(1, 3)), linear())


def dynamically_quantised():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear()), dtype=torch.qint8)


def without_a_bias():
    model = linear()
    model.bias = None
    return model


MODELS = {
    "linear": linear,
    "empty": nn.Module,
    "identity": nn.Identity,
    "tied": tied,
    "overlapping": overlapping,
    "lists": listed,
    "meta": on_meta,
    "itself": holds_itself,
    "0-dim": lambda: with_parameter(torch.tensor(0.0)),
    "zero-size": lambda: with_parameter(torch.empty(0, 3)),
    "expanded": lambda: with_buffer(torch.zeros(1, 3).expand(3, 3)),
    "transposed": lambda: with_parameter(torch.zeros(3, 3).t()),
    "strided": lambda: with_buffer(torch.zeros(3, 6)[:, ::2]),
    "bool": lambda: with_buffer(torch.zeros(3, 3, dtype=torch.bool)),
    "int8": lambda: with_buffer(torch.zeros(3, 3, dtype=torch.int8)),
    "complex": lambda: with_parameter(torch.zeros(3, 3, dtype=torch.complex64)),
    "conjugated": lambda: with_buffer(torch.zeros(3, 3, dtype=torch.complex64).conj()),
    "negated": lambda: with_buffer(torch.zeros(3, 3, dtype=torch.complex64).conj().imag),
    "fp8": lambda: with_buffer(torch.zeros(3, 3).to(torch.float8_e4m3fn)),
    "sparse": lambda: with_buffer(torch.zeros(3, 3).to_sparse()),
    "csr": lambda: with_buffer(torch.eye(3).to_sparse_csr()),
    "quantised": lambda: with_buffer(torch.quantize_per_tensor(torch.zeros(3, 3), 1.0, 0, torch.qint8)),
    "nested": lambda: with_buffer(torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])),
    "mkldnn": lambda: with_buffer(torch.zeros(3, 3).to_mkldnn()),
    "no bias": without_a_bias,
    "lazy": lambda: nn.LazyLinear(3),
    "traced part": traced_part,
    "scripted": lambda: torch.jit.script(linear()),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(linear()),
    "dynamically quantised": dynamically_quantised,
    "compiled": lambda: torch.compile(linear()),
    "data parallel": lambda: nn.DataParallel(linear()),
    "extra state": lambda: ExtraState(3, 3),
    "odd attributes": OddAttributes,
    "load_weights of no argument": lambda: NoArguments(3, 3),
    "load_weights is 3": lambda: NotCallable(3, 3),
    "load_weights is async": lambda: Coroutine(3, 3),
    "load_weights raises": lambda: loading(raises)(),
    "load_weights keeps": lambda: loading(keeps_everything)(),
    "load_weights asks for values": lambda: loading(casts_to_float)(),
    "load_weights by key": lambda: loading(looks_for_keys)(),
    "load_weights yields": lambda: loading(as_generator)(),
    "a property that raises": lambda: BadProperty(3, 3),
    "a hook that raises": lambda: BadHook(3, 3),
    "names that raise": lambda: BadNames(3, 3),
    "a class": lambda: nn.Linear,
    "None": lambda: None,
    "a mapping": dict,
    "a tensor": lambda: torch.ones(3),
}
MODELS = {name: quiet(make) for name, make in MODELS.items()}


def state(**more):
    return {"weight": torch.ones(3, 3), "bias": torch.ones(3), **more}


def fails_after(count):
    for number, pair in enumerate(state().items()):
        if number == count:
            raise Mine("by an iterator")
        yield pair
    raise Mine("by an iterator")


class BadMapping(collections.abc.Mapping):
    """Promises a name and does not have it."""

    def __getitem__(self, name):
        raise Mine("by a mapping")

    def __iter__(self):
        return iter(["weight", "bias"])

    def __len__(self):
        return 2


def closed_source():
    source = hw.open(state())
    source.close()
    return source


def file_of(folder, content, name="model.safetensors"):
    path = pathlib.Path(folder, name)
    path.write_bytes(content)
    return path


def saved(folder, tensors, name="model.safetensors"):
    save_file(tensors, path := pathlib.Path(folder, name))
    return path


def unpromised():
    return hw.from_iterator(iter(state(more=torch.ones(1)).items()), hw.open({"weight": torch.ones(3, 3)}).manifest)


SOURCES = {
    "fits": lambda folder: state(),
    "file": lambda folder: saved(folder, state()),
    "directory": lambda folder: saved(folder, state()).parent,
    "module": lambda folder: linear(),
    "iterator": lambda folder: hw.from_iterator(iter(state().items())),
    "pairs": lambda folder: iter(state().items()),
    "empty": lambda folder: {},
    "more": lambda folder: state(more=torch.ones(1)),
    "fewer": lambda folder: {"weight": torch.ones(3, 3)},
    "half": lambda folder: {name: tensor.half() for name, tensor in state().items()},
    "double": lambda folder: {name: tensor.double() for name, tensor in state().items()},
    "bool": lambda folder: {name: tensor.bool() for name, tensor in state().items()},
    "ints": lambda folder: {name: tensor.long() for name, tensor in state().items()},
    "complex": lambda folder: {name: tensor.to(torch.complex64) for name, tensor in state().items()},
    "broadcast": lambda folder: state(weight=torch.ones(3)),
    "0-dim": lambda folder: state(weight=torch.tensor(1.0)),
    "zero-size": lambda folder: state(weight=torch.empty(0, 3)),
    "expanded": lambda folder: state(weight=torch.ones(1, 3).expand(3, 3)),
    "with a graph": lambda folder: state(weight=torch.ones(3, 3, requires_grad=True) * 2),
    "conjugated": lambda folder: state(weight=torch.ones(3, 3, dtype=torch.complex64).conj()),
    "parameters": lambda folder: dict(linear().named_parameters()),
    "integers as names": lambda folder: {1: torch.ones(3, 3)},
    "None as a name": lambda folder: {None: torch.ones(3, 3)},
    "an empty name": lambda folder: {"": torch.ones(3, 3)},
    "None as a tensor": lambda folder: state(bias=None),
    "numbers": lambda folder: state(bias=3),
    "numpy": lambda folder: state(bias=numpy.ones(3, dtype=numpy.float32)),
    "a list": lambda folder: state(bias=[1.0, 1.0, 1.0]),
    "a mapping in it": lambda folder: {"model": state(), "epoch": 3},
    "bytes": lambda folder: state(bias=b"123"),
    "meta": lambda folder: state(bias=torch.ones(3, device="meta")),
    "sparse": lambda folder: state(weight=torch.ones(3, 3).to_sparse()),
    "csr": lambda folder: state(weight=torch.eye(3).to_sparse_csr()),
    "nested": lambda folder: state(bias=torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
    "quantised": lambda folder: state(weight=torch.quantize_per_tensor(torch.ones(3, 3), 1.0, 0, torch.qint8)),
    "mkldnn": lambda folder: state(weight=torch.ones(3, 3).to_mkldnn()),
    "lazy": lambda folder: nn.LazyLinear(3),
    "a mapping that raises": lambda folder: BadMapping(),
    "fails at once": lambda folder: hw.from_iterator(fails_after(0)),
    "fails later": lambda folder: hw.from_iterator(fails_after(1)),
    "fails at its end": lambda folder: hw.from_iterator(fails_after(2)),
    "not promised": lambda folder: unpromised(),
    "no pairs": lambda folder: hw.from_iterator(iter([1, 2, 3])),
    "three of each": lambda folder: hw.from_iterator(iter([("a", torch.ones(1), 3)])),
    "the same twice": lambda folder: hw.from_iterator(iter([("bias", torch.ones(3)), ("bias", torch.zeros(3))])),
    "names that are none": lambda folder: hw.from_iterator(iter([(3, torch.ones(3))])),
    "closed": lambda folder: closed_source(),
    "no such file": lambda folder: pathlib.Path(folder, "none.safetensors"),
    "an empty directory": lambda folder: folder,
    "garbage": lambda folder: file_of(folder, b"\xff" * 100),
    "an empty file": lambda folder: file_of(folder, b""),
    "html": lambda folder: file_of(folder, b"<!DOCTYPE html><html></html>"),
    "a cut file": lambda folder: file_of(folder, saved(folder, state()).read_bytes()[:-1]),
    "an index of nothing": lambda folder: file_of(folder, b"{}", "model.safetensors.index.json"),
    "an index that is a list": lambda folder: file_of(folder, b"[1]", "model.safetensors.index.json"),
    "a name with a zero": lambda folder: "a\0b",
    "an empty path": lambda folder: "",
    "a path of bytes": lambda folder: b"path",
    "an address": lambda folder: "ftp://bucket/model",
    "None": lambda folder: None,
    "a number": lambda folder: 3,
    "a class": lambda folder: nn.Linear,
    "a tensor": lambda folder: torch.ones(3, 3),
    "a generator function": lambda folder: fails_after,
}
SOURCES = {name: quiet(make) for name, make in SOURCES.items()}

# Arguments of `hw.load`, most of them odd.
OPTIONS = [
    {},
    {"allow_missing": "*", "allow_unexpected": "*"},
    {"allow_missing": "*", "allow_unexpected": "*", "allow_partial": "*", "cast": "loader", "device": "cpu"},
    {"device": "cpu"},
    {"device": "nowhere"},
    {"device": 3.5},
    {"allow_missing": 3},
    {"allow_missing": [None]},
    {"allow_unexpected": "["},
    {"cast": "loader"},
    {"cast": "sometimes"},
    {"order": "layers"},
    {"io": "direct"},
    {"threads": 0},
    {"threads": "two"},
    {"verify": "loader"},
    {"verify": True},
    {"cache": True},
    {"cache_dir": "/proc/none"},
    {"cache_dir": 3},
    {"pool": 3},
    {"plan": 3},
]
