"""Closing: how a source that holds files open ends, by ``close``, by a ``with``, or forgotten."""

from __future__ import annotations

from typing import Self

from ..errors import Closed
from ..notices import forgotten


class ClosedByOwner:
    """A source that its owner closes. Who forgets it is told, and it is closed all the same.

    Attributes:
        path: what it is called in messages.
    """

    path: str
    _closed = True  # Until the files are open there is nothing to close.

    def close(self) -> None:
        """Close the files. May be called twice."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            try:
                forgotten(f"the source {self.path!r} was not closed; use it in a with", self)
            finally:
                self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"the source {self.path!r} was closed")
