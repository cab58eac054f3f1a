"""Which rank gives which bytes: every placement, uneven shapes, any request, against the whole tensors, bit for bit."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from xxhash import xxh3_64_intdigest

import hotweights as hw
from hotweights.ranges import Range, disjoint
from hotweights.sharding import Block
from hotweights.transfer.sharded.filling import digest_of, fill
from hotweights.transfer.sharded.holding import BLOCKS, Table, TableRow, holding
from hotweights.transfer.sharded.tiling import Tiling


@pytest.fixture
def as_rank():
    """Makes this process a rank of a group that sends nothing."""

    def become(rank, size):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())

    yield become
    if dist.is_initialized():
        dist.destroy_process_group()


def held_by(as_rank, size, make, dtype=None):
    """What each of so many ranks holds, of what ``make(rank)`` gives."""
    holdings = []
    for rank in range(size):
        as_rank(rank, size)
        with holding(make(rank), None, range(size), dtype) as held:
            holdings.append(held)
    return holdings


def tiling_of(holdings):
    digests = [held.table.digest() for held in holdings]
    known = list(dict.fromkeys(digests))
    tables = [holdings[digests.index(digest)].table for digest in known]
    return Tiling(tables, [known.index(digest) for digest in digests])


def sent(tiling, holdings, number, requests, limit):
    """The bytes that come of it: each request's, in a tensor's bytes that are 0xFF elsewhere. Nothing comes twice."""
    spec = tiling.tensors[number].spec
    arrived = {place: torch.full((spec.nbytes,), 0xFF, dtype=torch.uint8) for place, _ in requests}
    counted = {place: torch.zeros(spec.nbytes, dtype=torch.uint8) for place, _ in requests}
    for job in tiling.jobs(number, requests, limit):
        slot = torch.full((4096 + limit,), 0xEE, dtype=torch.uint8)
        for share in job.shares:
            task = job.task(share, 64, hashed=True)
            alone = len(job.shares) == 1
            assert task.hashed is task.whole is alone
            digests = fill(slot, [task], holdings[share.rank])
            content = slot[64 : 64 + job.range.size]
            assert not alone or digests == (xxh3_64_intdigest(content.numpy()),)
            assert digest_of(slot, 64, job.range.size) == xxh3_64_intdigest(content.numpy())
        assert job.range.size <= limit
        for place in job.asking:
            into = bytes_of(arrived[place], job.range)
            into.copy_(slot[64 : 64 + job.range.size].view(into.shape))
            bytes_of(counted[place], job.range).add_(1)
    for place, ranges in requests:
        for part in ranges or [Range(0, spec.nbytes)]:
            assert (bytes_of(counted[place], part) == 1).all()
            bytes_of(counted[place], part).zero_()
        assert not counted[place].any(), "it was not asked for"
    return arrived


def bytes_of(memory, part):
    if part.count == 1:
        return memory[part.start : part.stop]
    return memory.as_strided((part.count, part.nbytes), (part.stride, 1), part.start)


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


_MESHES = [(1,), (2,), (3,), (4,), (2, 2), (2, 3), (3, 2)]
_SHAPES = [(), (1,), (6,), (7, 3), (1, 5), (12, 4), (5, 0), (2, 3, 4), (5, 3, 7), (33, 70)]
_DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64]


@st.composite
def cases(draw):
    mesh, shape = draw(st.sampled_from(_MESHES)), draw(st.sampled_from(_SHAPES))
    placements = [draw(st.sampled_from([Replicate(), *(Shard(dim) for dim in range(len(shape)))])) for _ in mesh]
    dtype = draw(st.sampled_from(_DTYPES))
    nbytes = math.prod(shape) * dtype.itemsize
    asked = [draw(asking(shape, dtype.itemsize, nbytes)) for _ in range(draw(st.integers(1, 3)))]
    return mesh, shape, placements, dtype, asked, draw(st.sampled_from([64, 4096]))


@st.composite
def asking(draw, shape, item, nbytes):
    """All of it; rows; columns; or any bytes."""
    kinds = (
        ["all"]
        + (["bytes"] if nbytes > 1 else [])
        + (["columns"] if len(shape) > 1 and shape[-1] > 1 and nbytes else [])
    )
    kind = draw(st.sampled_from(kinds))
    if kind == "all":
        return ()
    if kind == "bytes":
        start = draw(st.integers(0, nbytes - 1))
        return (Range(start, draw(st.integers(1, nbytes - start))),)
    first = draw(st.integers(0, shape[-1] - 2))
    width, rows = draw(st.integers(1, shape[-1] - 1 - first)), math.prod(shape[:-1])
    one = Range(first * item, width * item)
    return (Range(one.start, one.nbytes, rows, shape[-1] * item) if rows > 1 else one,)


@settings(max_examples=80, deadline=None)
@given(case=cases())
def _check(as_rank, case):
    mesh, shape, placements, dtype, asked, limit = case
    full = (torch.arange(math.prod(shape)).view(shape) * 37 % 251).to(dtype)

    def make(rank):
        lying = distribute_tensor(full, init_device_mesh("cpu", mesh), placements, src_data_rank=None)
        return {"w": lying}

    holdings = held_by(as_rank, math.prod(mesh), make)
    tiling = tiling_of(holdings)
    assert [spec.shape for spec in tiling.specs()] == [shape]
    requests = list(enumerate(asked))
    arrived = sent(tiling, holdings, 0, requests, limit)
    for place, ranges in requests:
        for part in ranges or [Range(0, full.nbytes)]:
            assert torch.equal(bytes_of(arrived[place], part), bytes_of(raw(full), part))


def test_any_placement_gives_any_wantedits_bytes(as_rank):
    _check(as_rank)


def test_long_boxes_are_chunks_of_their_owners_in_turn(as_rank):
    full = torch.arange(4 * 100 * 256).view(400, 256)

    def make(rank):
        return {"w": distribute_tensor(full, init_device_mesh("cpu", (4,)), [Shard(0)], src_data_rank=None)}

    holdings = held_by(as_rank, 4, make)
    tiling = tiling_of(holdings)
    jobs = list(tiling.jobs(0, [(0, ())], 128 * 1024))
    assert [[share.rank for share in job.shares] for job in jobs] == [[0], [1], [2], [3], [0], [1], [2], [3]]
    columns = [(place, (Range(place * 1024, 1024, 400, 2048),)) for place in range(2)]
    arrived = sent(tiling, holdings, 0, columns, 128 * 1024)
    for place, (part,) in columns:
        assert torch.equal(bytes_of(arrived[place], part), bytes_of(raw(full), part))


@pytest.mark.parametrize("limit", [64, 4096])
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
def test_masters_are_cast_where_they_lie(as_rank, placement, limit):
    full = torch.randn(9, 34) * 1e3
    full[0, :3] = torch.tensor([float("inf"), float("nan"), 1 + 2**-9])
    kept, counts = torch.randn(4), torch.arange(5)

    def make(rank):
        lying = distribute_tensor(full, init_device_mesh("cpu", (2,)), [placement], src_data_rank=None)
        return {"w": lying, "router": kept, "counts": counts, "fp8": full.to(torch.float8_e4m3fn)}

    holdings = held_by(as_rank, 2, make, lambda name: None if name == "router" else torch.bfloat16)
    tiling = tiling_of(holdings)
    kinds = [spec.dtype for spec in tiling.specs()]
    assert kinds == [torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn]
    wanted = full.bfloat16()
    odd = (Range(3, 67),)  # from the middle of an element to the middle of another
    arrived = sent(tiling, holdings, 0, [(0, ()), (1, odd)], limit)
    assert torch.equal(arrived[0], raw(wanted))
    assert torch.equal(arrived[1][3:70], raw(wanted)[3:70])
    assert torch.equal(sent(tiling, holdings, 1, [(0, ())], limit)[0], raw(kept))


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16", torch.float8_e4m3fn, lambda name: torch.int8])
def test_a_cast_is_to_floating_point_numbers(dtype):
    with (
        pytest.raises(hw.UsageError, match="dtype= is float32, bfloat16 or the like"),
        holding({"w": torch.ones(2)}, None, (0,), dtype),
    ):
        pass


def test_replicas_share_the_work(as_rank):
    holdings = held_by(as_rank, 3, lambda rank: {f"w{number}": torch.ones(8) for number in range(6)})
    tiling = tiling_of(holdings)
    tiling.begin()
    owners = [
        [share.rank for share in job.shares] for number in range(6) for job in tiling.jobs(number, [(0, ())], 4096)
    ]
    assert sorted(itertools.chain(*owners)) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("wanted", [(), (Range(0, 512, 2048, 4096),)], ids=["whole", "columns"])
def test_where_bytes_do_not_go_by_rank_0_chunks_are_of_one_rank(wanted):
    """Boxes of 16 x 8 ranks, for two workers that want the same, and one that wants half of the rows."""
    boxes = [Block((128 * row, 256 * column), (0, 0), (128, 256)) for row in range(16) for column in range(8)]
    tables = [Table((), (TableRow("w", "float16", (2048, 2048), BLOCKS, (box,)),)) for box in boxes]
    tiling = Tiling(tables, range(128))
    requests = [(0, wanted), (1, wanted), (2, (Range(0, 4096 * 1024),))]
    tiling.begin()
    assert any(len(job.shares) > 1 for job in tiling.jobs(0, requests, 4 << 20))
    tiling.begin(apart=True)
    jobs = list(tiling.jobs(0, requests, 4 << 20))
    assert {len(job.shares) for job in jobs} == {1}
    for place, ranges in requests:
        own = [job.range for job in jobs if place in job.asking]
        assert disjoint(own)
        assert sum(part.size for part in own) == sum(part.size for part in ranges or [Range(0, 4096 * 2048)])


def test_declared_boxes_and_stages_are_one_model(as_rank):
    full = torch.randn(6, 5)

    def make(rank):
        boxes = [hw.Shard("w", full[rank * 3 : rank * 3 + 3, :2], offset=(rank * 3, 0), shape=(6, 5))]
        boxes += [hw.Shard("w", full[rank * 3 : rank * 3 + 3, 2:], offset=(rank * 3, 2), shape=(6, 5))]
        return [*boxes, (f"stage{rank}", full[rank]), ("both", full.t())]

    holdings = held_by(as_rank, 2, make)
    tiling = tiling_of(holdings)
    wanted = {"w": full, "stage0": full[0], "stage1": full[1], "both": full.t()}
    assert [spec.name for spec in tiling.specs()] == ["stage0", "both", "w", "stage1"]
    for number, spec in enumerate(tiling.specs()):
        arrived = sent(tiling, holdings, number, [(0, ())], 64)
        assert torch.equal(arrived[0], raw(wanted[spec.name]))


def problem(as_rank, size, make):
    with pytest.raises(hw.UsageError) as caught:
        tiling_of(held_by(as_rank, size, make))
    return str(caught.value)


def test_what_is_not_all_of_a_tensor_is_refused_by_name(as_rank):
    full = torch.arange(32.0).view(8, 4)

    def some_ranks(rank):
        lying = distribute_tensor(full, init_device_mesh("cpu", (4,)), [Shard(0)], src_data_rank=None)
        return {} if rank == 2 else {"w": lying}

    assert "tensor 'w': its parts hold 24 of its 32 elements; of 4 ranks it lies on 0, 1, 3" in problem(
        as_rank, 4, some_ranks
    )

    def overlapping(rank):
        return [hw.Shard("w", full[:5], offset=(3 * rank, 0), shape=(8, 4))]

    assert "its part [5, 4] at [0, 0] and its part [5, 4] at [3, 0] overlap" in problem(as_rank, 2, overlapping)

    def whole_beside_parts(rank):
        return {"w": full} if rank == 0 else [hw.Shard("w", full[:5], offset=(0, 0), shape=(8, 4))]

    assert "overlap; of 2 ranks it lies on 0, 1" in problem(as_rank, 2, whole_beside_parts)

    def of_two_kinds(rank):
        return {"w": full if rank else full.half()}

    assert "'w' is float16 [8, 4] on rank 0 and float32 [8, 4] on rank 1" in problem(as_rank, 2, of_two_kinds)


def test_a_mesh_of_ranks_that_are_not_in_the_group_is_refused(as_rank):
    as_rank(0, 4)
    full = torch.ones(8, 4)
    lying = DTensor.from_local(full[:2], init_device_mesh("cpu", (4,)), [Shard(0)], run_check=False)
    with (
        pytest.raises(hw.UsageError, match=r"its mesh has ranks \[2, 3\], not in group="),
        holding({"w": lying}, None, (0, 1)),
    ):
        pass


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        (lambda: hw.Shard("w", torch.ones(2), offset=(7,), shape=(8,)), r"\[2\] at offset \[7\] does not lie in"),
        (lambda: hw.Shard("w", torch.ones(2), offset=(0, 0), shape=(8,)), "does not lie in"),
        (lambda: hw.Shard("w", [1.0], offset=(0,), shape=(8,)), "'w' is a list"),
        (lambda: hw.Shard(7, torch.ones(2), offset=(0,), shape=(8,)), "key 7 is no name"),
        (lambda: hw.Shard("w", torch.ones(2), offset=0, shape=(8,)), r"offset= is a number for each dimension"),
    ],
)
def test_a_shard_lies_in_its_tensor(shard, words):
    with pytest.raises(hw.UsageError, match=words):
        shard()
