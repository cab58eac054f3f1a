"""A pipeline that is there: ``load`` fills its models, ``live`` keeps them at one version. It makes no pipelines."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn

from ...arguments import check_choices, check_kind, device_from, shown
from ...dtypes import Cast
from ...errors import CheckpointError, PlanError, TiedWeightsDiffer, UnknownName, UsageError
from ...live.model import LiveModel
from ...loading.execute import owned
from ...loading.initialise import left_on_meta
from ...loading.load import load as load_model
from ...loading.report import LoadReport
from ...loading.ties import same_bits
from ...manifest import Manifest
from ...memory.pool import Pool
from ...model.places import places
from ...model.survey import survey
from ...names import unwrapped
from ...plan.adapters import of_adapter
from ...plan.patterns import matches
from ...plan.plan import LoadPlan
from ...plan.steps import Copy
from ...sources.contracts import IOMode
from ...sources.files.directory import snapshot
from ...sources.files.source import FileSource
from ...sources.iterator import IteratorSource, from_iterator
from ...sources.locating import naming_files
from ...sources.reading import check_reading
from ...text import some
from ...tracing.frameworks import has_rules, rules_for
from ...tracing.naming import fitted, match_for
from ...tracing.trace import trace
from .attention import names_on_load

# Once.


def load(
    pipeline: Any,
    directory: str | os.PathLike[str],
    *,
    components: Collection[str] | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    device: torch.device | str | None = None,
    cast: Cast = "floats",
    io: IOMode = "auto",
    threads: int | None = None,
    show_progress: bool | None = None,
) -> dict[str, LoadReport]:
    """Load the weights of a pipeline's directory into the models that a pipeline has, in place: all of them, or none.

    Each model is loaded as by ``hotweights.load``, which says what becomes of its tensors; dtypes and devices stay
    those of the pipeline. Nothing is written before every component's checkpoint was opened and fits its model. What
    a read finds later, such as a disk that fails, leaves the models before it loaded; its note says which. A
    pipeline that serves keeps its old version even then: ``live``.

    Args:
        pipeline: its models are written; schedulers, tokenizers and processors stay as they are.
        directory: what ``save_pretrained`` of a pipeline wrote, or its snapshot in a hub cache, or its name there.
        components: which models, such as ``["unet"]``; by default all that the pipeline has.
        variant: which variant of the weights, such as ``"fp16"``. A component that has none is read without, as
            diffusers does it; one at least has it.
        subfolder: the folder in the directory that holds the pipeline.
        device: where tensors on meta are made real. Without it they are a problem.
        cast: which casts that lose information are done, see ``hotweights.load``.
        io: how files are read, see ``hotweights.load``.
        threads: how many read at once; by default a few.
        show_progress: whether to draw progress bars; by default on a terminal.

    Returns:
        What was done, by component.

    Raises:
        CheckpointError: a component's checkpoint is not there, or broken; nothing was written.
        PlanError: it does not fit its model; nothing was written.
        TiedWeightsDiffer: components share a tensor, and the directory has different bytes for it; nothing was written.
        UnknownName: the pipeline has no such model.
    """
    check_choices(cast=(cast, Cast))
    check_reading(io, threads, None, show_progress)
    where = device_from(device)
    with ExitStack() as stack:
        folders = _folders(pipeline, directory, components, variant, subfolder)
        parts = _planned(folders, where, cast, stack)
        _prove_alike(parts)
        reports: dict[str, LoadReport] = {}
        loaded: dict[int, LoadReport] = {}
        for part in parts:
            try:
                if (report := loaded.get(id(part.model))) is None:
                    report = load_model(
                        part.model,
                        part.source,
                        plan=part.plan,
                        device=where,
                        io=io,
                        threads=threads,
                        show_progress=show_progress,
                    )
            except BaseException as error:
                error.add_note(f"hotweights: this was {part.name}; loaded before it: {some([*reports]) or 'nothing'}")
                raise
            reports[part.name] = loaded[id(part.model)] = report
        return reports


class _Folder(NamedTuple):
    """Where the weights of a component lie."""

    name: str
    model: Any
    path: Path
    variant: str | None


class _Component(NamedTuple):
    """A component that is about to be loaded; the source is under the model's names."""

    name: str
    model: Any
    source: Any
    plan: LoadPlan


def _planned(folders: Sequence[_Folder], device: torch.device | None, cast: Cast, stack: ExitStack) -> list[_Component]:
    """Every component with its open source and its plan; or all that stands against them, together."""
    parts: list[_Component] = []
    broken: list[str] = []
    unfit: list[str] = []
    for name, model, path, variant in folders:
        try:
            files = stack.enter_context(FileSource(path, variant=variant))
            parts.append(_component(name, model, files, device, cast))
        except CheckpointError as error:
            broken += [f"{name}: {line}" for line in error.problems or [error.title]]
        except PlanError as error:
            unfit += [f"{name}.{line}" for line in error.problems] or [f"{name}: {error.title}"]
        except UsageError as error:
            error.add_note(f"hotweights: this was {name}, a component of the pipeline; nothing was written")
            raise
    if broken or unfit:
        fit = [part.name for part in parts]
        advice = f"components={fit} loads the others, which fit." if fit else ""
        kind = CheckpointError if broken else PlanError
        raise kind("components of the pipeline cannot be loaded; nothing was written", broken + unfit, advice=advice)
    return parts


def _component(name: str, model: nn.Module, files: FileSource, device: torch.device | None, cast: Cast) -> _Component:
    inner = unwrapped(model)
    seen = survey(inner)
    names = names_on_load(inner, files.manifest)

    def rename(tensor: str) -> str:
        return names.get(tensor, tensor)

    source = fitted(files, rename, match_for(inner, seen.names, None))
    adapters = [place.name for place in places(inner) if of_adapter(place.name)]  # They stay, over the new weights.
    with naming_files(source):
        plan = trace(model, source, device=device, cast=cast, allow_missing=adapters, allow_unexpected=_ignored(inner))
        if device is not None:
            left_on_meta(plan, seen, None, inner)  # Raises before any model is written.
    return _Component(name, model, source, plan)


def _ignored(model: Any) -> list[re.Pattern[str]]:
    """Which tensors of a checkpoint a class of diffusers passes over."""
    patterns = None if has_rules(model) else getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    return [re.compile(pattern) for pattern in patterns or ()]


def _prove_alike(parts: Sequence[_Component]) -> None:
    """Compare what is written into one tensor from several names or components; raise ``TiedWeightsDiffer``."""
    differing: list[str] = []
    first: dict[int, tuple[_Component, str]] = {}
    for part in parts:
        tensors = {place.name: place.tensor for place in places(unwrapped(part.model))}
        for one, other in part.plan.ties:
            if not _alike((part, one.source), (part, other.source), tensors[one.destination].dtype):
                differing.append(f"{part.name}.{one.source} and {part.name}.{other.source}")
        for step in part.plan.steps:
            if isinstance(step, Copy) and step.destination in tensors:
                tensor = tensors[step.destination]
                before = first.setdefault(id(tensor), (part, step.source))
                if before[0] is not part and not _alike(before, (part, step.source), tensor.dtype):
                    differing.append(f"{before[0].name}.{before[1]} and {part.name}.{step.source}")
    if differing:
        problems = [f"{names} are one tensor in the pipeline, and differ in the directory" for names in differing]
        raise TiedWeightsDiffer("tied weights differ; nothing was written", problems)


def _alike(one: tuple[_Component, str], other: tuple[_Component, str], dtype: torch.dtype) -> bool:
    """Whether two tensors of checkpoints become the same bits in a tensor of this dtype."""
    with Pool() as pool:
        sides = [owned(part.source, name, partial(part.source.read, pool=pool)) for part, name in (one, other)]
    left, right = (tensor.to(dtype) for tensor in sides)
    return same_bits(left, right)


def _folders(
    pipeline: Any,
    directory: str | os.PathLike[str],
    components: Collection[str] | None,
    variant: str | None,
    subfolder: str | None,
) -> list[_Folder]:
    """Where the weights of these components lie, and which of their variants."""
    check_kind("directory", directory, (str, os.PathLike), "the directory of a pipeline")
    check_kind("variant", variant, str, 'the name of a variant, such as "fp16"')
    check_kind("subfolder", subfolder, str, "the name of a folder in the directory")
    models = _components(pipeline)
    if isinstance(components, str):
        components = [components]
    together = {name: [*_each(name, part)] for name, part in _whole(pipeline).items()}
    asked = [*models] if components is None else [part for name in components for part in together.get(name, [name])]
    for name in asked:
        if name not in models:
            raise UnknownName("component", name, [*models])
    where = _directory(directory) / (subfolder or "")
    if not where.is_dir():
        cure = "" if where.is_absolute() else f"; if it is a name on the hub: `hf download {directory}`"
        raise CheckpointError(f"{where}: there is no such directory{cure}")
    if not any((where / name).is_dir() for name in asked) and (where / "config.json").is_file():
        raise CheckpointError(
            f"{where}: holds one model and no pipeline; hotweights.load loads it into a model, such as "
            f"hotweights.load(pipeline.{asked[0]}, {os.fspath(where)!r})"
        )
    have = {name for name in asked if variant is not None and _has_variant(where / name, variant)}
    # As in diffusers, components without the variant are read without; where none has it, each says what it has.
    return [_Folder(name, models[name], where / name, variant if name in have or not have else None) for name in asked]


def _directory(directory: str | os.PathLike[str]) -> Path:
    """The directory itself; or where the cache of the hub has the pipeline of that name."""
    where = snapshot(Path(directory))
    if where.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(directory)):
        return where
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(os.fspath(directory), local_files_only=True))
    except LocalEntryNotFoundError:
        return where


def _has_variant(folder: Path, variant: str) -> bool:
    return folder.is_dir() and any(re.search(rf"\.{re.escape(variant)}[.-]", name) for name in os.listdir(folder))


def _components(pipeline: Any) -> dict[str, nn.Module]:
    """The models of a pipeline, by the folders in which diffusers saves them."""
    return {folder: part for name, model in _whole(pipeline).items() for folder, part in _each(name, model).items()}


def _whole(pipeline: Any) -> dict[str, nn.Module]:
    components = getattr(pipeline, "components", None)
    if not isinstance(components, Mapping):
        raise UsageError(f"a pipeline is a DiffusionPipeline of diffusers; found {shown(pipeline)}")
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


# Classes of diffusers that hold several models and save each in a folder of its own, and where they hold them.
_SEVERAL = {"MultiControlNetModel": "nets", "MultiControlNetUnionModel": "nets", "MultiAdapter": "adapters"}


def _each(name: str, component: nn.Module) -> dict[str, nn.Module]:
    """The models of a component: mostly itself; else ``controlnet``, ``controlnet_1`` and so on."""
    holds = next((_SEVERAL[kind.__name__] for kind in type(component).__mro__ if kind.__name__ in _SEVERAL), None)
    if holds is None:
        return {name: component}
    return {f"{name}_{number}" if number else name: part for number, part in enumerate(getattr(component, holds))}


# For as long as it serves.


def live(pipeline: Any, **options: Any) -> LiveModel:
    """A live model of all models of a pipeline: a version is all of them. Names begin with the component's: ``unet.``.

    Args:
        pipeline: keeps its components; they are updated in place.
        options: those of ``LiveModel``.

    Raises:
        UsageError: a hook moves a model to the host and back (``enable_model_cpu_offload``): its addresses change.
    """
    models, whole = _components(pipeline), _whole(pipeline)
    if moved := [name for name, part in whole.items() if type(vars(part).get("_hf_hook")).__name__ == "CpuOffload"]:
        raise UsageError(
            f"hooks move {some(moved)} to the host and back, and a live model keeps its addresses; "
            "pipeline.remove_all_hooks() takes them off"
        )
    return LiveModel(nn.ModuleDict(models), **options)


@contextmanager
def weights(
    pipeline: Any,
    directory: str | os.PathLike[str],
    *,
    components: Collection[str] | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
) -> Iterator[IteratorSource]:
    """The weights of a pipeline's directory as one source, for the ``load`` and ``update`` of what ``live`` made.

    It streams once, and is closed when the ``with`` ends.

    Args:
        pipeline: says which components are models, and what their tensors are called.
        directory: as for ``load``.
        components: which of them; by default all models. ``update`` then needs ``only=``, such as ``only="unet.*"``.
        variant: as for ``load``.
        subfolder: as for ``load``.

    Raises:
        CheckpointError: a component's checkpoint is not there, or broken.
        PlanError: transformers would have to convert a component's tensors.
        UnknownName: the pipeline has no such component.
    """
    with ExitStack() as stack:
        parts: list[tuple[FileSource, dict[str, str]]] = []
        for name, model, path, chosen in _folders(pipeline, directory, components, variant, subfolder):
            source = stack.enter_context(FileSource(path, variant=chosen))
            parts.append((source, _names_in(model, name, source)))
        manifest = Manifest(
            msgspec.structs.replace(source.manifest[name], name=new)
            for source, names in parts
            for name, new in names.items()
        )
        pairs = ((names[name], tensor) for source, names in parts for name, tensor in source.tensors() if name in names)
        yield stack.enter_context(from_iterator(pairs, manifest, borrowed=False))


def _names_in(model: Any, component: str, source: FileSource) -> dict[str, str]:
    """The names of a component's tensors in the pipeline, for those of its checkpoint that have a place."""
    rules = rules_for(model, source.manifest)
    if rules.steps is None:
        fixed, skipped = names_on_load(model, source.manifest), matches(_ignored(model))
        names = {name: fixed.get(name, name) for name in source.manifest if not skipped(name)}
    else:
        copies = [step for _, step in rules.steps if isinstance(step, Copy)]
        names = {step.source: step.destination for step in copies}
        made = [name for _, step in rules.steps if step not in copies for name in step.destinations]
        if rules.problems or made:
            raise PlanError(
                f"{component}: transformers converts tensors of this model, so it cannot be a part of a live pipeline",
                rules.problems or made,
            )
        skipped = matches(rules.skip)
        names |= {name: name for name in source.manifest if name not in names and not skipped(name)}
    return {name: f"{component}.{new}" for name, new in names.items()}
