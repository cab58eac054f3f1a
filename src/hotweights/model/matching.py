"""KnownNames: the names of a model's tensors, and which of them a source's names mean where wrappers stand between."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import nn

from ..errors import PlanError
from ..names import PREFIXES, SPELLED, bare_names

_Options = Mapping[str, Collection[str]]


class KnownNames:
    """The names of a model's tensors, with wrappers and without."""

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        """``names``: of the model's tensors, as they are."""
        self._names = names
        self._bare: dict[str, list[str]] = defaultdict(list)
        self._filed: dict[str, list[str]] = defaultdict(list)  # what an adapter's file leaves the adapter's name out of
        for name, (bare, filed) in bare_names(model).items():
            self._bare[bare].append(name)
            if filed != bare:
                self._filed[filed].append(name)
        self._adapters = {name for names in self._filed.values() for name in names}

    def matched(self, names: Collection[str]) -> dict[str, str]:
        """The model's names for a source's, where they differ.

        A name that fits as it is stays. Of what all names begin with, as much is taken off as makes most names fit.
        What only wrappers bring is looked through where one tensor of the model is meant, and no other name means it.

        Raises:
            PlanError: names fit several tensors of the model, such as those of two adapters.
        """
        if all(name in self._names for name in names):
            return {}
        best, most = "", -1
        for prefix in _prefixes(names):
            count = sum(any(self._options(name[len(prefix) :])) for name in names)
            if count > most:
                best, most = prefix, count
        found = self._found([name[len(best) :] for name in names])
        return {name: new for name, new in zip(names, found, strict=True) if name != new}

    def _options(self, name: str) -> tuple[Collection[str], Collection[str]]:
        """The tensors that the name may mean: of the model itself, and of its adapters."""
        for spelling in dict.fromkeys((name, _without_wrappers(name))):
            if spelling in self._names:
                return (spelling,), ()
            if spelling in self._bare or spelling in self._filed:
                return self._bare.get(spelling, ()), self._filed.get(spelling, ())
        return (), ()

    def _free(self, name: str, taken: Collection[str]) -> tuple[Collection[str], Collection[str]]:
        """The tensors that the name may mean and that are not ``taken``."""
        ours, theirs = ([target for target in several if target not in taken] for several in self._options(name))
        return ours, theirs

    def _found(self, names: list[str]) -> Iterator[str]:
        """The model's name for each; the name itself where it means none, or the same tensor as another."""
        # A tensor whose own name is among them is meant by no other: else a model that has all would be unclear.
        taken = {name for name in names if name in self._names}
        options = [self._options(name) if name in taken else self._free(name, taken) for name in names]
        # What only an adapter or only the model has tells what this source is; then the names that both have are clear.
        sure = [ours or theirs for ours, theirs in options if bool(ours) != bool(theirs)]
        adapters = any(map(self._adapters.issuperset, sure))
        itself = not all(map(self._adapters.issuperset, sure))
        meant: list[Collection[str]] = []
        for ours, theirs in options:
            both = [*ours, *theirs]
            meant.append(both if not (ours and theirs) or adapters == itself else theirs if adapters else ours)
        unclear = {name: several for name, several in zip(names, meant, strict=True) if len(several) > 1}
        if unclear:
            raise _unclear(unclear)
        claims = Counter(target for several in meant for target in several)
        claims.update(name for name in names if name in self._names)  # A name that fits as it is goes first.
        for name, several in zip(names, meant, strict=True):
            target = next(iter(several), name)
            yield name if name in self._names or claims[target] > 1 else target


def matched(model: nn.Module, known: Collection[str], names: Collection[str]) -> dict[str, str]:
    """The model's names for a source's, see ``KnownNames``. Where all fit as they are, nothing is looked at."""
    return {} if all(name in known for name in names) else KnownNames(model, known).matched(names)


def _prefixes(names: Collection[str]) -> Iterator[str]:
    """What can be taken off all names, from nothing to all that wrappers put in front of them."""
    prefix = ""
    while True:
        yield prefix
        longer = (prefix + known for known in PREFIXES)
        further = next((known for known in longer if names and all(name.startswith(known) for name in names)), None)
        if further is None:
            return
        prefix = further


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in SPELLED)


def _unclear(names: _Options) -> PlanError:
    swaps: dict[str, str] = {}
    for name, several in names.items():
        swaps.update([_insertion(name, sorted(several)[0])])
    calls = "".join(f".replace({old!r}, {new!r})" for old, new in swaps.items())
    return PlanError(
        "names of the source fit several tensors of the model; nothing was read or written. Say which is meant, for "
        f"example rename=lambda name: name{calls}",
        [f"{name}: fits {' and '.join(sorted(several))}" for name, several in names.items()],
    )


def _insertion(name: str, target: str) -> tuple[str, str]:
    """The part of the name after which the target has more, and the same with what it has more."""
    parts, longer = name.split("."), target.split(".")
    same = next((i for i, part in enumerate(parts) if longer[i] != part), len(parts))
    more = longer[same : same + len(longer) - len(parts)]
    end = "." if same < len(parts) else ""
    stem = parts[max(same - 1, 0)]
    return f"{stem}{end}", f"{'.'.join([stem, *more])}{end}"


def meant_by(others: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """The model's name for each of its ``other_names`` that means one tensor alone."""
    count = Counter(other for several in others.values() for other in dict.fromkeys(several))
    return {other: name for name, several in others.items() for other in several if count[other] == 1}


def other_names(
    model: nn.Module, outer: str, names: Iterable[str], others: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """The names by which a user may call a tensor besides its own: within ``outer``, without wrapping modules, and

    those of ``others``, which are one with it.
    """
    bare = bare_names(model)
    if not outer and not bare:
        return dict(others)
    known = {name: (outer + name, *bare.get(name, ())) for name in names}
    for name, several in others.items():
        known[name] = (*several, *(other for one in several for other in known.get(one, ())))
    return known
