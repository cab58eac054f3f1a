"""The demo's last part: a trainer and two workers as processes; one trainer dies half-way, the next takes over."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from ...engines import transformers as engine
from ...errors import CheckpointError, TransferError, UpdateAborted
from ...live.model import LiveModel
from ...sources.opening import open as open_source
from ...text import rate, size
from ...transfer.receiver import Receiver
from ...transfer.sender import Sender
from .quiet import quiet

_VERSIONS = ("step-1", "step-2", "step-3")
_PATIENCE = 240.0  # seconds that a process may take to start, torch imported
_spawn = multiprocessing.get_context("spawn")  # Forked children of a process with threads may hang.


def follow_a_trainer(console: Console, checkpoint: Path, scratch: Path) -> None:
    """Send three versions to two workers; kill the trainer in the middle of a fourth; go on with a new trainer."""
    console.rule("[bold]8. From a trainer to two workers: nobody is left between two versions")
    address = f"unix:{scratch / 'transfer' / 'socket'}"
    with ExitStack() as stack:
        workers = [stack.enter_context(_Process(_work, checkpoint, address)) for _ in range(2)]
        with _Process(_train, checkpoint, address, _VERSIONS, "step-4") as trainer:
            for version in _VERSIONS:
                console.print(f"{'sent':>10}  {trainer.heard()}")
                _agree(console, workers, version)
            killed = trainer.heard()
            trainer.ended(-signal.SIGKILL)
        console.print(f"{'killed':>10}  the trainer, {killed}", markup=False)
        _agree(console, workers, _VERSIONS[-1])
        with _Process(_train, checkpoint, address, ("step-5",), None) as trainer:
            console.print(f"{'sent':>10}  {trainer.heard()}, by a new trainer at the same address")
            _agree(console, workers, "step-5")
    files = os.listdir(scratch / "transfer")
    if files:
        raise CheckpointError("the transfer left files behind", files)
    console.print(f"{'proof':>10}  no socket, no lock and no shared memory is left behind\n")


def _agree(console: Console, workers: list[_Process], version: str) -> None:
    """See that all workers say that this version is live, with equal digests."""
    answers = [worker.heard() for worker in workers]
    (live, digest, why), *_ = answers
    if live != version or any(answer[:2] != (live, digest) for answer in answers):
        raise CheckpointError("workers disagree", [f"{live!r}, digest {digest}" for live, digest, _ in answers])
    console.print(f"{'workers':>10}  both at {version!r}, digest {digest}{why and f' ({why})'}", markup=False)


class _Failed(NamedTuple):
    """What a process says when it cannot go on."""

    why: str


class _Process:
    """A process and a pipe from it. It ends with its ``with``."""

    def __init__(self, work: Any, *arguments: object) -> None:
        self._pipe, theirs = _spawn.Pipe(duplex=False)
        self._process = _spawn.Process(target=work, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def heard(self) -> Any:
        """What it says next."""
        if not self._pipe.poll(_PATIENCE):
            raise CheckpointError("a process of the demo says nothing")
        try:
            said = self._pipe.recv()
        except EOFError:
            self._process.join(_PATIENCE)
            raise CheckpointError(f"a process of the demo ended with code {self._process.exitcode}") from None
        if isinstance(said, _Failed):
            raise CheckpointError("a process of the demo failed", [said.why])
        return said

    def ended(self, code: int) -> None:
        """Wait until it has ended, in this way."""
        self._process.join(_PATIENCE)
        if self._process.exitcode != code:
            raise CheckpointError(f"a process of the demo ended with code {self._process.exitcode}, not {code}")

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self._process.terminate()
        self._process.join(_PATIENCE)
        self._pipe.close()


def _work(pipe: Connection, checkpoint: Path, address: str) -> None:
    """A worker: follow whoever sends, until version 5; after each version say what is live."""
    _modest()
    live = LiveModel(engine.build(checkpoint))
    with Receiver(address) as receiver:
        while live.version != "step-5":
            why = ""
            try:
                if live.version is None:
                    live.load(receiver, device="cpu", show_progress=False)
                else:
                    live.update(receiver, show_progress=False)
            except UpdateAborted as error:
                why = f"{type(error.__cause__).__name__}: {error.__cause__}"
            pipe.send((live.version, live.digest().whole[:16], why))


def _train(pipe: Connection, checkpoint: Path, address: str, versions: tuple[str, ...], last: str | None) -> None:
    """A trainer: send versions; then, if there is a last one, die in the middle of it."""
    _modest()
    try:
        _send(pipe, checkpoint, address, versions, last)
    except TransferError as error:
        pipe.send(_Failed(f"the trainer: {type(error).__name__}: {error}"))


def _send(pipe: Connection, checkpoint: Path, address: str, versions: tuple[str, ...], last: str | None) -> None:
    with open_source(checkpoint) as source:
        tensors = {name: tensor for name, tensor in source.tensors() if tensor.is_floating_point()}
        with Sender(address, receivers=2, timeout=_PATIENCE / 2) as sender:
            for version in versions:
                report = sender.send(_trained(tensors, version), version=version, show_progress=False)
                workers, speed = len(report.committed), rate(report.nbytes, report.seconds)
                pipe.send(f"{version}: {size(report.nbytes)} to {workers} workers, {speed}")
            if last is not None:
                trained = _trained(tensors, last)
                with open_source(trained) as promised:
                    sender.send(_dying(pipe, trained), version=last, manifest=promised.manifest, show_progress=False)


def _trained(tensors: Mapping[str, torch.Tensor], version: str) -> dict[str, torch.Tensor]:
    """What training for so many steps makes of the weights, here."""
    step = int(version.rpartition("-")[2])
    return {name: tensor * (1 + step / 1000) for name, tensor in tensors.items()}


def _dying(pipe: Connection, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for number, pair in enumerate(tensors.items()):
        if number == len(tensors) // 2:
            pipe.send(f"by SIGKILL, with {number} of {len(tensors)} tensors of step-4 sent")
            os.kill(os.getpid(), signal.SIGKILL)
        yield pair


def _modest() -> None:
    quiet()
    torch.set_num_threads(1)
