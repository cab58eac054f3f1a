"""Measures ``hotweights.load`` against the limits of the machine and against what people use now.

    python benchmarks/load.py                      # 4 GB in 300 tensors, 1 GB in 20,000; about ten minutes
    python benchmarks/load.py --quick              # the same on small files, to see that it works

Every measurement runs in a process of its own. Contenders take turns, round after round; medians are shown. Every
result is compared with the digests of what was written, outside the timing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch  # noqa: F401 - before the forks, not in each
import torch
from rich.console import Console
from rich.table import Table

import checkpoints
from checkpoints import Checkpoint
from contenders import ALL, LIMITS, NO_RESULT, OURS, Contender
from isolate import Peak, Stage, call, wait_for_quiet

CASES = {
    "warm": "files in the page cache, parameters touched before",
    "untouched": "files in the page cache, parameters in memory that was never touched",
    "cold": "files not in the page cache (mincore says so), parameters touched before",
}
MB = 1e6
_PATIENCE = 2.0  # seconds to wait for other processes to leave the processors alone
_noise: list[str] = []  # contenders that were measured beside other work after all, once for each time
Seconds = dict[str, list[float]]


def measure(
    name: str,
    case: str,
    checkpoint: Checkpoint,
    *,
    watch: bool = False,
    contenders: Mapping[str, Contender] = ALL,
    patience: float = _PATIENCE,
    first: Checkpoint | None = None,
) -> tuple[float, Peak]:
    """Seconds of one load in a fresh process, and the memory that it took.

    It loads ``first`` before, which is tiny: what a process does only once (imports, code that runs for the first time)
    is not the loading of a checkpoint, and the contenders of fewer lines would win by it.
    """
    (checkpoints.cool_down if case == "cold" else checkpoints.warm_up)(checkpoint.files)

    if not wait_for_quiet(patience):
        _noise.append(name)

    def child(stage: Stage) -> float:
        if first is not None:
            small = checkpoints.module(first, touched=True)  # Contenders keep addresses, not tensors.
            contenders[name](first, small)()
        model = checkpoints.module(checkpoint, touched=case != "untouched")
        run = contenders[name](checkpoint, model)
        stage.begin()
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        stage.end()
        if name not in NO_RESULT:
            wrong = [key for key, p in model.named_parameters() if checkpoints.digest(p) != checkpoint.digests[key]]
            if wrong:
                raise RuntimeError(f"{len(wrong)} tensors are wrong, {wrong[0]} among them")
        return seconds

    return call(child, watch=watch)


def rounds(
    names: Sequence[str],
    case: str,
    checkpoint: Checkpoint,
    repeats: int,
    console: Console,
    *,
    contenders: Mapping[str, Contender] = ALL,
    patience: float = _PATIENCE,
    first: Checkpoint | None = None,
) -> Seconds:
    """Seconds of every contender, one of each in turn."""
    seconds: Seconds = {name: [] for name in names}
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with console.status(f"{case}, round {turn + 1} of {repeats}: {name}"):
                try:
                    took, _ = measure(name, case, checkpoint, contenders=contenders, patience=patience, first=first)
                    seconds[name].append(took)
                except RuntimeError as error:
                    console.print(f"{case}: {name}: {error}")
    return {name: times for name, times in seconds.items() if times}


def limit(seconds: Seconds, case: str) -> float:
    """The fastest limit: of those that fill the parameters; for cold files, the direct reads."""
    fit = [statistics.median(times) for name, times in seconds.items() if name in LIMITS and fits(name, case)]
    return min(fit, default=float("nan"))


def fits(name: str, case: str) -> bool:
    """Whether this limit is one for this case."""
    return (name in NO_RESULT) == (case == "cold")


def speed_table(seconds: Seconds, case: str, nbytes: int) -> Table:
    table = Table(title=f"{case}: {CASES[case]}", title_justify="left")
    for heading in ("", "seconds", "spread", "GB/s", "of the limit"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, times in seconds.items():
        middle = statistics.median(times)
        table.add_row(
            f"[bold]{name}[/]" if name in OURS else f"[dim]{name}[/]" if name in LIMITS else name,
            f"{middle:.3f}",
            f"{min(times):.3f}..{max(times):.3f}",
            f"{nbytes / middle / 1e9:.1f}",
            f"{limit(seconds, case) / middle:.2f}",
        )
    return table


def memory_table(peaks: dict[str, dict[str, Peak]]) -> Table:
    table = Table(title="peak memory over the touched parameters, MB", title_justify="left")
    table.add_column("")
    cases = list(next(iter(peaks.values())))
    for case in cases:
        table.add_column(f"{case}: own (RssAnon)", justify="right")
        table.add_column("with mapped files (VmHWM)", justify="right")
    for name, by_case in peaks.items():
        cells = [
            (f"{by_case[c].anonymous / MB:.0f}", f"{by_case[c].total / MB:.0f}") if c in by_case else "" for c in cases
        ]
        table.add_row(name, *(cell for pair in cells for cell in (pair or ("-", "-"))))
    return table


def small_table(seconds: Seconds, floor: float, tensors: int) -> Table:
    table = Table(title=f"{tensors} tensors, warm: open and load, over {floor:.3f} s that the bytes take")
    for heading in ("", "seconds", "spread", "µs a tensor over the bytes"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, times in seconds.items():
        middle = statistics.median(times)
        table.add_row(
            name, f"{middle:.3f}", f"{min(times):.3f}..{max(times):.3f}", f"{(middle - floor) / tensors * 1e6:.1f}"
        )
    return table


def peaks_of(names: Iterable[str], cases: Iterable[str], checkpoint: Checkpoint) -> dict[str, dict[str, Peak]]:
    peaks: dict[str, dict[str, Peak]] = {}
    for name in names:
        for case in cases:
            try:
                peaks.setdefault(name, {})[case] = measure(name, case, checkpoint, watch=True)[1]
            except RuntimeError as error:
                print(f"{case}: {name}: {error}")
    return peaks


def plot(results: dict[str, Any], path: str) -> None:
    """Bars of seconds, one panel for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = {case: times for case, times in results["seconds"].items() if times}
    figure, panels = pyplot.subplots(1, len(cases), figsize=(5 * len(cases), 5), squeeze=False, layout="constrained")
    for panel, (case, times) in zip(panels[0], cases.items(), strict=True):
        names = [name for name in times if name not in LIMITS or fits(name, case)][::-1]
        colours = ["tab:orange" if n in OURS else "tab:gray" if n in LIMITS else "tab:blue" for n in names]
        panel.barh(names, [statistics.median(times[name]) for name in names], color=colours)
        panel.set(title=case, xlabel="seconds")
    figure.savefig(path, dpi=120)


def parse_size(text: str) -> int:
    for suffix, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if text.endswith(suffix):
            return int(float(text.removesuffix(suffix)) * factor)
    return int(text)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default="4GB", help="bytes of the checkpoint (4GB)")
    parser.add_argument("--tensors", type=int, default=300, help="tensors in it (300)")
    parser.add_argument("--shards", type=int, default=4, help="files (4)")
    parser.add_argument("--small-size", type=parse_size, default="1GB", help="bytes of the one with many tensors (1GB)")
    parser.add_argument("--small-tensors", type=int, default=20_000, help="tensors in it (20000); 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; medians are shown (5)")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), help="which cases")
    parser.add_argument("--only", default="", help="contenders whose names contain one of these, split by commas")
    parser.add_argument("--no-memory", action="store_true", help="leave out the rounds that watch memory")
    parser.add_argument(
        "--patience", type=float, default=_PATIENCE, help="seconds to wait, each time, for a quiet machine (2)"
    )
    parser.add_argument("--fresh", action="store_true", help="the first load of each process, not the second")
    parser.add_argument("--quick", action="store_true", help="small files, two rounds")
    parser.add_argument("--dir", help="where the files are written, some of the disk that is measured")
    parser.add_argument("--json", help="write all numbers to this file")
    parser.add_argument("--plot", help="draw a picture to this file (needs matplotlib)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.size, options.small_size, options.small_tensors, options.repeats = 256_000_000, 50_000_000, 1000, 2
    return options


def main() -> None:
    options = parse()
    console = Console()
    names = [name for name in ALL if any(part in name for part in options.only.split(","))]
    results: dict[str, Any] = {"machine": machine(), "options": vars(options), "seconds": {}}
    with tempfile.TemporaryDirectory(prefix="hotweights-bench-", dir=options.dir) as directory:
        if options.cases:
            big = written(Path(directory, "big"), options.size, options.tensors, options.shards)
            tiny = None if options.fresh else written(Path(directory, "tiny"), 1_000_000, 8, 1)
            for case in options.cases:
                mine = [name for name in names if name not in NO_RESULT or case == "cold"]
                seconds = rounds(mine, case, big, options.repeats, console, patience=options.patience, first=tiny)
                results["seconds"][case] = seconds
                console.print(speed_table(seconds, case, big.nbytes))
            if not options.no_memory:
                watched = [case for case in options.cases if case != "untouched"]
                peaks = peaks_of([name for name in names if name not in LIMITS], watched, big)
                console.print(memory_table(peaks))
                results["memory"] = {
                    name: {case: {"anonymous": p.anonymous, "total": p.total} for case, p in by_case.items()}
                    for name, by_case in peaks.items()
                }
        if options.small_tensors:
            many(options, names, Path(directory, "small"), results, console)
    if _noise:
        console.print(f"{len(_noise)} measurements were made beside other work: the machine was never quiet")
    results["noisy_measurements"] = len(_noise)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    if options.plot:
        plot(results, options.plot)


def many(
    options: argparse.Namespace, names: Sequence[str], directory: Path, results: dict[str, Any], console: Console
) -> None:
    """The same bytes in a few and in many tensors: the difference is what a tensor costs."""
    few = written(directory / "few", options.small_size, 64, 1)
    tiny = None if options.fresh else written(directory / "tiny", 1_000_000, 8, 1)
    small = written(directory / "many", options.small_size, options.small_tensors, 1)
    limits = [name for name in LIMITS if name not in NO_RESULT]
    mine = [name for name in names if name not in NO_RESULT]
    floor: list[float] = []
    seconds: Seconds = {}
    for _ in range(options.repeats):
        floor.append(limit(rounds(limits, "warm", few, 1, console, patience=options.patience, first=tiny), "warm"))
        for name, times in rounds(mine, "warm", small, 1, console, patience=options.patience, first=tiny).items():
            seconds.setdefault(name, []).extend(times)
    results["small"] = {"floor": floor, "seconds": seconds}
    console.print(small_table(seconds, statistics.median(floor), options.small_tensors))


def written(directory: Path, nbytes: int, tensors: int, shards: int) -> Checkpoint:
    """Made in a fork: torch's threads, once started, do not survive the forks that measure."""
    return call(lambda _: checkpoints.make(directory, nbytes=nbytes, tensors=tensors, shards=shards), watch=False)[0]


def machine() -> dict[str, str | int | None]:
    return {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hotweights": version("hotweights"),
    }


if __name__ == "__main__":
    main()
