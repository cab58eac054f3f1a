"""The recipe of docs/live.md by which ranks take a directory together, as it stands there."""

from pathlib import Path

import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import nn

import hotweights as hw

_PAGE = Path(__file__).parents[2] / "docs" / "live.md"


def take_together():
    page = _PAGE.read_text()
    code = page[page.index("def take_together") : page.index('dist.init_process_group("gloo"')]
    namespace = {"hw": hw, "dist": dist, "torch": torch}
    exec(code, namespace)
    return namespace["take_together"]


def weights(value):
    return {"weight": torch.full((2, 2), float(value))}


def takes(rank):
    """What is live after each round. In each, rank 1 gives something else."""
    live = hw.LiveModel(nn.Linear(2, 2, bias=False))
    live.load(weights(0), version="0")
    take = take_together()
    seen = []
    for given, version in ((weights(1), "1"), (None, "2"), ({}, "3"), (weights(4), "another"), (weights(5), "5")):
        source, name = (given, version) if rank else (weights(version if version.isdigit() else 4), version)
        name = "4" if version == "another" and not rank else name
        try:
            took = take(live, source, name)
        except hw.UsageError:
            took = "usage"
        seen.append((took, live.version, live.model.weight[0, 0].item()))
    return seen


def test_all_ranks_take_one_version_or_none_whatever_one_of_them_raises(tmp_path):
    first, second = on_ranks(tmp_path, takes)
    assert first == [(True, "1", 1.0), *[(False, "1", 1.0)] * 3, (True, "5", 5.0)]
    assert second == [(True, "1", 1.0), ("usage", "1", 1.0), *[(False, "1", 1.0)] * 2, (True, "5", 5.0)]
