"""Steps say what they take and write; what operations read before it was written is found."""

import torch

from hotweights.boxes import Box, Memory, Region
from hotweights.plan.steps import Copy, Op, Program, layer_of, read_too_early

A = Memory("model", "layer.a")
B = Memory("model", "layer.b")
SOURCE = Memory("source", "s")
ALL = Box(torch.float32, (4,), (1,), 0)
HALF = Box(torch.float32, (2,), (1,), 0)


def op(func, *operands, writes=(0,)):
    return Op(func, operands, {}, (), tuple(operands[number] for number in writes), operands)


def test_a_copy_and_a_program_answer_alike():
    copy = Copy("s", "layer.a", into=HALF)
    program = Program(("s",), (), (Region(A, HALF),))
    for step in (copy, program):
        assert step.sources == ("s",)
        assert step.destinations == ("layer.a",)
        assert list(step.written) == [("layer.a", HALF)]
        assert layer_of(step) == "layer"


def test_a_step_that_writes_nothing_is_of_no_layer():
    assert layer_of(Program(("s",), (), ())) == ""


def test_what_is_added_to_is_read_and_what_is_copied_over_is_not():
    add, copy = torch.ops.aten.add_.Tensor, torch.ops.aten.copy_.default
    a, source = Region(A, ALL), Region(SOURCE, ALL)
    assert read_too_early([op(add, a, source)], {}) == {"layer.a"}
    assert read_too_early([op(copy, a, source)], {}) == set()
    assert read_too_early([op(copy, a, source), op(add, a, source)], {}) == set()


def test_a_half_that_was_written_is_not_the_whole():
    copy, written = torch.ops.aten.copy_.default, {}
    first, b = op(copy, Region(A, HALF), Region(SOURCE, HALF)), Region(B, ALL)
    assert read_too_early([first, op(copy, b, Region(A, ALL))], written) == {"layer.a"}
    assert written == {"layer.a": [HALF], "layer.b": [ALL]}
    assert read_too_early([op(copy, b, Region(A, HALF))], written) == set()
