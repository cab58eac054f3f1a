"""What routing costs over loading the parts of a model by hand, from each kind of source; and a tensor, in small ones.

By hand is what somebody writes who knows the model, the reader and where the tensors lie, and makes no mistake.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import hotweights as hw
from isolate import wait_for_quiet

SHARES = {"language_model": 0.85, "vision_model": 0.1, "sound_encoder": 0.05}  # of all bytes
LIMIT = 1.05
_PATIENCE = 0.5  # seconds to wait for other processes to leave the processors alone
Pairs = Iterable[tuple[str, torch.Tensor]]
State = dict[str, torch.Tensor]


class Part(nn.Module):
    """A part of a model that copies what it is given, as the default loaders of engines do."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.tensors = {name: torch.zeros_like(tensor) for name, tensor in state.items()}

    def load_weights(self, pairs: Pairs) -> None:
        for name, tensor in pairs:
            self.tensors[name].copy_(tensor)


def checkpoint(nbytes: int, count: int) -> State:
    """``count`` bfloat16 tensors, part after part, as files have them."""
    each = nbytes // count // 2
    return {
        f"{part}.{number}": torch.randint(0, 255, (2 * each,), dtype=torch.uint8).view(torch.bfloat16)
        for part, share in SHARES.items()
        for number in range(max(1, round(count * share)))
    }


def reader(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """The fastest that a reader with one buffer can be: a copy out of memory into it."""
    buffer = torch.zeros(max(tensor.nbytes for tensor in state.values()), dtype=torch.uint8)
    for name, tensor in state.items():
        view = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        yield name, view


def by_hand_from_a_stream(pairs: Pairs, parts: dict[str, Part], *, copies: bool) -> None:
    """The first part streams, the others' tensors wait in lists."""
    waiting: dict[str, list[tuple[str, torch.Tensor]]] = {part: [] for part in parts}
    first = next(iter(parts))

    def streaming() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in pairs:
            part, _, ours = name.partition(".")
            own = tensor.clone() if copies else tensor
            if part == first:
                yield ours, own
            else:
                waiting[part].append((ours, own))

    parts[first].load_weights(streaming())
    for part, kept in waiting.items():
        parts[part].load_weights(kept)


def by_hand_from_files(path: Path, parts: dict[str, Part]) -> None:
    """Part after part, as they lie in the file."""
    with hw.open(path) as source:
        for part, pairs in itertools.groupby(source.tensors(), lambda pair: pair[0].partition(".")[0]):
            parts[part].load_weights((name.partition(".")[2], tensor) for name, tensor in pairs)


def by_hand_from_memory(state: State, parts: dict[str, Part]) -> None:
    for part, module in parts.items():
        prefix = f"{part}."
        module.load_weights((name.removeprefix(prefix), t) for name, t in state.items() if name.startswith(prefix))


def cases(state: State, path: Path) -> dict[str, tuple[Callable[..., object], Callable[..., object]]]:
    """By kind of source: by hand, and routed; each takes the parts."""

    def routed(make: Callable[[], Any], **options: Any) -> Callable[[dict[str, Part]], object]:
        def run(parts: dict[str, Part]) -> object:
            return hw.route(
                make(), [hw.Component(f"{name}.", part.load_weights) for name, part in parts.items()], **options
            )

        return run

    return {
        "files": (lambda parts: by_hand_from_files(path, parts), routed(lambda: path)),
        "borrowed pairs": (
            lambda parts: by_hand_from_a_stream(reader(state), parts, copies=True),
            routed(lambda: reader(state)),
        ),
        "owned pairs": (
            lambda parts: by_hand_from_a_stream(state.items(), parts, copies=False),
            routed(lambda: iter(state.items()), borrowed=False),
        ),
        "mapping": (lambda parts: by_hand_from_memory(state, parts), routed(lambda: state, borrowed=False)),
    }


def measure(state: State, path: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Medians, and the ratio of the fastest. By hand and routed take turns, and to begin."""
    save_file(state, path)
    parts = {
        part: Part({n.partition(".")[2]: t for n, t in state.items() if n.startswith(f"{part}.")}) for part in SHARES
    }
    by_case = {}
    for case, ways in cases(state, path).items():
        seconds: tuple[list[float], list[float]] = ([], [])
        for number in range(rounds + 1):
            for way in (0, 1) if number % 2 else (1, 0):
                for part in parts.values():
                    for tensor in part.tensors.values():
                        tensor.view(torch.uint8).fill_(0xFF)
                wait_for_quiet(_PATIENCE)
                began = time.perf_counter()
                ways[way](parts)
                seconds[way].append(time.perf_counter() - began)
                check(parts, state)
        hand, ours = seconds[0][1:], seconds[1][1:]  # The first of each warms up.
        ratio = min(ours) / min(hand)  # Work beside it only ever adds.
        by_case[case] = {"by_hand_s": statistics.median(hand), "routed_s": statistics.median(ours), "ratio": ratio}
    return by_case


def check(parts: dict[str, Part], state: State) -> None:
    """Every byte is there, outside the clock."""
    for name, tensor in state.items():
        part, _, ours = name.partition(".")
        loaded = parts[part].tensors[ours]
        assert torch.equal(loaded.view(torch.uint8), tensor.view(torch.uint8)), f"{name} is wrong"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=500, help="of weights, 10^6 bytes")
    parser.add_argument("--tensors", type=int, default=150, help="that they are in")
    parser.add_argument(
        "--small-tensors", type=int, default=20_000, help="of 4 kB each, for the cost of one; 0 for none"
    )
    parser.add_argument("--rounds", type=int, default=15, help="medians of how many")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; limit {LIMIT}")
    numbers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        numbers["large"] = measure(checkpoint(options.mb * 10**6, options.tensors), path, options.rounds)
        show(f"{options.mb} MB in {options.tensors} tensors", numbers["large"])
        if options.small_tensors:
            count = options.small_tensors
            numbers["small"] = measure(checkpoint(4096 * count, count), path, options.rounds)
            show(f"{count:,} tensors of 4 kB", numbers["small"], count=count)
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2))


def show(title: str, found: dict[str, dict[str, float]], *, count: int = 0) -> None:
    print(f"\n{title:<32} {'by hand':>10} {'routed':>10} {'ratio':>7}")
    for case, numbers in found.items():
        hand, ours = numbers["by_hand_s"], numbers["routed_s"]
        more = f"   {(ours - hand) / count * 1e6:+.1f} us a tensor" if count else ""
        print(f"{case:<32} {hand:8.3f} s {ours:8.3f} s {numbers['ratio']:7.3f}{more}")


if __name__ == "__main__":
    main()
