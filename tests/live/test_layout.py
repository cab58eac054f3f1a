"""Memory that several tensors share, over the whole model: found in one pass, journaled and written as one."""

import numpy
import pytest
import torch
import zoo
from torch import nn

import hotweights as hw
from hotweights.live.layout import MemoryLayout, Mirror
from hotweights.live.strategy import Journal, Staged
from hotweights.memory.host import host_copy

WAYS = ("journal", "staged", False)


def together(tensors):
    return sorted(sorted(group) for group in MemoryLayout(tensors).together())


def test_what_lies_together():
    base, array = torch.zeros(8, 8), numpy.zeros(16, dtype=numpy.float32)
    tensors = {
        "base": base,
        "tied": base.view(8, 8),
        "rows": base[2:4],
        "column": base[:, 3],
        "foreign": torch.from_numpy(array),
        "foreign again": torch.from_numpy(array[4:]),
        "frombuffer": torch.frombuffer(array, dtype=torch.float32)[3:5],
        "alone": torch.zeros(3),
    }
    assert together(tensors) == [
        ["alone"],
        ["base", "column", "rows", "tied"],
        ["foreign", "foreign again", "frombuffer"],
    ]


def test_neighbours_in_one_storage_do_not_overlap():
    base = torch.zeros(8)
    assert together({"a": base[:4], "b": base[4:]}) == [["a"], ["b"]]
    assert together({"a": base[:5], "b": base[4:]}) == [["a", "b"]]


def test_what_has_no_bytes_aliases_nothing():
    """Sizes, meta, uninitialised, sparse and wrapped ones are passed over."""
    base, meta = torch.zeros(4), torch.zeros(4, device="meta")
    spans = MemoryLayout(
        {
            "empty": base[:0],
            "inside": base[2:2],
            "meta": meta,
            "meta view": meta[1:],
            "lazy": nn.UninitializedParameter(),
            "sparse": torch.eye(2).to_sparse(),
            "base": base,
        }
    )
    assert list(spans.together()) == [["base"]]


def test_twenty_thousand_tensors_are_not_compared_in_pairs(monkeypatch):
    """Each is looked at a fixed number of times, also when all of them lie in one storage."""
    base = torch.zeros(20_000, 4)
    looked, data_ptr = [0], torch.Tensor.data_ptr

    def counted(tensor):
        looked[0] += 1
        return data_ptr(tensor)

    monkeypatch.setattr(torch.Tensor, "data_ptr", counted)
    for views in ([base[n] for n in range(20_000)], [base[n : n + 2] for n in range(20_000)]):
        looked[0] = 0
        spans = MemoryLayout({str(number): view for number, view in enumerate(views)})
        assert sum(1 for _ in spans.together()) in (20_000, 1)
        assert looked[0] <= 3 * 20_000


def test_a_mirror_overlaps_where_the_original_does():
    base = torch.arange(8.0)
    tensors = {"all": base, "some": base[2:6:2], "bits": base.view(torch.int32)[1:2]}
    mirror = Mirror(MemoryLayout(tensors), lambda nbytes, device: torch.zeros(nbytes, dtype=torch.uint8))
    mirror["all"].copy_(base)
    assert mirror["some"].tolist() == [2.0, 4.0]
    assert mirror["bits"].tolist() == base.view(torch.int32)[1:2].tolist()
    mirror["some"].fill_(9)
    assert mirror["all"].tolist() == [0, 1, 9, 3, 9, 5, 6, 7]
    assert mirror.nbytes <= 8 * 4 + 64


class Mixer(nn.Module):
    """As vLLM's MambaMixer2: the parent views its child's weight in a non-persistent buffer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Linear(3, 3, bias=False)
        self.register_buffer("conv_weights", self.conv.weight.data.view(9), persistent=False)
        self.register_buffer("constant", torch.tensor(0.0188), persistent=False)


def test_a_naive_reload_copies_garbage_over_the_weight():
    """Scratch for every tensor by itself, copied back by itself: a view of the weight overwrites it."""
    model = Mixer()
    scratch = {
        name: torch.full_like(one, torch.nan) for name, one in [*model.named_parameters(), *model.named_buffers()]
    }
    scratch["conv.weight"].fill_(1)
    with torch.no_grad():
        for name, one in [*model.named_parameters(), *model.named_buffers()]:
            one.copy_(scratch[name])
    assert model.conv.weight.isnan().all()
    assert model.constant.isnan()


@pytest.mark.parametrize("process", [None, lambda layer: None, zoo.process])
@pytest.mark.parametrize("atomic", WAYS)
def test_a_buffer_that_views_a_weight_stays_one(atomic, process):
    model = Mixer()
    live = hw.LiveModel(model, process=process, atomic=atomic)
    live.load({"conv.weight": torch.zeros(3, 3)})
    for value in (1.0, 2.0):
        live.update({"conv.weight": torch.full((3, 3), value)})
        assert model.conv.weight.tolist() == [[value] * 3] * 3
        assert model.conv_weights.data_ptr() == model.conv.weight.data_ptr()
        assert model.conv_weights.tolist() == [value] * 9
        assert list(model.state_dict()) == ["conv.weight"]
        assert float(model.constant) == pytest.approx(0.0188)


@pytest.mark.parametrize("way", [Journal, Staged])
def test_overlapping_tensors_come_back_together(way):
    """Saved one by one, the second would be saved when the first was written over."""
    memory = torch.arange(6.0)
    live = {"low": memory[:4], "high": memory[2:]}
    for commits in (False, True):
        found = way(live, Mirror(MemoryLayout(live), host_copy))
        found.deliver([("low", torch.full((4,), 7.0))])
        found.deliver([("high", torch.full((4,), 9.0))])
        found.commit() if commits else found.abort()
        assert memory.tolist() == ([7, 7, 9, 9, 9, 9] if commits else [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("process", [None, zoo.process])
@pytest.mark.parametrize("atomic", WAYS)
def test_a_persistent_buffer_that_views_a_weight(atomic, process):
    model = Mixer()
    model.register_buffer("conv_weights", model.conv_weights[:5], persistent=True)
    live = hw.LiveModel(model, process=process, atomic=atomic)
    live.load({"conv.weight": torch.zeros(3, 3)}, allow_missing="conv_weights")
    live.update({"conv.weight": torch.ones(3, 3)})
    assert model.conv_weights.tolist() == [1.0] * 5
    assert sorted(model.state_dict()) == ["conv.weight", "conv_weights"]


def test_a_naive_reload_processes_once_and_never_again():
    """A flag is left from the first time, and a square weight stays as the checkpoint has it."""
    spec = zoo.Spec((("Tied", "once", "nothing"),))
    model = zoo.cold(spec, 0)
    model.load_weights(zoo.checkpoint(spec, 1).items())
    zoo.process(model.tied0.embed)
    assert not torch.equal(model.tied0.embed.weight, zoo.cold(spec, 1).tied0.embed.weight)


def test_a_naive_reload_moves_addresses():
    """Processing replaces parameters."""
    spec = zoo.Spec((("Tied", "transpose", "nothing"),))
    model = zoo.cold(spec, 0)
    before = model.tied0.embed.weight  # Kept alive: its address cannot be given again.
    model.load_weights(zoo.checkpoint(spec, 1).items())
    zoo.process(model.tied0.embed)
    assert model.tied0.embed.weight.data_ptr() != before.data_ptr()


class Sliced(nn.Module):
    """Two ranks, each with its rows."""

    def __init__(self, rank):
        super().__init__()
        self.rank, self.weight = rank, zoo.parameter(2, 3)

    def load_weights(self, pairs):
        for _, one in pairs:
            self.weight.data.copy_(one.narrow(0, 2 * self.rank, 2))


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_gets_its_own_rows(rank):
    """Each row holds its own number, so a wrong row is seen."""
    model = Sliced(rank)
    live = hw.LiveModel(model, process=zoo.process)
    rows = torch.arange(4.0).view(4, 1).expand(4, 3).contiguous()
    live.load({"w": rows})
    report = live.update({"w": rows + 10})
    assert model.weight[:, 0].tolist() == [10 + 2 * rank, 11 + 2 * rank]
    assert report.bytes_read == model.weight.nbytes
    with live.begin() as update:
        update.feed({"w": rows + 20})
        update.commit()
    assert model.weight[:, 0].tolist() == [20 + 2 * rank, 21 + 2 * rank]
