"""One step of a plan, done on real memory: a copy or a program."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch

from ..boxes import view
from ..memory.copies import copy_alone, copy_queued
from ..plan.plan import LoadPlan
from ..plan.steps import Copy, Program
from .replay import run_program
from .report import Tally

Destinations = Mapping[str, torch.Tensor]


def any_inference(destinations: Destinations) -> bool:
    """Whether any of the tensors was made under inference mode."""
    lazy = torch.nn.parameter.is_lazy
    return any(not lazy(tensor) and tensor.is_inference() for tensor in destinations.values())


def writing_mode(inference: bool) -> AbstractContextManager[object]:
    """Inside, autograd sees no write. Tensors made under inference mode may only be written under it."""
    return torch.inference_mode() if inference else torch.no_grad()


def run_step(
    step: Program, tensors: dict[str, torch.Tensor], plan: LoadPlan, destinations: Destinations, done: Tally
) -> None:
    """Run a program; ``tensors`` are its sources, which it may write to."""
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    run_program(step, tensors, plan.constants, lambda name: destinations[name].detach())
    done.bytes_written += sum(region.box.nbytes for region in step.writes)
    done.hold_scratch(-nbytes)


def part_of(step: Copy, tensor: torch.Tensor) -> torch.Tensor:
    """The part of the source ``tensor`` that ``step`` copies."""
    if step.of is None:
        return tensor
    return view(tensor.contiguous(), step.of)


def place_of(step: Copy, destinations: Destinations) -> torch.Tensor:
    """The part of the model's tensor that ``step`` writes."""
    destination = destinations[step.destination]
    return destination if step.into is None else view(destination, step.into)


def written_nbytes(step: Copy, destinations: Destinations) -> int:
    """Bytes of the model that ``step`` writes."""
    return destinations[step.destination].nbytes if step.into is None else step.into.nbytes


def copy_now(
    step: Copy, tensor: torch.Tensor, destinations: Destinations, done: Tally, *, threads: bool = True
) -> torch.device:
    """Copy from the source ``tensor``, which the returned device may still read when this returns.

    ``threads`` is whether torch's may do it: they are faster where nobody else wants the processors, and far slower
    elsewhere.
    """
    place = place_of(step, destinations)
    part = part_of(step, tensor)
    part = part if part.shape == place.shape else part.reshape(place.shape)
    (copy_queued if threads else copy_alone)(place, part)
    done.bytes_written += place.nbytes
    return place.device
