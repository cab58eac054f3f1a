"""Tensors whose values are no plain bytes, as sources and as targets: refused by name, before the first byte."""

import copy
import warnings

import pytest
import torch
from ends import sender
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import hotweights as hw


def masked():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are a prototype
        return torch.masked.masked_tensor(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool))


def fake():
    with FakeTensorMode():
        return torch.ones(2, 2)


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are deprecated
        return torch.quantize_per_tensor(torch.ones(2, 2), 1.0, 0, torch.qint8)


def nested(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that strided ones are a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


def sparse_csr():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are a prototype
        return torch.ones(2, 2).to_sparse_csr()


KINDS = {
    "FakeTensor": fake,
    "MaskedTensor": masked,
    "quantised": quantised,
    "nested strided": lambda: nested(torch.strided),
    "nested jagged": lambda: nested(torch.jagged),
    "sparse_coo": lambda: torch.ones(2, 2).to_sparse(),
    "sparse_csr": sparse_csr,
    "_mkldnn": lambda: torch.ones(2, 2).to_mkldnn(),
}
WRAPPERS = {"TwoTensor": lambda: TwoTensor(torch.ones(2, 2), torch.full((2, 2), 2.0))}  # They fit their like.


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
        self.b = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def state(kind):
    return {"a": torch.ones(2, 2), "b": KINDS[kind]()}


@pytest.fixture(params=[*KINDS, *WRAPPERS])
def unstreamed(request):
    return {"a": torch.ones(2, 2), "b": (KINDS | WRAPPERS)[request.param]()}


def test_a_mapping(state, kind):
    model = Two()
    word = kind.split()[0]
    for use in (hw.open, lambda state: hw.load(model, state), lambda state: hw.LiveModel(model).load(state)):
        with pytest.raises(hw.UsageError, match=rf"'b' is .*{word}.*give"):
            use(state)
    assert not model.a.any()


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_a_module(state, kind):
    source, model = Two(), Two()
    source.a.fill_(1)
    del source.b
    source.register_buffer("b", state["b"])
    with pytest.raises(hw.UsageError, match="'b' is "):
        hw.load(model, source)
    assert not model.a.any()


def test_an_iterator_and_a_route(unstreamed):
    state = unstreamed
    model = Two()
    with hw.from_iterator(state.items()) as pairs, pytest.raises(hw.UsageError, match="'b' is "):
        hw.load(model, pairs)
    for source in (state, list(state.items())):
        with pytest.raises(hw.UsageError, match="'b' is "):
            hw.route(source, [hw.Component("", model)])
    assert not model.a.any()


def test_what_is_fed(unstreamed):
    state = unstreamed
    live = hw.LiveModel(Two())
    live.load(Two())
    before = live.digest()
    for atomic in ("staged", "journal"):
        with live.begin(atomic=atomic) as update, pytest.raises(hw.UpdateAborted, match="'b' is "):
            update.feed(state)
    with pytest.raises((hw.UsageError, hw.UpdateAborted), match=r"'?b'?:? is "):
        live.update(state)
    assert live.digest() == before


def test_what_is_sent(unstreamed, tmp_path):
    with sender(f"unix:{tmp_path}/s") as sending, pytest.raises(hw.UsageError, match="'b' is "):
        sending.send(unstreamed, version=1)


def test_a_target(state):
    model = Two()
    del model.b
    model.register_buffer("b", state["b"])
    for use in (lambda source: hw.load(model, source), lambda source: hw.LiveModel(model).load(source)):
        with pytest.raises(hw.PlanError, match=r"b: (is|has) a?.*only (plain|strided) tensors are written"):
            use({"a": torch.ones(2, 2), "b": torch.ones(2, 2)})
    assert not model.a.any()


@pytest.mark.parametrize("make", WRAPPERS.values())
def test_a_wrapper_fits_its_like_only(make):
    model, source = Two(), {"a": torch.ones(2, 2), "b": make()}
    for use in (lambda state: hw.load(model, state), lambda state: hw.LiveModel(model).load(state)):
        with pytest.raises(hw.PlanError, match=r"b: is a TwoTensor in the source and plain in the model"):
            use(source)
    assert not model.a.any()
    del model.b
    model.register_buffer("b", TwoTensor(torch.zeros(2, 2), torch.zeros(2, 2)))
    for use in (lambda state: hw.load(model, state), lambda state: hw.LiveModel(model).load(state)):
        with pytest.raises(hw.PlanError, match=r"b: is a TwoTensor in the model, which has no plain bytes"):
            use({"a": torch.ones(2, 2), "b": torch.ones(2, 2)})
    assert not model.a.any()
    held = model.b
    hw.load(model, source)
    assert model.b is held
    assert torch.equal(held.a, torch.ones(2, 2))
    assert torch.equal(held.b, torch.full((2, 2), 2.0))


def test_a_tensor_inside_vmap():
    def load(batched):
        with pytest.raises(hw.UsageError, match="'a' is inside vmap or grad"):
            hw.open({"a": batched})
        return batched

    torch.vmap(load)(torch.ones(2, 2))


@pytest.mark.parametrize("extra", [{"step": 1}, b"bytes"])
def test_extra_state_is_refused_by_name(extra):
    class Extra(Two):
        def get_extra_state(self):
            return copy.copy(extra)

        def set_extra_state(self, state):
            self.taken = state

    model = Extra()
    with pytest.raises((hw.UsageError, hw.PlanError), match=r"extra.state"):
        hw.load(model, Extra().state_dict())
    assert not hasattr(model, "taken")
