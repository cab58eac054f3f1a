"""What is said of many names in the same words is one line with a count; ``problems`` has all of them."""

import pickle

import pytest
import torch
from torch import nn

import hotweights as hw


def test_equal_problems_are_one_line():
    with torch.device("meta"):
        empty = nn.Sequential(*[nn.Linear(3, 3) for _ in range(40)])
    with pytest.raises(hw.PlanError) as caught:
        hw.load(empty, nn.Sequential(*[nn.Linear(3, 3) for _ in range(40)]))
    assert str(caught.value) == (
        "source and model do not fit; nothing was read or written: 0.bias, 0.weight, 1.bias and 77 more: lies on the "
        "meta device; say where it shall be made real with device="
    )
    assert len(caught.value.problems) == 80


def test_others_stay_apart():
    alike = [f"{number}.weight: is torn" for number in range(9)]
    error = hw.CheckpointError("broken", [*alike, "x: is long", "y: is long", "a line without a colon"])
    assert str(error).splitlines() == [
        "broken: 12 problems",
        "  - 0.weight, 1.weight, 2.weight and 6 more: is torn",
        "  - a line without a colon",
        "  - x: is long",
        "  - y: is long",
    ]


def test_a_failure_is_not_said_twice():
    """A problem may be the text of an error of the same kind, as another process said it."""
    heard = str(hw.TransferAborted("the update was aborted", ["rank0: no room"]))
    for problems in ([heard], [f"relay: {heard}"], ["the update was aborted"]):
        error = hw.TransferAborted("the update was aborted", problems)
        assert str(error).count("the update was aborted") == 1
        assert "no room" in str(error) or not error.problems
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_equal_hints_and_advice_are_told_once():
    hint = "the plan is made for the dtypes of the live version, which came as BF16"
    problems = [f"layer.{number}: F32 -> {dtype}; {hint}" for number in range(4) for dtype in ("F16", "BF16")]
    error = hw.PlanError("no", problems, advice="Do this.\nDo that.\nDo this.")
    assert str(error).count(hint) == 1
    assert f"8 of them: {hint}" in str(error)
    assert str(error).splitlines()[-2:] == ["Do this.", "Do that."]
    assert error.problems == tuple(sorted(problems))
