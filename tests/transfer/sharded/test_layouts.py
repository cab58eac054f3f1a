"""Four trainer ranks and two workers: every layout arrives whole, bit for bit, and nobody gathers."""

import pytest
import torch
import torch.distributed as dist
from ends import receiver
from processes import Child
from ranks import on_ranks, whole
from shard_ranks import as_far
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import hotweights as hw
from hosts import free_address
from hotweights.testing import assert_same_bits

RANKS = 4


class Net(nn.Module):
    """Even and uneven rows, fewer rows than ranks, a buffer, columns, and rows that are long enough for chunks."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(64, 1024, bias=False)
        self.down = nn.Linear(1024, 64, bias=False)
        self.odd = nn.Linear(30, 7)
        self.one = nn.Parameter(torch.randn(1, 3))
        self.register_buffer("steps", torch.randn(3))

    def forward(self, hidden):
        return self.odd(self.down(self.up(hidden))[:, :30]).sum() + self.one.sum()


def sharded(kind, seed):
    model = Net(seed).to(torch.bfloat16 if kind == "tp" else torch.float32)
    shape = {"fsdp": (4,), "tp": (4,), "fsdp x tp": (2, 2), "hsdp": (2, 2)}[kind]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])
    if "tp" in kind:
        inner = mesh if len(shape) == 1 else mesh["b"]
        parallelize_module(model, inner, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if kind != "tp":
        fully_shard(model, mesh=mesh["a"] if kind == "fsdp x tp" else mesh)
    return model


def content(kind, rank):
    """What a rank sends, and what all of it is."""
    torch.manual_seed(5)
    if kind == "stages":  # Pipeline stages of two ranks, with a tensor that both hold.
        layers = {f"layer{number}": torch.randn(5, 3) for number in range(RANKS)}
        shared = torch.randn(7)
        mine = {f"layer{number}": layers[f"layer{number}"] for number in (rank // 2 * 2, rank // 2 * 2 + 1)}
        return mine | {"norm": shared}, layers | {"norm": shared}
    if kind == "experts":  # Stacked experts by rank, each sent under its own name; the router by one rank.
        experts, router = torch.randn(8, 6, 5).to(torch.float8_e4m3fn), torch.randn(8, 6)
        own = [(f"experts.{2 * rank + number}", experts[2 * rank + number]) for number in range(2)]
        full = {f"experts.{number}": experts[number] for number in range(8)}
        return own + ([("router", router)] if rank == 3 else []), full | {"router": router}
    if kind == "boxes":  # What no DTensor says: interleaved columns, of a transposed tensor.
        full = torch.randn(10, 9)
        of_two = full.t().contiguous().t()
        own = [hw.Shard("w", of_two[:, col : col + 1], offset=(0, col), shape=(10, 9)) for col in range(rank, 9, RANKS)]
        return own, {"w": full}
    assert kind == "uneven"
    mesh = init_device_mesh("cpu", (2, 2))
    state = {}
    for number, placements in enumerate([(Shard(0), Shard(1)), (Shard(1), Shard(1)), (Shard(0), Replicate())]):
        state[f"w{number}"] = distribute_tensor(torch.randn(5, 7, 3).half(), mesh, placements)
    return state, None


KINDS = ("fsdp", "tp", "fsdp x tp", "hsdp", "stages", "experts", "boxes", "uneven")


def _sends(rank, address, keys=None, far=()):
    """Each layout is a version. Returns what was sent. Ranks in ``far`` do as if they were on another host."""
    full = {}
    options = {"slots": 3, "slot_nbytes": 65536, "keys": keys}
    with as_far(rank in far), hw.Sender(address, group=dist.group.WORLD, receivers=2, timeout=30, **options) as sending:
        for kind in KINDS:
            if kind in ("fsdp", "tp", "fsdp x tp", "hsdp"):
                given, wanted = sharded(kind, seed=1), None
            else:
                given, wanted = content(kind, rank)
            report = sending.send(given, version=kind, rename={"layer": "model.layer"} if kind == "stages" else None)
            assert report.version == kind
            assert len(report.committed) == 2
            if wanted is None:
                state = given.state_dict() if isinstance(given, nn.Module) else given
                wanted = {name: whole(tensor) for name, tensor in state.items()}
            full[kind] = wanted
    return full if rank == 0 else None


def _takes(pipe, address, keys=None):
    with receiver(address, timeout=30, offer_timeout=30, keys=keys) as source:
        for kind in KINDS:
            tensors = dict(source.tensors())
            assert source.version == kind
            pipe.send(tensors)
    pipe.recv()  # What it has sent lies in its memory until then.


@pytest.mark.parametrize("far", [(), (1, 3)], ids=["one host", "several hosts"])
def test_every_layout_arrives_whole(tmp_path, address, far):
    (tmp_path / "ranks").mkdir()
    keys = None
    if far:
        pytest.importorskip("cryptography")
        from hotweights.transfer.keys import make_keys

        address, keys = free_address(), tmp_path / "keys"
        make_keys(keys, ["127.0.0.1"])
    with Child(_takes, address, keys) as one, Child(_takes, address, keys) as other:
        full = on_ranks(tmp_path / "ranks", _sends, address, keys, far, count=RANKS)[0]
        for kind in KINDS:
            wanted = {name.replace("layer", "model.layer"): tensor for name, tensor in full[kind].items()}
            for worker in (one, other):
                taken = worker.heard()
                assert taken.keys() == wanted.keys(), kind
                assert_same_bits(taken, wanted)
        for worker in (one, other):
            worker.say("done")


def _trains(rank, address, kind):
    """Three steps, a version after each; nothing is gathered but for the test."""
    model = sharded(kind, seed=1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    states = []
    with hw.Sender(address, group=dist.group.WORLD, receivers=2, timeout=30) as sending:
        for step in range(3):
            model(torch.full((2, 64), float(step))).backward()
            optimiser.step()
            optimiser.zero_grad()
            handle = sending.send(model, version=step, wait=False, dtype=torch.bfloat16 if step == 2 else None)
            assert handle.result(timeout=30).version == step
            states.append({name: whole(tensor) for name, tensor in model.state_dict().items()})
    return states


class Half(nn.Module):
    """A worker's rank: rows of one, columns of the other, as its loading code narrows them."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank
        self.up = nn.Parameter(torch.zeros(512, 64), requires_grad=False)
        self.down = nn.Parameter(torch.zeros(64, 512), requires_grad=False)
        self.odd = nn.Parameter(torch.zeros(7, 30).double(), requires_grad=False)

    def load_weights(self, pairs):
        for name, tensor in pairs:
            if name == "up.weight":
                self.up.data.copy_(tensor.narrow(0, 512 * self.rank, 512))
            if name == "down.weight":
                self.down.data.copy_(tensor.narrow(1, 512 * self.rank, 512))
            if name == "odd.weight":
                self.odd.data.copy_(tensor)


def _follows(pipe, address, rank):
    live = hw.LiveModel(Half(rank))
    with receiver(address, timeout=30, offer_timeout=30) as source:
        for step in range(3):
            live.load(source) if step == 0 else live.update(source)
            pipe.send({name: tensor.clone() for name, tensor in live.model.state_dict().items()})
    pipe.recv()


@pytest.mark.parametrize("kind", ["fsdp", pytest.param("fsdp x tp", marks=pytest.mark.long)])
def test_three_steps_reach_ranks_that_take_slices(tmp_path, address, kind):
    (tmp_path / "ranks").mkdir()
    with Child(_follows, address, 0) as one, Child(_follows, address, 1) as other:
        steps = on_ranks(tmp_path / "ranks", _trains, address, kind, count=RANKS)[0]
        for step, state in enumerate(steps):
            if step == 2:  # The workers hold float32 and double: what came was rounded.
                state = {name: tensor.bfloat16().float() for name, tensor in state.items()}
            for rank, worker in enumerate((one, other)):
                live = worker.heard()
                assert torch.equal(live["up"], state["up.weight"].chunk(2)[rank])
                assert torch.equal(live["down"], state["down.weight"].chunk(2, 1)[rank])
                assert torch.equal(live["odd"], state["odd.weight"].double())
        for worker in (one, other):
            worker.say("done")


def _sends_fsdp1(rank, address):
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    model = FullyShardedDataParallel(Net(seed=3), device_id=torch.device("cpu"), use_orig_params=True)
    with hw.Sender(address, group=dist.group.WORLD, timeout=30) as sending:
        with pytest.raises(hw.UsageError, match="SHARDED_STATE_DICT"):
            sending.send(model, version=1)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
            state = model.state_dict()
        assert not isinstance(state["up.weight"], DTensor)
        sending.send(state, version=1)


def _takes_one(pipe, address):
    with receiver(address, timeout=30, offer_timeout=30) as source:
        pipe.send(dict(source.tensors()))
    pipe.recv()


@pytest.mark.filterwarnings("ignore")  # torch's, about FSDP1
def test_fsdp1_sends_its_sharded_state_dict(tmp_path, address):
    (tmp_path / "ranks").mkdir()
    with Child(_takes_one, address) as worker:
        on_ranks(tmp_path / "ranks", _sends_fsdp1, address, count=2)
        taken = worker.heard()
        wanted = Net(seed=3).state_dict()
        assert taken.keys() == wanted.keys()
        assert all(torch.equal(taken[name], wanted[name]) for name in wanted)
        worker.say("done")
