"""Ranks: forked processes with a gloo group of their own. They end before a deadline, whatever hangs."""

from __future__ import annotations

import os
import traceback
from contextlib import ExitStack
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor
from processes import Child


def on_ranks(folder, work, *arguments, count=2):
    """What ``work(rank, *arguments)`` returns on each rank. An error on any of them is raised here."""
    store = str(folder / f"store-{work.__name__}-{len(list(folder.iterdir()))}")
    with ExitStack() as stack:
        ranks = [stack.enter_context(Child(_rank, store, rank, count, work, arguments)) for rank in range(count)]
        said = [rank.heard(60.0) for rank in ranks]
        errors = [text for kind, text in said if kind == "error"]
        if errors:
            raise AssertionError("\n".join(errors))
        for rank in ranks:
            rank.say("all of them are done")
        return [result for _, result in said]


def _rank(pipe, store, rank, count, work, arguments):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, count), rank=rank, world_size=count, timeout=timedelta(seconds=30)
    )
    try:
        pipe.send(("result", work(rank, *arguments)))
    except BaseException:
        pipe.send(("error", f"rank {rank}: {traceback.format_exc()}"))
    pipe.recv()  # A rank that goes earlier would break what the others still send.
    dist.destroy_process_group()


def whole(tensor):
    """All of a tensor, also of a DTensor, plain."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
