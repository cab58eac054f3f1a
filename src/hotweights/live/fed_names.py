"""FedNames: from the names by which tensors are fed to an update to those of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..errors import SourceError
from ..manifest import Manifest
from ..rename import unusable


@dataclass(frozen=True)
class FedNames:
    """How the tensors of one update are called by who brings them.

    Attributes:
        new: the names of those that the model calls otherwise.
        rename: what is done to a name before that.
        meant: where there is a ``rename``, the model's names for those that wrapping modules make of them.
    """

    new: Mapping[str, str] = field(default_factory=dict)
    rename: Callable[[str], str] | None = None
    meant: Mapping[str, str] = field(default_factory=dict)

    def of(self, name: str, manifest: Manifest) -> str:
        """The name that the plan, which is made for ``manifest``, has for what is fed as ``name``.

        Raises:
            SourceError: ``rename`` gives no name.
        """
        if self.rename is None:
            return self.new.get(name, name)
        fresh = self.rename(name)
        if why := unusable(name, fresh):
            raise SourceError(f"rename= gives no name: {why}")
        # A name that is the plan's already would be renamed twice by a rename that swaps names, or counts them up.
        if fresh in manifest:
            return fresh
        # So would be one that the last version was called by, where that came by a rename of its own.
        return self.meant.get(fresh) or self.new.get(fresh, fresh)

    def called(self, name: str) -> str:
        """The plan's ``name`` for messages, with the one by which it must be fed."""
        fed = next((old for old, new in self.new.items() if new == name), name)
        return name if fed == name else f"{name} ({fed} in the source)"

    def promised(self, manifest: Manifest) -> Manifest:
        """What must be fed, where ``manifest`` has the plan's names."""
        fed = {new: old for old, new in self.new.items() if new in manifest}
        return manifest.renamed(fed)
