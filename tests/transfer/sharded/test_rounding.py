"""Masters that every worker casts travel as what they are cast to, and arrive as if the worker had cast them."""

from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist
from ends import receiver
from processes import Child
from ranks import on_ranks
from shard_ranks import as_far
from torch import nn

import hotweights as hw
from hosts import free_address
from hotweights.testing import assert_same_bits
from hotweights.transfer.relay import Relay


def masters():
    """float32 with all that casts treat differently, of odd shapes; a float64, and numbers that nobody casts."""
    torch.manual_seed(3)
    wide = torch.randn(301, 34)
    wide[0, :8] = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 3.4e38, 1.00390625, 65519.0])
    return {
        "wide": wide,
        "columns": torch.randn(64, 512),
        "eight": torch.randn(5, 3).double(),
        "count": torch.arange(9),
        "norm": torch.randn(7),
        "none": torch.empty(0, 4),
    }


class Worker(nn.Module):
    """Some columns of one tensor, and all of the rest."""

    def __init__(self, dtype, norm=torch.float32):
        super().__init__()
        of = {"wide": dtype, "eight": dtype, "count": torch.int64, "norm": norm, "none": dtype, "columns": dtype}
        for name, tensor in masters().items():
            tensor = tensor[:, 100:301] if name == "columns" else tensor
            self.register_buffer(name, torch.zeros(tensor.shape, dtype=of[name]))

    def load_weights(self, pairs):
        for name, tensor in pairs:
            self.get_buffer(name).copy_(tensor[:, 100:301] if name == "columns" else tensor)


def _sends(rank, address, far, workers):
    own = masters()
    rows = own["wide"].tensor_split([100, 100, 250])
    start = sum(len(part) for part in rows[:rank])
    given = [hw.Shard("wide", rows[rank], offset=(start, 0), shape=(301, 34))]
    columns = own["columns"][:, 128 * rank : 128 * rank + 128]
    given.append(hw.Shard("columns", columns, offset=(0, 128 * rank), shape=(64, 512)))
    given += [(name, tensor) for name, tensor in own.items() if name not in ("wide", "columns")]
    options = {"receivers": workers, "timeout": 30, "slot_nbytes": 8192}
    with as_far(rank in far), hw.Sender(address, group=dist.group.WORLD, **options) as sending:
        return [sending.send(given, version=version).nbytes for version in (1, 2)]


def _takes(pipe, address, model, once):
    with receiver(address, timeout=30, offer_timeout=30) as source:
        if once:
            hw.load(model, source)
            hw.load(model, source)
        else:
            live = hw.LiveModel(model)
            live.load(source)
            live.update(source)
    pipe.send({name: tensor.clone() for name, tensor in model.state_dict().items()})
    pipe.recv()  # What it has sent lies in its memory until then.


def sent(tmp_path, address, models, far=(), to=None, once=False):
    """The bytes of a version that these workers take, each of which has then what its own cast would have made."""
    (tmp_path / "ranks").mkdir()
    with ExitStack() as stack:
        workers = [stack.enter_context(Child(_takes, to or address, model, once)) for model in models]
        nbytes = on_ranks(tmp_path / "ranks", _sends, address, far, len(models), count=4)
        for model, worker in zip(models, workers, strict=True):
            wanted = Worker(model.wide.dtype, model.norm.dtype)
            wanted.load_weights(masters().items())
            assert_same_bits(worker.heard(), dict(wanted.state_dict()))
            worker.say("done")
    assert len({number for own in nbytes for number in own}) == 1
    return nbytes[0][0]


def size(wide, double, norm):
    return wide * (301 * 34 + 64 * 201) + double * 15 + 8 * 9 + norm * 7


@pytest.mark.parametrize("far", [(), (1, 3)], ids=["one host", "several hosts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_of_the_bytes_travel(tmp_path, address, dtype, far):
    models = [Worker(dtype), Worker(dtype)]
    assert sent(tmp_path, free_address() if far else address, models, far) == size(2, 2, 4)


def test_what_one_worker_wants_whole_goes_whole(tmp_path, address):
    models = [Worker(torch.bfloat16, norm=torch.bfloat16), Worker(torch.float32, norm=torch.bfloat16)]
    assert sent(tmp_path, address, models) == size(4, 8, 2)


def _relay(pipe, address, to):
    with Relay(address, to, timeout=30) as relay:
        relay.run()


def test_through_a_relay(tmp_path):
    address, to = free_address(), f"unix:{tmp_path / 'relay' / 'socket'}"
    with Child(_relay, address, to) as relay:
        models = [Worker(torch.bfloat16), Worker(torch.bfloat16)]
        try:
            assert sent(tmp_path, address, models, to=to) == size(2, 2, 4)
        finally:
            relay.process.kill()


def test_hw_load_asks_for_it_too(tmp_path, address):
    assert sent(tmp_path, address, [Worker(torch.bfloat16)], once=True) == size(2, 2, 4)
