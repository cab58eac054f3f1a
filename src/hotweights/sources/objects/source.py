"""ObjectSource: the tensors of safetensors objects in a store. It is read as files are, by ranges."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ...memory.pool import Pool
from ..contracts import IOMode, Read
from ..files.belongings import MODULES, Belongings, belong
from ..files.source import FileSource
from .address import Address
from .object import Object
from .store import PART

_AT_ONCE = 8 * PART  # bytes in memory of a file that goes along


class ObjectSource(FileSource):
    """The tensors of one checkpoint in a store. Made by ``hotweights.open``; closing it ends the connection.

    The index and the objects are those that were found when it was opened: an answer of another object is an error.
    """

    _piece = PART
    _gap = 512 * 1024  # cost less to read than a second request does

    def __init__(
        self,
        what: Sequence[Address],
        *,
        variant: str | None = None,
        subfolder: str | None = None,
        digests: str | os.PathLike[str] | None = None,
    ) -> None:
        """The source closes the store of ``what``, also if this raises."""
        self._store = what[0].store
        try:
            super().__init__(what[0] if len(what) == 1 else what, variant=variant, subfolder=subfolder, digests=digests)
        except BaseException:
            self._store.close()
            raise

    def read(
        self,
        reads: Iterable[Read],
        *,
        pool: Pool,
        io: IOMode = "auto",
        threads: int | None = None,
        advance: Callable[[int], None] | None = None,
        stop: threading.Event | None = None,
    ) -> dict[str, int]:
        """Do all the reads, see ``contracts.Addressed``. ``threads`` is how many ranges are asked for at once."""
        threads = threads or self._store.requests
        return super().read(reads, pool=pool, io=io, threads=threads, advance=advance, stop=stop)

    def belongings(self, folder: Path) -> Belongings:
        """Bring to a folder on the disk what goes along with the weights when they are copied.

        Raises:
            CheckpointError: the store did not give it, or not in time.
        """
        first = self._shards[0].file
        assert isinstance(first, Object)
        place = Address(self._store, first.key).parent
        modules = self._store.content((place / MODULES).key)
        weights = {os.path.basename(file) for file in self.files}
        names, left = belong(self._store.tree(place.key), weights, b"" if modules is None else modules[0])
        self._store.open_soon((place / name).key for name in names)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            each = Object(self._store, (place / name).key)
            with open(folder / name, "wb") as file:
                for start in range(0, each.size, _AT_ONCE):
                    file.write(each.pread(min(_AT_ONCE, each.size - start), start))
        return Belongings({name: folder / name for name in names}, left)

    def check(self) -> None:
        """See that the index still is the one that named the objects. They were compared with each answer."""
        super().check()
        if isinstance(index := self._checkpoint.index, Object):
            index.check_again()

    def close(self) -> None:
        """End the connection. May be called twice."""
        super().close()
        self._store.close()

    def __repr__(self) -> str:
        return f"<ObjectSource {self.path!r}: {len(self._manifest)} tensors in {len(self._shards)} objects>"
