"""Parts: the geometry of placements on a mesh, against what torch's own ``distribute_tensor`` gives each rank."""

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from hotweights.sharding import Part, is_dtensor, local


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


def taken(part, full):
    """What the part says that this rank holds."""
    held = torch.full(tuple(full.shape), -1) if part is None else None
    if part is None:
        return full
    lengths = [max((block.at[dim] + block.shape[dim] for block in part.blocks), default=0) for dim in range(full.ndim)]
    held = torch.full(lengths, -1)
    for block in part.blocks:
        into = tuple(slice(at, at + length) for at, length in zip(block.at, block.shape, strict=True))
        of = tuple(slice(at, at + length) for at, length in zip(block.start, block.shape, strict=True))
        held[into] = full[of]
    return held


_MESHES = [(1,), (2,), (3,), (2, 2), (2, 3), (3, 2)]
_SHAPES = [(), (1,), (6,), (7, 3), (1, 5), (12, 4), (5, 0), (2, 3, 4)]


@st.composite
def cases(draw):
    mesh, shape = draw(st.sampled_from(_MESHES)), draw(st.sampled_from(_SHAPES))
    shards = [Shard(dim) for dim in range(-len(shape), len(shape))]
    placements = [draw(st.sampled_from([Replicate(), *shards])) for _ in mesh]
    return mesh, shape, placements


@settings(max_examples=60, deadline=None)
@given(case=cases())
def _check(as_rank, case):
    mesh_shape, shape, placements = case
    full = torch.arange(torch.Size(shape).numel()).view(shape)
    size = torch.Size(mesh_shape).numel()
    for rank in range(size):
        as_rank(rank, size)
        tensor = distribute_tensor(full, init_device_mesh("cpu", mesh_shape), placements, src_data_rank=None)
        held, part = local(tensor)
        assert held is tensor._local_tensor
        assert part is None or not part.problem
        if held.numel() or part is None:
            assert torch.equal(taken(part, full), held)
        else:
            assert part.blocks == ()
        assert (part is None) == (held.shape == full.shape and torch.equal(held, full)) or not full.numel()


def test_parts_are_what_distribute_tensor_gives(as_rank):
    _check(as_rank)


def test_fsdp_over_tensor_parallel_interleaves(as_rank):
    full = torch.arange(24).view(12, 2)
    seen = []
    for rank, uneven in itertools.product(range(4), (False, True)):
        whole = full[:9] if uneven else full
        as_rank(rank, 4)
        mesh = init_device_mesh("cpu", (2, 2))
        strided = _StridedShard(0, split_factor=2)
        shards, _ = strided._split_tensor(whole, 2, with_padding=False)
        mine = shards[rank // 2].chunk(2)[rank % 2].contiguous()
        tensor = DTensor.from_local(mine, mesh, [strided, Shard(0)], shape=whole.shape, stride=whole.stride())
        _, part = local(tensor)
        assert torch.equal(taken(part, whole), mine)
        if not uneven:
            seen.append(part.blocks[0].start[0])
    assert seen == [0, 6, 3, 9]


def test_an_equal_mesh_of_another_group_has_its_own_place(as_rank):
    """What is known of a mesh is not taken for one that torch calls equal."""
    found = []
    for rank in (1, 2):
        as_rank(rank, 4)
        mesh = init_device_mesh("cpu", (4,))
        tensor = DTensor.from_local(torch.ones(3, 8), mesh, [Shard(0)], run_check=False)
        found.append((mesh, local(tensor)[1].blocks[0].start))
    (mesh, first), (other, second) = found
    assert mesh == other
    assert (first, second) == ((3, 0), (6, 0))


def test_what_is_not_known_is_a_problem(as_rank):
    as_rank(0, 2)
    mesh = init_device_mesh("cpu", (2,))
    _, part = local(DTensor.from_local(torch.ones(2), mesh, [Partial()]))
    assert "summand" in part.problem
    odd = DTensor.from_local(torch.ones(3), mesh, [Shard(0)], shape=(4,), stride=(1,))
    assert "say [2] for this rank, which holds [3]" in local(odd)[1].problem
    assert not part.same_elements(part), "of what is not known nothing is the same"
    assert local(torch.ones(2))[1] is None
    assert not is_dtensor(torch.ones(2))
    assert str(Part((4, 2), (), "[Shard(dim=0)] on mesh (2,)")) == "[Shard(dim=0)] on mesh (2,) of [4, 2]"
