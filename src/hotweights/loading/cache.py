"""Plans that are used again: kept in memory as long as their model lives, and in files for other processes.

A plan may be used again where tracing would give it again. So its key is made of all that tracing looks at: the
manifest, the model's fingerprint, its configuration, the process groups, the versions of the packages, and the options.
Values of the model that loading code asked for are compared by digest. What loading code reads from elsewhere (the
environment, a file) is not in the key: ``cache=False`` is for such models.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .. import signals
from ..errors import PlanError, PlanFileError
from ..gc_pause import without_collection
from ..manifest import Manifest
from ..memory.aliases import owners, spots
from ..memory.digest import digests
from ..model.reachable import reachable
from ..model.survey import Survey
from ..notices import log
from ..plan.plan import LoadPlan
from ..tracing import fit
from .fingerprint import Fingerprint, portable_digest

Options = tuple[object, ...]
"""All that a plan depends on beside model and manifest: plain values."""

_KEPT = 4  # plans of one model: several checkpoints may take turns


@signals.held
def planned(
    model: nn.Module,
    survey: Survey | None,
    manifest: Manifest,
    options: Options,
    make: Callable[[], LoadPlan],
    directory: str | os.PathLike[str] | None = None,
) -> LoadPlan:
    """The plan that was made before from all the same; else a new one, which is kept.

    Args:
        model: whose plan it is. It is not kept alive.
        survey: of the model, if it is loaded by name and nothing but its tensors has a say in that.
        manifest: what will be loaded.
        options: what else ``make`` depends on.
        make: makes a plan; it changes nothing.
        directory: where plans are kept for other processes. It is made if need be.
    """
    with without_collection():
        key = _Key(model, survey, manifest, options)
    kept = _kept(model)
    for entry in kept:
        if entry.fits(key) and _values_hold(entry.plan, model):
            return entry.plan
    file = None if directory is None else Path(directory) / f"{key.digest()}.plan"
    plan = None if file is None else _from_file(file, model, manifest)
    if plan is None:
        plan = make()
        if file is not None:
            _to_file(plan, file)
    with _LOCK:
        kept[:] = [_KeptPlan(key, plan), *(entry for entry in kept if not entry.fits(key))][:_KEPT]
    return plan


class _Key:
    """All that a plan is made from. It holds the model's tensors, so it is let go when the plan is found."""

    def __init__(self, model: nn.Module, survey: Survey | None, manifest: Manifest, options: Options) -> None:
        seen = Fingerprint()
        self.facts: list[object] = [tuple(map(seen.trait, options)), _versions(), _groups(), list(manifest.values())]
        if survey is None or not seen.add_by_name(survey):
            seen = Fingerprint()
            seen.add_model(model)
            config = seen.trait(getattr(model, "config", None))
            self.facts += [config, [seen.code_of(kind) for kind in seen.classes]]
        self.facts.append(seen.rows)
        self.places = seen.places
        self._tensors = seen.tensors

    def ties(self) -> list[object]:
        """For each tensor of the model, the first name of it; and where those lie that share memory."""
        tensors = {str(number): tensor for number, tensor in enumerate(self._tensors)}
        return [*owners(tensors).values(), *spots(tensors).items()]

    def digest(self) -> str:
        """The same in every process."""
        return portable_digest((self.facts, self.ties()))


class _KeptPlan:
    """A plan and what it was made from, without the tensors."""

    def __init__(self, key: _Key, plan: LoadPlan) -> None:
        self._facts = key.facts
        self._places = key.places
        self._ties = key.ties()
        self.plan = plan

    def fits(self, key: _Key) -> bool:
        """Whether tracing would give this plan."""
        if self._facts != key.facts:
            return False
        # Where every tensor lies where it lay, all share memory as they did: ties need not be looked for.
        return self._places == key.places or self._ties == key.ties()


_PLANS: WeakKeyDictionary[nn.Module, list[_KeptPlan]] = WeakKeyDictionary()
_LOCK = threading.Lock()


@signals.held
def _kept(model: nn.Module) -> list[_KeptPlan]:
    with _LOCK:
        return _PLANS.setdefault(model, [])


def _values_hold(plan: LoadPlan, model: nn.Module) -> bool:
    return not plan.state_read or digests(reachable(model), plan.state_read) == plan.digests


def _from_file(file: Path, model: nn.Module, manifest: Manifest) -> LoadPlan | None:
    try:
        plan = LoadPlan.load(file)
    except OSError:  # Why it cannot be read is told when it cannot be written either.
        return None
    except PlanFileError as error:
        log(logging.WARNING, "a kept plan is not used, and made anew: %s", error)
        return None
    try:
        fit.check(plan, model, manifest, torch.device("cpu"))
    except PlanError as error:  # The model holds other values than those that loading code asked for.
        log(logging.INFO, "%s is not used, and made anew: %s", file, error)
        return None
    return plan


def _to_file(plan: LoadPlan, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        plan.save(file)
    except PlanFileError as error:
        log(logging.INFO, "a plan is not kept for other processes: %s", error)
    except OSError as error:  # The plan is there, and the weights can be loaded all the same.
        log(logging.WARNING, "a plan is not kept for other processes; give cache_dir= a folder: %s", error)


def _versions() -> tuple[tuple[str, str], ...]:
    return tuple(
        (name, str(getattr(sys.modules[name], "__version__", "")))
        for name in ("torch", "transformers", "vllm", "sglang")
        if name in sys.modules
    )


def _groups() -> tuple[object, ...]:
    """This process's rank, how many there are, and the members of every group that it is in, in order of creation."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return ()
    groups = distributed.distributed_c10d._world.pg_map
    members = (tuple(distributed.get_process_group_ranks(group)) for group in groups)
    return (distributed.get_rank(), distributed.get_world_size(), *members)
