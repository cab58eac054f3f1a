"""Places and targets: which names a model's tensors have, and which of them cannot be written."""

import pytest
import torch
from torch import nn

from hotweights.model.places import places, targets_of


def model():
    layer = nn.Linear(2, 3)
    layer.register_buffer("mask", torch.zeros(1))
    layer.register_buffer("cache", torch.zeros(1), persistent=False)
    return nn.Sequential(nn.BatchNorm1d(2), layer)


def test_places_are_those_of_the_state_dict_and_of_other_buffers():
    found = list(places(model()))
    assert [place.name for place in found if place.persistent] == list(model().state_dict())
    assert [place.name for place in found if not place.persistent] == ["1.cache"]


def test_a_place_holds_what_is_put_there():
    own = model()
    for place in places(own):
        new = torch.full_like(place.tensor, 3)
        place.put(nn.Parameter(new) if isinstance(place.tensor, nn.Parameter) else new)
        assert (place.tensor == 3).all()
    assert all((tensor == 3).all() for tensor in own.state_dict().values())


PROBLEMS = {
    "on meta": (torch.empty(2, device="meta"), "meta device"),
    "sparse": (torch.eye(2).to_sparse(), "layout"),
    "expanded": (torch.zeros(1).expand(4), "share memory"),
    "lazy": (nn.UninitializedParameter(), "uninitialised"),
    "plain": (torch.zeros(2), ""),
    "transposed": (torch.zeros(2, 3).t(), ""),
    "expanded along nothing": (torch.zeros(1).expand(1), ""),
}


@pytest.mark.parametrize(("tensor", "problem"), PROBLEMS.values(), ids=PROBLEMS)
def test_what_cannot_be_written_says_why(tensor, problem):
    found = targets_of({"a": tensor}, None)["a"].problem
    assert problem in found
    assert bool(problem) == bool(found)


def test_meta_is_no_problem_where_it_will_be_made_real():
    assert not targets_of({"a": torch.empty(2, device="meta")}, torch.device("cpu"))["a"].problem


def test_targets_say_which_memory_they_share():
    base = torch.zeros(4, 4)
    found = targets_of({"all": base, "tied": base, "row": base[1], "column": base[:, 1], "other": torch.ones(1)}, None)
    assert {name: target.owner for name, target in found.items()} == {
        "all": "all",
        "tied": "all",
        "row": "row",
        "column": "column",
        "other": "other",
    }
    assert [(found[name].memory, found[name].start) for name in found] == [
        ("all", 0),
        ("all", 0),
        ("all", 16),
        ("all", 4),
        ("", 0),
    ]
    assert found["column"].stride == (4,)
