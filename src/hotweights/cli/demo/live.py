"""The demo's live part: MiniLM answers in a loop while it is reloaded in place, and while a reload fails half-way."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...engines import transformers as engine
from ...errors import CheckpointError, UpdateAborted
from ...live.model import LiveModel
from ...loading.load import load
from ...memory.wrappers import is_wrapper, leaves
from ...sources.opening import open as open_source
from ...text import size

Embed = Callable[[Any], torch.Tensor]


def serve_and_reload(console: Console, checkpoint: Path, embed: Embed) -> None:
    """Reload MiniLM in the checkpoint's precision, and print each proof."""
    console.rule("[bold]6. New weights while it serves: all or nothing")
    prove_reloads(console, checkpoint, embed)


def prove_reloads(
    console: Console,
    checkpoint: Path,
    embed: Embed,
    *,
    process: Callable[[torch.nn.Module], object] | None = None,
    finish: Callable[[torch.nn.Module], object] = lambda model: None,
) -> LiveModel:
    """Serve, reload to other weights and back, fail once, and prove each step. Returns what served.

    ``process`` is the live model's; ``finish`` does the same to a whole model that was loaded without one.
    """
    model = engine.build(checkpoint)
    live = LiveModel(model, process=process)
    live.load(checkpoint, device="cpu", version="trained")
    trained, addresses = live.digest(), _addresses(model)
    with open_source(checkpoint) as source:
        perturbed = {name: _perturbed(tensor) for name, tensor in source.tensors()}
    cold = engine.build(checkpoint)
    load(cold, perturbed, device="cpu")
    finish(cold)
    expected = {"trained": embed(model), "perturbed": embed(cold)}
    with _Client(live, embed) as client:
        client.wait_for_answers()
        report = live.update(perturbed, version="perturbed")
        client.wait_for_answers()
        console.print(
            f"{'reloaded':>10}  to other weights: {size(report.bytes_written)} in {report.seconds * 1e3:.0f} ms"
        )
        _prove(_addresses(model) == addresses, "an address changed")
        _prove(live.digest() == LiveModel(cold).digest(), "a reload in place differs from a cold load")
        console.print(f"{'proof':>10}  equal to a cold load, bit for bit; all {len(addresses)} addresses are kept")
        try:
            with live.begin() as update:
                update.feed(_half_of(perturbed))
        except UpdateAborted as error:
            console.print(f"{'failed':>10}  {error}", markup=False)
        _prove(live.digest() == LiveModel(cold).digest(), "a failed update left traces")
        console.print(f"{'proof':>10}  version {live.version!r} is live, byte for byte ({live.digest().whole[:16]})")
        live.update(checkpoint, version="trained")
        client.wait_for_answers()
    _prove(live.digest() == trained, "the way back leads elsewhere")
    for version, answer in client.answers:
        _prove(torch.equal(answer, expected[str(version)]), f"an answer of version {version} is none of its")
    counts = Counter(str(version) for version, _ in client.answers)
    console.print(
        f"{'served':>10}  {', '.join(f'{count} answers by {version!r}' for version, count in counts.items())}, "
        "meanwhile: each of one version, none of a mix\n"
    )
    return live


class _Client:
    """Asks the model in a thread until its ``with`` ends, and keeps each answer with the version that gave it."""

    def __init__(self, live: LiveModel, embed: Embed) -> None:
        self.answers: list[tuple[str | int | None, torch.Tensor]] = []
        self._live, self._embed = live, embed
        self._answered = threading.Condition()
        self._left = False
        self._thread = threading.Thread(target=self._ask, name="client")

    def __enter__(self) -> _Client:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left = True
        self._thread.join()

    def wait_for_answers(self) -> None:
        """Return when two more answers were given."""
        with self._answered:
            enough = len(self.answers) + 2
            self._answered.wait_for(lambda: len(self.answers) >= enough or not self._thread.is_alive(), timeout=60)

    def _ask(self) -> None:
        while not self._left:
            with self._live.serving() as version:
                answer = self._embed(self._live.model)
            with self._answered:
                self.answers.append((version, answer))
                self._answered.notify_all()


def _perturbed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 1.01 if tensor.is_floating_point() else tensor


def _half_of(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for number, (name, tensor) in enumerate(tensors.items()):
        if number == len(tensors) // 2:
            raise ConnectionError(f"the trainer died after {number} of {len(tensors)} tensors")
        yield name, tensor * 3 if tensor.is_floating_point() else tensor


def _addresses(model: torch.nn.Module) -> dict[str, int]:
    tensors = (pair for name, tensor in model.state_dict().items() for pair in leaves(name, tensor))
    return {name: tensor.data_ptr() for name, tensor in tensors if not is_wrapper(tensor)}


def _prove(true: bool, otherwise: str) -> None:
    if not true:
        raise CheckpointError(otherwise)
