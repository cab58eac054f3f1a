"""Measures what the safety of a reader costs: ours over a package against the package's own iterator.

    python benchmarks/readers.py                   # 1 GB in 300 tensors and in 5,000; about five minutes
    python benchmarks/readers.py --quick           # the same on small files, to see that it works

Every tensor is copied into a parameter as it comes, which is what loading code does, and all parameters are compared
with the digests of what was written. Pairs of rows read the same files by the same package; the ratio is of one run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import load
from checkpoints import Checkpoint
from contenders import Contender, Run

Pairs = Iterator[tuple[str, torch.Tensor]]


class Row(NamedTuple):
    """One comparison: what the package does by itself, and ours over it."""

    raw: str
    ours: str


def copying(pairs: Callable[[Checkpoint], Pairs]) -> Contender:
    """Bring the pairs into the parameters, one by one."""

    def prepare(checkpoint: Checkpoint, model: nn.Module) -> Run:
        for package in ("hotweights", "runai_model_streamer", "fastsafetensors"):
            importlib.import_module(package)
        parameters = dict(model.named_parameters())

        def run() -> None:
            with closing(pairs(checkpoint)) as found:
                for name, tensor in found:
                    parameters[name].copy_(tensor)

        return run

    return prepare


def runai(*, owned: bool) -> Callable[[Checkpoint], Pairs]:
    def pairs(checkpoint: Checkpoint) -> Pairs:
        from runai_model_streamer import SafetensorsStreamer

        with SafetensorsStreamer() as streamer:
            streamer.stream_files(checkpoint.files, owned=owned)
            yield from streamer.get_tensors()

    return pairs


def fastsafetensors(*, borrowed: bool) -> Callable[[Checkpoint], Pairs]:
    def pairs(checkpoint: Checkpoint) -> Pairs:
        from fastsafetensors import SafeTensorsFileLoader

        for path in checkpoint.files:
            loader = SafeTensorsFileLoader(None, device="cpu", nogds=True)
            loader.add_filenames({0: [path]})
            buffers = loader.copy_files_to_device(borrowed_tensors=borrowed)
            for name in loader.get_keys():
                yield name, buffers.get_tensor(name)
            buffers.close()
            loader.close()

    return pairs


def safetensors(checkpoint: Checkpoint) -> Pairs:
    from safetensors import safe_open

    for path in checkpoint.files:
        with safe_open(path, framework="pt", backend="pread") as file:
            for name in file.offset_keys():
                yield name, file.get_tensor(name)


def torch_bin(checkpoint: Checkpoint) -> Pairs:
    for path in _pickled(checkpoint):
        yield from torch.load(path, map_location="cpu", weights_only=True).items()


def _pickled(checkpoint: Checkpoint) -> list[str]:
    return sorted(str(path) for path in checkpoint.directory.glob("pytorch_model*.bin"))


def tensors(reader: str) -> Callable[[Checkpoint], Pairs]:
    def pairs(checkpoint: Checkpoint) -> Pairs:
        import hotweights

        with hotweights.open(checkpoint.directory, reader=reader) as source:
            yield from source.tensors()

    return pairs


def leases(reader: str) -> Callable[[Checkpoint], Pairs]:
    def pairs(checkpoint: Checkpoint) -> Pairs:
        import hotweights

        with hotweights.open(checkpoint.directory, reader=reader) as source, source.leases() as stream:
            for lease in stream:
                yield lease.name, lease.tensor

    return pairs


def cloned(raw: Callable[[Checkpoint], Pairs]) -> Callable[[Checkpoint], Pairs]:
    """What people write where they have been bitten."""

    def pairs(checkpoint: Checkpoint) -> Pairs:
        for name, tensor in raw(checkpoint):
            yield name, tensor.clone()

    return pairs


_PAIRS = {
    "runai owned": runai(owned=True),
    "runai borrowed": runai(owned=False),
    "runai borrowed, cloned": cloned(runai(owned=False)),
    "hw runai tensors": tensors("runai"),
    "hw runai leases": leases("runai"),
    "fastsafetensors owned": fastsafetensors(borrowed=False),
    "fastsafetensors borrowed": fastsafetensors(borrowed=True),
    "hw fastsafetensors tensors": tensors("fastsafetensors"),
    "hw fastsafetensors leases": leases("fastsafetensors"),
    "safetensors": safetensors,
    "hw safetensors tensors": tensors("safetensors"),
    "torch": torch_bin,
    "hw torch tensors": tensors("torch"),
    "hw tensors": tensors("hotweights"),
}
CONTENDERS = {name: copying(pairs) for name, pairs in _PAIRS.items()}
ROWS = (
    Row("runai owned", "hw runai tensors"),
    Row("runai borrowed, cloned", "hw runai tensors"),
    Row("runai borrowed", "hw runai leases"),
    Row("fastsafetensors owned", "hw fastsafetensors tensors"),
    Row("fastsafetensors borrowed", "hw fastsafetensors leases"),
    Row("safetensors", "hw safetensors tensors"),
    Row("torch", "hw torch tensors"),
    Row("safetensors", "hw tensors"),
)


def table(seconds: load.Seconds, title: str, count: int) -> Table:
    made = Table(title=title, title_justify="left")
    for heading in ("the package", "seconds", "ours over it", "seconds ", "ratio", "µs a tensor"):
        made.add_column(heading, justify="left" if heading in ("the package", "ours over it") else "right")
    for name_of_theirs, name_of_ours in ROWS:
        if name_of_theirs in seconds and name_of_ours in seconds:
            theirs, ours = (statistics.median(seconds[name]) for name in (name_of_theirs, name_of_ours))
            cells = (
                name_of_theirs,
                f"{theirs:.3f}",
                name_of_ours,
                f"{ours:.3f}",
                f"{ours / theirs:.2f}",
                f"{(ours - theirs) / count * 1e6:.1f}",
            )
            made.add_row(*cells)
    return made


def pickle_beside(checkpoint: Checkpoint) -> None:
    """The same tensors in torch's format, file by file."""
    from safetensors.torch import load_file

    for number, path in enumerate(checkpoint.files, start=1):
        name = f"pytorch_model-{number:05}-of-{len(checkpoint.files):05}.bin"
        torch.save(load_file(path), checkpoint.directory / name)


def written(directory: Path, nbytes: int, count: int, shards: int) -> Checkpoint:
    checkpoint = load.written(directory, nbytes, count, shards)
    load.call(lambda _: pickle_beside(checkpoint), watch=False)
    return checkpoint


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=load.parse_size, default="1GB", help="bytes of each checkpoint (1GB)")
    parser.add_argument("--tensors", type=int, nargs="*", default=[300, 5000], help="tensors in it (300 and 5000)")
    parser.add_argument("--shards", type=int, default=2, help="files (2)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; medians are shown (5)")
    parser.add_argument("--only", default="", help="contenders whose names contain one of these, split by commas")
    parser.add_argument("--quick", action="store_true", help="small files, one round, at once")
    parser.add_argument("--dir", help="where the files are written")
    parser.add_argument("--json", help="write all numbers to this file")
    options = parser.parse_args(arguments)
    if options.quick:
        options.size, options.tensors, options.repeats = 8_000_000, [16], 1
    return options


def main() -> None:
    options = parse()
    console = Console()
    if not console.is_terminal:
        console.width = 120
    names = [name for name in CONTENDERS if any(part in name for part in options.only.split(","))]
    results = {"machine": load.machine(), "options": vars(options), "seconds": {}}
    for count in options.tensors:
        with tempfile.TemporaryDirectory(prefix="hotweights-bench-", dir=options.dir) as directory:
            checkpoint = written(Path(directory), options.size, count, options.shards)
            patience = {"patience": 0.0} if options.quick else {}
            seconds = load.rounds(
                names, "warm", checkpoint, options.repeats, console, contenders=CONTENDERS, **patience
            )
        results["seconds"][count] = seconds
        console.print(table(seconds, f"{count} tensors, {options.size / 1e6:g} MB, warm", count))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
