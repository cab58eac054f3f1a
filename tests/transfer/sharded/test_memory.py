"""Memory: a rank has its own shards and the slots, whatever the others hold."""

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # it registers the backend
from ends import receiver
from processes import Child

import hotweights as hw

RANKS, ROWS, MIB = 3, 2048, 1024 * 1024


def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{key}:"))


def _sends(pipe, rank, store, address):
    """Two tensors of 24 MiB, of which it holds 8 MiB each. Returns how much more it had at most while it sent."""
    dist.init_process_group("fake", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    own = torch.full((ROWS, 1024), float(rank))
    shape = (RANKS * ROWS, 1024)
    held = [hw.Shard(name, own, offset=(rank * ROWS, 0), shape=shape) for name in ("one", "two")]
    with hw.Sender(address, group=dist.group.WORLD, slots=4, slot_nbytes=256 * 1024) as sending:
        sending.send(held, version=1)  # What the first one imports and allocates is not counted.
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
        before = resident("VmRSS")
        report = sending.send(held, version=2, dtype=torch.bfloat16)
        assert report.nbytes == RANKS * ROWS * 1024 * 2 * 2
        pipe.send(resident("VmHWM") - before)


def _takes(pipe, address):
    with receiver(address, offer_timeout=60) as source:
        for _ in range(2):
            for name, tensor in source.tensors():
                assert tensor[::ROWS, 5].tolist() == [0, 1, 2], name
    pipe.send("right")


def test_no_rank_has_more_than_its_shards_and_the_slots(tmp_path, address):
    store = str(tmp_path / "store")
    with Child(_takes, address) as worker:
        ranks = [Child(_sends, rank, store, address) for rank in range(RANKS)]
        more = [rank.heard(60.0) for rank in ranks]
        assert worker.heard(60.0) == "right"
        for rank in ranks:
            rank.__exit__(None, None, None)
    assert max(more) < 4 * MIB, more  # A gathered tensor would be 24 MiB; the slots, and what is cast for one, are 2.
