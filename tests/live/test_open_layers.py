"""Open layers: accounting, the one warning, waiting on the host, memory_limit. Here CPU memory counts as a device's."""

import logging

import pytest
import torch
import zoo
from torch import nn

import hotweights as hw
from hotweights.live import open_layers
from hotweights.memory import host
from hotweights.testing import assert_same_bits, write_checkpoint

LAYERS = 4
SIDE = 8
LAYER_NBYTES = 2 * SIDE * SIDE * 4


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = zoo.parameter(SIDE, SIDE)
        self.two = zoo.parameter(SIDE, SIDE)


def stack():
    return nn.Sequential(*(Layer() for _ in range(LAYERS)))


def weights(seed=0):
    made = torch.Generator().manual_seed(seed)
    return {f"{n}.{key}": torch.rand((SIDE, SIDE), generator=made) for n in range(LAYERS) for key in ("one", "two")}


def round_robin(tensors):
    """First one tensor of each layer, then the other of each: all are half open."""
    return {name: tensors[name] for name in sorted(tensors, key=lambda name: name.rpartition(".")[2])}


@pytest.fixture
def on_device(monkeypatch):
    monkeypatch.setattr(open_layers, "is_device", lambda device: device.type == "cpu")


def live_model(**options):
    model = stack()
    live = hw.LiveModel(model, process=lambda layer: None, **options)
    live.load(weights())
    return model, live


def tracked(update):
    return update._attempt._layers


def push(live, tensors):
    with live.begin() as update:
        update.feed(tensors)
        report = update.commit()
    assert len(tracked(update)) == 0
    return report


def test_what_a_device_is():
    """One function says it, and tests replace it."""
    kinds = {name: open_layers.is_device(torch.device(name)) for name in ("cpu", "meta", "cuda:0", "xpu", "mps")}
    assert kinds == {"cpu": False, "meta": False, "cuda:0": True, "xpu": True, "mps": True}


def test_round_robin_warns_once(on_device, caplog):
    """Weights that come tensor by tensor over all layers hold every layer twice: vllm#40309."""
    model, live = live_model()
    with caplog.at_level(logging.WARNING, "hotweights"):
        report = push(live, round_robin(weights(1)))
        assert_same_bits(dict(model.named_parameters()), weights(1))
        again = push(live, round_robin(weights(2)))
        assert_same_bits(dict(model.named_parameters()), weights(2))
    (record,) = caplog.records
    assert record.getMessage() == report.warnings[-1]
    assert "2 layers are open at once and hold 0.0 MB of device memory: 0, 1;" in record.getMessage()
    assert not again.warnings
    assert (report.open_layers, report.open_bytes) == (LAYERS, LAYERS * LAYER_NBYTES)


def test_names_in_the_warning_are_sorted_and_its_megabytes_right():
    layers = open_layers.OpenLayers(None)
    layers.open("b", ["model.b"], 3_000_000)
    assert not layers.warning
    layers.open("a", ["model.a"], 2_500_000)
    assert layers.warning.startswith("2 layers are open at once and hold 5.5 MB of device memory: model.a, model.b;")


def test_layer_order_keeps_one_open(on_device, caplog):
    _, live = live_model(memory_limit=LAYER_NBYTES)
    report = push(live, weights(1))
    assert (report.open_layers, report.open_bytes) == (1, LAYER_NBYTES)
    assert not report.warnings
    assert not caplog.records


def test_addressed_sources_never_have_two_open(on_device, tmp_path):
    model, live = live_model(memory_limit=LAYER_NBYTES)
    for source in (round_robin(weights(1)), write_checkpoint(tmp_path, round_robin(weights(1)), shards=3)):
        report = live.update(source)
        assert_same_bits(dict(model.named_parameters()), weights(1))
        assert (report.open_layers, report.open_bytes) == (1, LAYER_NBYTES)
        assert report.peak_scratch_bytes == LAYER_NBYTES
        assert not report.warnings


@pytest.mark.parametrize("atomic", ["journal", "staged", False])
@pytest.mark.parametrize("room", [1, 2, 3])
def test_over_the_limit_tensors_wait_on_the_host(on_device, room, atomic):
    model, live = live_model(memory_limit=room * LAYER_NBYTES, atomic=atomic)
    report = push(live, round_robin(weights(1)))
    assert_same_bits(dict(model.named_parameters()), weights(1))
    assert report.open_bytes == room * LAYER_NBYTES
    assert report.peak_host_bytes >= (LAYERS - room) * LAYER_NBYTES // 2


def test_a_layer_over_the_limit_aborts(on_device):
    model, live = live_model(memory_limit=LAYER_NBYTES - 1)
    with live.begin() as update, pytest.raises(hw.UpdateAborted, match="memory_limit"):
        update.feed(weights(1))
    assert len(tracked(update)) == 0
    assert_same_bits(dict(model.named_parameters()), weights(0))
    assert live.state is hw.State.SERVING


def test_a_host_without_room_aborts(on_device, monkeypatch):
    model, live = live_model(memory_limit=LAYER_NBYTES)
    push(live, weights(1))
    monkeypatch.setattr(host, "host_available", lambda: 0)
    with live.begin() as update, pytest.raises(hw.UpdateAborted, match="the host has"):
        update.feed(round_robin(weights(2)))
    assert_same_bits(dict(model.named_parameters()), weights(1))


def test_a_host_without_room_for_the_copy_is_told_first(monkeypatch):
    model, live = live_model()
    monkeypatch.setattr(host, "host_available", lambda: LAYERS * LAYER_NBYTES - 1)
    with pytest.raises(hw.UpdateAborted, match="keeps a copy of the model on the host"):
        live.update(weights(1))
    assert_same_bits(dict(model.named_parameters()), weights(0))
    live.update(weights(1), atomic=False)
    assert_same_bits(dict(model.named_parameters()), weights(1))


def test_deferred_layers_do_not_count(on_device, caplog):
    model, live = live_model(deferred=["1", "2", "3"], memory_limit=LAYER_NBYTES)
    report = push(live, round_robin(weights(1)))
    assert_same_bits(dict(model.named_parameters()), weights(1))
    assert (report.open_layers, report.open_bytes, report.peak_host_bytes) == (1, LAYER_NBYTES, 0)
    assert not caplog.records


def test_tracking_is_empty_after_an_abort(on_device):
    _, live = live_model()
    with live.begin() as update:
        update.feed(list(round_robin(weights(1)).items())[:LAYERS])
        assert len(tracked(update)) == LAYERS
    assert len(tracked(update)) == 0
    assert tracked(update).nbytes == 0


def test_a_first_load_opens_nothing(on_device):
    """It fills the model itself, whatever the order."""
    model = stack()
    live = hw.LiveModel(model, process=lambda layer: None, memory_limit=1)
    tensors = round_robin(weights())
    live.load(hw.from_iterator(tensors.items(), manifest=hw.open(tensors).manifest))
    assert_same_bits(dict(model.named_parameters()), weights())
