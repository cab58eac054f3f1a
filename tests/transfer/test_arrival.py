"""What a receiver counts of a tensor as come: each byte once, in whatever parts."""

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

import hotweights as hw
from hotweights.manifest import TensorSpec
from hotweights.ranges import Range
from hotweights.transfer.arrival import Arrival

ROW, ROWS = 12, 8
SPEC = TensorSpec("w", torch.uint8, (ROWS, ROW))


def bytes_of(part):
    return {part.start + run * part.stride + byte for run in range(part.count) for byte in range(part.nbytes)}


@st.composite
def cells(draw):
    """Rows and columns of the tensor."""
    top = draw(st.integers(0, ROWS - 1))
    count = draw(st.integers(1, ROWS - top))
    left = 3 * draw(st.integers(0, 3))
    wide = draw(st.sampled_from([3, 6, 2]).filter(lambda wide: left + wide <= ROW))
    return Range(top * ROW + left, wide, count, ROW) if count > 1 else Range(top * ROW + left, wide)


@examples(300)
@given(st.lists(cells(), max_size=12))
def test_nothing_comes_twice(parts):
    arrival, seen = Arrival(0, SPEC, ()), set()
    for part in parts:
        new = bytes_of(part)
        if seen & new:
            with pytest.raises(hw.ProtocolError, match="came twice"):
                arrival.take(part)
            return
        arrival.take(part)
        seen |= new


def test_a_grid_of_many_parts_is_not_compared_part_by_part(monkeypatch):
    def compared(parts):
        raise AssertionError("it was compared with all others")

    monkeypatch.setattr("hotweights.transfer.arrival.disjoint", compared)
    side, cell = 32, 1024
    stride = 8 * cell
    arrival = Arrival(0, TensorSpec("w", torch.uint8, (side * 16, stride)), ())
    for row in range(side):
        for column in range(8):
            arrival.take(Range(row * 16 * stride + column * cell, cell, 16, stride))
    assert arrival.complete
