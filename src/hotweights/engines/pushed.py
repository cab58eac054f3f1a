"""PushedUpdate: an update whose tensors another's code hands over, in callbacks that must not raise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress

from ..errors import TiedWeightsDiffer
from ..live.report import UpdateReport
from ..live.update import Update
from ..manifest import Manifest
from ..memory.digest import digests
from ..sources.pairs import Pair

_LOG = logging.getLogger("hotweights")

Agree = Callable[[Exception | None], None]
"""Says what failed here, or ``None``; raises if anything failed anywhere."""


class PushedUpdate:
    """One update of a live model. What fails is kept for ``finish``, so that whoever pushes can end its handshake.

    A context manager; leaving it without ``finish`` aborts.

    Attributes:
        problem: what failed first.
        report: what was done, once the version was taken.
    """

    def __init__(
        self,
        begin: Callable[[], AbstractContextManager[Update]],
        *,
        agree: Agree | None = None,
        twins: Callable[[Manifest], Mapping[str, str]] | None = None,
    ) -> None:
        """Nothing is begun yet.

        Args:
            begin: begins the update, such as ``live.begin``.
            agree: what others have to say in it; by default nobody has.
            twins: of what is promised, endings of names that may come besides, each with the name that must bring the
                same bytes: tied weights, which some trainers send twice and checkpoints hold once.
        """
        self._begin, self._agree, self._twins_of = begin, agree or _alone, twins
        self._twins: Mapping[str, str] = {}
        self._promised: Manifest | None = None
        self._stack = ExitStack()
        self._update: Update | None = None
        self._digests: dict[str, str] = {}
        self._over = False
        self._failure: Exception | None = None
        self.problem: Exception | None = None
        self.report: UpdateReport | None = None

    def __enter__(self) -> PushedUpdate:
        try:
            update = self._update = self._stack.enter_context(self._begin())
        except Exception as error:
            self.fail(error)
        else:
            promised = self._promised = update.manifest
            self._twins = {} if self._twins_of is None else self._twins_of(promised)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def feed(self, pairs: Iterable[Pair]) -> None:
        """Take tensors; they may be borrowed. What was fed after a failure is forgotten."""
        if self.problem is not None or self._update is None:
            return
        try:
            self._update.feed(self._without_twins(pairs) if self._twins else pairs)
        except Exception as error:
            self.fail(error)

    def feed_or_raise(self, pairs: Iterable[Pair]) -> None:
        """The same; raises what failed, for those who tell the other end."""
        self.feed(pairs)
        if self.problem is not None:
            raise self.problem

    def fail(self, error: Exception) -> None:
        """Take note that the update has failed; of several failures the first counts."""
        _LOG.debug("what is pushed cannot be taken", exc_info=error)
        # Its frames, and those that had called them, hold tensors in memory that whoever pushes is about to close.
        each: BaseException | None = error
        while each is not None:
            each.__traceback__ = None
            each = each.__cause__ or each.__context__
        self.problem = self.problem or error

    def finish(self, version: str | int | None = None) -> UpdateReport:
        """Commit, if everything came and nobody has a problem. Called again, it says again what came of it.

        Raises:
            Exception: the version was not taken: whoever pushed has failed, see ``fail``, or the update has.
        """
        if not self._over:
            self._over = True
            try:
                self.report = self._finished(version)
            except Exception as error:
                self.fail(error)
                self._failure = error
        if self._failure is not None:
            raise self._failure
        assert self.report is not None, "it was taken, or something failed"
        return self.report

    def finish_quietly(self, version: str | int | None = None) -> None:
        """The same, for those whose other end would wait for ever if this raised. ``finish`` says what came of it."""
        with suppress(Exception):
            self.finish(version)

    def _finished(self, version: str | int | None) -> UpdateReport:
        update = self._update
        if update is not None and self.problem is None:
            try:
                self._compare()
                update.prepare()
            except Exception as error:
                self.fail(error)
        self._agree(self.problem)
        assert update is not None, "what was not begun has a problem"
        return update.commit(version)

    def _without_twins(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        assert self._promised is not None, "it was begun"
        for name, tensor in pairs:
            is_twin = name not in self._promised and name.endswith(tuple(self._twins))
            if is_twin or name in self._twins.values():
                self._digests.update(digests({name: tensor}, [name]))
            if not is_twin:
                yield name, tensor

    def _compare(self) -> None:
        """See that twins came with the same bytes."""
        for ending, name in self._twins.items():
            others = [other for other in self._digests if other != name and other.endswith(ending)]
            problems = [f"{other}: other bytes than {name}" for other in others if self._differs(other, name)]
            if problems:
                raise TiedWeightsDiffer("the model has one tensor for what came with different bytes", problems)

    def _differs(self, one: str, other: str) -> bool:
        return other in self._digests and self._digests[one] != self._digests[other]


def _alone(problem: Exception | None) -> None:
    if problem is not None:
        raise problem
