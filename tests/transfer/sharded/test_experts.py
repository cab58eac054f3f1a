"""A tiny mixture of experts: stacks on two ranks, as DTensors; workers hold two of eight experts each, fused anew."""

from contextlib import ExitStack

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ends import receiver
from processes import Child
from ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import hotweights as hw

EXPERTS, HIDDEN, INNER = 8, 6, 10


def stacks():
    torch.manual_seed(4)
    return {
        "router.weight": torch.randn(EXPERTS, HIDDEN),
        "experts.gate_up": torch.randn(EXPERTS, HIDDEN, 2 * INNER),  # as the trainer has them: the other way round
        "experts.down": torch.randn(EXPERTS, INNER, HIDDEN),
    }


def by_expert(state):
    """The checkpoint's names and views of what this rank holds: one tensor an expert, gate and up apart. No copies."""
    for name, tensor in state.items():
        if not isinstance(tensor, DTensor):
            yield name, tensor
            continue
        own = tensor.to_local()
        first = tensor.device_mesh.get_local_rank() * len(own)  # Shard(0), even
        for number, expert in enumerate(own, first):
            if name == "experts.down":
                yield f"experts.{number}.down.weight", expert.t()
            else:
                gate, up = expert.t().chunk(2)
                yield f"experts.{number}.gate.weight", gate
                yield f"experts.{number}.up.weight", up


def _sends(rank, address):
    mesh = init_device_mesh("cpu", (2,))
    held = {
        name: distribute_tensor(tensor, mesh, [Shard(0)]) if "experts" in name else tensor
        for name, tensor in stacks().items()
    }
    with hw.Sender(address, group=dist.group.WORLD, receivers=4, timeout=30) as sending:
        for version in range(2):
            report = sending.send(by_expert(held), version=version)
    return report.nbytes


class Rank(nn.Module):
    """One of four ranks of a server, with its experts in stacks of its own layout."""

    def __init__(self, rank):
        super().__init__()
        self.first = 2 * rank
        self.router = nn.Parameter(torch.zeros(EXPERTS, HIDDEN), requires_grad=False)
        self.w13 = nn.Parameter(torch.zeros(2, 2 * INNER, HIDDEN), requires_grad=False)
        self.w2 = nn.Parameter(torch.zeros(2, HIDDEN, INNER), requires_grad=False)

    def load_weights(self, pairs):
        for name, tensor in pairs:
            if name == "router.weight":
                self.router.data.copy_(tensor)
                continue
            _, number, part, _ = name.split(".")
            own = int(number) - self.first
            if 0 <= own < 2:
                place = {
                    "gate": self.w13.data[own, :INNER],
                    "up": self.w13.data[own, INNER:],
                    "down": self.w2.data[own],
                }
                place[part].copy_(tensor)

    def forward(self, hidden):
        """What its experts add, each by its weight."""
        weights = F.softmax(hidden @ self.router.T, -1)
        total = torch.zeros_like(hidden)
        for own in range(2):
            gate, up = (hidden @ self.w13[own].T).chunk(2, -1)
            total += weights[:, self.first + own, None] * ((F.silu(gate) * up) @ self.w2[own].T)
        return total


def _serves(pipe, address, rank, hidden):
    live = hw.LiveModel(Rank(rank))
    with receiver(address, timeout=30, offer_timeout=30) as source, torch.inference_mode():
        live.load(source)
        live.update(source)
        pipe.send(live.model(hidden).clone())
    pipe.recv()  # What it has sent lies in its memory until then.


def trained(hidden):
    """What the trainer's own model gives."""
    state = stacks()
    weights = F.softmax(hidden @ state["router.weight"].T, -1)
    gate, up = torch.einsum("th,ehi->eti", hidden, state["experts.gate_up"]).chunk(2, -1)
    return torch.einsum("te,eth->th", weights, (F.silu(gate) * up) @ state["experts.down"])


def test_two_ranks_of_experts_feed_four(tmp_path, address):
    (tmp_path / "ranks").mkdir()
    torch.manual_seed(0)
    hidden = torch.randn(5, HIDDEN)
    with ExitStack() as stack:
        workers = [stack.enter_context(Child(_serves, address, rank, hidden)) for rank in range(4)]

        nbytes = on_ranks(tmp_path / "ranks", _sends, address)
        total = sum(worker.heard(60) for worker in workers)
        torch.testing.assert_close(total, trained(hidden))
        assert nbytes == [sum(tensor.nbytes for tensor in stacks().values())] * 2, "each expert goes to one worker"
        for worker in workers:
            worker.say("done")
