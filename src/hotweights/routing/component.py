"""Component and Routes: which tensor goes to which part of a model, and under which name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import nn

from ..arguments import check_callable, check_flags, check_kind
from ..dtypes import Cast
from ..errors import UsageError
from ..rename import Rename, both_become, renamer, unusable
from ..text import some


@dataclass(frozen=True, slots=True, eq=False)
class Component:
    """A part of a model, and which tensors are its own.

    Attributes:
        match: a prefix of the tensors' names, or a predicate on a name. A predicate goes before any prefix, a longer
            prefix before a shorter one; ``""`` matches all the rest.
        load_weights: the part's own loading code. It is called once, with an iterable of pairs, and may keep the
            tensors. Or a module: its ``load_weights`` is called; a module without one is loaded by name, as
            ``hotweights.load`` does it. ``None`` if the model does not have this part.
        strip: what is taken off the front of each name; by default a matched prefix.
        rename: is given what is left of a name, and returns the name that ``load_weights`` gets; or a mapping of
            prefixes, as for ``hotweights.load``.
        enabled: if ``False``, its tensors are left alone: neither read, copied nor looked at, as is ``load_weights``.
        cast: which casts that lose information are done where a module is loaded by name, see ``hotweights.load``.
        required: whether it is a problem if there is no tensor for it. A part that got none is not called.
        name: its name in errors and in the report; by default the prefix, or the predicate's name.
    """

    match: str | Callable[[str], bool]
    load_weights: Callable[[Iterable[tuple[str, torch.Tensor]]], object] | nn.Module | None
    _: KW_ONLY
    strip: str | None = None
    rename: Rename | None = None
    enabled: bool = True
    cast: Cast | None = None
    required: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        if not (isinstance(self.match, str) or callable(self.match)):
            raise UsageError(f"a component matches a prefix or a predicate, not a {type(self.match).__name__}")
        check_kind("strip", self.strip, str, "a prefix")
        check_kind("name", self.name, str, "a name")
        check_callable(rename=self.rename)
        check_flags(enabled=self.enabled, required=self.required)
        if self.enabled and not (self.load_weights is None or callable(self.load_weights)):
            found = type(self.load_weights).__name__
            raise UsageError(f"the load_weights of a component is a function, a module or None, not a {found}")
        if self.rename is not None:
            renamer(self.rename)
        object.__setattr__(self, "name", self.name or _name_of(self.match))


def _name_of(match: str | Callable[[str], bool]) -> str:
    if isinstance(match, str):
        return match.rstrip(".") or "everything else"
    return getattr(match, "__name__", type(match).__name__)


class Routes:
    """Decides, name by name, where tensors go, and collects every problem.

    Attributes:
        components: in the order in which they were given.
        problems: what was wrong so far, one line each.
    """

    def __init__(self, components: Iterable[Component]) -> None:
        if not isinstance(components, Iterable):
            raise UsageError(f"components are several hotweights.Component; this is a {type(components).__name__}")
        self.components = tuple(components)
        _check(self.components)
        self.problems: list[str] = []  # Grows as names are placed.
        self._origins: dict[Component, dict[str, str]] = {component: {} for component in self.components}
        self._predicates = [(part.match, part) for part in self.components if not isinstance(part.match, str)]
        prefixes = [(part.match, part) for part in self.components if isinstance(part.match, str)]
        self._prefixes = sorted(prefixes, key=lambda pair: -len(pair[0]))

    def place(self, name: str) -> tuple[Component, str] | None:
        """The component that gets the tensor, and the tensor's name there.

        ``None`` if none gets it: the component is disabled, or there is a problem.
        """
        component = self._component(name)
        if component is None:
            return None
        ours = self._renamed(component, name) if component.enabled else name
        origins = self._origins[component]
        if ours in origins:
            before = origins[ours]
            problem = f"{name} comes twice" if name == before else both_become(before, name, ours)
            self.problems.append(f"{component.name}: {problem}")
            return None
        origins[ours] = name
        return (component, ours) if component.enabled and component.load_weights is not None else None

    def names(self, component: Component) -> Mapping[str, str]:
        """The tensors that came for the component: from each one's name there to its name in the source."""
        return self._origins[component]

    def loaded(self) -> list[Component]:
        """The components that are present and have tensors."""
        return [component for component in self.present() if self._origins[component]]

    def present(self) -> list[Component]:
        """The components that the model has, and that are enabled."""
        return [part for part in self.components if part.enabled and part.load_weights is not None]

    def _component(self, name: str) -> Component | None:
        fitting = [component for matches, component in self._predicates if matches(name)] if self._predicates else ()
        if len(fitting) > 1:
            self.problems.append(f"{name}: fits {' and '.join(component.name for component in fitting)}")
            return None
        if fitting:
            return fitting[0]
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
            ours = renamer(component.rename)(ours)
        if problem := unusable(name, ours):
            self.problems.append(f"{component.name}: {problem}")
            return name
        return ours


def unfilled(routes: Routes) -> Iterator[str]:
    """What is wrong once all names are known: a required part got nothing, or a part that is absent got tensors."""
    for component in routes.components:
        names = list(routes.names(component).values())
        if not component.enabled:
            continue
        if component.load_weights is None and names:
            yield (
                f"{component.name}: its load_weights is None, but there are tensors for it: {some(names, 3)}; "
                "enabled=False leaves them alone"
            )
        elif component.load_weights is not None and component.required and not names:
            yield f"{component.name}: is missing, for there is no tensor for it; required=False allows that"


def _check(components: tuple[Component, ...]) -> None:
    if not components:
        raise UsageError("there are no components to route to; give at least one hotweights.Component")
    if strangers := [f"{value!r} is no Component" for value in components if not isinstance(value, Component)]:
        raise UsageError(f"{'; '.join(strangers)}; give hotweights.Component(match, load_weights)")
    twice = _twice("name", [component.name for component in components])
    twice += _twice("prefix", [component.match for component in components if isinstance(component.match, str)])
    if twice:
        raise UsageError(f"these components cannot be told apart: {'; '.join(twice)}")


def _twice(what: str, values: list[str]) -> list[str]:
    return [f"two have the {what} {value!r}" for value, count in sorted(Counter(values).items()) if count > 1]
