"""``trace``: the plan of loading a manifest into a model, by its own loading code, its framework's rules or by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import chain

import torch
from torch import nn

from .. import signals
from ..arguments import check_choices, check_model, device_from, patterns_from
from ..dtypes import Cast, OpaqueDtype
from ..errors import PlanError
from ..gc_pause import without_collection
from ..manifest import Manifest
from ..memory.aliases import overlaps, spots
from ..model.matching import other_names
from ..model.merged import refuse_merged
from ..model.offloading import refuse_own_code, refuse_unwritable
from ..model.places import targets_of
from ..model.processed import processed, telling
from ..model.survey import By, LoadingCode, Survey, counters, extra_states, loader_of, own_loader, passed_over, survey
from ..names import outer_prefix, unwrapped
from ..plan.draft import Allowed, Traced, draft
from ..plan.inside import outer_manifest
from ..plan.patterns import Patterns, both, idle, matches, widened
from ..plan.plan import LoadPlan
from ..plan.steps import Copy, Fate
from ..plan.writes import fits
from ..rename import Rename
from ..sources.iterator import IteratorSource
from ..sources.opening import AnySource, opened
from ..text import some
from .fit import complete
from .frameworks import rules_for
from .leave_out import trace_code
from .naming import match_for, names_for

_SAID = 3  # patterns that match nothing: a list that many models share has many


@signals.watched
def trace(
    model: nn.Module,
    manifest: Manifest | AnySource,
    *,
    device: torch.device | str | None = None,
    allow_missing: Patterns = (),
    allow_partial: Patterns = (),
    allow_unexpected: Patterns = (),
    allow_mismatched: Patterns = (),
    cast: Cast | None = None,
    rename: Rename | None = None,
    by: By | None = None,
) -> LoadPlan:
    """Plan the loading of ``manifest`` into ``model``: run the model's own loading code on fake tensors and record it.

    A model with ``load_weights`` is asked by that; a transformers model by transformers' own conversions; any other is
    planned by name, or by its ``load_state_dict`` where that runs code of its own. Moves nothing, changes nothing: no
    tensor of the model is written, and attributes that its code changes are put back. Layers that a ``LiveModel`` has
    processed are no longer as a checkpoint has them: plan and error name them, and ``live.plan`` is what is meant.

    Args:
        model: whose loading is planned.
        manifest: what a source promises; or a source, or anything that ``hotweights.open`` takes.
        device: where meta tensors will be made real. Without it they are a problem.
        allow_missing: names of the model that may stay as they are.
        allow_partial: names of the model of which some bytes may stay as they are.
        allow_unexpected: tensors of the manifest that may have no place.
        allow_mismatched: names of the model that may stay as they are where the tensor for them has another shape, as
            a new head's; a ``load_weights`` is not asked, it decides itself what it takes.
        cast: which casts that lose information are meant, see ``hotweights.load``; the others are problems.
        rename: new names of the manifest's tensors, see ``hotweights.load``. The plan has the new names.
        by: ``"loader"`` or ``"name"``, see ``hotweights.load``.

    Raises:
        PlanError: with every problem.
        UsageError: an argument is of the wrong kind.
    """
    check_model(model, manifest)
    given = {
        "allow_missing": allow_missing,
        "allow_partial": allow_partial,
        "allow_unexpected": allow_unexpected,
        "allow_mismatched": allow_mismatched,
    }
    missing, partly, unexpected, mismatched = several = patterns_from(**given)
    where = device_from(device)
    check_choices(**({"by": (by, By)} if by is not None else {}))
    outer, model = outer_prefix(model), unwrapped(model)
    if cast is None:
        cast = "error" if own_loader(model, by) is None else "loader"
    with without_collection():
        seen = survey(model, by)
        promised = _promised(manifest)
        promised = promised.renamed(names_for(promised, rename, match_for(model, seen.names, by)))
        others = other_names(model, outer, seen.names, seen.others()) if missing or partly or mismatched else {}
        there = {new: (old,) for new, old in outer_manifest(promised).origins.items()}
        allowed = Allowed(
            missing=widened(missing, others),
            partial=widened(partly, others),
            unexpected=widened(unexpected, there),
            mismatched=widened(mismatched, others),
            cast=cast,
        )
        layers = processed(model)
        try:
            plan = _trace(model, seen, promised, where, allowed, by)
        except PlanError as error:
            if cure := passed_over(model, by):
                # Names that both sides lack are what it would have translated: to allow them would lose the weights.
                lost = "allow_missing=" in error.advice and "allow_unexpected=" in error.advice
                lost = lost or "another model's" in error.advice
                error.advice = cure if lost else "\n".join(filter(None, (error.advice, cure)))
            elif prefix := _prefix_that_goes(model, seen, promised, where, allowed, by):
                error.advice = f'All fits without "{prefix}" before each name: rename={{"{prefix}": ""}}.'
            known = [*seen.names, *promised, *promised.origins.values(), *chain.from_iterable(others.values())]
            # One that is misspelt allows nothing.
            if unmatched := idle(known, **dict(zip(given, several, strict=True))):
                error.advice = "\n".join(filter(None, (error.advice, *unmatched[:_SAID])))
            if layers:
                raise telling(error, layers) from error
            raise
        return replace(plan, processed=layers) if layers else plan


def _prefix_that_goes(
    model: nn.Module, seen: Survey, manifest: Manifest, device: torch.device | None, allowed: Allowed, by: By | None
) -> str:
    """What stands before every name of the source, and without which the model's own code takes them; or nothing."""
    if manifest.origins or not manifest or own_loader(model, by) is None:
        return ""
    parts = next(iter(manifest)).split(".")
    for count in range(1, len(parts)):
        prefix = "".join(f"{part}." for part in parts[:count])
        if not all(name.startswith(prefix) and name != prefix for name in manifest):
            break
        names = {name: name.removeprefix(prefix) for name in manifest}
        with suppress(PlanError):
            plan = _trace(model, seen, manifest.renamed(names), device, allowed, by)
            if plan.steps and not plan.names(Fate.SKIPPED):
                return prefix
    return ""


def _promised(source: Manifest | AnySource) -> Manifest:
    if isinstance(source, Manifest):
        return source
    if isinstance(source, IteratorSource):  # Without a manifest it says what to pass; to collect would use it up.
        return source.manifest
    with opened(source) as promising:
        return promising.manifest


def _trace(
    model: nn.Module,
    surveyed: Survey,
    manifest: Manifest,
    device: torch.device | None,
    allowed: Allowed,
    by: By | None,
) -> LoadPlan:
    refuse_unwritable(model, surveyed)
    refuse_merged(model)
    tensors = surveyed.persistent
    if flat := [name for name in tensors if name.endswith("_flat_param")]:
        raise PlanError(
            "FSDP keeps these parameters flattened; nothing was read or written",
            [f"{name}: is made of many" for name in flat],
            advice="Load inside `with FullyShardedDataParallel.summon_full_params(model):`.",
        )
    own_code = own_loader(model, by) is not None
    rules = rules_for(model, outer_manifest(manifest))
    if rules.problems and rules.steps is None:
        # The framework says why no name can be matched. What is missing then would only bury it.
        raise PlanError("source and model do not fit; nothing was read or written", rules.problems)
    if not own_code:
        # Names of the source are others where a framework's rules rename them.
        written = {name for _, step in rules.steps or () for name in step.destinations}
        absent = counters(model, sorted(tensors.keys() - manifest.keys() - written))
        zeroed = tuple(name for name in absent if tensors[name].is_meta) if device is not None else ()
        rules = replace(rules, allow_missing=both(rules.allow_missing, absent), zeroed=zeroed)
    problems = list(rules.problems)
    if not own_code and not surveyed.plain:
        problems += _extra_state_problems(model, manifest, allowed, by_rules=rules.steps is not None)
    loader = None if surveyed.plain or rules.steps is not None else loader_of(model, by)
    traced = None
    if loader is not None:
        refuse_own_code(model, surveyed)
    if loader is not None and surveyed.parts:
        problems += _sharded(model, surveyed)
    elif loader is not None and (wrapped := _wrapped(model, surveyed, manifest, allowed)):
        problems += wrapped
    elif loader is not None:
        try:
            if own_code:
                traced = trace_code(model, manifest, loader)
                traced = replace(traced, stopped=_stopped(model, manifest, traced))
            else:
                traced = _traced_by_name(model, manifest, loader, tensors, allowed.mismatched)
        except PlanError as error:
            if own_code:
                raise
            # By name every misfit is found and named, where load_state_dict stops at a summary.
            problems += error.problems
    plan = draft(
        manifest,
        targets_of(tensors, device, surveyed.parts, surveyed.shells),
        traced=traced,
        rules=rules,
        allowed=allowed,
        overlapping=overlaps(tensors),
        problems=problems,
    )
    return complete(replace(plan, transient=_transient(surveyed)), model)


def _stopped(model: nn.Module, manifest: Manifest, traced: Traced) -> str:
    """What is said of loading code that ended before it was given every tensor."""
    given = [name for name, spec in manifest.items() if not isinstance(spec.dtype, OpaqueDtype)]
    asked = [name for name in given if name in traced.taken or name in traced.fallback]
    if len(asked) == len(given):
        return ""
    code, rest = f"{type(model).__name__}.load_weights", some([name for name in given if name not in asked], 3)
    if not asked:
        return (
            f"{code} took none of the {len(given)} tensors of the source; let it go through all pairs that it is given"
        )
    return (
        f"{code} ended after {len(asked)} of {len(given)} tensors; the last that it took is {asked[-1]}. It never "
        f"looked at {rest}; let it go through all pairs that it is given"
    )


def _transient(surveyed: Survey) -> dict[str, str]:
    """The non-persistent buffers, each with a tensor of the state dict in whose memory it lies."""
    if not surveyed.transient:
        return {}
    held = spots(surveyed.tensors)
    first: dict[str, str] = {}
    for name in surveyed.persistent:
        if name in held:
            first.setdefault(held[name][0], name)
    return {name: first.get(held[name][0], "") if name in held else "" for name in surveyed.transient}


def _sharded(model: nn.Module, surveyed: Survey) -> Iterator[str]:
    """DTensors of a model with loading code of its own: it is made for whole tensors, and cannot be traced."""
    code = (
        "load_weights of its own" if hasattr(model, "load_weights") else "code or hooks of its own in load_state_dict"
    )
    for name, part in surveyed.parts.items():
        yield (
            f"{name}: is a DTensor ({part}), and the model has {code}, which takes no whole tensors for parts; "
            "load the model before it is sharded"
        )


def _extra_state_problems(model: nn.Module, manifest: Manifest, allowed: Allowed, *, by_rules: bool) -> Iterator[str]:
    """Extra state that would stay as it is: the source has none, or nobody would hand it to its module."""
    may_miss = matches(allowed.missing)
    for name, module in extra_states(model).items():
        if by_rules:
            yield f"{name}: {type(module).__name__} keeps extra state, which the model's framework would not give it"
        elif name not in manifest and not may_miss(name):
            cure = f"allow_missing={name!r} leaves it as it is"
            yield f"{name}: missing; {type(module).__name__} keeps extra state; {cure}"


def _wrapped(model: nn.Module, surveyed: Survey, manifest: Manifest, allowed: Allowed) -> list[str]:
    """Wrapper tensors on either side, of a model with loading code of its own: it is made for plain tensors."""
    may_miss = matches(allowed.missing)
    shells = {name: shell for name, shell in surveyed.shells.items() if not may_miss(shell.outer(name))}
    shells |= {name: spec.shell for name, spec in manifest.items() if spec.shell}
    kinds = {shell.outer(name): shell.kind.rpartition(".")[2] for name, shell in shells.items()}
    return [
        f"{name}: is a {kind}, and the model has loading code of its own, which cannot be traced with it; load plain "
        'tensors before the model is quantised, or load by name (by="name") where it has a load_weights'
        for name, kind in kinds.items()
    ]


def _traced_by_name(
    model: nn.Module,
    manifest: Manifest,
    loader: LoadingCode,
    tensors: Mapping[str, torch.Tensor],
    may_mismatch: Patterns,
) -> Traced:
    """What ``load_state_dict`` does; it is asked again without tensors of a wrong shape, if those may be.

    Not at first: its hooks may give a tensor the shape that fits. It takes all names, and tells which are of no use.
    """
    useless: set[str] = set()

    def noting(pairs: Iterable[tuple[str, torch.Tensor]]) -> None:
        with warnings.catch_warnings():
            # Nothing is copied yet: fake tensors are compared with what is on meta.
            warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter", UserWarning)
            useless.update(getattr(loader(pairs), "unexpected_keys", ()))

    traced = _asked_twice(model, manifest, noting, tensors, may_mismatch)
    return replace(
        traced,
        taken={name for name in manifest if name in traced.taken and name not in useless},
        fallback=tuple(name for name in traced.fallback if name not in useless),
    )


def _asked_twice(
    model: nn.Module,
    manifest: Manifest,
    loader: LoadingCode,
    tensors: Mapping[str, torch.Tensor],
    may_mismatch: Patterns,
) -> Traced:
    try:
        return trace_code(model, manifest, loader)
    except PlanError:
        may = matches(may_mismatch)
        odd = {
            name
            for name, spec in manifest.items()
            if name in tensors and may(name) and not fits(spec.shape, tensors[name].shape)
        }
        if not odd:
            raise
    traced = trace_code(model, Manifest(spec for spec in manifest.values() if spec.name not in odd), loader)
    return replace(traced, steps=[*traced.steps, *((0, Copy(name, name)) for name in sorted(odd))])
