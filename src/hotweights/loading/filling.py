"""Filling: a plan that is followed while the tensors of a stream arrive one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from ..plan.plan import LoadPlan
from ..plan.steps import Copy, Program
from ..signals import held
from .copy_step import Destinations, any_inference, copy_now, run_step, writing_mode, written_nbytes
from .report import Tally
from .ties import refuse_ties, same_as_written


class Filling:
    """A plan that is followed as its tensors arrive, in any order. Steps that need several wait, with owned copies.

    Attributes:
        missing: names of the tensors that have not arrived. The caller sees to it that none comes twice.
        kept: owned copies that wait for others.
    """

    def __init__(self, plan: LoadPlan, destinations: Destinations, done: Tally) -> None:
        self._plan, self._destinations, self._done = plan, destinations, done
        self._inference = any_inference(destinations)  # Asked once: take() comes for every tensor.
        first, *rest = [*plan.by_level()] or [()]
        self._copies: dict[str, list[Copy]] = defaultdict(list)
        for step in first:
            if isinstance(step, Copy):
                self._copies[step.source].append(step)
        self._later = [step for step in first if isinstance(step, Program)], *rest
        self._wanted = {name for steps in self._later for step in steps for name in step.sources}
        self._wanted |= {second.source for _, second in plan.ties} | set(plan.fallback)
        self.missing = self._wanted | self._copies.keys()
        self.kept: dict[str, torch.Tensor] = {}

    @held
    def take(self, name: str, tensor: torch.Tensor, own: Callable[[], torch.Tensor]) -> set[torch.device]:
        """Do every copy that can be done with a tensor that has arrived.

        Args:
            name: of the tensor, one of ``missing``.
            tensor: is borrowed, until the queues of the devices that are returned are done.
            own: gives a tensor of the same values that may be kept.

        Returns:
            The devices whose queues may still read it.
        """
        self.missing.discard(name)
        if name in self._wanted:
            self.kept[name] = own()
            self._done.hold_scratch(tensor.nbytes)
        with writing_mode(self._inference):
            return {
                tensor.device,  # It makes the copy that is kept.
                # Who sends tensors one by one works beside this: torch's threads would wait for its.
                *(
                    copy_now(step, tensor, self._destinations, self._done, threads=False)
                    for step in self._copies.get(name, ())
                ),
            }

    def placed(self, name: str) -> None:
        """Count one of ``missing`` as copied: its bytes came straight to where its only copy would have put them."""
        self.missing.discard(name)
        self._done.bytes_written += sum(written_nbytes(step, self._destinations) for step in self._copies[name])

    @held
    def finish(self) -> dict[str, torch.Tensor]:
        """Do the steps that waited, now that everything is there; returns the tensors of ``plan.fallback``, owned.

        Raises:
            TiedWeightsDiffer: names of one tensor carry different bytes. One of them was written.
        """
        kept, destinations = self.kept, self._destinations
        with writing_mode(self._inference):
            for step in (step for steps in self._later for step in steps):
                if isinstance(step, Copy):
                    copy_now(step, kept[step.source], destinations, self._done)
                else:
                    sources = {name: kept[name].clone() for name in step.sources}
                    run_step(step, sources, self._plan, destinations, self._done)
        refuse_ties(
            (done, skipped)
            for done, skipped in self._plan.ties
            if not same_as_written(skipped, kept[skipped.source], done, destinations)
        )
        return {name: kept[name] for name in self._plan.fallback}
