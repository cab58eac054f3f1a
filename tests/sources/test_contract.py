"""Every source against the public contract."""

import pytest
import torch

import hotweights as hw
from hotweights.sources import READERS
from hotweights.sources.contracts import Addressed, InMemory, Participant, Source
from hotweights.testing import SOURCE_CONTRACT, ReusedBuffer, write_checkpoint
from readers import CANNOT, REUSING, save

TENSORS = {
    "embed.weight": torch.randn(33, 17),
    "layers.0.weight": torch.randn(40, 1000).to(torch.bfloat16),
    "three": torch.arange(3, dtype=torch.uint8),  # puts every tensor behind it off its alignment
    "layers.1.weight": torch.randn(64, 64),
    "scale": torch.tensor(3.0),
    "empty": torch.empty(0, 7),
    "counts": torch.arange(-5, 5),
    "flags": torch.tensor([True, False, True]),
    "fp8": torch.randn(16).to(torch.float8_e4m3fn),
    "complex": torch.randn(3, dtype=torch.complex64),
}


def strided():
    wide = torch.randn(8, 12)
    return {"t": wide.t(), "columns": wide[:, ::2], "expanded": torch.randn(1, 4).expand(3, 4), "scalar": wide[2, 3]}


OURS = ["file", "shards", "mapping", "strided mapping", "module"]
ITERATORS = ["owned iterator", "borrowed iterator", "strided iterator", "reused buffer"]
OF_READERS = [*READERS, *(f"{name}, reusing" for name in REUSING)]


@pytest.fixture(params=[*OURS, *ITERATORS, *OF_READERS])
def case(request, tmp_path, monkeypatch):
    """What makes a source, and what it holds."""
    if request.param in ITERATORS:
        return iterator(request.param)
    if request.param in OF_READERS:
        return reader(request.param.partition(",")[0], tmp_path, monkeypatch, reusing="reusing" in request.param)
    if request.param == "file":
        path = write_checkpoint(tmp_path, TENSORS) / "model.safetensors"
        return lambda: hw.open(path), TENSORS
    if request.param == "shards":
        write_checkpoint(tmp_path, TENSORS, shards=3)
        return lambda: hw.open(tmp_path), TENSORS
    if request.param == "module":
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        return lambda: hw.open(module), dict(module.state_dict())
    tensors = TENSORS if request.param == "mapping" else strided()
    return lambda: hw.open(tensors), tensors


def iterator(kind):
    tensors = strided() if kind == "strided iterator" else TENSORS
    manifest = hw.open(tensors).manifest
    if kind == "owned iterator":  # A new clone each time: what it gives belongs to whoever gets it.
        pairs = Fresh(tensors)
        return lambda: hw.from_iterator(pairs, manifest, borrowed=False), tensors
    pairs = ReusedBuffer(tensors) if kind == "reused buffer" else list(tensors.items())
    return lambda: hw.from_iterator(pairs, manifest), tensors


class Fresh:
    def __init__(self, tensors):
        self.tensors = tensors

    def __iter__(self):
        return ((name, tensor.clone()) for name, tensor in self.tensors.items())


def reader(name, tmp_path, monkeypatch, *, reusing):
    for variable, value in REUSING[name].items() if reusing else ():
        monkeypatch.setenv(variable, value)
    tensors = {key: tensor for key, tensor in TENSORS.items() if tensor.dtype not in CANNOT.get(name, ())}
    save(tmp_path, tensors, reader=name, shards=3)
    return lambda: hw.open(tmp_path, reader=name), tensors


@pytest.mark.parametrize("check", SOURCE_CONTRACT, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(*case)


class Waiting:
    """A source whose manifest is not there yet, as a receiver's: asking for it would wait for a sender."""

    @property
    def manifest(self):
        raise AssertionError("its code ran")

    position = read = borrow = wanted = decision = refuse = manifest

    def leases(self, *, guard="off"): ...
    def tensors(self): ...
    def close(self): ...
    def __enter__(self): ...
    def __exit__(self, *error): ...


@pytest.mark.parametrize("contract", [Source, Addressed, InMemory, Participant])
def test_asking_what_a_source_can_do_runs_none_of_its_code(contract):
    assert isinstance(Waiting(), contract)
    assert not isinstance({}, contract)
