"""Extents: who reaches into whose memory, by address; and new versions for all that see what was written."""

import pytest
import torch
from torch import nn

from hotweights.memory.extents import Extents, renew

WHOLE = torch.arange(24.0)

MEETING = {
    "itself": WHOLE,
    "a view": WHOLE[3:5],
    "its data": WHOLE.data,
    "another storage over the same bytes": torch.from_numpy(WHOLE.numpy()[2:4]),
    "other numbers over the same bytes": WHOLE.view(torch.uint8)[-1:],
    "a transposed view": WHOLE.view(4, 6).t(),
    "an expanded view": WHOLE[5:6].expand(7),
}


@pytest.mark.parametrize("tensor", MEETING.values(), ids=MEETING)
def test_whoever_shares_bytes_is_found(tensor):
    assert Extents([WHOLE]).meets(tensor)
    assert Extents([tensor]).meets(WHOLE)


def test_neighbours_in_one_storage_do_not_meet():
    third = [WHOLE[:8], WHOLE[8:16], WHOLE[16:]]
    assert not Extents([third[0], third[2]]).meets(third[1])
    assert not Extents([third[1]]).meets(third[0])
    assert Extents(third[:2]).meets(WHOLE[7:9])


@pytest.mark.parametrize(
    "tensor",
    [torch.empty(0), torch.empty(2, device="meta"), nn.UninitializedParameter(), torch.eye(2).to_sparse()],
    ids=["empty", "meta", "lazy", "sparse"],
)
def test_what_has_no_plain_bytes_meets_nothing(tensor):
    assert not Extents([WHOLE]).meets(tensor)
    assert not Extents([tensor]).meets(WHOLE)


def test_the_written_and_all_that_see_their_bytes_get_a_new_version():
    written, other = nn.Parameter(torch.zeros(4)), torch.zeros(4)
    data, part, away = written.data, nn.Parameter(written.data[1:2]), torch.zeros(4)
    before = [tensor._version for tensor in (written, data, part, other, away)]
    renew([written], [other, data, part])
    grown = [tensor._version - was for tensor, was in zip((written, data, part, other, away), before, strict=True)]
    assert grown == [1, 1, 1, 0, 0]


def test_tensors_of_inference_mode_and_lazy_ones_have_no_version_to_renew():
    with torch.inference_mode():
        tensor = torch.zeros(2)
    renew([tensor], [tensor[:1], nn.UninitializedParameter(), torch.empty(2, device="meta")])
