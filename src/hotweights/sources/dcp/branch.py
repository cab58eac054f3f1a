"""Branch: which dict of a nested state dict holds the model, by its keys alone. docs/sources.md says the rule."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ...errors import CheckpointError
from ...text import some
from .place import OUTERMOST
from .saved import Keys

_MODEL = ("model", "state_dict", "model_state_dict", "model_state", "module")
# What trainers keep beside a model. Taken only where nothing else is.
_TRAINING = re.compile(r"(optim|.*sched|.*scaler|.*sampler|random|rng|train(er)?_?state|data_?loader|progress).*", re.I)


class Branch(NamedTuple):
    """The tensors of one dict.

    Attributes:
        names: what they are called within it, by their names in the checkpoint.
        others: the dicts beside it that may be meant too; those that trainers keep beside a model are no such.
    """

    names: dict[str, str]
    others: tuple[str, ...]


def find_branch(place: str, names: Iterable[str], keys: Mapping[str, Keys], asked: str | None) -> Branch:
    """The tensors of the dict that is ``asked`` for, such as ``"app/model"``; else of the model's.

    Raises:
        CheckpointError: there is no such dict; or several may be the model's, and nothing says which.
    """
    paths = {name: tuple(map(str, keys.get(name, (name,)))) for name in names}
    return _chosen(place, paths) if asked is None else _asked(place, asked, paths)


_Paths = Mapping[str, tuple[str, ...]]
_Head = tuple[str, ...]  # the keys that lead to a dict


def _asked(place: str, asked: str, paths: _Paths) -> Branch:
    if asked == OUTERMOST:
        return Branch(_directly(paths, ()), ())
    head = tuple(asked.split("/"))
    if found := _within(paths, head):
        return Branch(found, ())
    there = [group for group in _groups(paths, ()) if group]
    cure = f"choose one: {_ways((), there)}" if there else "its tensors lie in no dict; leave subfolder= out"
    raise CheckpointError(
        f"{place}: no folder here, and no dict of the checkpoint, is called {asked!r}; {cure}", cause="not_found"
    )


def _chosen(place: str, paths: _Paths, head: _Head = ()) -> Branch:
    groups = _groups(paths, head)
    left = [group for group in groups if not _TRAINING.fullmatch(group)]
    models = [group for group in left if group in _MODEL]
    if len(models) == 1:
        others = ["/".join((*head, group)) or OUTERMOST for group in left if group and group not in models]
        return Branch(_within(paths, (*head, *models)), tuple(others))
    if len(left) > 1:
        raise CheckpointError(
            f"{place}: holds several state dicts, and nothing says which is meant; choose one: {_ways(head, left)}"
        )
    if not left:
        return Branch(_within(paths, head), ())
    if left == [""]:
        return Branch(_directly(paths, head), ())
    return _chosen(place, paths, (*head, *left))


def _groups(paths: _Paths, head: _Head) -> list[str]:
    """The keys of the dicts in the one at ``head`` that hold tensors; an empty one if it holds some itself."""
    depth = len(head)
    inside = [path for path in paths.values() if path[:depth] == head]
    return list(dict.fromkeys(path[depth] if len(path) > depth + 1 else "" for path in inside))


def _within(paths: _Paths, head: _Head) -> dict[str, str]:
    depth = len(head)
    return {name: ".".join(path[depth:]) for name, path in paths.items() if path[:depth] == head and path[depth:]}


def _directly(paths: _Paths, head: _Head) -> dict[str, str]:
    depth = len(head)
    return {name: path[-1] for name, path in paths.items() if path[:depth] == head and len(path) == depth + 1}


def _ways(head: _Head, groups: Iterable[str]) -> str:
    paths = ["/".join(filter(None, (*head, group))) or OUTERMOST for group in groups]
    return some([f"subfolder={json.dumps(path)}" for path in paths], 10)
