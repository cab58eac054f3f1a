"""What a load asks of its source: the slices that its plan copies, and how many bytes they are."""

import sys
from contextlib import contextmanager

import pytest
import torch
from ends import Thread, receiver, sender
from torch import nn

import hotweights as hw
from hotweights.testing import FailingSource, write_checkpoint

load_module = sys.modules["hotweights.loading.load"]
TENSORS = {
    "rows": torch.arange(4096.0).view(64, 64),
    "columns": torch.arange(65536.0).view(64, 1024),  # half of a row is 2 kB: read run by run
    "narrow": torch.arange(1024.0).view(64, 16),  # half of a row is 32 bytes: read with all that lies between
    "norm": torch.arange(64.0),
}


class Half(nn.Module):
    """The first of two ranks: its loading code copies half of each matrix, and all of the norm."""

    def __init__(self):
        super().__init__()
        for name, tensor in TENSORS.items():
            self.register_parameter(name, nn.Parameter(torch.zeros_like(self.part(name, tensor)), requires_grad=False))

    def part(self, name, tensor):
        if tensor.ndim == 1:
            return tensor
        dim = 0 if name == "rows" else 1
        return tensor.narrow(dim, 0, tensor.shape[dim] // 2)

    def load_weights(self, pairs):
        for name, tensor in pairs:
            self.get_parameter(name).copy_(self.part(name, tensor))


class Twice(Half):
    """Copies each half into two places; a program makes one of them."""

    def __init__(self):
        super().__init__()
        for name in TENSORS:
            self.register_parameter(f"{name}_too", nn.Parameter(self.get_parameter(name).clone(), requires_grad=False))

    def load_weights(self, pairs):
        for name, tensor in pairs:
            self.get_parameter(name).copy_(self.part(name, tensor))
            twin = self.get_parameter(f"{name}_too")
            twin.copy_(self.part(name, tensor * 2 if name == "norm" else tensor))


class Asking(Half):
    """Looks at a value, so that its own code loads what it concerns."""

    def load_weights(self, pairs):
        for name, tensor in pairs:
            if name != "norm" or tensor.sum().item() > 0:
                self.get_parameter(name).copy_(self.part(name, tensor))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(64, 64))
        self.columns, self.head = nn.Parameter(torch.zeros(64, 1024)), self.rows
        self.narrow, self.norm = nn.Parameter(torch.zeros(64, 16)), nn.Parameter(torch.zeros(64))


@pytest.fixture(params=["files", "mapping", "iterator"])
def opened(request, tmp_path):
    """From tensors to an open source: one that gives any bytes, one that lies in memory, one that streams."""

    def put(tensors):
        if request.param == "iterator":
            return hw.from_iterator(iter(tensors.items()), hw.open(tensors).manifest)
        return hw.open(write_checkpoint(tmp_path, tensors) if request.param == "files" else tensors)

    return put


@pytest.fixture
def bars(monkeypatch):
    """Of each progress bar, how many bytes it is made for, and how far it came."""
    bars = []

    @contextmanager
    def recording(title, nbytes, *, show=None):
        bar = [nbytes, 0]
        bars.append(bar)

        def advance(count):
            bar[1] += count

        yield advance

    monkeypatch.setattr(load_module, "progress", recording)
    return bars


@pytest.mark.parametrize("kind", [Half, Twice, Asking])
def test_progress_reaches_its_end(kind, opened, bars):
    with opened(TENSORS) as source:
        report = hw.load(kind(), source)
    ((total, arrived),) = bars
    assert total == arrived == report.bytes_read


def test_the_model_itself_as_a_source(bars):
    """Its own code gets copies, since what it writes lies where it would read."""
    model = Asking()
    model.norm.fill_(1)
    report = hw.load(model, {**TENSORS, "norm": model.norm.data})
    assert report.fell_back
    ((total, arrived),) = bars
    assert total == arrived == report.bytes_read


def test_with_ties_too(opened, bars):
    with opened({**TENSORS, "head": TENSORS["rows"]}) as source:
        report = hw.load(Tied(), source)
    ((total, arrived),) = bars
    assert total == arrived == report.bytes_read


def test_an_error_says_how_much_of_the_slices_was_read(tmp_path):
    write_checkpoint(tmp_path, {"columns": TENSORS["columns"], "norm": TENSORS["norm"]})
    model = Half()
    del model.rows, model.narrow
    fault = hw.CheckpointError("injected")
    with hw.open(tmp_path) as source, pytest.raises(hw.CheckpointError, match="injected") as caught:
        hw.load(model, FailingSource(source, at=32, error=fault))
    assert "65.5 kB of 131.3 kB had been read into the model" in caught.value.__notes__[0]


@pytest.mark.parametrize("digests", [True, False])
def test_a_receiver_is_asked_for_slices(digests, bars, address):
    """Rows and long columns come alone; narrow columns with what lies between them."""
    model = Half()

    def take():
        with receiver(address) as source:
            return hw.load(model, source)

    taking = Thread(take)
    with sender(address, digests=digests) as sending:
        sent = sending.send(TENSORS, version=1)
    report = taking.result()
    nbytes = {name: model.part(name, tensor).nbytes for name, tensor in TENSORS.items()}
    nbytes["narrow"] = TENSORS["narrow"].nbytes - 32
    assert sent.nbytes == report.bytes_read == sum(nbytes.values())
    assert bars == [[sent.nbytes, sent.nbytes]]
    for name, tensor in TENSORS.items():
        assert torch.equal(model.get_parameter(name), model.part(name, tensor))


@pytest.mark.parametrize("kind", [Twice, Asking, Tied])
def test_what_else_takes_a_tensor_gets_it_whole(kind, bars, address):
    """A program, a second copy, the model's own code and a comparison see what they would see of a file."""
    ours, theirs = kind(), kind()
    tensors = TENSORS if kind is not Tied else {**TENSORS, "head": TENSORS["rows"]}

    def take():
        with receiver(address) as source:
            return hw.load(ours, source)

    taking = Thread(take)
    with sender(address) as sending:
        sent = sending.send(tensors, version=1)
    taking.result()
    assert bars == [[sent.nbytes, sent.nbytes]]
    hw.load(theirs, tensors)
    for name, tensor in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), tensor), name
