"""What wrappers are, in words: equal where they mean the same, and never equal where nobody can see."""

import dataclasses
import enum
import functools
from typing import NamedTuple

import pytest
import torch

from hotweights.shell import described


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Layout:
    size: int
    more: object = None


class Config(NamedTuple):
    fast: bool


def quantiser(tensor):
    return tensor


class Opaque:
    pass


@pytest.mark.parametrize(
    "value",
    [
        None,
        1.5,
        torch.float8_e4m3fn,
        Colour.RED,
        Layout(3, [Colour.RED]),
        Config(True),
        quantiser,
        Layout,
        {"a": (1, 2), "b": functools.partial(quantiser, 3, axis=0)},
    ],
)
def test_the_same_is_said_in_the_same_words(value):
    assert described(value) == described(value)


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (1, 1.0),
        (1, True),
        ("1", 1),
        (Layout(3), Layout(4)),
        (Layout(3, Layout(1)), Layout(3, Layout(2))),
        (Config(True), Config(False)),
        (functools.partial(quantiser, 3), functools.partial(quantiser, 4)),
        ([1, [2]], [[1], 2]),
        (torch.int8, "torch.int8"),
    ],
)
def test_what_differs_is_said_in_other_words(value, other):
    assert described(value) != described(other)


def test_a_list_and_a_tuple_mean_the_same():
    assert described([1, 64]) == described((1, 64)) == described(torch.Size((1, 64)))


@pytest.mark.parametrize("value", [Opaque(), lambda tensor: tensor, torch.zeros(1), {1, 2}, Layout(3, Opaque())])
def test_what_nobody_can_see_into_is_never_the_same(value):
    assert described(value) != described(value)
    assert "cannot be compared" in described(value)


def test_no_end_is_no_trouble():
    around = []
    around.append(around)
    assert "cannot be compared" in described(around)
