"""``build``: the model that a config.json of transformers describes, on meta, ready to be loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError, MissingPackage
from ...model.materialise import materialise
from ...model.places import Place, places
from ...plan.patterns import matches
from ...sources.files.shards import neighbour
from ...tracing.transformers import ignored_when_missing


def build(config_dir: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Any:
    """The model that ``config.json`` in ``config_dir`` describes: parameters on meta, buffers real, in eval mode.

    Dtypes, ties and the values of buffers are those that ``from_pretrained`` would give; a ``generation_config.json``
    is taken along. Parameters that no checkpoint of this class carries are real and initialised. ``requires_grad`` is
    what the model's class says, which ``from_pretrained`` forgets.

    Args:
        config_dir: a directory with a ``config.json``; nothing is fetched from anywhere, and no code in it is run.
        dtype: of the parameters; by default what the configuration says, else torch's default.

    Raises:
        CheckpointError: there is no usable ``config.json``.
        MissingPackage: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingPackage("transformers", "transformers") from error
    directory = Path(config_dir)
    if directory.is_file():
        raise CheckpointError(f"{directory}: is a file; give the directory in which the model's config.json lies")
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: there is no such directory{neighbour(directory)}. Give the one with the model's "
            "config.json; a name on the hub is downloaded first: hf download ORG/NAME prints the directory"
        )
    otherwise = (
        "; a model of your own is made by a factory: --model package.module:factory, or hotweights.build(factory=)"
    )
    # transformers would take the name of a directory that does not exist for a name on the hub, and fetch it.
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory}: has no config.json of transformers, which says what model it is{otherwise}"
        )
    with _our_errors(directory):
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        make = _maker(transformers, config)
        with torch.device("meta"):
            model = make(config, **({} if dtype is None else {"dtype": dtype}))
        keep_dtypes(model, model._get_dtype_plan(model.config.dtype or torch.get_default_dtype()))
        _initialise(model)
        if model.can_generate() and (directory / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model.eval()


@contextmanager
def _our_errors(directory: Path) -> Iterator[None]:
    """Turn any error into a ``CheckpointError``: a wrong configuration breaks a constructor in any way."""
    try:
        yield
    except (CheckpointError, ImportError):
        raise
    except Exception as error:
        raise CheckpointError(f"{directory}: transformers cannot make a model of its config.json: {error}") from error


def _maker(transformers: Any, config: Any) -> Callable[..., Any]:
    made = class_named(transformers, config)
    return made.from_config if made is transformers.AutoModel else made._from_config  # type: ignore[no-any-return]


def class_named(transformers: Any, config: Any) -> Any:
    """The model class that a configuration names; ``AutoModel``, for the base model, if it names none."""
    for architecture in (getattr(config, "architectures", None) or ())[:1]:
        model_class = getattr(transformers, architecture, None)
        if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
            raise CheckpointError(
                f"transformers {transformers.__version__} has no model {architecture!r}"
                + ("" if of_own_code(config) is None else f"; {_OWN_CODE}")
            )
        return model_class
    return transformers.AutoModel


_OWN_CODE = (
    "the checkpoint brings its own code, and hotweights.engines.transformers.from_pretrained(..., "
    "trust_remote_code=True) runs it"
)


def of_own_code(config: Any) -> str | None:
    """The ``AutoModel`` that makes a configuration's model by code that lies beside it; ``None`` if there is none."""
    found: dict[str, Any] = getattr(config, "auto_map", None) or {}
    models = {name: str(where).rpartition(".")[2] for name, where in found.items() if name.startswith("AutoModel")}
    architecture = next(iter(getattr(config, "architectures", None) or ()), models.get("AutoModel"))
    return next((name for name, model in models.items() if model == architecture), None)


def keep_dtypes(model: Any, plan: Mapping[str, torch.dtype]) -> list[tuple[Place, torch.Tensor]]:
    """Give parameters that transformers keeps in a dtype of their own that dtype; the tensors that were there."""
    kept = {re.compile(pattern.replace("*", ".*")): dtype for pattern, dtype in plan.items()}
    # This list keeps the old tensors alive: ties are known by id, and a new tensor may get the id of one that is gone.
    olds = [(place, place.tensor) for place in places(model) if place.persistent and place.tensor.is_floating_point()]
    casts: dict[int, torch.Tensor] = {}
    for place, old in olds:
        for pattern, dtype in kept.items():
            if pattern.search(place.name) and id(old) not in casts:
                casts[id(old)] = _cast(old, dtype)
    replaced = [(place, old) for place, old in olds if id(old) in casts]
    for place, old in replaced:
        place.put(casts[id(old)])
    return replaced


def _cast(old: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    new = old.detach().to(dtype)
    if isinstance(old, nn.Parameter):
        new = type(old)(new, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    return new


def _initialise(model: Any) -> None:
    """Make real what no checkpoint carries, and compute it as ``from_pretrained`` does.

    That is after the constructor: inside it, torch's default dtype is the model's, and rotary tables that are computed
    in that dtype come out coarser.
    """
    everywhere = list(places(model))
    never_saved = matches(ignored_when_missing(model))
    names = {
        place.name for place in everywhere if not isinstance(place.tensor, nn.Parameter) or never_saved(place.name)
    }
    for place, _ in materialise(everywhere, names, torch.device("cpu")):
        place.tensor.detach().zero_()  # What initialize_weights() leaves out would differ from run to run.
    model.initialize_weights()
