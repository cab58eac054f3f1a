"""Lowering: which operations become one step, and which steps wait for others."""

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.plan.disjoint_sets import DisjointSets
from hotweights.plan.steps import Copy, Program
from hotweights.testing import assert_same_bits
from hotweights.tracing.ordering import cycles, levels


class Model(nn.Module):
    """Three parameters, written by ``write``."""

    def __init__(self, write):
        super().__init__()
        for name in "pqg":
            self.register_parameter(name, nn.Parameter(torch.zeros(4, 4), requires_grad=False))
        self.write = write

    def load_weights(self, pairs):
        self.write(self, dict(pairs))


TENSORS = {name: torch.rand(4, 4, generator=torch.Generator().manual_seed(ord(name))) for name in "abcd"}


def traced(write):
    """The plan of what ``write`` does, seen to give what it gives on real tensors."""
    ours, theirs = Model(write), Model(write)
    plan = hw.trace(ours, hw.open(TENSORS).manifest)
    theirs.load_weights(TENSORS.items())
    hw.load(ours, TENSORS, plan=plan)
    assert_same_bits(ours.state_dict(), theirs.state_dict())
    return plan


def mutual(model, tensors):
    """A copy in the middle of what shares an intermediate result."""
    double = tensors["a"] * 2
    model.p[:3].copy_(double[:3])
    model.p.copy_(tensors["b"])
    model.p[3:].copy_(double[3:])
    model.q.copy_(tensors["c"])
    model.g.copy_(tensors["d"])


def test_two_steps_that_wait_for_each_other_become_one():
    plan = traced(mutual)
    programs = [step for step in plan.steps if isinstance(step, Program)]
    assert [set(step.sources) for step in programs] == [{"a", "b"}]
    assert len(plan.steps) == 3
    assert not plan.levels


def circle(model, tensors):
    """Three programs, each of which is done in part before the next; and a copy that waits for the last."""
    first, second, third = (tensors[name] * 2 for name in "abc")
    model.p[:3].copy_(first[:3])
    model.p.copy_(second)
    model.q.copy_(second)
    model.q.copy_(third)
    model.g.copy_(third)
    model.g[2:].copy_(first[2:])
    model.g[:1].copy_(tensors["d"][:1])


def test_a_circle_becomes_one_program_without_what_comes_behind_it():
    plan = traced(circle)
    assert [type(step) for step in plan.steps] == [Program, Copy]
    assert set(plan.steps[0].sources) == {"a", "b", "c"}
    assert plan.levels == (0, 1)


def test_what_waits_for_nothing_has_no_level():
    plan = traced(
        lambda model, tensors: [getattr(model, p).copy_(tensors[s]) for p, s in zip("pqg", "abc", strict=True)]
    )
    assert plan.steps == (Copy("a", "p"), Copy("b", "q"), Copy("c", "g"))
    assert plan.levels == ()


def test_levels_are_the_longest_way():
    assert levels([(0, 1), (1, 2), (0, 2), (5, 2)]) == {0: 0, 5: 0, 1: 1, 2: 2}
    assert levels([]) == {}


@pytest.mark.parametrize("count", [1, 2000])
def test_cycles_are_found_apart_from_what_leads_to_them_and_away(count):
    edges, expected = set(), set()
    for number in range(0, 10 * count, 10):
        edges |= {(number + a, number + b) for a, b in ((0, 1), (1, 2), (2, 3), (3, 1), (3, 4), (4, 5), (5, 4), (5, 6))}
        expected |= {frozenset((number + 1, number + 2, number + 3)), frozenset((number + 4, number + 5))}
    assert set(map(frozenset, cycles(edges))) == expected


def test_sets_are_joined_through_any_member():
    sets = DisjointSets()
    sets.join([1, 2])
    sets.join([3, 4, 5])
    assert sets.of(1) == sets.of(2) != sets.of(3)
    sets.join([5, 2])
    assert len({sets.of(member) for member in (1, 2, 3, 4, 5)}) == 1
    assert sets.of("alone") == "alone"
