"""RouteReport: what one routing did. Frozen; prints as a short table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..loading.report import LoadReport
from ..text import as_html, rate, size, some, summary, table


@dataclass(frozen=True, slots=True)
class RouteReport:
    """What one routing did. Its maps go by the components' names, in the order in which those were given.

    Attributes:
        tensors: of each component that was loaded, the source's names of its tensors.
        nbytes: the bytes of those.
        returned: what each ``load_weights`` returned; the ``LoadReport`` of a module that was loaded by name.
        untaken: the source's names of tensors that a component's loading code did not take, because it stopped early.
        disabled: of each component that is disabled, the source's names of its tensors.
        streamed: the component that was loaded while the stream passed; ``None`` if no component had to wait.
        peak_waiting_bytes: the most memory that tensors of the other components held at once, until the stream's end.
        seconds: from opening the source to the end of the last component.
    """

    tensors: Mapping[str, tuple[str, ...]]
    nbytes: Mapping[str, int]
    returned: Mapping[str, object]
    untaken: Mapping[str, tuple[str, ...]]
    disabled: Mapping[str, tuple[str, ...]]
    streamed: str | None
    peak_waiting_bytes: int
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """The same facts for machines: only names, numbers, lists and dictionaries.

        Of what components returned reports are dictionaries, sets are sorted lists, and objects their ``repr``.
        """
        return {
            "tensors": _lists(self.tensors),
            "nbytes": dict(self.nbytes),
            "returned": {name: _plain(value) for name, value in self.returned.items()},
            "untaken": _lists(self.untaken),
            "disabled": _lists(self.disabled),
            "streamed": self.streamed,
            "peak_waiting_bytes": self.peak_waiting_bytes,
            "seconds": self.seconds,
        }

    def __repr__(self) -> str:
        names = some([*self.tensors], 3)
        off = f", {len(self.disabled)} disabled" if self.disabled else ""
        return f"<RouteReport {size(sum(self.nbytes.values()))} in {self.seconds:.3f} s to {names or 'nobody'}{off}>"

    def _repr_html_(self) -> str:
        return as_html(self)

    def __str__(self) -> str:
        rows = [(name, self._loaded(name)) for name in self.tensors]
        rows += [(name, f"disabled, {len(names)} tensors left alone") for name, names in self.disabled.items()]
        rows.append(("memory", f"{size(self.peak_waiting_bytes)} waiting at peak"))
        total = sum(self.nbytes.values())
        rows.append(("all", f"{size(total)} in {self.seconds:.3f} s ({rate(total, self.seconds)})"))
        return table(rows)

    def _loaded(self, name: str) -> str:
        text = f"{size(self.nbytes[name])} in {len(self.tensors[name])} tensors"
        if name == self.streamed:
            text += ", streamed"
        return text + (f"; stopped before {summary(self.untaken[name], {})}" if name in self.untaken else "")


def _lists(names: Mapping[str, tuple[str, ...]]) -> dict[str, list[str]]:
    return {name: list(several) for name, several in names.items()}


def _plain(value: object) -> object:
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, LoadReport):
        return value.as_dict()
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return repr(value)
