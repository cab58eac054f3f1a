"""FedNames: from the names by which tensors are fed to an update to those of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..manifest import Manifest


@dataclass(frozen=True)
class FedNames:
    """How the tensors of one update are called by who brings them.

    Attributes:
        new: the names of those that the model calls otherwise.
        rename: what is done to a name before that.
    """

    new: Mapping[str, str] = field(default_factory=dict)
    rename: Callable[[str], str] | None = None

    def of(self, name: str) -> str:
        """The name that the plan has for what is fed as ``name``."""
        if self.rename is not None:
            name = self.rename(name)
        return self.new.get(name, name)

    def promised(self, manifest: Manifest) -> Manifest:
        """What must be fed, where ``manifest`` has the plan's names."""
        fed = {new: old for old, new in self.new.items() if new in manifest}
        return manifest.renamed(fed)
