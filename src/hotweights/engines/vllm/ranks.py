"""Ranks: the workers of one engine, who take a version together or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed
from torch import Tensor

from ...errors import HotweightsError, UpdateAborted
from ...manifest import Manifest
from ...memory.guards import Guard
from ...sources.contracts import Addressed, Read, Source, Stream


class Refused(HotweightsError):
    """Some rank cannot take this version; each is named with its cause. No rank has taken it.

    Attributes:
        problems: one for each such rank.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "; ".join(self.problems)


class Ranks:
    """The workers of one engine, who can ask each other.

    Attributes:
        rank: which this is.
        size: how many there are.
    """

    def __init__(self) -> None:
        from vllm.distributed import parallel_state

        # Replicas that serve other requests are asked by themselves; where there are none, vLLM has but one group.
        group = parallel_state._INNER_DP_WORLD or parallel_state.get_world_group()
        self.rank: int = group.rank_in_group
        self.size: int = group.world_size
        self._group: Any = group.cpu_group

    @classmethod
    def of(cls, group: Any) -> Ranks:
        """Those of a process group of torch's, which can gather objects: one of gloo."""
        ranks = cls.__new__(cls)
        ranks.rank = torch.distributed.get_rank(group)
        ranks.size = torch.distributed.get_world_size(group)
        ranks._group = group
        return ranks

    def gather(self, word: str | None) -> list[str | None]:
        """What each rank says. Every rank must call this: it waits for all of them."""
        if self.size == 1:
            return [word]
        words: list[str | None] = [None] * self.size
        torch.distributed.all_gather_object(words, word, group=self._group)
        return words

    def agree(self, problem: str | None) -> None:
        """Return when no rank has a problem. Every rank must call this: it waits for all of them.

        Raises:
            Refused: some ranks have one; the message names them.
        """
        words = self.gather(problem)
        problems = [f"rank {number}: {word}" for number, word in enumerate(words) if word is not None]
        if problems:
            raise Refused(problems)

    def own_words(self, error: BaseException) -> str:
        """An error in words; of several ranks' problems this rank's own, if it has one."""
        own = [problem for problem in getattr(error, "problems", ()) if problem.startswith(f"rank {self.rank}: ")]
        return own[0].partition(": ")[2] if own and isinstance(error, Refused) else words_of(error)


class _Together:
    """A source whose version all ranks take, or none. Each rank has one of these, and asks the others once."""

    def __init__(self, source: Source, ranks: Ranks) -> None:
        self._source = source
        self._ranks = ranks
        self._asked = False

    @property
    def manifest(self) -> Manifest:
        return self._source.manifest

    def leases(self, *, guard: Guard = "off") -> Stream:
        return self._source.leases(guard=guard)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return self._source.tensors()

    def wanted(self, names: Iterable[object]) -> None:
        """Nothing need be said before: a file is there already."""

    @contextmanager
    def decision(self) -> Iterator[None]:
        self._asked = True
        self._ranks.agree(None)
        yield

    def refuse(self, error: BaseException) -> None:
        if not self._asked:
            self._asked = True
            self._ranks.gather(words_of(error))

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> _Together:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _AddressedTogether(_Together):
    """The same, of a source that can be asked for any bytes."""

    _source: Any

    def position(self, name: str) -> tuple[int, int]:
        position: tuple[int, int] = self._source.position(name)
        return position

    def read(self, reads: Iterable[Read], **how: Any) -> dict[str, int]:
        bytes_by_io: dict[str, int] = self._source.read(reads, **how)
        return bytes_by_io


def together(source: Source, ranks: Ranks) -> Source:
    """The source, as a ``Participant`` in the ranks' decision: a live model waits for it before it commits."""
    return _AddressedTogether(source, ranks) if isinstance(source, Addressed) else _Together(source, ranks)


def words_of(error: BaseException) -> str:
    """An error in words for another process. Of an aborted update, they are those of its cause."""
    if isinstance(error, UpdateAborted) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
