"""DTensors as targets and as sources: FSDP2, tensor parallel, both together; each rank its own slices."""

import pytest
import torch
from ranks import on_ranks, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import hotweights as hw
from hotweights.testing import write_checkpoint


class Net(nn.Module):
    """Even and uneven tensors, a scalar, a buffer, tied weights, and tensors with fewer rows than ranks."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(10, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)
        self.odd = nn.Linear(8, 5)
        self.one = nn.Parameter(torch.randn(1, 3))
        self.register_buffer("steps", torch.randn(3))
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        hidden = self.down(torch.relu(self.up(self.embed(ids))))
        return self.head(hidden).sum() + self.odd(hidden).sum() + self.one.sum()


def fsdp(count=2, **options):
    model = Net()
    mesh = init_device_mesh("cpu", (count,))
    fully_shard(model.up, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def same(model, wanted):
    """Whether the model holds these tensors; all ranks must ask."""
    held = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    assert held.keys() == wanted.keys()
    return all(torch.equal(held[name], wanted[name].detach()) for name in wanted)


def addresses(model):
    return {name: whole_or_local(tensor).data_ptr() for name, tensor in model.state_dict().items()}


def whole_or_local(tensor):
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def _loads_a_full_checkpoint(rank, path):
    model = fsdp()
    before = addresses(model)
    with hw.open(path) as source:
        full = source.manifest.nbytes
        report = hw.load(model, source)
    assert same(model, Net(seed=1).state_dict())
    assert addresses(model) == before
    assert hw.load(model, path).bytes_read == report.bytes_read  # from the plan that was kept
    return (
        report.bytes_read,
        report.bytes_written,
        full,
        sum(map(nbytes_here, model.state_dict(keep_vars=True).values())),
    )


def nbytes_here(tensor):
    return whole_or_local(tensor).nbytes


def test_fsdp2_reads_only_its_slices_of_a_full_checkpoint(tmp_path):
    tensors = {name: tensor for name, tensor in Net(seed=1).state_dict().items() if name != "head.weight"}
    path = write_checkpoint(tmp_path / "full", tensors)
    ranks = on_ranks(tmp_path, _loads_a_full_checkpoint, path)
    tied = 10 * 8 * 4
    for read, written, full, here in ranks:
        assert read == written < full
        assert here - tied // 2 == written  # of the tied weights half, once
    assert sum(written for _, written, _, _ in ranks) == ranks[0][2] + 3 * 4  # The buffer is everybody's.


def _takes_its_own_state(rank, path):
    trained, model = fsdp(), fsdp()
    hw.load(trained, path)
    report = hw.load(model, trained)  # parts from parts: nothing is gathered
    assert same(model, Net(seed=1).state_dict())
    assert report.bytes_written == report.bytes_read
    other = Net(seed=2).state_dict()
    with hw.from_iterator(other.items(), hw.open(other).manifest) as pairs:
        hw.load(model, pairs)
    assert same(model, other)
    with hw.from_iterator(other.items()) as pairs:
        hw.LiveModel(trained).load(pairs)
    assert same(trained, other)
    hw.load(trained, path)
    hw.load(model, trained)
    hw.load(model, model.state_dict())  # from its own memory
    assert same(model, Net(seed=1).state_dict())
    return "done"


def test_a_sharded_model_takes_the_state_of_one_that_is_sharded_alike(tmp_path):
    path = write_checkpoint(tmp_path / "full", Net(seed=1).state_dict())
    assert on_ranks(tmp_path, _takes_its_own_state, path) == ["done"] * 2


def _refuses_other_parts(rank):
    mesh = init_device_mesh("cpu", (2,))
    full = torch.arange(32.0).view(8, 4)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 8, bias=False))
    nn.init.zeros_(model[0].weight)
    by_rows = distribute_tensor(full, mesh, [Shard(0)])
    state = {"0.weight": torch.ones(4, 4), "1.weight": by_rows}
    with pytest.raises(hw.PlanError, match=r"1\.weight: the source holds a part of it.*gather=True"):
        hw.load(model, state)
    by_columns = nn.Parameter(distribute_tensor(torch.zeros(8, 4), mesh, [Shard(1)]))
    model[1].weight = by_columns
    with pytest.raises(hw.PlanError, match=r"Shard\(dim=1\).*the source.*Shard\(dim=0\).*gather=True"):
        hw.load(model, state)
    with pytest.raises(hw.PlanError, match="shape"):  # Whole shapes are compared.
        hw.load(model, {"0.weight": torch.ones(4, 4), "1.weight": torch.ones(4, 4)})
    live = hw.LiveModel(model)
    with pytest.raises(hw.PlanError, match="gather=True"):
        live.load(state)
    assert not model[0].weight.any()
    assert not by_columns.to_local().any()
    with hw.open(state) as source:
        with pytest.raises(hw.UsageError, match=r"1\.weight.*gather=True"):
            next(source.tensors())
        with pytest.raises(hw.UsageError, match="gather=True"):
            source.leases()
        with pytest.raises(hw.UsageError, match="gather=True"):
            hw.route(source, [hw.Component("", lambda pairs: None)])
    with hw.from_iterator(state.items()) as pairs, pytest.raises(hw.UsageError, match=r"1\.weight.*full_tensor"):
        hw.load(model, pairs)
    with pytest.raises(hw.UsageError, match=r"1\.weight.*full_tensor"):
        hw.route(iter(state.items()), [hw.Component("", lambda pairs: list(pairs))])
    with hw.open(state, gather=True) as source:  # what the messages say
        assert torch.equal(source.borrow("1.weight"), full)
        hw.load(model, source)
    assert torch.equal(by_columns.full_tensor(), full)
    live.load(hw.open(state, gather=True))
    alike = {"0.weight": torch.ones(4, 4), "1.weight": distribute_tensor(2 * full, mesh, [Shard(1)])}
    manifest = hw.open(alike).manifest
    with live.begin(manifest) as update:
        update.feed(alike)
        update.commit()
    assert torch.equal(by_columns.full_tensor(), 2 * full)
    with hw.from_iterator(alike.items(), manifest) as pairs:
        hw.load(model, pairs)
    with (
        live.begin(hw.open(state, gather=True).manifest) as update,
        pytest.raises(hw.UpdateAborted, match=r"1\.weight.*full_tensor"),
    ):
        update.feed(state)
    with pytest.raises(hw.UsageError, match="gather= is for"):
        hw.open("somewhere", gather=True)
    return "done"


def test_other_parts_are_refused_by_name_and_gathered_when_asked(tmp_path):
    assert on_ranks(tmp_path, _refuses_other_parts) == ["done"] * 2


def _knows_all_of_it(rank, folder):
    mesh = init_device_mesh("cpu", (2,))
    full = torch.arange(8.0).view(2, 4)
    state = {"weight": distribute_tensor(full, mesh, [Replicate()])}
    model = nn.Linear(4, 2, bias=False)
    hw.load(model, state)
    assert torch.equal(model.weight, full)
    nn.init.zeros_(model.weight)
    with hw.from_iterator(state.items()) as pairs:
        hw.load(model, pairs)
    assert torch.equal(model.weight, full)
    with (
        hw.Sender(f"unix:{folder}/whole-{rank}", timeout=0.05) as sender,
        pytest.raises(hw.TransferTimeout),  # Nobody comes for it; it is not refused.
    ):
        sender.send(state, version=1)
    summed = {"weight": DTensor.from_local(full, mesh, [Partial()])}
    nn.init.zeros_(model.weight)
    with pytest.raises(hw.UsageError, match=r"weight.*summand.*gather=True"):
        hw.load(model, summed)
    hw.load(model, hw.open(summed, gather=True))
    assert torch.equal(model.weight, 2 * full)
    model.weight = nn.Parameter(summed["weight"])
    with pytest.raises(hw.PlanError, match="summand"):
        hw.load(model, {"weight": full})
    return "done"


def test_a_replicated_tensor_is_whole_and_a_partial_one_is_no_value(tmp_path):
    assert on_ranks(tmp_path, _knows_all_of_it, tmp_path) == ["done"] * 2


def _goes_on_after_forward(rank, path):
    model = fsdp(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    ids = torch.arange(6)
    live = hw.LiveModel(model)
    live.load(path, version=1)
    before = addresses(model)
    with torch.no_grad():
        first = model(ids)
    assert not isinstance(model.odd.weight, DTensor), "the root keeps what it gathered, so this test tests something"
    fresh = Net(seed=2).state_dict()
    for atomic in ("staged", "journal", False):
        hw.load(model, path)
        with torch.no_grad():
            assert torch.equal(model(ids), first)
        live.update(fresh, atomic=atomic)
        with torch.no_grad():
            second = model(ids)
        other = fsdp(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        hw.load(other, fresh)
        with torch.no_grad():
            assert torch.equal(second, other(ids))
        assert not torch.equal(first, second)
        assert addresses(model) == before
        live.update(other, atomic=atomic)  # parts to parts
        with torch.no_grad():
            model(ids)  # so that the next load finds what it gathered
    held = live.digest()
    for atomic in ("staged", "journal"):
        with live.begin(atomic=atomic) as update:
            update.feed({"up.weight": DTensor.from_local(torch.zeros(6, 8), model.up.weight.device_mesh, [Shard(0)])})
            with pytest.raises(hw.UpdateAborted, match=r"'up\.bias' is whole, where a part .* was promised"):
                update.feed({"up.bias": torch.zeros(6)})
        assert live.digest() == held
        with torch.no_grad():
            assert torch.equal(model(ids), second)
    assert addresses(model) == before
    return "done"


def test_a_live_model_keeps_the_addresses_of_its_shards_and_forward_sees_the_new_version(tmp_path):
    path = write_checkpoint(tmp_path / "full", Net(seed=1).state_dict())
    assert on_ranks(tmp_path, _goes_on_after_forward, path) == ["done"] * 2


def _is_parallel(rank, path):
    model = Net()
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    report = hw.load(model, path)
    assert same(model, Net(seed=1).state_dict())
    whole_nbytes = sum(tensor.nbytes for tensor in Net().state_dict().values())
    assert report.bytes_written < whole_nbytes - 10 * 8 * 4
    return "done"


def test_tensor_parallel(tmp_path):
    path = write_checkpoint(tmp_path / "full", Net(seed=1).state_dict())
    assert on_ranks(tmp_path, _is_parallel, path) == ["done"] * 2


class OwnCode(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4, bias=False)

    def load_weights(self, weights):
        for name, tensor in weights:
            self.get_parameter(name).data.copy_(tensor)


def _refuses_what_it_cannot_do(rank, folder):
    mesh = init_device_mesh("cpu", (2,))
    model = OwnCode()
    parallelize_module(model, mesh, {"up": ColwiseParallel()})
    before = model.up.weight.full_tensor().clone()
    full = {"up.weight": torch.ones(4, 4)}
    with pytest.raises(hw.PlanError, match=r"up\.weight: is a DTensor .*load_weights.*before it is sharded"):
        hw.load(model, full)
    layer = nn.Sequential(nn.Linear(4, 4, bias=False))
    parallelize_module(layer, mesh, {"0": ColwiseParallel()})
    full = {"0.weight": torch.ones(4, 4)}
    with pytest.raises(hw.LiveModelError, match=r"0\.weight: is a DTensor"):
        hw.LiveModel(layer, process=lambda layer: None).load(full)
    with pytest.raises(hw.UsageError, match=r"0\.weight.*leave verify= out"):
        hw.load(layer, full, verify="loader")
    plan = hw.trace(layer, hw.open(full).manifest)
    with pytest.raises(hw.PlanFileError, match=r"sharded tensors: 0\.weight"):
        plan.save(folder / f"plan-{rank}")
    assert torch.equal(model.up.weight.full_tensor(), before)
    hw.load(layer, full, plan=plan, cache_dir=folder / "plans")
    other = nn.Sequential(nn.Linear(4, 4, bias=False))
    with pytest.raises(hw.PlanError, match="was made for"):
        hw.load(other, full, plan=plan)
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(4, 4, bias=False))
    fully_shard(meta, mesh=mesh)
    for device in (None, "cpu"):
        with pytest.raises(hw.PlanError, match=r"0\.weight.*to_empty"):
            hw.load(meta, full, device=device)
    hw.load(meta.to_empty(device="cpu"), full)
    assert torch.equal(whole(meta[0].weight), full["0.weight"])
    with hw.Sender(f"unix:{folder}/socket-{rank}") as sender, pytest.raises(hw.UsageError, match=r"0\.weight.*gather"):
        sender.send(meta, version=1)
    return "done"


def test_what_cannot_be_done_is_refused_by_name(tmp_path):
    assert on_ranks(tmp_path, _refuses_what_it_cannot_do, tmp_path) == ["done"] * 2


def _is_both(rank, path):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = Net()
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model.up, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    hw.load(model, path)
    assert same(model, Net(seed=1).state_dict())
    other = Net()
    fully_shard(other, mesh=mesh)  # copies on the first dimension, shards on the second
    hw.LiveModel(other).load(path)
    assert same(other, Net(seed=1).state_dict())
    with pytest.raises(hw.PlanError, match="not the same parts"):
        hw.load(model, other)
    assert same(model, Net(seed=1).state_dict())
    return "done"


@pytest.mark.long
def test_two_dimensions_of_sharding_on_four_ranks(tmp_path):
    path = write_checkpoint(tmp_path / "full", Net(seed=1).state_dict())
    assert on_ranks(tmp_path, _is_both, path, count=4) == ["done"] * 4
