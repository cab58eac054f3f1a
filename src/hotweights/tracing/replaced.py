"""Replaced: a function of somebody else's that is another one for some time, in however many threads."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..signals import held


class Replaced:
    """A function and what stands in for it, which must do the same for threads that are not inside.

    Attributes:
        original: the function, as it was when the first block was entered.
    """

    def __init__(self, owner: Any, name: str, other: Callable[..., Any]) -> None:
        self._owner, self._name, self._other = owner, name, other
        # As it stands there: of a static method, the object that makes it one.
        self.original: Callable[..., Any] = inspect.getattr_static(owner, name)
        self._inside = 0  # blocks that are open now, in all threads; changes under the lock
        self._changing = threading.Lock()

    @contextmanager
    @held
    def meanwhile(self) -> Iterator[None]:
        """Inside, the other function is there. The last block to end puts the function back, whoever was first."""
        with self._changing:
            self._inside += 1
            now = inspect.getattr_static(self._owner, self._name)
            if now is not self._other:
                self.original = now
                setattr(self._owner, self._name, self._other)
        try:
            yield
        finally:
            with self._changing:
                self._inside -= 1
                if not self._inside:
                    setattr(self._owner, self._name, self.original)
