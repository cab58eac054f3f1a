"""A table of vLLM's own reload and of ours on the same models, each compared with a fresh engine of the same weights.

    python benchmarks/vllm_reload.py                       # every model, then every broken checkpoint
    python benchmarks/vllm_reload.py --only llama,int8 --json out.json

It needs an environment with vllm on a CPU (``make test-vllm`` makes one); models are tiny, with random weights, and the
same as the tests'. Each engine is a process of its own. Weights A are loaded and asked; B are put in their place, and
asked; then A again. *right*: greedy answers equal those of an engine that was started with these weights. *long* is a
prompt of several cache blocks that was asked before: vLLM's ``reload_weights`` does not empty the prefix cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent / "tests" / "vllm"
sys.path.insert(0, str(TESTS))

import cases  # noqa: E402
from broken import CHANGES, broken  # noqa: E402
from drive import OURS, Talker, Zoo  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

Tokens = list[list[int]]


def theirs(talker: Talker, path: str) -> None:
    """vLLM's own reload."""
    talker.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})


def ours(talker: Talker, path: str) -> None:
    """That of hotweights."""
    from hotweights.engines import vllm as engine

    engine.update(talker.llm, path)


def visit(talker: Talker, act: Callable[[Talker, str], None], paths: Sequence[str]) -> list[Any]:
    """What it says before, and after each update; or why there was none."""
    found: list[Any] = [talker.tokens()]
    for path in paths:
        try:
            act(talker, path)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        try:
            found.append(talker.tokens())
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def asked(zoo: Zoo, name: str, act: Callable[[Talker, str], None], paths: Sequence[str]) -> list[Any]:
    """The same of a fresh engine with weights A; what it died of, if it did."""
    options = {**cases.CASES[name].engine, **(OURS if act is ours else {})}
    try:
        return list(zoo.run(visit, zoo.checkpoint(name, "A"), act, paths, options=options))
    except AssertionError as error:
        return [f"died: {str(error).strip().splitlines()[-1]}"]


def verdict(said: list[Any], expected: Sequence[Tokens]) -> tuple[str, str]:
    """How the short prompts and the long one were answered."""
    words = [answer for answer in said if isinstance(answer, str)]
    if words:
        return words[0][:60], ""
    short = [answers[:-1] == right[:-1] for answers, right in zip(said, expected, strict=True)]
    long = [answers[-1] == right[-1] for answers, right in zip(said, expected, strict=True)]
    return ("right" if all(short) else "WRONG"), ("right" if all(long) else "WRONG")


def reloads(zoo: Zoo, name: str) -> list[str]:
    """One row of the table."""
    expected = [zoo.fresh(name, weights) for weights in "ABA"]
    paths = [str(zoo.checkpoint(name, weights)) for weights in "BA"]
    return [name, *(word for act in (theirs, ours) for word in verdict(asked(zoo, name, act, paths), expected))]


def refusals(zoo: Zoo, kind: str, name: str = "llama") -> list[str]:
    """One row of the other table: a checkpoint that is broken."""
    path = broken(kind, zoo.checkpoint(name, "B"), zoo.directory / "broken")
    right = {"A": zoo.fresh(name, "A"), "B": zoo.fresh(name, "B")}
    row = [kind]
    for act in (theirs, ours):
        said = asked(zoo, name, act, [str(path)])
        raised = any(isinstance(answer, str) for answer in said[:-1])
        last = next(
            (f"serves {weights}" for weights, answers in right.items() if answers == said[-1]), "serves neither A nor B"
        )
        row.append(("an error; " if raised else "no error; ") + (last if isinstance(said[-1], list) else "dead"))
    return row


def main() -> None:
    """Make the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(cases.CASES), help="which models")
    parser.add_argument("--broken", default=",".join(CHANGES), help="which broken checkpoints")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    os.environ.update(Zoo.environment, PYTHONPATH=f"{TESTS}:{Path(__file__).parent}")
    console = Console()
    reloaded = Table("model", "vLLM, short", "vLLM, long", "hotweights, short", "hotweights, long")
    refused = Table("checkpoint", "vLLM", "hotweights")
    with tempfile.TemporaryDirectory() as directory:
        zoo = Zoo(Path(directory))
        models = [reloads(zoo, name) for name in filter(None, arguments.only.split(","))]
        bad = [refusals(zoo, kind) for kind in filter(None, arguments.broken.split(","))]
    for table, rows in ((reloaded, models), (refused, bad)):
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"models": models, "broken": bad}, indent=1))


if __name__ == "__main__":
    main()
