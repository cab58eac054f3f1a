"""Order on a device: nobody writes over what it still reads, nobody reads what does not lie there yet.

The device is late, see ``late_device``. Each test fails where one wait in the code is taken out.
"""

import random
import threading
from contextlib import contextmanager

import pytest
import torch
from dcp_saved import InParts, save_dcp
from ends import receiver, sender
from late_device import DEVICE, LateDevice, held, of_host, put
from torch import nn

import hotweights as hw
from hotweights.memory.devices import wait
from hotweights.sources.streams import LeaseStream
from hotweights.testing import (
    FailingSource,
    Processed,
    ReusedBuffer,
    assert_same_bits,
    processed_checkpoint,
    write_checkpoint,
)

ROWS, WIDTH, COUNT = 16, 512, 6  # Each weight takes most of a slot below.
SLOT = 9 * 4096
WAYS = ("staged", "journal", False)


@pytest.fixture(params=[0, 1], ids="seed {}".format)
def device(request, monkeypatch):
    with LateDevice(request.param).installed(monkeypatch) as device:
        yield device


@pytest.fixture(params=["default", "own"])
def stream(request, device):
    """The stream of the test's thread: other threads of ours begin on the default one."""
    if request.param == "default":
        yield
    else:
        with device.another_stream():
            yield


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, ROWS) for _ in range(COUNT))
        self.requires_grad_(False)


def weights(seed):
    made = torch.Generator().manual_seed(seed)
    return {name: torch.rand(tensor.shape, generator=made) for name, tensor in Stack().state_dict().items()}


def model(seed=0):
    model = Stack()
    model.load_state_dict(weights(seed))
    return model._apply(put)


def holds(model, expected):
    """What a thread sees that uses the model on its stream."""
    assert_same_bits({name: tensor.cpu() for name, tensor in model.state_dict().items()}, expected)


def lies_there(model, expected):
    """What anybody sees."""
    assert_same_bits({name: held(tensor) for name, tensor in model.state_dict().items()}, expected)


def pool(device="cpu"):
    return hw.Pool(2, SLOT, device=device)


def overwrite(tensors):
    for tensor in tensors.values():
        tensor.fill_(-1)


def reused(tensors, on_device):
    """Pairs in memory that is filled again at once, by somebody who knows nothing of streams."""
    if not on_device:
        yield from ReusedBuffer(tensors)
        return
    memory = put(torch.zeros(max(tensor.nbytes for tensor in tensors.values()), dtype=torch.uint8))
    for name, tensor in tensors.items():
        lent = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        of_host(lent).copy_(tensor)
        try:
            yield name, lent
        finally:
            of_host(memory).fill_(0xFF)


# The device itself.


def test_a_copy_is_late(monkeypatch):
    with LateDevice(0).installed(monkeypatch) as device:
        source, target = torch.ones(4), put(torch.zeros(4))
        target.copy_(source, non_blocking=True)
        assert held(target).tolist() == [0] * 4  # Who looks too early reads old bytes.
        source.fill_(2)  # Who writes to the source too early has other bytes copied.
        device.synchronize(DEVICE)
        assert held(target).tolist() == [2] * 4
        target.copy_(torch.ones(4))
        assert held(target).tolist() == [1] * 4
        target.copy_(put(torch.zeros(4)))  # On a device nobody waits for a copy.
        assert held(target).tolist() == [1] * 4
        assert (target + 1).cpu().tolist() == [1] * 4


def test_a_stream_is_in_order_and_two_are_not(monkeypatch):
    with LateDevice(0).installed(monkeypatch) as device:
        target = put(torch.zeros(4))
        target.copy_(torch.ones(4), non_blocking=True)
        target.copy_(torch.full((4,), 2.0), non_blocking=True)
        with device.another_stream():
            target.copy_(torch.full((4,), 3.0), non_blocking=True)
            torch.accelerator.current_stream(DEVICE).synchronize()
        assert held(target).tolist() == [3] * 4
        torch.accelerator.current_stream(DEVICE).synchronize()
        assert held(target).tolist() == [2] * 4


def test_an_event_happens_in_the_end(device):
    target = put(torch.zeros(4))
    target.copy_(torch.ones(4), non_blocking=True)
    event = torch.Event(device=DEVICE)
    event.record(torch.accelerator.current_stream(DEVICE))
    target.copy_(torch.zeros(4), non_blocking=True)
    assert wait(event.query, 10.0)
    device.synchronize(DEVICE)
    assert held(target).tolist() == [0] * 4


# Loading.


@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_a_slot_is_filled_again_when_it_was_read(device, stream, tmp_path, io):
    loaded, source = model(), write_checkpoint(tmp_path, weights(1), shards=2)
    for tensor in loaded.parameters():
        tensor.copy_(put(torch.full(tensor.shape, -1.0)))  # What the caller has queued comes before.
    with pool(DEVICE) as slots:
        hw.load(loaded, source, pool=slots, io=io, threads=3)
    holds(loaded, weights(1))


def test_a_slot_in_which_parts_were_joined_is_filled_again_when_it_was_read(device, stream, tmp_path):
    save_dcp(tmp_path / "dcp", {name: InParts(one, [[7], [100]][: one.dim()]) for name, one in weights(1).items()})
    with pool(DEVICE) as slots:
        hw.load(loaded := model(), tmp_path / "dcp", pool=slots, threads=3)
    holds(loaded, weights(1))


def test_our_own_pool_is_page_locked(device, tmp_path):
    source = write_checkpoint(tmp_path, weights(1))
    hw.load(made := model(), source)
    assert device.pinned
    live, device.pinned = hw.LiveModel(made), 0
    live.load(source)
    assert device.pinned
    lies_there(made, weights(1))


def test_a_mapping_may_change_after_a_load(device, stream):
    loaded, given = model(), weights(1)
    hw.load(loaded, given)
    overwrite(given)
    lies_there(loaded, weights(1))


@pytest.mark.parametrize("on_device", [False, True])
def test_an_iterator_advances_when_its_tensor_was_read(device, stream, on_device):
    loaded, manifest = model(), hw.open(weights(1)).manifest
    with hw.from_iterator(reused(weights(1), on_device), manifest) as source:
        hw.load(loaded, source)
    holds(loaded, weights(1))
    with hw.from_iterator(reused(weights(1), on_device), manifest) as source:
        kept = dict(source.tensors())
    assert_same_bits({name: tensor.cpu() for name, tensor in kept.items()}, weights(1))


@pytest.mark.parametrize("ordered", [False, True])
def test_what_comes_to_the_host_is_there(device, stream, ordered):
    loaded, given = Stack(), {name: put(tensor) for name, tensor in weights(1).items()}
    with hw.from_iterator(given.items(), hw.open(given).manifest) if ordered else hw.open(given) as source:
        hw.load(loaded, source)
    assert_same_bits(loaded.state_dict(), weights(1))


@pytest.mark.parametrize("on_device", [False, True])
def test_a_component_keeps_what_it_is_given(device, stream, on_device):
    kept = {}
    component = hw.Component("", kept.update)
    hw.route(reused(weights(1), on_device), [component])
    assert_same_bits({name: tensor.cpu() for name, tensor in kept.items()}, weights(1))


class LendingSource:
    """A stream of leases on one piece of the device's memory, which is used again when the lease's event says so."""

    def __init__(self, tensors):
        self.manifest, self._tensors = hw.open(tensors).manifest, tensors

    def leases(self, *, guard="off"):
        return LeaseStream(self._lent())

    def _lent(self):
        pairs = reused(self._tensors, on_device=True)
        for name, tensor in pairs:
            lease = hw.Lease(self.manifest[name], tensor=tensor)
            yield lease
            lease.release()
            assert wait(lambda lease=lease: not lease.pending(), 10.0)

    def tensors(self):
        raise NotImplementedError

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class Late(nn.Module):
    """Needs two tensors for one weight: the first waits for the second. What looks at values cannot be planned."""

    def __init__(self, *, looks):
        super().__init__()
        self.weight = nn.Parameter(put(torch.zeros(ROWS, WIDTH)), requires_grad=False)
        self._looks = looks

    def load_weights(self, pairs):
        first = None
        for _, tensor in pairs:
            if self._looks and not tensor.isfinite().all():
                raise ValueError("not finite")
            if first is None:
                first = tensor
            else:
                self.weight.copy_(first.to(DEVICE) + tensor.to(DEVICE))


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("way", ["load", "update", "route"])
def test_a_lease_of_device_memory_ends_when_its_copy_is_made(device, stream, way, looks):
    tensors = {"a": torch.rand(ROWS, WIDTH), "b": torch.rand(ROWS, WIDTH)}
    expected = tensors["a"] + tensors["b"]
    loaded = Late(looks=looks)
    if way == "load":
        hw.load(loaded, LendingSource(tensors))
    elif way == "update":
        live = hw.LiveModel(loaded)
        live.load({name: torch.zeros(ROWS, WIDTH) for name in tensors})
        live.update(LendingSource(tensors))
    else:
        hw.route(LendingSource(tensors), [hw.Component("", loaded.load_weights)])
    assert torch.equal(loaded.weight.cpu(), expected)


# Live models.


@contextmanager
def in_flight(device, live, model):
    """A reader whose forward pass runs on a stream of its own; it has left ``serving()``, and is late."""
    before = {name: held(tensor) for name, tensor in model.state_dict().items()}
    out = {}

    def read():
        with device.another_stream(), live.serving():
            out.update({name: tensor.clone() for name, tensor in model.state_dict().items()})

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    yield
    device.synchronize(DEVICE)
    assert_same_bits({name: held(tensor) for name, tensor in out.items()}, before)


def live_model(**options):
    made = model(9)
    live = hw.LiveModel(made, **options)
    live.load(weights(0))
    lies_there(made, weights(0))
    return made, live


def by_files(live, tensors, directory):
    source = write_checkpoint(directory, tensors, shards=2)
    with hw.Pool(2, SLOT, device=DEVICE) as slots:
        live.update(source, pool=slots, threads=3)


def by_mapping(live, tensors, directory):
    live.update(given := {name: tensor.clone() for name, tensor in tensors.items()})
    overwrite(given)


def by_stream(live, tensors, directory):
    with hw.from_iterator(reused(tensors, on_device=False), hw.open(tensors).manifest) as source:
        live.update(source)


def by_stream_of_the_device(live, tensors, directory):
    with hw.from_iterator(reused(tensors, on_device=True), hw.open(tensors).manifest) as source:
        live.update(source)


def by_pushes(live, tensors, directory):
    with live.begin() as update:
        update.feed(reused(tensors, on_device=False))
        update.commit()


def by_pushes_of_the_device(live, tensors, directory):
    with live.begin() as update:
        update.feed(reused(tensors, on_device=True))
        update.commit()


ROADS = [by_files, by_mapping, by_stream, by_stream_of_the_device, by_pushes, by_pushes_of_the_device]


@pytest.mark.parametrize("atomic", WAYS)
@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__)
def test_an_update_is_between_what_others_read(device, stream, tmp_path, road, atomic):
    made, live = live_model(atomic=atomic)
    with in_flight(device, live, made):
        road(live, weights(1), tmp_path)
        lies_there(made, weights(1))


def shifted(layer):
    if isinstance(layer, nn.Linear):
        layer.weight = nn.Parameter(layer.weight.flip(0).contiguous(), requires_grad=False)


@pytest.mark.parametrize("atomic", WAYS)
@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__)
def test_processing_sees_what_came(device, stream, tmp_path, road, atomic):
    made = model(9)
    live = hw.LiveModel(made, process=shifted, layers=lambda layer: isinstance(layer, nn.Linear), atomic=atomic)
    live.load(weights(0))
    road(live, weights(1), tmp_path)
    lies_there(made, {name: new.flip(0) if "weight" in name else new for name, new in weights(1).items()})


@pytest.mark.parametrize("atomic", ["staged", "journal"])
def test_an_abort_after_some_copies(device, stream, tmp_path, atomic):
    made, live = live_model(atomic=atomic)
    with in_flight(device, live, made):
        source = FailingSource(hw.open(write_checkpoint(tmp_path, weights(1))), at=5, error=OSError("gone"))
        with source, pool(DEVICE) as slots, pytest.raises(hw.UpdateAborted, match="gone"):
            live.update(source, pool=slots)
        lies_there(made, weights(0))
    device.synchronize(DEVICE)
    lies_there(made, weights(0))


@pytest.mark.parametrize("atomic", ["staged", "journal"])
def test_a_check_and_a_rollback_are_between_what_others_read(device, stream, atomic):
    made, live = live_model(atomic=atomic, keep_previous=True)

    def check(model):
        lies_there(model, weights(1))
        return False

    with in_flight(device, live, made), pytest.raises(hw.UpdateAborted):
        live.update(weights(1), check=check)
    lies_there(made, weights(0))
    live.update(weights(1))
    live.update(weights(0))
    with in_flight(device, live, made):
        live.rollback()
        lies_there(made, weights(1))


def test_a_model_whose_layers_read_each_other(device, stream, tmp_path):
    kinds = ["transposed", "once only", "attention"]
    on_host, made = Processed(kinds), Processed(kinds)
    made._apply(put)
    for number, checkpoint in enumerate(processed_checkpoint(kinds, seed=seed) for seed in range(3)):
        digests = []
        for each in (on_host, made):
            if number == 0:
                each.live = hw.LiveModel(each, deferred=each.deferred)
                each.live.load(checkpoint, allow_missing=each.allow_missing)
            else:
                each.live.update(write_checkpoint(tmp_path / str(number), checkpoint))
            digests.append(each.live.digest())
        assert digests[0] == digests[1]


# Transfers.


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize("way", ["load", "update"])
def test_a_slot_of_a_sender_goes_back_when_it_was_read(device, stream, tmp_path, way, digests):
    address = f"unix:{tmp_path}/s"
    made = model()
    live = hw.LiveModel(made, atomic="journal")
    if way == "update":
        live.load(weights(0))
    with sender(address, slot_nbytes=SLOT, digests=digests) as sending, receiver(address) as receiving:
        thread = threading.Thread(target=sending.send, args=(weights(1),), kwargs={"version": 1})
        thread.start()
        if way == "load":
            hw.load(made, receiving)
        else:
            live.update(receiving)
        thread.join()
    holds(made, weights(1))


def test_a_trainer_sends_what_it_has_queued(device, tmp_path):
    address, trainer = f"unix:{tmp_path}/s", {name: put(tensor) for name, tensor in weights(0).items()}
    into = Stack()
    with sender(address) as sending, receiver(address) as receiving, device.another_stream():
        for name, tensor in weights(1).items():
            trainer[name].copy_(put(tensor))  # The last step of the optimizer.
        handle = sending.send(trainer, version=1, wait=False)
        hw.load(into, receiving)
        handle.result()
    assert_same_bits(into.state_dict(), weights(1))


# Any model.

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)


class Mixed(nn.Module):
    """Tensors of any dtype and shape, some of them no block of memory."""

    def __init__(self, draw):
        super().__init__()
        for number in range(draw.randrange(3, 12)):
            shape = [draw.randrange(1, 90) for _ in range(draw.randrange(0, 3))]
            tensor = torch.zeros(shape).to(draw.choice(DTYPES))
            self.register_buffer(f"t{number}", tensor.t() if len(shape) == 2 and draw.random() < 0.3 else tensor)

    def weights(self, seed):
        made = torch.Generator().manual_seed(seed)
        return {
            name: (torch.rand(tensor.shape, generator=made) * 100).to(tensor.dtype)
            for name, tensor in self.state_dict().items()
        }


@pytest.mark.parametrize("seed", range(12))
def test_any_model_by_any_road_is_what_it_is_on_a_host(seed, monkeypatch, tmp_path):
    draw = random.Random(seed)
    with LateDevice(seed).installed(monkeypatch) as device, device.another_stream():
        made = Mixed(draw)
        versions = [made.weights(number) for number in range(3)]
        made._apply(put)
        live = hw.LiveModel(made, atomic=draw.choice(WAYS))
        hw.load(made, write_checkpoint(tmp_path / "0", versions[0]))
        lies_there(made, versions[0])
        live.load(versions[1])
        lies_there(made, versions[1])
        for number in range(4):
            version = draw.choice(versions)
            pairs = [*version.items()]
            draw.shuffle(pairs)
            with in_flight(device, live, made):
                draw.choice(ROADS)(live, dict(pairs), tmp_path / f"update {number}")
                lies_there(made, version)
