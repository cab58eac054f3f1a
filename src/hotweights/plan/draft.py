"""Draft: from steps to a plan. It says what becomes of every name, and reports every problem at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..arguments import check_choices
from ..boxes import Memory, Region
from ..dtypes import Cast, format_name
from ..errors import PlanError
from ..manifest import Manifest
from ..text import some
from .absent import absent_from, unlike_in
from .adapters import by_parts, homeless_adapter, of_adapter, of_ranks
from .inside import Insides, outer_manifest, outer_targets
from .local import Local, whole_manifest, whole_targets
from .misnamed import misnamed, misspelt, parametrised, shortened
from .patterns import Patterns, both, matches, narrowest, typed
from .plan import LoadPlan
from .quantised import in_layers_of, quantised_by, refusal, unscaled
from .rules import Rules
from .steps import Copy, Fate, GraphBreak, Op, Program, Step, Target
from .unused import not_used
from .writes import Gap, Writes, fits


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the caller allows.

    Attributes:
        missing: names of the model that may stay as they are.
        partial: names of the model of which some bytes may stay as they are.
        unexpected: source tensors that may have no place.
        mismatched: names of the model that may stay as they are where the source's tensor has another shape.
        cast: which casts that lose information are meant; the others are problems.
    """

    missing: Patterns = ()
    partial: Patterns = ()
    unexpected: Patterns = ()
    cast: Cast = "error"
    mismatched: Patterns = ()


@dataclass(frozen=True, slots=True)
class Traced:
    """What the model's own loading code does, as tracing saw it.

    Attributes:
        steps: with levels, in order.
        taken: source tensors that it took; those that it writes nowhere are skipped.
        constants: tensors that programs use.
        state_read: the model's tensors whose values it asked for.
        side_effects: attributes that it changes.
        fallback: source tensors that no plan can load and that this code will get itself.
        graph_breaks: why: what it did that a plan cannot repeat.
        stopped: says that it ended before it was given every tensor, where it did.
    """

    steps: Sequence[tuple[int, Step]]
    taken: Container[str] = ()
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    state_read: Iterable[str] = ()
    side_effects: Sequence[str] = ()
    fallback: Sequence[str] = ()
    graph_breaks: Sequence[GraphBreak] = ()
    stopped: str = ""


LACKS = "; the source lacks "
"""What a problem says before the names of the tensors that it is about and the source does not have."""

_OWN_CODE = "the model's own loading code"
_NO_RULES, _NOTHING_ALLOWED = Rules(), Allowed()


def draft(
    manifest: Manifest,
    targets: Mapping[str, Target],
    *,
    traced: Traced | None = None,
    rules: Rules = _NO_RULES,
    allowed: Allowed = _NOTHING_ALLOWED,
    overlapping: Iterable[tuple[str, str]] = (),
    problems: Iterable[str] = (),
) -> LoadPlan:
    """Make the plan of loading ``manifest`` into ``targets``.

    Args:
        manifest: what the source promises.
        targets: the names of the model.
        traced: what the model's own loading code does; without it the steps are those of ``rules``.
        rules: those of the model's framework.
        allowed: what is no problem.
        overlapping: pairs of targets that share bytes without being the same tensor.
        problems: what the caller found already.

    Raises:
        PlanError: with every problem.
    """
    check_choices(cast=(allowed.cast, Cast))
    own_code = traced is not None
    # Whole tensors and wrappers are compared with such; only then is it cut down to what this rank and they hold.
    insides = Insides(manifest, targets)
    whole, wide = whole_manifest(outer_manifest(manifest)), whole_targets(outer_targets(targets))
    if traced is None:
        traced = Traced(tuple(_steps_of(rules, whole, wide)), constants=rules.constants)
    writes = Writes(whole, wide, allowed.cast, last_wins=own_code)
    mismatched: dict[Step, str] = {}
    unlike: dict[Step, str] = {}
    may_mismatch = _may_mismatch(allowed)
    may_any = allowed.mismatched or (allowed.unexpected and allowed.missing and allowed.partial)
    for level, step in traced.steps:
        shapes = _mismatch(step, whole, wide) if may_any or insides else ""
        if shapes and may_mismatch(step.sources[0], step.destinations[0]):
            mismatched[step] = shapes
        elif insides and not shapes and (problem := insides.problem(step)):
            unlike[step] = problem
        else:
            writes.add(level, step)
    local = Local(manifest, targets)
    levelled: list[tuple[int, Step]] = list(zip(writes.levels, writes.steps, strict=True))
    if insides:
        levelled = list(insides.steps(levelled))
    if whole is not manifest or wide is not targets:
        levelled = list(local.steps(levelled))
    ties = tuple(local.ties(insides.ties(writes.ties)))
    fates = _fates_of_sources(whole, writes, traced, matches(rules.skip))
    made = {name: misfit for name, misfit in rules.mismatched.items() if may_mismatch(misfit.sources[0], name)}
    left_out = [source for kept in (*mismatched, *unlike, *made.values()) for source in kept.sources]
    fates.update({source: Fate.MISMATCHED for source in left_out if source not in writes.fates})
    shapes_of = {step.destinations[0]: shapes for step, shapes in mismatched.items()}
    shapes_of |= {name: misfit.shapes for name, misfit in made.items()}
    wrong = {*problems, *local.problems, *writes.problems, *writes.double_writes(), *unlike.values()}
    wrong.update(line for name, misfit in rules.mismatched.items() if name not in made for line in misfit.problems)
    wrong.update(writes.overlaps(insides.outer(overlapping)))
    unexpected = list(_unexpected(fates, matches(allowed.unexpected)))
    missing: dict[str, str] = {}
    lacking: dict[str, tuple[int, ...]] = {}  # shapes of missing ones
    absent: list[str] = []  # missing, or allowed to be
    may_miss, may_be_partial = matches(both(allowed.missing, rules.allow_missing)), matches(allowed.partial)
    partial: dict[str, str] = {}
    absent_for = absent_from(whole, writes.steps)
    unlike_of = unlike_in(whole)
    misshapen: set[str] = set()  # partial, as a source tensor has not the shape of its likes
    unproven: list[str] = []
    kept = {name for step in (*mismatched, *unlike) for name in step.destinations} | made.keys()
    gaps = list(writes.gaps())
    for gap in gaps:
        if not gap.written and not kept.isdisjoint(gap.names):
            fates.update(dict.fromkeys(gap.names, Fate.MISMATCHED))
            continue
        # Of what the model's own code writes, nobody knows how much.
        some_of_it = bool(gap.written) or (bool(traced.fallback) and any(map(may_be_partial, gap.names)))
        fate, may_be = (Fate.PARTIAL, may_be_partial) if some_of_it else (Fate.MISSING, may_miss)
        tolerated = any(map(may_be, gap.names))
        absent += () if gap.written else gap.names
        if traced.fallback and not tolerated:
            unproven.append(gap.names[0])  # The model's own code may write it; only running that code can tell.
        elif tolerated:
            fates.update(dict.fromkeys(gap.names, fate))
        elif gap.written:
            by = writes.sources_of(gap.names)
            partial[gap.names[0]] = _in_words(gap, absent_for(gap.names), by)
            if odd := unlike_of(by):
                partial[gap.names[0]] += f"; {some(odd, 3)}"
                misshapen.add(gap.names[0])
        else:
            missing.update(dict.fromkeys(gap.names, _in_words(gap, absent_for(gap.names))))
            lacking.update(dict.fromkeys(gap.names, gap.spec.shape))
    stopped = traced.stopped if unexpected else ""
    if stopped:  # What is missing is in what it never looked at: other names, or to allow them, would lose weights.
        lacking_names = [*missing, *partial]
        wrong.add(stopped + (f". So {some(lacking_names, 3)} would lack weights" if lacking_names else ""))
        unexpected, missing, partial = ([], {}, {}) if lacking_names else (unexpected, missing, partial)
    elif (other := misnamed(whole, unexpected, absent)) is not None:
        wrong.add(other.problem)
        explained = {missing.get(name) for name in other.targets}  # A tied parameter is one problem with several names.
        unexpected = [name for name in unexpected if name not in other.sources]
        missing = {name: line for name, line in missing.items() if line not in explained}
    homeless = [name for name, fate in fates.items() if fate is Fate.UNEXPECTED]
    if own_code:  # Code that passes over names which it does not know drops scales without a word.
        dropped = [name for name, fate in fates.items() if fate is Fate.SKIPPED]
        if any(unscaled(whole, writes.casts, dropped)):
            homeless += dropped
    lost = sorted(unscaled(whole, writes.casts, homeless))
    quantised = quantised_by(homeless) if unexpected or lost else None
    misfits = list(writes.misfits)
    if quantised is not None:
        # One line instead of several for each layer. To allow their names would drop the scales, and leave the rest
        # wrong.
        of_these = in_layers_of(homeless)
        lost = [] if unexpected else lost[:1]
        unexpected = [name for name in unexpected if not of_these(name)]
        missing = {name: line for name, line in missing.items() if not of_these(name)}
        misfits = [name for name in misfits if not of_these(name)]
        wrong = {line for line in wrong if not of_these(line.partition(": ")[0])}
        wrong.add(refusal(*quantised))
    advice: list[str] = []
    unused = [name for name, fate in fates.items() if own_code and fate is Fate.SKIPPED]
    # Loading code that passes over an adapter would load the model under it, as if that were all.
    passed_over = [] if any(map(of_adapter, wide)) else _not_allowed(unused, allowed.unexpected)
    if homeless_parts := [name for name in (*unexpected, *passed_over) if of_adapter(name)]:
        # To allow them would load the model under the adapter, and drop what was trained.
        alone = all(map(of_adapter, whole))
        problem, cure = homeless_adapter(list(map(whole.called, homeless_parts)), whole, wide, alone=alone)
        wrong.add(problem)
        advice.append(cure)
        unexpected = [name for name in unexpected if not of_adapter(name)]
        missing = {} if alone else missing
    unfit = 0 if quantised else len(unexpected) + len(misfits)
    anothers = _of_another_model({*missing, *misfits}, unfit, whole, wide)
    if missing and not whole:
        advice.append("The source holds no tensors at all; an iterator that was read before gives none.")
    elif other_part := by_parts(whole, wide, missing):
        advice += [other_part] if other_part not in advice else []
    elif own_code and missing and not (writes.steps or traced.fallback or mismatched):
        advice.append("Nothing of the source fits: the model's own loading code knows none of these names.")
    elif missing and unexpected and len(unexpected) == len(whole):
        # To allow all of it would load nothing.
        advice.append(
            f"Nothing of the source fits the model: it has {some(list(map(whole.called, unexpected)), 3)}; the model "
            f"has {some(list(missing), 3)}. Give the weights of this model; rename= translates names."
        )
    elif anothers:
        advice.append(anothers)
    elif not quantised and not homeless_parts:
        lacks = dict.fromkeys(source for gap in gaps if gap.written for source in absent_for(gap.names))
        advice += [f"{whole.called(name)} was not used{said}" for name, said in misspelt(whole, unused, lacks).items()]
        # To allow what a misshapen part leaves unwritten would keep old bytes there.
        may_be_meant = [name for name in partial if name not in misshapen]
        advice += _allowing(missing, may_be_meant, unexpected, whole, wide)
    lacking = {name: shape for name, shape in lacking.items() if name in missing}
    meant = misspelt(whole, unexpected, lacking)
    if not stopped:
        wrong.update(
            shortened({name: _no_place(whole, name) + meant.get(name, "") for name in unexpected}, "unexpected")
        )
    wrong.update(shortened(missing, "missing"))
    wrong.update(partial.values())
    # Also where allow_unexpected= names them: "*" is meant for an extra head, not for weights without their scales.
    wrong.update(lost)
    if wrong:
        if misfits:
            # With those that are allowed already: whoever types it types it in their place.
            pattern = narrowest([*shapes_of, *misfits])
            if all(map(of_ranks, misfits)):
                advice.append(
                    "The adapter in the source has another rank: give the model one of that rank, the r of its "
                    "adapter_config.json."
                )
            elif not anothers:
                advice.append(f'If another head is meant, allow_mismatched="{pattern}" keeps what the model has there.')
        if (others := [name for name in unused if not of_adapter(name)]) and (missing or partial):
            advice.append(f"{not_used(list(map(whole.called, others)), _OWN_CODE)}.")
        advice += filter(None, [parametrised([*unexpected, *missing])])
        raise PlanError("source and model do not fit; nothing was read or written", wrong, advice="\n".join(advice))
    return LoadPlan(
        steps=tuple(step for _, step in levelled),
        levels=tuple(level for level, _ in levelled) if any(writes.levels) else (),
        ties=ties,
        fates=insides.by_name(fates) if insides else fates,
        casts=writes.casts,
        constants=traced.constants,
        fallback=tuple(traced.fallback),
        graph_breaks=tuple(traced.graph_breaks),
        unproven=tuple(unproven),
        side_effects=tuple(traced.side_effects),
        state_read=tuple(sorted(traced.state_read)),
        manifest=manifest,
        targets=targets,
        mismatched=insides.by_name(shapes_of),
    )


def _may_mismatch(allowed: Allowed) -> Callable[[str, str], bool]:
    """Whether a tensor of another shape may stay out: said so, or by all three that say it of both its sides."""
    mismatched, unexpected = matches(allowed.mismatched), matches(allowed.unexpected)
    missing, partial = matches(allowed.missing), matches(allowed.partial)
    return lambda source, destination: (
        mismatched(destination) or (unexpected(source) and missing(destination) and partial(destination))
    )


def _mismatch(step: Step, manifest: Manifest, targets: Mapping[str, Target]) -> str:
    """Both shapes, where a whole tensor would be copied into one of another shape."""
    if not isinstance(step, Copy) or step.of is not None or step.into is not None or step.destination not in targets:
        return ""
    found, expected = manifest[step.source].shape, targets[step.destination].spec.shape
    return "" if fits(found, expected) else f"{list(found)} in the source, {list(expected)} in the model"


def _steps_of(rules: Rules, manifest: Manifest, targets: Mapping[str, Target]) -> Iterator[tuple[int, Step]]:
    """The framework's steps, or each tensor to the target of its name; then the zeros."""
    if rules.steps is None:
        yield from ((0, Copy(name, name)) for name in manifest if name in targets)
    else:
        yield from rules.steps
    for name in rules.zeroed:
        region = Region(Memory("model", name), targets[name].box)
        op = Op(torch.ops.aten.zero_.default, (region,), {}, (), (region,), (region,))
        yield 0, Program((), (op,), (region,))


def _fates_of_sources(
    manifest: Manifest, writes: Writes, traced: Traced, skipped: Callable[[str], bool]
) -> dict[str, Fate]:
    fates = dict.fromkeys(traced.fallback, Fate.WRITTEN) | writes.fates
    for name in manifest:
        if name not in fates:
            fates[name] = Fate.SKIPPED if name in traced.taken or skipped(name) else Fate.UNEXPECTED
    return fates


def _unexpected(fates: Mapping[str, Fate], allowed: Callable[[str], bool]) -> Iterator[str]:
    for name, fate in fates.items():
        if fate is Fate.UNEXPECTED and not allowed(name):
            yield name


def _not_allowed(names: Iterable[str], allowed: Patterns) -> list[str]:
    match = matches(allowed)
    return [name for name in names if not match(name)]


def _no_place(manifest: Manifest, name: str) -> str:
    return f"{manifest.called(name)}: unexpected; the model has no such name"


def _in_words(gap: Gap, absent: Sequence[str], by: Sequence[str] = ()) -> str:
    shape = gap.spec.shape
    words = f"missing; {format_name(gap.spec.dtype)} {list(shape)} expected"
    if gap.written:
        words = f"partial; {gap.written} of {math.prod(shape)} elements would be written, from {some(by, 3)}"
    lacking = f"{LACKS}{some(absent, 3)}" if absent else ""
    tied = f" (tied with {some(gap.names[1:], 3)})" if len(gap.names) > 1 else ""
    return f"{gap.names[0]}: {words}{tied}{lacking}"


def _of_another_model(kept: Collection[str], unfit: int, manifest: Manifest, targets: Collection[str]) -> str:
    """What is said where nearly nothing fits. To allow that would serve old weights under the new version's name.

    Args:
        kept: the names of the model that would get nothing.
        unfit: how many tensors of the source have no place, or another shape; those of a mere part all fit.
        manifest: of the source.
        targets: all names of the model.
    """
    # Of a tensor or two it cannot be told: another head has as many. Where all names are others, that is said instead.
    if min(len(kept), unfit) < 4 or 4 * len(kept) < 3 * len(targets) or 4 * unfit < 3 * len(manifest):
        return ""
    return (
        f"This looks like another model's checkpoint: {len(kept)} of {len(targets)} names of the model would keep what "
        "they have. Give the weights of this model."
    )


def _allowing(
    missing: Collection[str],
    partial: Collection[str],
    unexpected: Collection[str],
    manifest: Manifest,
    targets: Mapping[str, Target],
) -> Iterator[str]:
    """The arguments that would allow these names, as they are typed."""
    arguments = {
        "allow_missing": typed(missing, targets) if missing else None,
        "allow_partial": typed(partial, targets) if partial else None,
        "allow_unexpected": typed(unexpected, manifest) if unexpected else None,
    }
    given = [
        f"{name}={pattern or '[...] with their names'}" for name, pattern in arguments.items() if pattern is not None
    ]
    if given:
        yield f"If that is meant, allow it: {', '.join(given)}."
