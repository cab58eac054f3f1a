"""``load``: a source into a model, once: plan it, execute the plan, report."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain

import torch
from torch import nn

from .. import signals
from ..arguments import check_choices, check_flags, check_kind, check_model, device_from, patterns_from
from ..dtypes import Cast
from ..errors import PlanError
from ..forked import alone_in_a_fork
from ..gc_pause import without_collection
from ..manifest import Manifest
from ..memory.devices import accelerator_of, wait_for_copies
from ..memory.extents import renew
from ..memory.pool import Pool
from ..model.looks_processed import advise_of_processed
from ..model.materialise import materialise, put_back
from ..model.merged import refuse_merged
from ..model.offloading import refuse_own_code, refuse_unwritable
from ..model.places import places
from ..model.process_calls import noting_calls
from ..model.processed import in_words, processed
from ..model.reachable import attributes, reachable
from ..model.survey import By, Survey, own_loader, survey
from ..model.unprocessed import unprocessed
from ..model.walk import modules_of
from ..names import outer_prefix, unwrapped
from ..plan.patterns import Patterns
from ..plan.plan import LoadPlan, Order
from ..plan.quantised import scaleless
from ..plan.steps import Copy, Fate
from ..plan.unused import unused
from ..progress import progress
from ..rename import Rename
from ..sharding import reshard
from ..sources.contracts import Addressed, InMemory, IOMode, OnDisk, Participant, refusing, warnings_of
from ..sources.iterator import IteratorSource
from ..sources.locating import naming_files
from ..sources.opening import AnySource, opened
from ..sources.reading import check_reading
from ..text import size, some
from ..tracing.fit import check
from ..tracing.frameworks import has_rules
from ..tracing.naming import fitted, match_for
from ..tracing.trace import trace
from .apart import apart
from .cache import planned
from .copy_step import Destinations
from .execute import execute
from .fallback import fall_back
from .initialise import InitMissing, check_init_missing, initialise, left_on_meta, told
from .report import LoadReport, Tally
from .requests import bytes_to_read, requests_of
from .verify import Verify, check_verifiable, unprovable, verifier

_LOAD_BEFORE = "load before that; hotweights.LiveModel, made before, loads into processed layers again and again"


@signals.watched
def load(
    model: nn.Module,
    source: AnySource,
    *,
    plan: LoadPlan | None = None,
    device: torch.device | str | None = None,
    allow_missing: Patterns = (),
    allow_partial: Patterns = (),
    allow_unexpected: Patterns = (),
    allow_mismatched: Patterns = (),
    init_missing: InitMissing | None = None,
    cast: Cast | None = None,
    order: Order = "given",
    cache: bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    io: IOMode = "auto",
    threads: int | None = None,
    pool: Pool | None = None,
    verify: Verify = "off",
    show_progress: bool | None = None,
    rename: Rename | None = None,
    by: By | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    digests: str | os.PathLike[str] | None = None,
) -> LoadReport:
    """Load the weights of ``source`` into the parameters and persistent buffers of ``model``, in place, by name.

    Everything that does not fit is found before the first byte is read, and raised together. Tied parameters may be in
    the source under any of their names, or several. The wrappers of torch and PEFT (``torch.compile``, data parallel,
    FSDP1, activation checkpointing, adapters) are looked through, in the model and in the source; the report has the
    names of the module inside. Models of transformers are loaded through transformers' own
    renamings, conversions and ties. Autograd does not record the writes; every tensor that
    was written has a new ``_version``, and all that see its bytes. A failure while reading leaves tensors of both
    versions in the model, and the error's note says how much was read; parameters that were on meta are on meta
    again. The word "loader", in ``cast=`` and ``verify=``, means the model's own loading code: ``load_weights``, or
    ``load_state_dict`` and its hooks.

    Args:
        model: is written in place: the addresses of its tensors do not change, except those of meta tensors.
        source: an open source, which stays open; or anything that ``hotweights.open`` takes. An iterator that came
            without a manifest is read to its end first, and all its tensors are in memory until this returns.
        plan: a plan made or saved before; it is checked to be one for this model and this source. By default the model
            is traced now, or a plan from the cache is used.
        device: where meta tensors are made real. Without it they are a problem.
        allow_missing: names of the model that may be missing from the source; they keep their values.
        allow_partial: names of the model of which some bytes may keep their values.
        allow_unexpected: tensors of the source that may have no place in the model.
        allow_mismatched: names of the model that keep their values where the source's tensor has another shape, as a
            new head's has; the report names them, with both shapes. A ``load_weights`` decides itself what it takes.
        init_missing: fills what is on meta, gets no bytes, or not all, and has to be real: called as ``fn(name,
            tensor)`` for each such tensor before the first byte is read, on ``device``. ``True`` runs the
            ``reset_parameters`` of the module that has it. By default models of transformers are initialised by their
            own rules, as ``from_pretrained`` does it, and others by ``True`` where all that is left was allowed and can
            be; if not, it is a problem. What is real keeps its value.
        cast: which casts that lose information are done: none (``"error"``, the default by name), those from one float
            of 16 bits or more to another (``"floats"``), or all that the model's own loading code does (``"loader"``,
            the default for models with a ``load_weights``). The others are problems. Casts that lose nothing are done;
            all are reported; a cast from floats to integers is always a problem.
        order: what is read first, see ``Order``. Files are read in their own order within a layer, and where no order
            is asked for.
        cache: whether to use again a plan that was traced from the same model, manifest and options, and to keep this
            one for that. By default only for models that are loaded by name: loading code of a model's own may read
            what no key can see.
        cache_dir: where plans are kept for other processes too.
        io: how files are read, see ``IOMode``.
        threads: how many read at once; by default a few.
        pool: memory for what cannot be read in place; by default 64 MiB, which is freed at the end.
        verify: ``"loader"`` lets the model's own loading code load each layer once more afterwards, and compares bits.
        show_progress: whether to draw a progress bar; by default on a terminal or in a notebook.
        rename: new names for the source's tensors: a mapping of prefixes, ``{"module.": ""}``, of which the longest
            that fits counts; or a function that is given a name. Names that would become the same are a problem.
        by: ``"name"`` loads a model by name that has a ``load_weights``; ``"loader"`` by that, whatever its signature.
            By default a ``load_weights`` is used that can be called with pairs of name and tensor, and not one that,
            by its signature, takes a path.
        variant: where ``source`` is a path: which variant of the weights there, see ``hotweights.open``.
        subfolder: where ``source`` is a path: which folder there.
        digests: where ``source`` is a path: what the files must hold, see ``hotweights.open``.

    Raises:
        CheckpointError: the checkpoint is broken; the model is unharmed. Or a byte is not what ``digests`` says, which
            is known when it has been read: the model holds it by then, and the error's note says so.
        PlanError: source and model do not fit; the model is unharmed.
        TiedWeightsDiffer: names of one tensor carry different bytes; the model is unharmed, or holds those of one name
            where the source is a stream.
        CheckpointChanged: a file changed while it was read.
        SourceError: a stream gave memory of the model that had been written by then.
        UsageError: an argument is of the wrong kind; the model is unharmed.
        IncompleteLoad: loading fell back to the model's own code, which left something unwritten.
        PlanDiffers: ``verify="loader"`` found a difference.
    """
    check_model(model, source)
    check_kind("plan", plan, LoadPlan, "a LoadPlan (LoadPlan.load reads one from a file)")
    check_flags(cache=cache)
    check_reading(io, threads, pool, show_progress)
    check_kind("cache_dir", cache_dir, (str, os.PathLike), "a path")
    check_choices(
        order=(order, Order),
        verify=(verify, Verify),
        cast=("error" if cast is None else cast, Cast),
        by=("name" if by is None else by, By),
    )
    check_init_missing(init_missing)
    allowed = patterns_from(
        allow_missing=allow_missing,
        allow_partial=allow_partial,
        allow_unexpected=allow_unexpected,
        allow_mismatched=allow_mismatched,
    )
    target_device = device_from(device)
    began = time.perf_counter()
    done = Tally()
    whole, model = model, unwrapped(model)
    with alone_in_a_fork(), without_collection(), refusing(source), ExitStack() as stack:
        given, source = (
            source,
            stack.enter_context(opened(source, variant=variant, subfolder=subfolder, digests=digests)),
        )
        if isinstance(given, IteratorSource) and given is not source:  # Its tensors were collected.
            done.hold_scratch(source.manifest.nbytes)
        seen = survey(model, by)
        refuse_unwritable(model, seen)
        refuse_merged(model)
        if verify == "loader":
            check_verifiable(seen)
        source = fitted(source, rename, match_for(model, seen.names, by))
        stack.enter_context(naming_files(source))
        own_code = own_loader(model, by) is not None
        # Code that processes layers itself does so while it is traced, or when it loads what falls back.
        called = stack.enter_context(noting_calls(model.modules())) if own_code else []
        if plan is None:
            make = partial(_trace, whole, source.manifest, target_device, allowed, cast, by)
            options = (target_device, allowed, cast, by, source.manifest.origins, outer_prefix(whole))
            # Code of the model's own may depend on what no key can see.
            keep = seen.plain if cache is None else cache
            plain = seen if seen.plain and not has_rules(model) else None
            with _telling_processed(model, source.manifest):
                plan = planned(model, plain, source.manifest, options, make, cache_dir) if keep or cache_dir else make()
        else:
            check(plan, model, source.manifest, target_device)
        if plan.fallback:
            refuse_own_code(model, seen)
        left = [] if target_device is None else left_on_meta(plan, seen, init_missing, model)
        if order != "given":
            plan = plan.ordered(order, source.position if isinstance(source, Addressed) else None)
        nbytes = bytes_to_read(plan, source)
        with _made_real(plan, model, seen, target_device, left) as tensors, _noting(done, nbytes):
            signals.deliver()
            reshard(model.modules())
            initialise(model, left, init_missing)
            # Tensors in lists and attributes are looked for only if a step writes there: it takes a second walk.
            destinations = tensors if plan.targets.keys() <= tensors.keys() else reachable(model) | tensors
            stack.enter_context(_renewing(plan, model, seen, tensors, destinations, done))
            if pool is None:
                pool = stack.enter_context(
                    Pool(device=accelerator_of(tensor.device for tensor in destinations.values()))
                )
            advance = stack.enter_context(progress("loading", nbytes, show=show_progress))
            # Code that loads what falls back may be given every tensor.
            some_only = isinstance(source, InMemory) and not plan.fallback
            wanted = {request.name for request in requests_of(plan, source)} if some_only else None
            weights, copied_nbytes = apart(source, destinations.values, wanted)
            done.hold_scratch(copied_nbytes)
            kept = execute(plan, weights, destinations, done, pool=pool, io=io, threads=threads, advance=advance)
            if plan.fallback:
                fall_back(plan, model, weights, kept, done, by=by, pool=pool, advance=advance)
            if verify == "loader":
                prove = verifier(model, weights, by)
                prove(plan, destinations, pool)
                done.proven = prove.proven
            if isinstance(source, OnDisk):
                source.check()
            # Whoever lent the tensors may write over them next, and may not know that a device still reads them.
            wait_for_copies(tensor.device for tensor in destinations.values())
            # Not before everything is loaded and proven: from here on the group counts on this member.
            if isinstance(source, Participant):
                stack.enter_context(source.decision())
        kernels = processed(model)
        warnings = (*warnings_of(source), *told(model, left, init_missing), *_unprocessed(model, called))
        warnings = (*warnings, *scaleless(plan.manifest, plan.casts))
        if verify == "loader":
            warnings = (*warnings, *unprovable(plan, done.proven))
        if own_code:
            warnings = (*warnings, *unused(plan, f"{type(model).__name__}.load_weights"))
        if kernels:
            warnings = (*warnings, in_words(kernels))
        return _report(plan, done, pool, time.perf_counter() - began, warnings)


def _trace(
    model: nn.Module,
    manifest: Manifest,
    device: torch.device | None,
    allowed: list[list[str | re.Pattern[str]]],
    cast: Cast | None,
    by: By | None,
) -> LoadPlan:
    missing, partly, unexpected, mismatched = allowed
    return trace(
        model,
        manifest,
        device=device,
        allow_missing=missing,
        allow_partial=partly,
        allow_unexpected=unexpected,
        allow_mismatched=mismatched,
        cast=cast,
        by=by,
    )


@contextmanager
def _telling_processed(model: nn.Module, manifest: Manifest) -> Iterator[None]:
    """Inside, the error of a plan says which layers an engine may have processed."""
    try:
        yield
    except PlanError as error:
        if "processed by a LiveModel" not in error.advice:
            processes = {*unprocessed(model)}
            layers = {name: layer for name, layer in model.named_modules() if name in processes}
            advise_of_processed(error, manifest, layers, _LOAD_BEFORE)
        raise


@contextmanager
@signals.held
def _made_real(
    plan: LoadPlan, model: nn.Module, seen: Survey, device: torch.device | None, left: list[str]
) -> Iterator[dict[str, torch.Tensor]]:
    """The model's tensors. Inside, meta tensors that the plan writes, or that are ``left`` to be initialised, are real;

    after an error they are meta again.
    """
    written = {name for step in plan.steps for name in step.destinations} | set(plan.unproven) | set(left)
    written -= set(seen.kept)  # What their modules have stays on meta.
    replaced = [] if device is None else materialise(places(model), written, device)
    try:
        yield survey(model).tensors if replaced else seen.tensors
    except BaseException:
        put_back(replaced)
        raise


@contextmanager
def _noting(done: Tally, nbytes: int) -> Iterator[None]:
    """Errors and Ctrl-C get a note of how much had been read: the model may hold tensors of two versions."""
    try:
        yield
    except BaseException as error:
        if done.writing:
            error.add_note(
                f"hotweights: {size(done.bytes_read)} of {size(nbytes)} had been read into the model by then; it may "
                "hold tensors of both versions until a load succeeds"
            )
        raise


@contextmanager
@signals.held
def _renewing(
    plan: LoadPlan, model: nn.Module, seen: Survey, tensors: Destinations, destinations: Destinations, done: Tally
) -> Iterator[None]:
    """At the end, failed or not, every tensor that was written has a new ``_version``."""
    try:
        yield
    finally:
        if done.writing:
            written = {name: destinations[name] for step in plan.steps for name in step.destinations}
            seen.offloaded.renew_copies(written.values())
            others = attributes(modules_of(model), set(map(id, tensors.values())))
            renew(written.values(), [*tensors.values(), *seen.wrappers, *(tensor for _, tensor in others)])


def _is_slice(step: Copy) -> bool:
    """Whether it copies, or fills, less than a whole tensor."""
    return step.of is not None or step.into is not None


def _report(plan: LoadPlan, done: Tally, pool: Pool, seconds: float, warnings: tuple[str, ...]) -> LoadReport:
    stats = pool.stats()
    tensors = {fate: plan.names(fate) for fate in Fate}
    used = chain(tensors[Fate.WRITTEN], tensors[Fate.CAST], tensors[Fate.TIED])
    copies = [step for step in plan.steps if isinstance(step, Copy)]
    return LoadReport(
        bytes_read=done.bytes_read,
        bytes_written=done.bytes_written,
        seconds=seconds,
        peak_buffer_bytes=stats.peak * pool.slot_nbytes,
        peak_scratch_bytes=done.peak_scratch,
        tensors=tensors,
        casts=plan.casts,
        mismatched=plan.mismatched,
        bytes_by_io=dict(done.bytes_by_io),
        steps={
            "copies": len(copies),
            "slices": sum(map(_is_slice, copies)),
            "programs": len(plan.steps) - len(copies),
        },
        planned=sum(name not in plan.fallback for name in used),
        fell_back=tuple(str(note) for note in plan.graph_breaks),
        side_effects=plan.side_effects,
        warnings=warnings,
        proven=done.proven,
    )


def _unprocessed(model: nn.Module, called: Collection[nn.Module]) -> tuple[str, ...]:
    """A warning for layers that are not ready to compute: those that the loading code has not ``called`` itself."""
    if not (names := unprocessed(model, lambda _, layer: layer in called)):
        return ()
    return (
        f"{some(names, 3)}: to be processed after loading (process_weights_after_loading), which hotweights.load does "
        "not do; do it now, if the model's own loading code has not quantised them itself, or load by "
        "hotweights.LiveModel, which does it, and does it anew for each update",
    )
