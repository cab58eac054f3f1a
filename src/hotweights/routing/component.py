"""Component and Routes: which tensor goes to which part of a model, under which name. They move nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import nn

from ..errors import UsageError

_SHOWN = 3  # names a line


@dataclass(frozen=True, slots=True, eq=False)
class Component:
    """A part of a model, and which tensors are its own.

    Attributes:
        match: a prefix of their names, or a predicate on a name. A predicate goes before any prefix, a longer prefix
            before a shorter one; ``""`` is all the rest.
        load_weights: the part's own loading code, which is given an iterable of pairs, once, and may keep the tensors;
            or a module: its ``load_weights``, or without one it is loaded by name, as ``hotweights.load`` does it.
            ``None`` where the model does not have this part.
        strip: what is taken off the front of each name; by default a matched prefix.
        rename: makes of what is left the name that ``load_weights`` gets.
        enabled: if not, its tensors are left alone: neither read, copied nor looked at. Nor is ``load_weights``.
        required: whether it is a problem if there is no tensor for it. A part that got none is not called.
        name: in errors and in the report; by default the prefix, or the predicate's name.
    """

    match: str | Callable[[str], bool]
    load_weights: Callable[[Iterable[tuple[str, torch.Tensor]]], object] | nn.Module | None
    _: KW_ONLY
    strip: str | None = None
    rename: Callable[[str], str] | None = None
    enabled: bool = True
    required: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        if not (isinstance(self.match, str) or callable(self.match)):
            raise UsageError(f"a component matches a prefix or a predicate, not a {type(self.match).__name__}")
        if self.enabled and not (self.load_weights is None or callable(self.load_weights)):
            raise UsageError(
                f"the load_weights of a component is a function, a module or None, not a "
                f"{type(self.load_weights).__name__}"
            )
        object.__setattr__(self, "name", self.name or _name_of(self.match))


def _name_of(match: str | Callable[[str], bool]) -> str:
    if isinstance(match, str):
        return match.rstrip(".") or "everything else"
    return getattr(match, "__name__", type(match).__name__)


class Routes:
    """Decides, name by name, where tensors go, and keeps every problem that it meets."""

    def __init__(self, components: Iterable[Component]) -> None:
        self.components = tuple(components)
        _check(self.components)
        self.problems: list[str] = []  # Grows as names are placed.
        self._origins: dict[Component, dict[str, str]] = {component: {} for component in self.components}
        self._predicates = [(one.match, one) for one in self.components if not isinstance(one.match, str)]
        prefixes = [(one.match, one) for one in self.components if isinstance(one.match, str)]
        self._prefixes = sorted(prefixes, key=lambda pair: -len(pair[0]))

    def place(self, name: str) -> tuple[Component, str] | None:
        """The component that gets the tensor, and the name that it gets it under.

        ``None`` if no component does, because it is disabled or because of a problem.
        """
        component = self._component(name)
        if component is None:
            return None
        ours = self._renamed(component, name) if component.enabled else name
        origins = self._origins[component]
        if ours in origins:
            one, other = sorted((name, origins[ours]))
            twice = f"{name} comes twice" if one == other else f"{one} and {other} both become {ours}"
            self.problems.append(f"{component.name}: {twice}")
            return None
        origins[ours] = name
        return (component, ours) if component.enabled and component.load_weights is not None else None

    def names(self, component: Component) -> Mapping[str, str]:
        """The tensors that came for the component: of each its name there, and the source's."""
        return self._origins[component]

    def loaded(self) -> list[Component]:
        """The components that are there, enabled, and have tensors."""
        return [one for one in self.components if one.enabled and one.load_weights is not None and self._origins[one]]

    def _component(self, name: str) -> Component | None:
        found = [component for matches, component in self._predicates if matches(name)] if self._predicates else ()
        if len(found) > 1:
            self.problems.append(f"{name}: fits {' and '.join(component.name for component in found)}")
            return None
        if found:
            return found[0]
        for prefix, component in self._prefixes:
            if name.startswith(prefix):
                return component
        self.problems.append(f"{name}: is unexpected, for it fits no component")
        return None

    def _renamed(self, component: Component, name: str) -> str:
        strip = component.strip
        if strip is None:
            strip = component.match if isinstance(component.match, str) else ""
        if not name.startswith(strip):
            self.problems.append(f"{component.name}: {name} does not begin with {strip!r}, which strip= takes off")
        ours = name.removeprefix(strip)
        if component.rename is not None:
            ours = component.rename(ours)
        if not isinstance(ours, str) or not ours or ours.startswith("."):
            self.problems.append(f"{component.name}: {name} would become {ours!r}; a prefix ends with its dot")
            return name
        return ours


def unfilled(routes: Routes) -> Iterator[str]:
    """What is wrong once all names are known: parts that are needed and got nothing, or got tensors and are absent."""
    for component in routes.components:
        names = list(routes.names(component).values())
        if not component.enabled:
            continue
        if component.load_weights is None and names:
            yield (
                f"{component.name}: its load_weights is None, but there are tensors for it: {_shown(names)}; "
                "enabled=False leaves them alone"
            )
        elif component.load_weights is not None and component.required and not names:
            yield f"{component.name}: is missing, for there is no tensor for it; required=False allows that"


def _shown(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _check(components: tuple[Component, ...]) -> None:
    problems = [f"{one!r} is no Component" for one in components if not isinstance(one, Component)]
    if not problems:
        problems += _twice("name", [one.name for one in components])
        problems += _twice("prefix", [one.match for one in components if isinstance(one.match, str)])
    if not components or problems:
        raise UsageError("these components cannot be told apart: " + "; ".join(problems or ["there are none"]))


def _twice(what: str, values: list[str]) -> list[str]:
    return [f"two have the {what} {value!r}" for value in sorted({one for one in values if values.count(one) > 1})]
