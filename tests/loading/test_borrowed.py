"""Borrowed tensors that are kept, sorted, awaited, viewed, or copied late: first naive code, then ours."""

import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.loading import execute
from hotweights.sources import READERS
from hotweights.testing import Engine, ManualEvent, ReusedBuffer, assert_same_bits, engine_checkpoint, write_checkpoint

TENSORS = {f"{part}.{n}.weight": torch.full((8, 8), 10.0 * p + n) for p, part in enumerate("ab") for n in range(8)}
TENSORS = {name: TENSORS[name] for name in sorted(TENSORS, key=lambda name: name[2:])}  # parts in turn


@pytest.fixture(params=["iterator", "iterator without a manifest", *READERS])
def opened(request, tmp_path, monkeypatch):
    """From tensors to an open source of them, which reuses its memory where it can."""
    monkeypatch.setenv("RUNAI_STREAMER_MEMORY_LIMIT", "0")

    def put(tensors):
        if request.param == "iterator":
            return hw.from_iterator(ReusedBuffer(tensors), hw.open(tensors).manifest)
        if request.param == "iterator without a manifest":
            return hw.from_iterator(iter(ReusedBuffer(tensors)))
        if request.param == "torch":
            torch.save(tensors, tmp_path / "pytorch_model.bin")
        else:
            write_checkpoint(tmp_path, tensors, shards=2)
        return hw.open(tmp_path, reader=request.param)

    return put


class Sorting(nn.Module):
    """Sorts the stream by component before it loads any."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(8)) for _ in "ab")

    def load_weights(self, pairs):
        parts = defaultdict(list)
        for name, tensor in pairs:
            parts[name.partition(".")[0]].append((name, tensor))
        parameters = dict(self.named_parameters())
        for name, tensor in [*parts["b"], *parts["a"]]:
            parameters[name].data.copy_(tensor)


class Scaled(nn.Module):
    """Holds each weight until its scale has come, then writes their product."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))

    def load_weights(self, pairs):
        waiting = {}
        for name, tensor in pairs:
            waiting[name] = tensor
            weight = name.removesuffix("_scale")
            if weight in waiting and f"{weight}_scale" in waiting:
                scaled = waiting.pop(weight).float() * waiting.pop(f"{weight}_scale")
                self.get_parameter(weight).data.copy_(scaled)


class Pooled(nn.Module):
    """Copies in threads that begin when the stream has ended."""

    def __init__(self):
        super().__init__()
        self.layers = Sorting()

    def load_weights(self, pairs):
        parameters, begin = dict(self.layers.named_parameters()), threading.Event()

        def copy(name, tensor):
            assert begin.wait(30)
            parameters[name].data.copy_(tensor)

        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(copy, name, tensor) for name, tensor in pairs]
            begin.set()
            for future in futures:
                future.result()


def scaled_checkpoint():
    weights = {f"layers.{n}.weight": torch.randn(4, 4).to(torch.float8_e4m3fn) for n in range(3)}
    return weights | {f"layers.{n}.weight_scale": torch.tensor([n + 0.5]) for n in reversed(range(3))}


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


LOADERS = {"sorts": (Sorting, TENSORS), "waits": (Scaled, scaled_checkpoint()), "pools": (Pooled, TENSORS)}
LOADERS["engine"] = (Engine, engine_checkpoint())


@pytest.fixture(params=LOADERS)
def loader(request):
    """A model that keeps what it is given, a checkpoint for it, and what it becomes."""
    make, tensors = LOADERS[request.param]
    expected = make()
    expected.load_weights(tensors.items())
    return make, tensors, state(expected)


class TestKept:
    """Code that keeps tensors longer than they live."""

    def test_a_dictionary(self, opened):
        naive = dict(ReusedBuffer(TENSORS))
        assert len({tensor.data_ptr() for tensor in naive.values()}) == 1
        assert all(tensor.isnan().all() for tensor in naive.values())
        with opened(TENSORS) as source:
            kept = dict(source.tensors())
        assert len({tensor.data_ptr() for tensor in kept.values()}) == len(TENSORS)
        assert_same_bits(kept, TENSORS)

    def test_the_naive_way_bites(self, loader):
        make, tensors, expected = loader
        model = make()
        model.load_weights(ReusedBuffer(tensors))
        with pytest.raises(AssertionError, match="other bytes"):
            assert_same_bits(state(model), expected)

    def test_its_own_code_with_owned_tensors(self, loader, opened):
        make, tensors, expected = loader
        model = make()
        with opened(tensors) as source:
            model.load_weights(source.tensors())
        assert_same_bits(state(model), expected)

    def test_planned(self, loader, opened):
        make, tensors, expected = loader
        model = make()
        with opened(tensors) as source:
            hw.load(model, source, allow_unexpected="*")
        assert_same_bits(state(model), expected)

    def test_a_weight_and_its_scale_are_one_step(self):
        tensors = scaled_checkpoint()
        with hw.from_iterator(ReusedBuffer(tensors), hw.open(tensors).manifest) as source:
            report = hw.load(Scaled(), source)
        assert report.steps["programs"] == 3
        assert not report.fell_back


class TestViews:
    """A callback keeps a view of what it was given, and the next tensor overwrites it."""

    def test_a_trap_names_the_tensor(self, opened):
        kept = {}
        with opened(TENSORS) as source, source.leases(guard="trap") as stream:
            for lease in stream:
                kept[lease.name] = lease, lease.tensor[2:].t()
        for name, (lease, view) in kept.items():
            if lease.borrowed:
                with pytest.raises(hw.StaleLease, match=name):
                    view.sum()
            else:
                assert torch.equal(view, TENSORS[name][2:].t())

    def test_owning_is_safe(self, opened):
        with opened(TENSORS) as source, source.leases() as stream:
            kept = {lease.name: lease.own()[2:].t() for lease in stream}
        assert_same_bits(kept, {name: tensor[2:].t() for name, tensor in TENSORS.items()})

    def test_which_readers_lend(self, tmp_path, monkeypatch):
        monkeypatch.setenv("RUNAI_STREAMER_MEMORY_LIMIT", "0")
        write_checkpoint(tmp_path, TENSORS)
        torch.save(TENSORS, tmp_path / "pytorch_model.bin")
        lending = set()
        for reader in READERS:
            with hw.open(tmp_path, reader=reader) as source, source.leases() as stream:
                lending |= {reader for lease in stream if lease.borrowed}
        assert lending == {"runai", "fastsafetensors"}


class TestLateCopies:
    """The copy to the device still runs when the iterator advances."""

    def test_ours_waits_for_the_device(self, monkeypatch):
        """The copies that ``load`` queues are done only when the device says so, on another thread."""
        queued, events = [], []

        def record(devices):
            events.append(Counted())
            return events[-1]

        class Counted(ManualEvent):
            def query(self):
                if not super().query():
                    queued.append(self)
                    self.happen()
                    return False
                return True

        given = []

        def pairs():
            for name, tensor in ReusedBuffer(TENSORS):
                assert all(event in queued for event in events), "advanced before the copy was done"
                given.append(name)
                yield name, tensor

        monkeypatch.setattr(execute, "record_events", record)
        model = Sorting()
        with hw.from_iterator(pairs(), hw.open(TENSORS).manifest) as source:
            hw.load(model, source)
        assert given == list(TENSORS)
        assert len(events) == len(queued) == len(TENSORS)
        assert_same_bits(state(model), TENSORS)


class TestLoading:
    """``load`` from an iterator, with a manifest and without."""

    def test_a_misfit_is_found_before_a_tensor_comes(self):
        given = []

        def pairs():
            for pair in TENSORS.items():
                given.append(pair)
                yield pair

        tensors = {**TENSORS, "stranger": torch.ones(1)}
        with (
            hw.from_iterator(pairs(), hw.open(tensors).manifest) as source,
            pytest.raises(hw.PlanError, match="stranger"),
        ):
            hw.load(nn.ModuleDict(Sorting().named_children()), source)
        assert not given

    def test_without_a_manifest_before_one_is_written(self):
        model = nn.ModuleDict(Sorting().named_children())
        before = state(model)
        with (
            hw.from_iterator(ReusedBuffer({**TENSORS, "stranger": torch.ones(1)})) as source,
            pytest.raises(hw.PlanError, match="stranger"),
        ):
            hw.load(model, source)
        assert_same_bits(state(model), before)

    def test_what_it_collects_is_counted(self):
        nbytes = sum(tensor.nbytes for tensor in TENSORS.values())
        for manifest, scratch in ((None, nbytes), (hw.open(TENSORS).manifest, 0)):
            with hw.from_iterator(ReusedBuffer(TENSORS), manifest) as source:
                report = hw.load(nn.ModuleDict(Sorting().named_children()), source)
            assert report.peak_scratch_bytes == scratch

    def test_a_promise_that_breaks_says_what_was_written(self):
        model = nn.ModuleDict(Sorting().named_children())
        pairs = [pair for pair in TENSORS.items() if pair[0] != "b.7.weight"]
        with (
            hw.from_iterator(iter(pairs), hw.open(TENSORS).manifest) as source,
            pytest.raises(hw.SourceError, match=r"b\.7\.weight") as caught,
        ):
            hw.load(model, source)
        assert "may hold tensors of both versions" in caught.value.__notes__[0]

    def test_an_error_of_the_iterator(self):
        def pairs():
            yield from list(TENSORS.items())[:3]
            raise ConnectionError("the trainer is gone")

        for manifest in (None, hw.open(TENSORS).manifest):
            with (
                hw.from_iterator(pairs(), manifest) as source,
                pytest.raises(ConnectionError, match="the trainer is gone"),
            ):
                hw.load(Sorting(), source)

    def test_streamed_before(self):
        with hw.from_iterator(iter(TENSORS.items()), hw.open(TENSORS).manifest) as source:
            hw.load(Sorting(), source)
            with pytest.raises(hw.UsageError, match="once"):
                hw.load(Sorting(), source)
