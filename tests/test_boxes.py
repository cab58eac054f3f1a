"""Boxes against torch: what the arithmetic says of a view is what the view is."""

import itertools

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

import hotweights as hw
from hotweights.boxes import (
    box_of,
    contiguous,
    covered,
    extent,
    joined,
    meeting,
    meets,
    narrowed,
    runs,
    share_bytes,
    view,
)
from hotweights.loading.reads import reads_of
from hotweights.plan.steps import Copy
from hotweights.testing import write_safetensors

BASE = (6, 5, 8)
COUNT = 240


def viewed(base, choices):
    """A view of ``base`` by a random walk of slicing, selecting, transposing and expanding."""
    tensor = base
    for what, a, b in choices:
        if tensor.dim() == 0:
            break
        dim = a % tensor.dim()
        length = tensor.shape[dim]
        if what == "narrow" and length:
            start = b % length
            tensor = tensor.narrow(dim, start, 1 + (a * 7 + b) % (length - start))
        elif what == "select" and length:
            tensor = tensor.select(dim, b % length)
        elif what == "step" and length:
            tensor = tensor[(slice(None),) * dim + (slice(b % length, None, 2),)]
        elif what == "transpose":
            tensor = tensor.transpose(dim, b % tensor.dim())
        elif what == "unsqueeze":
            tensor = tensor.unsqueeze(dim)
    return tensor


walks = st.lists(
    st.tuples(
        st.sampled_from(["narrow", "select", "step", "transpose", "unsqueeze"]), st.integers(0, 9), st.integers(0, 9)
    ),
    max_size=5,
)
many = examples(300, derandomize=True)


def base():
    return torch.arange(COUNT, dtype=torch.int32).view(BASE)


def touched(tensor):
    """The bytes of the base that a view lies on."""
    return {4 * int(value) + byte for value in tensor.reshape(-1) for byte in range(4)}


@many
@given(walks)
def test_a_box_is_its_view(choices):
    tensor = viewed(base(), choices)
    box = box_of(tensor)
    assert torch.equal(view(base(), box), tensor)
    assert contiguous(box) == tensor.is_contiguous()
    start, stop = extent(box)
    assert (start, stop) == (min(touched(tensor)), max(touched(tensor)) + 1)
    assert box.nbytes == tensor.nbytes


@many
@given(walks)
def test_runs_are_the_view_in_order(choices):
    tensor = viewed(base(), choices)
    box = box_of(tensor)
    inner, each = runs(box)
    values = []
    for index, first in each:
        run = tensor[index]
        assert run.is_contiguous()
        assert run.dim() == inner
        values += range(first // 4, first // 4 + run.numel())
    assert values == tensor.reshape(-1).tolist()


@many
@given(walks, st.data())
def test_narrowing(choices, data):
    tensor = viewed(base(), choices)
    start = tuple(data.draw(st.integers(0, length - 1)) for length in tensor.shape)
    lengths = tuple(data.draw(st.integers(1, n - a)) for a, n in zip(start, tensor.shape, strict=True))
    part = tensor[tuple(slice(a, a + n) for a, n in zip(start, lengths, strict=True))]
    assert torch.equal(view(base(), narrowed(box_of(tensor), start, lengths)), part)


@many
@given(walks, walks)
def test_boxes_that_share_a_byte_meet(one, other):
    """``meets`` may say so of two that do not; never the other way round."""
    a, b = viewed(base(), one), viewed(base(), other)
    assert share_bytes(box_of(a), box_of(b)) == bool(touched(a) & touched(b))
    assert meets(box_of(a), box_of(b)) >= share_bytes(box_of(a), box_of(b))


def test_an_empty_box_shares_nothing():
    full, empty = torch.zeros(8), torch.zeros(8)[3:3]
    assert not meets(box_of(full), box_of(empty))
    assert not share_bytes(box_of(full), box_of(empty))


spans = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)).map(lambda span: (span[0], sum(span))), max_size=8)


@many
@given(spans, st.integers(0, 3))
def test_joined_spans_hold_the_same_bytes_and_lie_apart(several, gap):
    together = joined(several, gap)
    held = {byte for start, stop in several for byte in range(start, stop)}
    after = {byte for start, stop in together for byte in range(start, stop)}
    assert held <= after
    assert held == after or gap
    assert all(before[1] + gap < behind[0] for before, behind in itertools.pairwise(together))


@many
@given(spans)
def test_spans_meet_where_they_have_a_byte_together(several):
    pairs = list(meeting((*span, number) for number, span in enumerate(several)))
    right = [(a, b) for a in range(len(several)) for b in range(a) if set(range(*several[a])) & set(range(*several[b]))]
    assert sorted(map(sorted, pairs)) == sorted(map(sorted, right))
    assert all(several[first][0] <= several[second][0] for first, second in pairs)


def test_columns_of_a_matrix_do_not_meet():
    wide = torch.zeros(4, 12)
    q, k, v = wide.chunk(3, dim=1)
    assert not meets(box_of(q), box_of(k))
    assert not meets(box_of(k), box_of(v))
    assert meets(box_of(q), box_of(wide[2]))


@many
@given(st.lists(walks, max_size=4), walks)
def test_covered_counts_each_element_once(several, target):
    target = viewed(base(), target)
    parts = [viewed(base(), walk) for walk in several]
    seen = set().union(*map(touched, parts)) & touched(target)
    assert covered([box_of(part) for part in parts], box_of(target)) == len(seen) // 4


@examples(150, derandomize=True)
@given(walks, walks, st.sampled_from([torch.int32, torch.int64]), st.sampled_from([1, 2, 3]))
def test_a_copy_of_slices_is_read_exactly(tmp_path_factory, of, into, dtype, pages):
    """Any part of a file's tensor into any part of a destination, through any slot."""
    part = viewed(base(), of)
    destination = torch.full(BASE, -1, dtype=dtype)
    place = viewed(destination, into)
    if part.numel() == 0 or place.shape != part.shape:
        place = torch.empty_strided(part.shape, tuple(2 * s for s in part.stride()), dtype=dtype).fill_(-1)
        destination, into_box = place, None
    else:
        into_box = box_of(place)
    path = tmp_path_factory.mktemp("copy") / "x.safetensors"
    write_safetensors(path, {"shift": torch.zeros(pages, dtype=torch.uint8), "w": base()})
    with hw.open(path) as source, hw.Pool(2, 3 * 4096) as pool:
        step = Copy("w", "destination", box_of(part), into_box)
        reads = list(reads_of(step, source.manifest["w"], destination, 256))
        source.read(reads, pool=pool)
    assert torch.equal(place, part.to(dtype))
    if into_box is not None:
        place.fill_(-1)
        assert bool((destination == -1).all()), "bytes beside the destination were written"


@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_reads_its_bytes_and_no_others(tmp_path, world):
    """Rows and columns of a matrix: long runs are read one by one."""
    weight = torch.randn(64, 1024)
    write_safetensors(tmp_path / "x.safetensors", {"w": weight})
    with hw.open(tmp_path) as source, hw.Pool() as pool:
        for dim in (0, 1):
            part = weight.chunk(world, dim)[1]
            destination = torch.empty(part.shape)
            reads = list(reads_of(Copy("w", "d", box_of(part)), source.manifest["w"], destination, 1 << 20))
            bytes_by_io = source.read(reads, pool=pool)
            assert sum(bytes_by_io.values()) == weight.nbytes // world
            assert torch.equal(destination, part)
