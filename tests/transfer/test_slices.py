"""Ranks that take slices: each gets its own bytes and no others, the sender sends the union once."""

import pytest
import torch
from ends import Thread, receiver, sender
from torch import nn

import hotweights as hw
from hotweights.ranges import Range
from hotweights.sources.contracts import Request
from hotweights.testing import assert_same_bits
from hotweights.transfer.channel import Channel
from hotweights.transfer.messages import Filled

HIDDEN, INNER, EXPERTS = 96, 512, 4


def checkpoint(value=0):
    torch.manual_seed(value)
    return {
        "up.weight": torch.randn(INNER, HIDDEN),  # rows are split
        "down.weight": torch.randn(HIDDEN, INNER),  # columns are split: 512 runs of 1 kB for two ranks
        "short.weight": torch.randn(HIDDEN, 8),  # columns too short to be worth a cut
        "experts": torch.randn(EXPERTS, 10, HIDDEN),  # whole experts are split
        "router.weight": torch.randn(EXPERTS, HIDDEN),  # everybody's, and cast
        "norm.weight": torch.randn(HIDDEN),
    }


class Shard(nn.Module):
    """What engines do: each rank's loading code narrows what it is given."""

    def __init__(self, rank, size):
        super().__init__()
        self.rank, self.size = rank, size
        full = checkpoint()
        for name, tensor in full.items():
            parameter = nn.Parameter(torch.zeros_like(self.part(name, tensor)), requires_grad=False)
            self.register_parameter(name.replace(".", "_"), parameter)
        self.router_weight = nn.Parameter(self.router_weight.double(), requires_grad=False)

    def part(self, name, tensor):
        dim = {"up.weight": 0, "down.weight": 1, "short.weight": 1, "experts": 0}.get(name)
        return tensor if dim is None else tensor.chunk(self.size, dim)[self.rank].contiguous()

    def load_weights(self, pairs):
        for name, tensor in pairs:
            dim = {"up.weight": 0, "down.weight": 1, "short.weight": 1, "experts": 0}.get(name)
            if dim is not None:
                length = tensor.shape[dim] // self.size
                tensor = tensor.narrow(dim, self.rank * length, length)
            self.get_parameter(name.replace(".", "_")).data.copy_(tensor)

    def expected(self, value):
        parts = {name.replace(".", "_"): self.part(name, tensor) for name, tensor in checkpoint(value).items()}
        return {**parts, "router_weight": parts["router_weight"].double()}


def follow(address, shard, atomic):
    live = hw.LiveModel(shard, atomic=atomic)
    with receiver(address) as source:
        live.load(source)
        live.update(source)
    return live.model.state_dict()


@pytest.fixture
def told(monkeypatch):
    """The bytes that each connection was told of, in all slots."""
    nbytes, say = {}, Channel.send

    def noting(channel, message, **options):
        if isinstance(message, Filled):
            key = id(channel)
            nbytes[key] = nbytes.get(key, 0) + sum(chunk.range.size for chunk in message.chunks)
        say(channel, message, **options)

    monkeypatch.setattr(Channel, "send", noting)
    return nbytes


def whole(content):
    return sum(tensor.nbytes for tensor in content.values())


def own(rank, size):
    """Bytes that a rank asks for: its slices, but of the short columns everything that lies between them."""
    full, shard = checkpoint(), Shard(rank, size)
    nbytes = sum(shard.part(name, tensor).nbytes for name, tensor in full.items())
    short = full["short.weight"]
    return nbytes + (
        short.nbytes - (size - 1) * short.nbytes // size // HIDDEN - shard.part("short.weight", short).nbytes
    )


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("atomic", ["staged", "journal", False])
@pytest.mark.parametrize("slot_nbytes", [4096, 1 << 20])
def test_each_rank_gets_its_slices_and_the_union_is_sent_once(digests, atomic, slot_nbytes, address, told):
    shards = [Shard(rank, 2) for rank in range(2)]
    taking = [Thread(follow, address, shard, atomic) for shard in shards]
    with sender(address, receivers=2, digests=digests, slot_nbytes=slot_nbytes) as sending:
        for value in (1, 2):
            told.clear()
            report = sending.send(checkpoint(value), version=value)
            assert report.nbytes == whole(checkpoint())
            assert sorted(told.values()) == sorted(own(rank, 2) for rank in range(2))
    for thread, shard in zip(taking, shards, strict=True):
        assert_same_bits(thread.result(), shard.expected(2))


@pytest.mark.parametrize("digests", [True, False])
def test_one_wants_all_and_others_slices_of_two_sizes(digests, address, told):
    shards = [Shard(0, 1), Shard(0, 2), Shard(3, 4)]
    taking = [Thread(follow, address, shard, False) for shard in shards]
    with sender(address, receivers=3, digests=digests) as sending:
        for value in (1, 2):
            report = sending.send(checkpoint(value), version=value)
            assert report.nbytes == whole(checkpoint())
    for thread, shard in zip(taking, shards, strict=True):
        assert_same_bits(thread.result(), shard.expected(2))
    assert sorted(told.values()) == sorted(2 * own(shard.rank, shard.size) for shard in shards)


def test_what_no_rank_wants_is_not_sent(address):
    shards = [Shard(0, 4), Shard(2, 4)]
    taking = [Thread(follow, address, shard, False) for shard in shards]
    with sender(address, receivers=2) as sending:
        for value in (1, 2):
            report = sending.send(checkpoint(value), version=value)
    for thread, shard in zip(taking, shards, strict=True):
        assert_same_bits(thread.result(), shard.expected(2))
    split = sum(checkpoint()[name].nbytes for name in ("up.weight", "down.weight", "experts"))
    assert report.nbytes < whole(checkpoint()) - split // 2 + checkpoint()["short.weight"].nbytes
    assert report.tensors == len(checkpoint())


@pytest.mark.parametrize("as_pairs", [True, False])
def test_slices_of_tensors_that_do_not_lie_in_row_major_order(as_pairs, address):
    shards = [Shard(rank, 2) for rank in range(2)]
    taking = [Thread(follow, address, shard, "staged") for shard in shards]
    with sender(address, receivers=2) as sending:
        for value in (1, 2):
            turned = {
                name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor
                for name, tensor in checkpoint(value).items()
            }
            manifest = hw.open(checkpoint(value)).manifest
            if as_pairs:
                sending.send(iter(turned.items()), version=value, manifest=manifest)
            else:
                sending.send(turned, version=value)
    for thread, shard in zip(taking, shards, strict=True):
        assert_same_bits(thread.result(), shard.expected(2))


@pytest.mark.parametrize("atomic", ["staged", "journal"])
@pytest.mark.parametrize("name", ["up.weight", "down.weight", "short.weight", "router.weight"])
def test_a_changed_byte_of_any_slice_is_caught_before_it_counts(name, atomic, address, monkeypatch):
    """In place, in runs, and on the way through private memory: what is compared is what was copied."""
    say, changed = Channel.send, []
    number = list(checkpoint()).index(name)
    shard = Shard(1, 2)

    def update():
        live = hw.LiveModel(shard, atomic=atomic)
        with receiver(address) as source:
            live.load(source)
            with pytest.raises(hw.UpdateAborted, match="is not what the sender held"):
                live.update(source)
            before = {key: tensor.clone() for key, tensor in live.model.state_dict().items()}
            live.update(source)
            return before, live.model.state_dict()

    taking = Thread(update)
    with sender(address) as sending:
        sending.send(checkpoint(1), version=1)

        def corrupting(channel, message, **options):
            if isinstance(message, Filled) and not changed:
                for chunk in message.chunks:
                    if chunk.tensor == number:
                        sending._way.slots.memories[message.slot][chunk.offset + chunk.range.size - 1] ^= 1
                        changed.append(chunk)
                        break
            say(channel, message, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Channel, "send", corrupting)
            with pytest.raises(
                hw.TransferAborted, match=rf"{name}: [0-9a-f]{{16}} was sent, [0-9a-f]{{16}} was copied"
            ):
                sending.send(checkpoint(2), version=2)
        sending.send(checkpoint(3), version=3)
    before, after = taking.result()
    assert_same_bits(before, shard.expected(1))
    assert_same_bits(after, shard.expected(3))


def test_bytes_that_are_only_moved_go_straight_to_where_they_belong(address):
    """Each byte is copied once on this side, and never into memory in between."""
    live = hw.LiveModel(Shard(1, 2), atomic=False)
    live.load(checkpoint(1))
    version = live.model.down_weight._version
    asked = {}

    def update():
        with receiver(address) as source:
            wanted = source.wanted

            def noting(requests):
                requests = list(requests)
                asked.update((request.name, (request.ranges, request.into and request.into())) for request in requests)
                wanted(requests)

            source.wanted = noting
            live.update(source)
            return source._private.take(0).untyped_storage().nbytes()

    taking = Thread(update)
    with sender(address) as sending:
        sending.send(checkpoint(2), version=2)
    private = taking.result()
    assert_same_bits(live.model.state_dict(), live.model.expected(2))
    row = INNER * 4
    assert asked["down.weight"][0] == (Range(row // 2, row // 2, HIDDEN, row),)
    placed = {name for name, (_, room) in asked.items() if room is not None}
    assert placed == {"up.weight", "down.weight", "experts", "norm.weight"}
    assert asked["down.weight"][1].data_ptr() == live.model.down_weight.data_ptr()
    assert live.model.down_weight._version > version  # Nobody else can see that the bytes were written.
    assert private == max(checkpoint()[name].nbytes for name in ("short.weight", "router.weight"))


@pytest.mark.parametrize(
    "ranges", [(), (Range(0, 0),), (Range(0, 10), Range(5, 10)), (Range(-1, 4),), (Range(0, 4, 9, 8),)]
)
def test_requests_for_bytes_that_there_are_not_are_refused(ranges, address):
    def want():
        with receiver(address) as source, pytest.raises(hw.UsageError, match="bytes are wanted that there are not"):
            source.wanted([Request("w", ranges)])

    taking = Thread(want)
    with sender(address) as sending, pytest.raises(hw.TransferAborted):
        sending.send({"w": torch.zeros(10)}, version=1)
    taking.result()


def test_a_consumer_of_its_own_says_what_it_wants(address):
    """Of a tensor that is wanted in part, the lease has the whole shape, and those bytes."""
    content = {"a": torch.arange(100.0), "b": torch.arange(30).view(5, 6), "c": torch.zeros(3)}
    room = torch.zeros(80, dtype=torch.uint8)

    def take():
        tensors = {}
        with receiver(address) as source:
            source.wanted([Request("b", (Range(0, 16, 5, 48),)), Request("a", (Range(40, 80),), lambda: room)])
            with source.leases() as stream:
                for lease in stream:
                    assert lease.placed == (lease.name == "a")
                    tensors[lease.name] = lease.own()
            with source.decision():
                pass
        return tensors

    taking = Thread(take)
    with sender(address) as sending:
        assert sending.send(content, version=1).nbytes == 160
    tensors = taking.result()
    assert torch.equal(room.view(torch.float32), content["a"][10:30])
    assert torch.equal(tensors["b"][:, :2], content["b"][:, :2])
