"""Ranges against sets of bytes: what is cut is what was asked for, each byte once."""

import itertools

import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from hotweights.boxes import box_of
from hotweights.ranges import Range, disjoint, pieces_of, range_of, ranges_of, shared, within

ROW = 24


def places(asked):
    """The bytes of a range, in its order."""
    return [asked.start + run * asked.stride + byte for run in range(asked.count) for byte in range(asked.nbytes)]


def union(ranges):
    return {byte for asked in ranges for byte in places(asked)}


@st.composite
def columns(draw):
    """Some columns of some rows of a matrix with rows of 24 bytes; whole rows are a single run."""
    first, last = sorted(draw(st.lists(st.integers(0, ROW), min_size=2, max_size=2, unique=True)))
    row, rows = draw(st.integers(0, 5)), draw(st.integers(1, 6))
    if last - first == ROW:
        return Range(row * ROW, rows * ROW)
    return Range(row * ROW + first, last - first, rows, ROW if rows > 1 else 0)


anything = st.builds(Range, st.integers(0, 200), st.integers(1, 100)) | columns()
strided = st.builds(lambda a, n, c, more: Range(a, n, c, n + more), *(st.integers(1, 9) for _ in range(4))).filter(
    lambda asked: asked.count > 1
)


@examples(100)
@given(st.lists(columns().map(lambda asked: (asked,)), min_size=1, max_size=4))
def test_what_several_want_is_cut_into_pieces_that_each_wants_wholly_or_not(requests):
    cut = shared(requests)
    whole = [byte for asked, _ in cut for byte in places(asked)]
    assert len(whole) == len(set(whole)), "a byte is sent twice"
    assert set(whole) == union(asked for request in requests for asked in request)
    for number, request in enumerate(requests):
        mine = [asked for asked, asking in cut if number in asking]
        assert union(mine) == union(request)
        assert all(any(within(asked, whole) for whole in request) for asked in mine)


@examples(100)
@given(st.lists(st.tuples(anything | strided), min_size=1, max_size=4))
def test_however_odd_the_requests_everybody_gets_what_it_asked_for(requests):
    for number, request in enumerate(requests):
        mine = [asked for asked, asking in shared(requests) if number in asking]
        assert sorted(byte for asked in mine for byte in places(asked)) == sorted(union(request))


def test_ranks_that_want_a_slice_each_are_sent_the_tensor_once():
    rows = [(Range(rank * 100, 100),) for rank in range(4)]
    assert [(asked, set(asking)) for asked, asking in shared(rows)] == [(rows[rank][0], {rank}) for rank in range(4)]
    halves = [(Range(0, 12, 10, ROW),), (Range(12, 12, 10, ROW),), (Range(0, 240),)]
    assert [(asked, set(asking)) for asked, asking in shared(halves)] == [
        (halves[0][0], {0, 2}),
        (halves[1][0], {1, 2}),
    ]


@examples(100)
@given(anything | strided, st.integers(1, 64))
def test_pieces_are_the_range_in_order_and_small_enough(asked, limit):
    pieces = list(pieces_of(asked, limit))
    assert [byte for piece in pieces for byte in places(piece)] == places(asked)
    assert all(piece.size <= limit and piece.fits(asked.stop) for piece in pieces)


@examples(100)
@given(anything | strided, anything | strided)
def test_disjoint_is_never_said_of_what_is_not(asked, other):
    apart = not union([asked]) & union([other])
    assert apart or not disjoint((asked, other))
    if asked.count == other.count == 1:
        assert disjoint((asked, other)) == apart


@examples(200)
@given(st.lists(anything | strided, min_size=2, max_size=5))
def test_several_are_disjoint_when_each_two_are(asked):
    assert disjoint(asked) <= all(disjoint(pair) for pair in itertools.combinations(asked, 2))
    if disjoint(asked):
        assert len(union(asked)) == sum(part.size for part in asked)


@examples(100)
@given(anything | strided, anything | strided)
def test_within_says_where_the_bytes_lie_among_the_others(part, whole):
    inside = within(part, whole)
    if inside is not None:
        order = places(whole)
        assert [order[byte] for byte in places(inside)] == places(part)
    elif part.count == whole.count == 1:
        assert not set(places(part)) <= set(places(whole))


@examples(100)
@given(anything | strided, st.integers(0, 400))
def test_what_fits_has_all_its_bytes_in_the_tensor(asked, nbytes):
    assert asked.fits(nbytes) == (max(places(asked)) < nbytes)


def test_malformed_ranges_fit_nowhere():
    for odd in (
        Range(-1, 2),
        Range(0, -2),
        Range(0, 2, 0),
        Range(0, 2, -1, 4),
        Range(0, 2, 2, 0),
        Range(0, 4, 2, 2),
        Range(0, 4, 1, 4),
    ):
        assert not odd.fits(100)


def bytes_of(view):
    """Which bytes of its storage a tensor is, in its order."""
    first, item = view.storage_offset() * view.element_size(), view.element_size()
    index = torch.arange(view.untyped_storage().nbytes() // item).as_strided(view.shape, view.stride())
    return [first + at * item + byte for at in index.reshape(-1).tolist() for byte in range(item)]


def test_slices_of_tensors_are_ranges():
    matrix, stack = torch.zeros(8, 6), torch.zeros(4, 3, 10, dtype=torch.bfloat16)
    views = [matrix, matrix[2:5], matrix[:, 2:4], matrix[1:3, 5:], matrix[3], stack[1:], stack[:, 1:2], stack[:, :, :5]]
    views += [stack[1], stack[2, :, 4:6], stack[:, 0], torch.tensor(3.0), matrix[:0]]
    for view in views:
        asked = range_of(box_of(view))
        assert asked is not None, view.shape
        assert places(asked) == bytes_of(view)
    for odd in (
        matrix.t(),
        stack[:, :2, :5],
        torch.zeros(1, 5).expand(3, 5),
        matrix[:, ::2][:, :, None].expand(8, 3, 2),
    ):
        assert range_of(box_of(odd)) is None


def test_small_gaps_and_short_runs_are_sent_rather_than_cut():
    rows = torch.zeros(1000, 1000)
    assert ranges_of([box_of(rows[:, :10])]) == (Range(0, 999 * 4000 + 40),)
    assert ranges_of([box_of(rows[:, :500])]) == (Range(0, 2000, 1000, 4000),)
    near = [box_of(rows[10:20]), box_of(rows[30:40])]
    assert ranges_of(near) == (Range(40_000, 120_000),)
    far = [box_of(rows[500:600]), box_of(rows[10:20])]
    assert ranges_of(far) == (Range(40_000, 40_000), Range(2_000_000, 400_000))
    assert ranges_of([*far, *far]) == ranges_of(far)
