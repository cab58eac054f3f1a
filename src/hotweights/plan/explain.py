"""A plan in words: how one tensor comes to be, a summary, rows for a table, and what differs from another model."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..boxes import Box, meets, moved, slices, whole
from ..dtypes import OpaqueDtype, format_name
from ..errors import UnknownName
from ..manifest import Manifest
from ..sharding import Part
from ..text import some, summary, table
from .steps import Copy, Fate, Op, Program, Step, Target

if TYPE_CHECKING:
    from .plan import LoadPlan

_ALL = "all of it"
_WHY = {
    Fate.SKIPPED: "skipped: loading code was given it, and did not use it",
    Fate.UNEXPECTED: "unexpected: the model has no place for it, and allow_unexpected= allows that",
    Fate.MISMATCHED: "mismatched: the model's tensor has another shape, and allow_mismatched= allows that",
}


def explain(plan: LoadPlan, name: str) -> str:
    """Which parts of which source tensors become the model's tensor ``name``; of a source tensor, where it goes."""
    if name in plan.transient:
        return _explain_transient(plan, name)
    lines = [*_writes_of(plan, name), *_ties_of(plan, name)]
    target = plan.targets.get(name)
    if not lines and target is not None and target.owner != name:
        return f"{_titled(plan, name)}\n  is one tensor with {target.owner}\n{explain(plan, target.owner)}"
    if not lines and name in plan.unproven:
        lines = [f"  the model's own code writes it: {graph_break}" for graph_break in plan.graph_breaks]
    if not lines and target is not None:
        fate = plan.fates.get(name)
        lines = [f"  nothing writes it{f' ({fate.value})' if fate else ''}; it keeps its values"]
    if not lines and name in plan.manifest:
        return _explain_source(plan, name)
    if not lines:
        raise UnknownName("tensor", name, [some(alike(name, [*plan.targets, *plan.transient, *plan.manifest]))])
    return "\n".join([_titled(plan, name), *lines])


def _explain_transient(plan: LoadPlan, name: str) -> str:
    """What becomes of a non-persistent buffer."""
    owner = plan.transient[name]
    if owner:
        shown = f"{name}\n  is a non-persistent buffer in the memory of {owner}, and shows what that holds"
        return f"{shown}\n{explain(plan, owner)}"
    return (
        f"{name}\n  is a non-persistent buffer, which no checkpoint carries: it keeps its values, and on meta it is "
        "initialised (init_missing= of hotweights.load)"
    )


def summarise(plan: LoadPlan) -> str:
    """What ``print(plan)`` shows: steps, fates and everything that a plan cannot repeat."""
    copies = [step for step in plan.steps if isinstance(step, Copy)]
    programs = [step for step in plan.steps if isinstance(step, Program)]
    sliced = sum(step.of is not None or step.into is not None for step in copies)
    rows = [("copies", f"{len(copies)}" + (f", {sliced} of them of slices" if sliced else ""))]
    if programs:
        ops = Counter(_named(op) for step in programs for op in step.ops)
        common = ", ".join(f"{count} {name}" for name, count in ops.most_common(4))
        rows.append(("programs", f"{len(programs)} of {sum(ops.values())} operations: {common}"))
    if plan.levels:
        rows.append(("levels", f"{max(plan.levels) + 1}, done one after the other"))
    rows += [(fate.value, summary(names, {})) for fate in Fate if (names := plan.names(fate))]
    if plan.fallback:
        rows.append(("fallback", f"{summary(plan.fallback, {})}, by the model's own code, because of"))
    rows += [("", f"  {graph_break}") for graph_break in plan.graph_breaks]
    if plan.state_read:
        rows.append(("reads", f"{summary(plan.state_read, {})} of the model: the plan holds for their values"))
    rows += [("changes", effect) for effect in plan.side_effects]
    if plan.processed:
        rows.append(
            ("processed", f"{summary(plan.processed, {})} by a LiveModel: this plan is for what their kernels use;")
        )
        rows.append(("", "see live.plan, live.explain(name)"))
    return table(rows)


def rows_of(plan: LoadPlan, step: Step) -> Iterator[tuple[str, str, str]]:
    """For a table: a destination, how it comes to be, and from what."""
    if isinstance(step, Copy):
        part = _part_of_target(plan, step.into, step.destination).removeprefix(_ALL)
        how = f"cast {plan.casts[step.source]}" if step.source in plan.casts else "copy"
        yield step.destination + part, how, step.source + _part_of_source(plan, step.of, step.source)
        return
    for name in dict.fromkeys(step.destinations):
        yield name, "program: " + ", ".join(map(_named, step.ops)), ", ".join(step.sources)


def differences(plan: LoadPlan, manifest: Manifest, targets: Mapping[str, Target]) -> Iterator[str]:
    """What is not as it was when the plan was made: a line for each tensor of the source or the model."""
    yield from _differing("source", plan.manifest, manifest, str)
    yield from _differing("model", plan.targets, targets, _target_in_words)
    written = {name for step in plan.steps for name in step.destinations}
    for name in sorted(written & targets.keys()):
        if targets[name].problem:
            yield f"model: {name}: {targets[name].problem}"


def _writes_of(plan: LoadPlan, name: str) -> list[str]:
    """A line for each step that writes bytes of ``name``, by level and by the first byte that it writes."""
    lines: list[tuple[int, int, str]] = []
    for level, step in zip(plan.levels or (0,) * len(plan.steps), plan.steps, strict=True):
        writes = [(written, box) for written, box in step.written if _reaches(plan, written, box, name)]
        if writes:
            first = min(0 if box is None else box.offset for _, box in writes)
            lines.append((level, first, _line(plan, step, writes, name)))
    return [line for *_, line in sorted(lines, key=lambda item: item[:2])]


def _line(plan: LoadPlan, step: Step, writes: Iterable[tuple[str, Box | None]], name: str) -> str:
    parts = " and ".join(dict.fromkeys(_place(plan, written, box, name) for written, box in writes))
    if isinstance(step, Copy):
        cast = f", cast {plan.casts[step.source]}" if step.source in plan.casts else ""
        return f"  {parts} <- {step.source}{_part_of_source(plan, step.of, step.source)}{cast}"
    return f"  {parts} <- a program of {', '.join(step.sources) or 'no source'}: {', '.join(map(_named, step.ops))}"


def _ties_of(plan: LoadPlan, name: str) -> Iterator[str]:
    for first, second in plan.ties:
        if name == first.destination:
            yield f"  {second.source} is compared with {first.source}: they are one tensor in the model"


def _explain_source(plan: LoadPlan, name: str) -> str:
    title = f"{plan.manifest[name]} (of the source)"
    if name in plan.fallback:
        return f"{title}\n  is given to the model's own loading code"
    lines = [line for step in plan.steps if name in step.sources for line in _uses_of(plan, step, name)]
    lines += [
        f"  is compared with {first.source}: they are one tensor in the model"
        for first, second in plan.ties
        if second.source == name
    ]
    if not lines:
        fate = plan.fates.get(name)
        lines = [f"  goes nowhere ({'unused' if fate is None else _WHY.get(fate, fate.value)})"]
    return "\n".join([title, *dict.fromkeys(lines)])


def _uses_of(plan: LoadPlan, step: Step, name: str) -> Iterator[str]:
    """Which part of the source tensor goes into which part of the model's; a rank reads no more than that."""
    if isinstance(step, Copy):
        part = _part_of_source(plan, step.of, name)
        into = step.destination + _part_of_target(plan, step.into, step.destination).removeprefix(_ALL)
        cast = f", cast {plan.casts[name]}" if name in plan.casts else ""
        yield f"  {part or _ALL} -> {into}{cast}"
        return
    read = dict.fromkeys(
        _part_of_source(plan, region.box, name) or _ALL
        for op in step.ops
        for region in op.reads
        if region.memory.kind == "source" and region.memory.name == name
    )
    for written, box in dict.fromkeys(step.written):
        into = written + _part_of_target(plan, box, written).removeprefix(_ALL)
        beside = [other for other in step.sources if other != name]
        others = f", together with {some(beside, 3)}" if beside else ""
        yield f"  {' and '.join(read) or _ALL} -> {into} by a program: {', '.join(map(_named, step.ops))}{others}"


def _titled(plan: LoadPlan, name: str) -> str:
    target = plan.targets.get(name)
    if target is None:
        return name
    beside = [other for other in plan.targets if other != name and _reaches(plan, other, None, name)]
    if not beside:
        return str(target.spec)
    names = ", ".join(beside) if len(beside) <= 3 else f"{len(beside)} tensors"
    return f"{target.spec} (shares memory with {names})"


def _reaches(plan: LoadPlan, written: str, box: Box | None, name: str) -> bool:
    """Whether a write to ``written`` changes bytes of ``name``: it is that tensor, or shares memory with it."""
    if written == name:
        return True
    first, second = plan.targets.get(written), plan.targets.get(name)
    if first is None or second is None or not first.memory or first.memory != second.memory:
        return False
    return meets(moved(box or first.box, first.start), moved(second.box, second.start))


def _place(plan: LoadPlan, written: str, box: Box | None, name: str) -> str:
    part = _part_of_target(plan, box, written)
    return part if written == name else written + part.removeprefix(_ALL)


def _part_of_target(plan: LoadPlan, box: Box | None, name: str) -> str:
    target = plan.targets.get(name)
    return _ALL if box is None else _part(box, None if target is None else target.box) or _ALL


def _part_of_source(plan: LoadPlan, box: Box | None, name: str) -> str:
    spec = plan.manifest.get(name)
    if box is None:
        return ""
    return _part(box, None if spec is None or isinstance(spec.dtype, OpaqueDtype) else whole(spec))


def _part(box: Box, of: Box | None) -> str:
    """``[0:768, :]`` where that says it all; nothing for all of it; strides and bytes where it is no rectangle."""
    ranges = None if of is None else slices(box, of)
    if of is None or ranges is None:
        shape, stride = list(box.shape), list(box.stride)
        return f"[{format_name(box.dtype)} {shape} with strides {stride} from byte {box.offset}]"
    words = [
        ":" if (start, stop) == (0, length) else f"{start}:{stop}"
        for (start, stop), length in zip(ranges, of.shape, strict=True)
    ]
    return f"[{', '.join(words)}]" if set(words) - {":"} else ""


def _named(op: Op) -> str:
    return str(op.func).removeprefix("aten.").partition(".")[0]


def alike(name: str, known: Iterable[str]) -> list[str]:
    """Names that hold this one, or are near it, or end as it does; all where there are none."""
    last, several = name.rpartition(".")[2], list(dict.fromkeys(known))
    return sorted(
        [other for other in several if name in other]
        or difflib.get_close_matches(name, several, n=5, cutoff=0.9)
        or [other for other in several if other.endswith(last)]
        or several
    )


def _differing(
    whose: str, expected: Mapping[str, Any], present: Mapping[str, Any], words: Callable[[Any], str]
) -> Iterator[str]:
    for name, before in expected.items():
        now = present.get(name)
        if now is None:
            yield f"{whose}: {name}: is not there; the plan has {_short(words(before), name)}"
        elif now != before and words(now) != words(before):
            yield f"{whose}: {name}: {_short(words(now), name)} found, the plan has {_short(words(before), name)}"
    for name, now in present.items():
        if name not in expected:
            yield f"{whose}: {name}: {_short(words(now), name)} found, which the plan does not know"


def _target_in_words(target: Target) -> str:
    stride = "" if target.stride is None else f" with strides {list(target.stride)}"
    beside = f" at byte {target.start} of the memory of {target.memory}" if target.memory else ""
    tied = "" if target.owner == target.spec.name else f" tied with {target.owner}"
    part = "" if target.part is None else f", {_elements(target.part)} of {target.part}"
    shell = "" if target.spec.shell is None else f", in a {target.spec.shell}"
    return f"{format_name(target.spec.dtype)} {list(target.spec.shape)}{stride}{tied}{beside}{part}{shell}"


def _elements(part: Part) -> str:
    """Which elements, so that the parts of two ranks are never one."""
    boxes = (
        [f"{first}:{first + length}" for first, length in zip(block.start, block.shape, strict=True)]
        for block in part.blocks
    )
    return " and ".join(f"[{', '.join(box)}]" for box in boxes) or "nothing"


def _short(words: str, name: str) -> str:
    return words.removeprefix(f"{name}: ")
