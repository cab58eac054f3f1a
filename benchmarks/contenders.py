"""Ways to bring a checkpoint into the parameters of a module: limits, ours, and what people use now.

Each takes a checkpoint and a module, prepares what is not part of loading, and returns the function that is timed.
Imports of a contender's package happen in the preparation.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from checkpoints import Checkpoint

Run = Callable[[], None]
Contender = Callable[[Checkpoint, nn.Module], Run]

_PIECE = 16 * 1024 * 1024
_IOV_MAX = 1024


def _memory(tensor: torch.Tensor) -> ctypes.Array[ctypes.c_char]:
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


@contextmanager
def _opened(files: list[str], flags: int = 0) -> Iterator[dict[str, int]]:
    with ExitStack() as stack:
        opened = {}
        for path in files:
            opened[path] = os.open(path, os.O_RDONLY | flags)
            stack.callback(os.close, opened[path])
        yield opened


def memcpy_from_mapping(checkpoint: Checkpoint, model: nn.Module) -> Run:
    """Limit: ``copy_`` out of ``mmap``, one tensor after the other, on all of torch's threads."""
    parameters = dict(model.named_parameters())

    def run() -> None:
        with _opened(checkpoint.files) as opened:
            mappings = {path: mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE) for path, fd in opened.items()}
            for place in checkpoint.places:
                count = place.nbytes // 2
                source = torch.frombuffer(mappings[place.path], dtype=torch.bfloat16, count=count, offset=place.offset)
                parameters[place.name].copy_(source.view(place.shape))

    return run


def preadv(threads: int) -> Contender:
    """Limit: ``preadv`` straight into the parameters, 16 MiB and up to 1024 tensors a call, no checks."""

    def prepare(checkpoint: Checkpoint, model: nn.Module) -> Run:
        jobs = iter(list(_batches(checkpoint, dict(model.named_parameters()))))
        lock = threading.Lock()

        def run() -> None:
            with _opened(checkpoint.files) as opened, ThreadPoolExecutor(threads) as crew:
                list(crew.map(work, [opened] * threads))

        def work(opened: Mapping[str, int]) -> None:
            while True:
                with lock:
                    job = next(jobs, None)
                if job is None:
                    return
                path, offset, buffers, total = job
                if os.preadv(opened[path], buffers, offset) != total:
                    raise OSError("short read")

        return run

    return prepare


def _batches(
    checkpoint: Checkpoint, parameters: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, int, list[memoryview], int]]:
    batch: tuple[str, int, list[memoryview], int] | None = None
    for place in checkpoint.places:
        memory = memoryview(_memory(parameters[place.name])).cast("B")
        for start in range(0, place.nbytes, _PIECE):
            part = memory[start : start + _PIECE]
            if batch is not None:
                path, offset, buffers, total = batch
                joins = path == place.path and offset + total == place.offset + start
                if joins and total + len(part) <= _PIECE and len(buffers) < _IOV_MAX:
                    batch = (path, offset, [*buffers, part], total + len(part))
                    continue
                yield batch
            batch = (place.path, place.offset + start, [part], len(part))
    if batch is not None:
        yield batch


def direct_ring(slots: int, *, copied: bool = False) -> Contender:
    """Limit for cold files: ``O_DIRECT``, in the files' order, into 64 MiB on huge pages.

    ``slots`` pieces are in flight at once. The bytes go no further, so its result is not compared; or they are
    ``copied`` on to the parameters, as they must be: files and parameters are hardly ever aligned alike.
    """

    def prepare(checkpoint: Checkpoint, model: nn.Module) -> Run:
        size = 64 * 1024 * 1024 // slots
        # Private: huge pages are not given to shared memory by default.
        region = mmap.mmap(-1, 66 * 1024 * 1024, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        region.madvise(mmap.MADV_HUGEPAGE)
        whole = memoryview(region)
        address = ctypes.addressof(ctypes.c_char.from_buffer(region))
        first = -address % (2 * 1024 * 1024)
        ring = whole[first:]
        pieces = [(path, at) for path in checkpoint.files for at in range(0, os.path.getsize(path), size)]
        jobs, lock = iter(pieces), threading.Lock()
        targets = _targets(checkpoint, dict(model.named_parameters())) if copied else {}

        def work(opened: Mapping[str, int], slot: int) -> None:
            while True:
                with lock:
                    job = next(jobs, None)
                if job is None:
                    return
                path, at = job
                os.preadv(opened[path], [ring[slot * size : (slot + 1) * size]], at)
                for offset, nbytes, target in targets.get(path, ()):
                    start, stop = max(at, offset), min(at + size, offset + nbytes)
                    if start < stop:
                        source = address + first + slot * size + start - at
                        ctypes.memmove(target + start - offset, source, stop - start)

        def run() -> None:
            with _opened(checkpoint.files, os.O_DIRECT) as opened, ThreadPoolExecutor(slots) as crew:
                list(crew.map(work, [opened] * slots, range(slots)))

        return run

    return prepare


def _targets(checkpoint: Checkpoint, parameters: Mapping[str, torch.Tensor]) -> dict[str, list[tuple[int, int, int]]]:
    """By file: first byte, bytes, and the address they belong to."""
    found: dict[str, list[tuple[int, int, int]]] = {}
    for place in checkpoint.places:
        found.setdefault(place.path, []).append((place.offset, place.nbytes, parameters[place.name].data_ptr()))
    return found


def hotweights(io: str, **options: object) -> Contender:
    """Ours: open, plan by name, load."""

    def prepare(checkpoint: Checkpoint, model: nn.Module) -> Run:
        from hotweights import load

        def run() -> None:
            load(model, checkpoint.directory, io=io, show_progress=False, **options)

        return run

    return prepare


def hotweights_again(checkpoint: Checkpoint, model: nn.Module) -> Run:
    """Ours, when this model was loaded before: its plan is kept."""
    run = hotweights("auto")(checkpoint, model)
    run()
    return run


def safetensors_load_file(checkpoint: Checkpoint, model: nn.Module) -> Run:
    from safetensors.torch import load_file

    parameters = dict(model.named_parameters())

    def run() -> None:
        for path in checkpoint.files:
            for name, tensor in load_file(path).items():
                parameters[name].copy_(tensor)

    return run


def safetensors_open(**options: str) -> Contender:
    def prepare(checkpoint: Checkpoint, model: nn.Module) -> Run:
        from safetensors import safe_open

        parameters = dict(model.named_parameters())

        def run() -> None:
            for path in checkpoint.files:
                with safe_open(path, framework="pt", **options) as file:
                    for name in file.keys():  # noqa: SIM118 - it is no mapping
                        parameters[name].copy_(file.get_tensor(name))

        return run

    return prepare


def runai(checkpoint: Checkpoint, model: nn.Module) -> Run:
    from runai_model_streamer import SafetensorsStreamer

    parameters = dict(model.named_parameters())

    def run() -> None:
        with SafetensorsStreamer() as streamer:
            # We copy at once, so its borrowed tensors are safe here, and faster.
            streamer.stream_files(checkpoint.files, owned=False)
            for name, tensor in streamer.get_tensors():
                parameters[name].copy_(tensor)

    return run


def fastsafetensors(checkpoint: Checkpoint, model: nn.Module) -> Run:
    from fastsafetensors import fastsafe_open

    parameters = dict(model.named_parameters())

    def run() -> None:
        # File by file: all at once takes the whole checkpoint in memory a second time.
        for path in checkpoint.files:
            with fastsafe_open([path], device="cpu", nogds=True) as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    parameters[name].copy_(file.get_tensor(name))

    return run


LIMITS: Mapping[str, Contender] = {
    "copy from a mapping": memcpy_from_mapping,
    "preadv x2": preadv(2),
    "preadv x4": preadv(4),
    "preadv x8": preadv(8),
    "O_DIRECT ring x1": direct_ring(1),
    "O_DIRECT ring x4": direct_ring(4),
    "O_DIRECT ring x4, copied": direct_ring(4, copied=True),
}
OURS: Mapping[str, Contender] = {
    "hw.load": hotweights("auto"),
    "hw.load again": hotweights_again,
    "hw.load buffered": hotweights("buffered"),
    "hw.load direct": hotweights("direct"),
}
PEERS: Mapping[str, Contender] = {
    "safetensors load_file": safetensors_load_file,
    "safetensors safe_open": safetensors_open(),
    "safetensors pread": safetensors_open(backend="pread"),
    "runai-model-streamer": runai,
    "fastsafetensors": fastsafetensors,
}
ALL: Mapping[str, Contender] = {**LIMITS, **OURS, **PEERS}
NO_RESULT = frozenset(("O_DIRECT ring x1", "O_DIRECT ring x4"))
