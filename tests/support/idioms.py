"""Ways in which loading code treats the tensors it is given, each with what becomes of it. No test lives here.

A row is a name, a loader and an outcome: ``"C"`` copies only, ``"P"`` programs too, ``"F"`` the model's own code does
it (with what was noted), ``"refused"`` with a pattern of the problem. Loading must give what the loader gives on real
tensors.
"""

import concurrent.futures
import copy
import functools
import multiprocessing.pool
import pickle
import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


def weights(seed):
    """What the source carries. Finite, unequal, and not exactly representable in fewer bits."""
    made = torch.Generator().manual_seed(seed)

    def rand(*shape, dtype=torch.float32):
        return (torch.rand(shape, generator=made, dtype=torch.float64) + 0.1).to(dtype)

    return {
        "w": rand(4, 4),
        "s": rand(1),
        "e": rand(2, 4),
        "z": rand(),
        "d": rand(4, 4, dtype=torch.float64),
        "h": rand(4, 4, dtype=torch.bfloat16),
        "i": torch.randperm(4, generator=made),
        "u": torch.randint(0, 256, (4, 2), generator=made, dtype=torch.uint8),
        "c": torch.complex(rand(2, 2), rand(2, 2)),
        "t": rand(2, 3, 4),
        "n": torch.empty(0, 4),
    }


class Holder:
    """An object that is no module and holds a tensor; it can be called."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.count = 0

    def __call__(self, tensor):
        self.count += 1
        self.tensor.copy_(tensor)


class Model(nn.Module):
    """Tensors of many kinds, in many places."""

    def __init__(self, loader):
        super().__init__()
        self.p = nn.Parameter(torch.full((4, 4), 5.0), requires_grad=False)
        self.q = nn.Parameter(torch.full((8, 4), 6.0), requires_grad=False)
        self.g = nn.Parameter(torch.full((4, 4), 7.0))
        self.bf = nn.Parameter(torch.full((4, 4), 8.0, dtype=torch.bfloat16), requires_grad=False)
        self.ints = nn.Parameter(torch.full((4, 4), 9, dtype=torch.int32), requires_grad=False)
        self.packed = nn.Parameter(torch.full((4, 2), 1, dtype=torch.uint8), requires_grad=False)
        self.cplx = nn.Parameter(torch.full((2, 2), 2 + 3j), requires_grad=False)
        self.zero_d = nn.Parameter(torch.tensor(3.0), requires_grad=False)
        self.cube = nn.Parameter(torch.full((2, 3, 4), 4.0), requires_grad=False)
        self.none = nn.Parameter(torch.empty(0, 4), requires_grad=False)
        self.middle = nn.Parameter(self.q.data[2:6], requires_grad=False)  # a view of another parameter
        self.register_buffer("expert_map", torch.tensor([-1, 0]))
        self.register_buffer("perm", torch.tensor([3, 2, 1, 0]))
        self.register_buffer("mask", torch.eye(4, dtype=torch.bool), persistent=False)
        self.inner = nn.Linear(4, 4)
        self.listed = [nn.Parameter(torch.full((4, 4), 1.5), requires_grad=False)]
        self.hidden = [nn.Linear(4, 4)]  # modules that nn.Module does not know of
        self.shadow = self.p.data
        self.holder = Holder(torch.full((4, 4), 2.5))
        self.partial = functools.partial(lambda held, tensor: held.copy_(tensor), torch.full((4, 4), 3.5))
        self.seen, self.flag, self.scale, self.loader = [], False, 1.0, loader
        for linear, value in ((self.inner, 0.5), (self.hidden[0], 0.75)):
            nn.init.constant_(linear.weight, value)
            nn.init.constant_(linear.bias, value)
        self.p.weight_loader = lambda param, tensor: param.data.copy_(tensor)

    def load_weights(self, pairs):
        return self.loader(self, pairs)

    def all_tensors(self):
        """Every tensor, wherever it is kept."""
        found = dict([*self.named_parameters(), *self.named_buffers()])
        found |= {"listed": self.listed[0], "hidden": self.hidden[0].weight, "hidden.b": self.hidden[0].bias}
        found |= {"shadow": self.shadow, "holder": self.holder.tensor, "partial": self.partial.args[0]}
        return found


class Idiom(NamedTuple):
    name: str
    loader: object
    outcome: str
    words: str = ""


IDIOMS = []


def row(name, outcome, words=""):
    """Add a loader to the table."""

    def add(loader):
        IDIOMS.append(Idiom(name, loader, outcome, words))
        return loader

    return add


def on(wanted):
    """A loader of one tensor."""

    def wrap(write):
        def loader(model, pairs):
            for name, tensor in pairs:
                if name == wanted:
                    write(model, tensor)

        return loader

    return wrap


def each(name, write, outcome, words="", wanted="w"):
    IDIOMS.append(Idiom(name, on(wanted)(write), outcome, words))


def kept(name, write, outcome, words=""):
    """A loader that takes everything first."""
    IDIOMS.append(Idiom(name, lambda model, pairs: write(model, dict(pairs)), outcome, words))


def seq(*writes):
    """Several writes, one after another."""
    return lambda m, w: [write(m, w) for write in writes]


# --- plain ways of writing -------------------------------------------------------------------------------------------

each("plain copy", lambda m, w: m.p.data.copy_(w), "C")
each("copy into the parameter itself", lambda m, w: m.p.copy_(w), "C")
each("copy without grad", lambda m, w: torch.no_grad()(lambda: m.g.copy_(w))(), "C")
each("requires grad, by data", lambda m, w: m.g.data.copy_(w), "C")
each("detach first", lambda m, w: m.g.detach().copy_(w.detach()), "C")
each("weight_loader attribute", lambda m, w: m.p.weight_loader(m.p, w), "C")
each(
    "getattr weight_loader with a default",
    lambda m, w: getattr(m.q, "weight_loader", lambda p, t: p.data[:4].copy_(t))(m.q, w),
    "C",
)
each("slice assignment", lambda m, w: m.p.data.__setitem__(slice(None), w), "C")
each("index assignment of rows", lambda m, w: [m.q.data.__setitem__(i + 4, w[i]) for i in range(4)], "C")
each("narrow and cast", lambda m, w: m.q.data.narrow(0, 4, 4).copy_(w.to(torch.bfloat16)), "P")
each("cast by copy", lambda m, w: m.bf.data.copy_(w), "C")
each("cast by to", lambda m, w: m.bf.data.copy_(w.to(m.bf.dtype)), "C")
each("a chain of casts", lambda m, w: m.p.data.copy_(w.to(torch.float16).to(torch.bfloat16)), "P", wanted="d")
each("a cast there and back", lambda m, w: m.p.data.copy_(w.bfloat16().float()), "P")
each("a cast there, then a copy that casts again", lambda m, w: m.p.data.copy_(w.half()), "P")
each("a double cast by an intermediate of another dtype", lambda m, w: m.bf.data.copy_(w.float()), "P", wanted="d")
each("type_as", lambda m, w: m.bf.data.copy_(w.type_as(m.bf)), "C")
each("contiguous and clone", lambda m, w: m.p.data.copy_(w.contiguous().clone()), "C")
each("to the device", lambda m, w: m.p.data.copy_(w.to(m.p.device, non_blocking=True)), "C")
each("non_blocking", lambda m, w: m.p.data.copy_(w, non_blocking=True), "C")
each("transpose", lambda m, w: m.p.data.copy_(w.t()), "C")
each("transpose and contiguous", lambda m, w: m.p.data.copy_(w.t().contiguous()), "C")
each("into a transposed view", lambda m, w: m.p.data.t().copy_(w), "C")
each("transpose of the middle", lambda m, w: m.cube.data.copy_(w.transpose(1, 2).reshape(2, 3, 4)), "P", wanted="t")
each(
    "permute and reshape", lambda m, w: m.cube.data.view(6, 4).copy_(w.permute(1, 0, 2).reshape(6, 4)), "P", wanted="t"
)
each("view", lambda m, w: m.p.data.view(-1).copy_(w.view(16)), "C")
each("flatten and unflatten", lambda m, w: m.p.data.copy_(w.flatten().unflatten(0, (4, 4))), "C")
each("squeeze and unsqueeze", lambda m, w: m.p.data.copy_(w.unsqueeze(0).squeeze(0)), "C")
each("one more leading one", lambda m, w: m.p.data.copy_(w.unsqueeze(0)[0]), "C")
each("chunk", lambda m, w: [m.q.data[i * 2 : i * 2 + 1].copy_(x) for i, x in enumerate(w.chunk(4))], "C")
each(
    "split by sizes",
    lambda m, w: [d.copy_(x) for d, x in zip(m.p.data.split([1, 3]), w.split([1, 3]), strict=True)],
    "C",
)
each("unbind", lambda m, w: [m.p.data[3 - i].copy_(x) for i, x in enumerate(w.unbind(0))], "C")
each("for row in tensor", lambda m, w: [m.p.data[i].copy_(x) for i, x in enumerate(w)], "C")
each("every second column", lambda m, w: m.p.data[:, ::2].copy_(w[:, 1::2]), "C")
each("interleaved gate and up", lambda m, w: m.q.data.view(4, 2, 4)[:, 0].copy_(w), "C")
each("as_strided", lambda m, w: m.p.data.copy_(w.as_strided((4, 4), (1, 4), 0)), "C")
each("diagonal", lambda m, w: m.p.data.diagonal().copy_(w.diagonal()), "C")
each("unfold", lambda m, w: m.p.data[:3].copy_(w.unfold(0, 2, 1)[..., 0].contiguous()), "C")
each(
    "movedim and swapaxes",
    lambda m, w: m.cube.data.copy_(w.movedim(0, 2).swapaxes(0, 2).permute(0, 2, 1)),
    "C",
    wanted="t",
)
each("expand", lambda m, w: m.p.data.copy_(w[0].expand(4, 4)), "C")
each("expand of a view", lambda m, w: m.p.data.copy_(w[:, :1].expand(-1, 4)), "C")
each("fake tensor seen as bytes", lambda m, w: m.packed.data.copy_(w[:2].view(torch.uint8).view(4, 8)[:, 2:4]), "C")
each("bytes into a parameter seen as bytes", lambda m, w: m.p.data.view(torch.uint8).copy_(w.view(torch.uint8)), "C")
each(
    "bytes seen as int16, arithmetic",
    lambda m, w: m.bf.data.copy_((w.view(torch.int16) & 0x7FFF).view(torch.bfloat16)),
    "P",
    wanted="h",
)
each("zero-dim into one element", lambda m, z: m.q.data[0, :1].copy_(z), "C", wanted="z")
each("one element into zero-dim", lambda m, s: m.zero_d.data.copy_(s.reshape(())), "C", wanted="s")
each("one element into zero-dim by copy", lambda m, s: m.zero_d.data.copy_(s[0]), "C", wanted="s")
each("reshape(1) of a scalar", lambda m, z: m.q.data[0, 1:2].copy_(z.reshape(1)), "C", wanted="z")
each("empty", lambda m, n: m.none.data.copy_(n), "C", wanted="n")
each("cat with an empty one", lambda m, w: m.p.data.copy_(torch.cat([torch.empty(0), w])), "P")
each("double write of the same bytes", lambda m, w: (m.p.data.copy_(w), m.p.data.copy_(w)), "C")
each("tied by hand", lambda m, w: (m.p.data.copy_(w), m.g.data.copy_(w)), "C")
each("foreach copy", lambda m, w: torch._foreach_copy_([m.p.data, m.g.data], [w, w.t()]), "P")

# --- where things are kept -------------------------------------------------------------------------------------------

each("kept reference", lambda m, w: m.shadow.copy_(w), "C")
each("registered view", lambda m, w: m.middle.data.copy_(w), "C")
each("registered view, then what it views", lambda m, w: (m.middle.data.copy_(w), m.q.data[:4].copy_(w)), "C")
each("program into a registered view", lambda m, w: (m.q.data[4:].copy_(w), m.middle.data.mul_(w)), "P")
each("parameter in a list", lambda m, w: m.listed[0].data.copy_(w), "C")
each("module in a list", lambda m, w: m.hidden[0].weight.data.copy_(w), "C|F")
each("tensor of a callable object", lambda m, w: m.holder(w), "C|F")
each("tensor within a partial", lambda m, w: m.partial(w), "C|F")
each("named_parameters dict", lambda m, w: dict(m.named_parameters())["inner.weight"].data.copy_(w), "C")
each("get_parameter", lambda m, w: m.get_parameter("inner.weight").data.copy_(w), "C")
each("state_dict entries", lambda m, w: m.state_dict()["p"].copy_(w), "C")
each("load_state_dict of a child", lambda m, w: m.inner.load_state_dict({"weight": w, "bias": w[0]}), "C")
each("load_state_dict of itself", lambda m, w: m.load_state_dict({"p": w}, strict=False), "C")

_CLOSED = torch.full((4, 4), 1.25)


@row("a tensor in a closure that nothing else leads to", "F|refused", "memory that is not the model's")
def closure(model, pairs):
    for name, tensor in pairs:
        if name == "w":
            _CLOSED.copy_(tensor)
    model.p.data.copy_(_CLOSED)


# --- constants and order ---------------------------------------------------------------------------------------------

each("constant after the copy", lambda m, w: (m.p.data.copy_(w), m.p.data.__setitem__((slice(None), 0), 7.0)), "P")
each("fills padding", lambda m, w: (m.q.data.zero_(), m.q.data[:4].copy_(w)), "P")
each("fills padding after", lambda m, w: (m.q.data[:4].copy_(w), m.q.data[4:].fill_(0)), "P")
each("init.zeros_", lambda m, w: (nn.init.zeros_(m.q), m.q.data[:4].copy_(w)), "P")
each("masked_fill_ of the destination", lambda m, w: (m.p.data.copy_(w), m.p.data.masked_fill_(m.mask, 0.5)), "P")
each("write, change, write again", lambda m, w: (m.p.data.copy_(w), m.p.data.mul_(2), m.p.data.copy_(w)), "P")
each("write, fill a part, write again", lambda m, w: (m.p.data.copy_(w), m.p.data[0].fill_(7), m.p.data.copy_(w)), "P")
each(
    "write part, fill it, write it again",
    lambda m, w: (m.p.data[:2].copy_(w[:2]), m.p.data[1:3].fill_(7), m.p.data[:2].copy_(w[:2])),
    "P",
)
each(
    "overlapping parts of one source",
    lambda m, w: (m.p.data[:2].copy_(w[:2]), m.p.data[1:3].copy_(w[2:]), m.p.data[:2].copy_(w[:2])),
    "C",
)
each(
    "overlapping parts of one source, other order",
    lambda m, w: (m.p.data[1:3].copy_(w[2:]), m.p.data[:2].copy_(w[:2]), m.p.data[:, 1].copy_(w[0])),
    "C",
)
each(
    "whole, then a part from elsewhere in it",
    lambda m, w: (m.p.data.copy_(w), m.p.data[0].copy_(w[3])),
    "C|refused",
    "written twice",
)
each("part, then whole", lambda m, w: (m.p.data[0].copy_(w[3]), m.p.data.copy_(w)), "C|refused", "written twice")
each(
    "columns over rows",
    lambda m, w: (m.p.data[:, 0].copy_(w[0]), m.p.data[0].copy_(w[1]), m.p.data[:, 1].copy_(w[2])),
    "C",
)
kept(
    "two sources to one place",
    lambda m, k: (m.p.data.copy_(k["w"]), m.p.data.copy_(k["h"])),
    "C",
)
kept(
    "two sources to one place, changed between",
    lambda m, k: (m.p.data.copy_(k["w"]), m.p.data.mul_(2), m.p.data.copy_(k["w"].clone().add_(1))),
    "P",
)
each(
    "scratch of the loader",
    lambda m, w: (lambda s: (s[:, :4].copy_(w), s[:, 4:].copy_(w.t()), m.p.data.copy_(s[:, 2:6])))(torch.zeros(4, 8)),
    "P",
)
each(
    "scratch from empty, filled in a loop",
    lambda m, w: (lambda s: ([s[i].copy_(w[3 - i]) for i in range(4)], m.p.data.copy_(s)))(torch.empty(4, 4)),
    "P",
)
each(
    "scratch like the source",
    lambda m, w: (lambda s: (s.copy_(w), s.add_(1), m.p.data.copy_(s)))(torch.empty_like(w)),
    "P",
)
each(
    "scratch changed for real before",
    lambda m, w: (lambda s: (s.add_(2), s[0].copy_(w[0]), s.mul_(3), m.p.data.copy_(s)))(torch.ones(4, 4)),
    "P",
)
each(
    "scratch read through another view",
    lambda m, w: (lambda s, v: (s.copy_(w), m.p.data.copy_(v)))(*(lambda s: (s, s.t()))(torch.zeros(4, 4))),
    "P",
)
each(
    "scratch used twice",
    lambda m, w: (lambda s: (s.copy_(w), m.p.data.copy_(s), s.copy_(w.t()), m.g.data.copy_(s)))(torch.zeros(4, 4)),
    "P",
)
each(
    "constant changed after it was used",
    lambda m, w: (lambda s: (m.p.data.copy_(w * s), s.fill_(9), m.g.data.copy_(w + s)))(torch.full((4,), 2.0)),
    "P",
)
each("mutates its source", lambda m, w: m.p.data.copy_(w.mul_(2)), "P")
each("mutates its source after", lambda m, w: (m.p.data.copy_(w), w.mul_(2), m.g.data.copy_(w)), "P")
each(
    "mutates a view of its source before another is copied",
    lambda m, w: (w[0].zero_(), m.p.data.copy_(w), w[1].fill_(3), m.g.data.copy_(w)),
    "P",
)
each("clones, then mutates", lambda m, w: (lambda c: (w.zero_(), m.p.data.copy_(c), m.g.data.copy_(w)))(w.clone()), "P")
each(
    "reads the destination after a partial write",
    lambda m, w: (m.p.data[:2].copy_(w[:2]), m.g.data.copy_(m.p.data * 2)),
    "P",
)
each("copies one parameter to another", lambda m, w: (m.p.data.copy_(w), m.g.data.copy_(m.p.data)), "P")
each(
    "copies one parameter to another, then changes it",
    lambda m, w: (m.p.data.copy_(w), m.g.data.copy_(m.p.data), m.p.data.add_(1)),
    "P",
)
each(
    "swaps two halves through a clone",
    lambda m, w: (
        m.p.data.copy_(w),
        (lambda a: (m.p.data[:2].copy_(m.p.data[2:]), m.p.data[2:].copy_(a)))(m.p.data[:2].clone()),
    ),
    "P",
)
each("adds to what is there", lambda m, w: m.p.data.add_(w), "P")
each("what comes less what is there", lambda m, w: m.p.data.copy_(w - m.p.data), "P")
each("reads state that loading has not written", lambda m, w: m.p.data.copy_(w * m.g.data), "P")

# --- arithmetic and operations ---------------------------------------------------------------------------------------

kept("waits for its scale", lambda m, k: m.p.data.copy_(k["w"] * k["s"]), "P")
kept(
    "fp8-like pair",
    lambda m, k: m.bf.data.copy_((k["w"].to(torch.float8_e4m3fn).to(torch.float32) * k["z"]).bfloat16()),
    "P",
)
kept(
    "lists sorted by component",
    lambda m, k: [
        m.p.data.copy_(t) if n == "w" else m.q.data[:2].copy_(t)
        for n, t in sorted(k.items(), reverse=True)
        if n in "we"
    ],
    "C",
)
kept("cat of parts", lambda m, k: m.q.data.copy_(torch.cat([k["w"], k["e"], k["e"]])), "C")
kept("cat of two dtypes", lambda m, k: m.q.data.copy_(torch.cat([k["w"], k["h"]])), "P")
kept("cat in a lower dtype", lambda m, k: m.q.data.copy_(torch.cat([k["d"].bfloat16(), k["h"]])), "P")
kept("cat along columns", lambda m, k: m.q.data.view(4, 8).copy_(torch.cat([k["w"], k["w"].t()], dim=-1)), "C")
each("stack in a loop", lambda m, w: m.p.data.copy_(torch.stack([w[i] for i in (2, 0, 3, 1)])), "C")
each("stack along the last", lambda m, w: m.p.data.copy_(torch.stack([w[i] for i in range(4)], dim=-1)), "C")
each("part of a cat", lambda m, w: m.p.data.copy_(torch.cat([w, w + 1])[2:6]), "P")
each("part of a pure cat", lambda m, w: m.p.data.copy_(torch.cat([w, w.t()])[2:6]), "C")
each("transposed part of a cat", lambda m, w: m.p.data.copy_(torch.cat([w, w.t()])[2:6].t()), "P")
each("a cat that is changed", lambda m, w: (lambda c: (c[0].zero_(), m.q.data.copy_(c)))(torch.cat([w, w])), "P")
each(
    "hstack, vstack, column_stack",
    lambda m, w: m.q.data.copy_(torch.vstack([w, torch.column_stack([w[:, 0], w[:, 1], w[:, 2], w[:, 3]])])),
    "P|C",
)
each("concatenates a factory", lambda m, w: m.q.data.copy_(torch.cat([w, torch.ones(4, 4, device=w.device)])), "P")
each("new_zeros of the fake tensor", lambda m, w: m.q.data.copy_(torch.cat([w, w.new_zeros(4, 4)])), "P")
each("new_tensor", lambda m, w: m.p.data.copy_(w * w.new_tensor([1.0, 2.0, 3.0, 4.0])), "P|F")
each("pads", lambda m, w: m.q.data.copy_(F.pad(w, (0, 0, 0, 4), value=0.25)), "P")
each("repeats", lambda m, w: m.q.data.copy_(w.repeat(2, 1)), "P")
each("repeat_interleave", lambda m, w: m.q.data.copy_(w.repeat_interleave(2, dim=0)), "P")
each("tile and roll", lambda m, w: m.p.data.copy_(w.roll(1, 0).flip(1)), "P")
each("rot90", lambda m, w: m.p.data.copy_(torch.rot90(w)), "P")
each("indexes by a model buffer", lambda m, w: m.p.data.copy_(w[m.perm]), "P")
each("indexes by a list", lambda m, w: m.p.data.copy_(w[[1, 0, 3, 2]]), "P")
each(
    "index_select, gather, take_along_dim",
    lambda m, w: m.p.data.copy_(w.index_select(0, m.perm).gather(1, m.perm.expand(4, 4))),
    "P",
)
kept("indexes by a source", lambda m, k: m.p.data.copy_(k["w"][k["i"]]), "P")
kept("argsort of a source", lambda m, k: m.p.data.copy_(k["w"][torch.argsort(k["i"])]), "P")
each("boolean mask of a buffer", lambda m, w: m.p.data.diagonal().copy_(w[m.mask]), "F", "depends on values")
each("boolean mask of itself", lambda m, w: m.p.data.view(-1)[:16].copy_(w[w > -1]), "F")
each("assignment by a boolean mask", lambda m, w: m.p.data.__setitem__(m.mask, w.diagonal()), "P")
each("assignment by a list", lambda m, w: m.q.data.__setitem__([0, 2, 4, 6], w), "P")
each("index_copy_", lambda m, w: m.q.data.index_copy_(0, m.perm, w), "P")
each("index_put_ that adds", lambda m, w: m.p.data.index_put_((m.perm,), w, accumulate=True), "P")
each("scatter_", lambda m, w: m.p.data.scatter_(0, m.perm.expand(4, 4), w), "P")
each("masked_scatter_", lambda m, w: m.p.data.masked_scatter_(m.mask, w), "P")
each("where", lambda m, w: m.p.data.copy_(torch.where(w > 0.5, w, torch.zeros(()))), "P")
each("where with a number", lambda m, w: m.p.data.copy_(torch.where(w > 0.5, w, 0.125)), "P")
each("masked_fill", lambda m, w: m.p.data.copy_(w.masked_fill(m.mask, -1.0)), "P")
each("nan_to_num and clamp", lambda m, w: m.p.data.copy_(torch.nan_to_num(w / (w - w)).clamp(-448, 448)), "P")
each("triu", lambda m, w: m.p.data.copy_(w.triu(1) + w.tril()), "P")
each("norm of rows", lambda m, w: m.p.data.copy_(w / w.norm(dim=1, keepdim=True)), "P")
each("weight norm: v times g", lambda m, w: m.p.data.copy_(torch._weight_norm(w, w[:, :1].contiguous(), 0)), "P|F")
each("matmul", lambda m, w: m.p.data.copy_(w @ w.t()), "P")
each("linear and einsum", lambda m, w: m.p.data.copy_(F.linear(torch.einsum("ij,jk->ki", w, w), w)), "P")
each("max with indices", lambda m, w: m.p.data.copy_(w.max(dim=0).values.expand(4, 4)), "P")
each("sort and topk", lambda m, w: (m.p.data.copy_(w.sort(dim=1)[0]), m.g.data[:, :2].copy_(w.topk(2).values)), "P")
each("out=", lambda m, w: torch.add(w, 1, out=m.p.data), "P")
each(
    "out= of the loader's own",
    lambda m, w: (lambda o: (torch.mul(w, 2, out=o), m.p.data.copy_(o)))(torch.empty(4, 4)),
    "P",
)
each(
    "foreach arithmetic",
    lambda m, w: (lambda made: torch._foreach_copy_([m.p.data, m.g.data], made))(torch._foreach_mul([w, w.t()], 2.0)),
    "P",
)
each("addcmul, lerp", lambda m, w: (m.p.data.copy_(w), m.p.data.addcmul_(w, w, value=2), m.p.data.lerp_(w, 0.3)), "P")
each("gemma's one plus", lambda m, w: m.p.data.copy_(w + 1), "P")
each("mamba's A", lambda m, w: (m.p.data.copy_(w), m.p.data.copy_(-torch.exp(m.p.data.float()))), "P")
each("softmax and sum", lambda m, w: m.p.data.copy_(w.softmax(-1) * w.sum()), "P")
each(
    "interpolates",
    lambda m, w: m.q.data.view(4, 8).copy_(F.interpolate(w[None], size=8, mode="linear", align_corners=False)[0]),
    "P",
)
each("packs two int4", lambda m, u: m.packed.data.copy_((u & 0xF) | (u.flip(1) << 4)), "P", wanted="u")
each(
    "unpacks int4",
    lambda m, u: m.ints.data.copy_(torch.stack([u & 0xF, u >> 4], dim=-1).view(4, 4).to(torch.int32) - 8),
    "P",
    wanted="u",
)
each("xors the sign", lambda m, u: m.packed.data.copy_(u ^ 0x88), "P", wanted="u")
each("rounds to integers", lambda m, w: m.ints.data.copy_((w * 127).round().to(torch.int32)), "P")
each("fractions into integers", lambda m, w: m.ints.data.copy_(w), "refused", "cuts off fractions")
each("quantises by its maximum", lambda m, w: m.p.data.copy_((w / w.abs().amax()).round()), "P")
each(
    "block scales",
    lambda m, w: m.p.data.copy_((w.view(2, 2, 2, 2) / w.view(2, 2, 2, 2).abs().amax((1, 3), keepdim=True)).view(4, 4)),
    "P",
)
each("complex", lambda m, c: m.cplx.data.copy_(c), "C", wanted="c")
each("conjugate", lambda m, c: m.cplx.data.copy_(c.conj()), "P|F", wanted="c")
each("adjoint and resolve", lambda m, c: m.cplx.data.copy_(c.mH.resolve_conj()), "P|F", wanted="c")
each("imaginary part", lambda m, c: m.p.data[:2, :2].copy_(c.imag), "C|P", wanted="c")
each("imaginary part of a conjugate", lambda m, c: m.p.data[:2, :2].copy_(c.conj().imag), "P|F", wanted="c")
each("into the conjugate of the destination", lambda m, c: m.cplx.data.conj().copy_(c), "P|F", wanted="c")
each("into the real part", lambda m, w: m.cplx.data.real.copy_(w[:2, :2]), "C|P")
each("conjugate of a buffer", lambda m, c: m.cplx.data.copy_(c * torch.full((2, 2), 1 + 1j).conj()), "P|F", wanted="c")
each(
    "negated view of a constant",
    lambda m, w: m.p.data[:2, :2].copy_(w[:2, :2] + torch.full((2, 2), 1 + 2j).conj().imag),
    "P|F",
)
each(
    "autocast",
    lambda m, w: torch.autocast("cpu", dtype=torch.bfloat16)(lambda: m.p.data.copy_(w @ w))(),
    "F",
    "autocast",
)
each("inference mode", lambda m, w: torch.inference_mode()(lambda: m.p.data.copy_(w * 2))(), "P")
each("inference mode, plain", lambda m, w: torch.inference_mode()(lambda: m.p.data.copy_(w))(), "C")
each("silent broadcast", lambda m, w: m.p.data.copy_(w[0]), "refused", "broadcast, silently")
each("broadcast by assignment, which expands", lambda m, w: m.p.data.__setitem__(slice(None), w[0]), "C")
each("one scale for a vector", lambda m, s: m.q.data[0].copy_(s), "refused", "broadcast, silently", wanted="s")
each("fill_ by a tensor", lambda m, z: m.q.data[0].fill_(z), "P", wanted="z")
each("0-dim parameter by fill", lambda m, z: m.zero_d.data.fill_(z), "P", wanted="z")

# --- asks for values and addresses -----------------------------------------------------------------------------------

each("scalar fill", lambda m, w: m.p.data.fill_(w[0, 1].item()), "P")
each("scalar assignment", lambda m, w: m.p.data.__setitem__((0, slice(None)), w[0, 1].item()), "P")
each("scalar fill into bfloat16", lambda m, d: m.bf.data.fill_(d[0, 1].item()), "P", wanted="d")
each(
    "scalar that is a float to Python",
    lambda m, z: m.p.data.fill_(z.item()) if isinstance(z.item(), float) else m.p.data.fill_(-1),
    "P|F",
    wanted="z",
)
each(
    "scalar that is no tensor to Python",
    lambda m, z: m.p.data.fill_(-1) if isinstance(z.item(), torch.Tensor) else m.p.data.fill_(z.item()),
    "P|F",
    wanted="z",
)
each("scalar arithmetic", lambda m, z: m.p.data.fill_(z.item() * 2), "F", ".item()", wanted="z")
each("scalar in a tensor", lambda m, z: m.p.data.fill_(torch.tensor(z.item())), "F", ".item()", wanted="z")
each(
    "scalar in a list of a tensor",
    lambda m, z: m.p.data[0].copy_(torch.tensor([z.item()] * 4)),
    "F",
    ".item()",
    wanted="z",
)
each("scalar in full", lambda m, z: m.p.data.copy_(torch.full((4, 4), z.item())), "F", ".item()", wanted="z")
each("scalar as an operand", lambda m, z: m.p.data.copy_(m.g.data * z.item()), "F", ".item()", wanted="z")
each(
    "scalar of what changes later",
    lambda m, z: (lambda x: (z.zero_(), m.p.data.fill_(x)))(z.item()),
    "P",
    wanted="z",
)
each(
    "scalar only looked at",
    lambda m, z: m.p.data.zero_() if isinstance(z.item(), int) else m.p.data.fill_(2),
    "F",
    ".item()",
    wanted="z",
)
each(
    "scalar compared",
    lambda m, z: m.p.data.fill_(z.item()) if z.item() > 0.5 else m.p.data.zero_(),
    "F",
    ".item()",
    wanted="z",
)
each(
    "scalar formatted", lambda m, z: m.p.data.copy_(m.g.data) if f"{z.item():.3f}" else None, "F", ".item()", wanted="z"
)
each("scalar to an int", lambda m, i: m.p.data[int(i[0])].fill_(1), "F", "", wanted="i")
each("tensor as an index", lambda m, i: m.p.data[i[0]].fill_(1), "F|P", "", wanted="i")
each("tensor as a range", lambda m, i: [m.p.data[n].fill_(1) for n in range(i[0])], "F", "", wanted="i")
each("float()", lambda m, z: m.p.data.fill_(float(z)), "F", ".item()", wanted="z")
each("kept as a number", lambda m, z: setattr(m, "scale", z.item()), "F", "keeping", wanted="z")
each(
    "kept as a number in a dict of a parameter",
    lambda m, z: setattr(m.p, "types", {"q": z.item()}),
    "F",
    "keeping",
    wanted="z",
)
each("kept as a tensor", lambda m, w: (m.p.data.copy_(w), setattr(m, "derived", w * 2)), "F", "keeping")
each("kept in a list", lambda m, w: (m.p.data.copy_(w), m.seen.append(w)), "F", "keeping")
each("kept in an object", lambda m, w: (m.p.data.copy_(w), setattr(m.holder, "tensor", w)), "F", "keeping")
each("bool of a comparison", lambda m, w: m.p.data.copy_(w) if (w > 0).all() else None, "F", "")
each("nan check", lambda m, w: m.p.data.copy_(w) if not torch.isnan(w).any() else None, "F", "")
each("compares first", lambda m, w: None if torch.equal(m.p.data, w) else m.p.data.copy_(w), "F", "torch.equal()")
each("allclose", lambda m, w: None if torch.allclose(m.p.data, w) else m.p.data.copy_(w), "F", "")
each("numpy", lambda m, w: m.p.data.copy_(torch.from_numpy(w.numpy() * 2)), "F", ".numpy()")
each(
    "numpy of what was written",
    lambda m, w: (m.p.data.copy_(w), m.g.data.copy_(torch.from_numpy(m.p.data.numpy() * 2))),
    "F",
    ".numpy()",
)
each(
    "numpy of scratch",
    lambda m, w: (lambda s: (s.copy_(w), m.p.data.copy_(torch.from_numpy(s.numpy().copy()))))(torch.zeros(4, 4)),
    "F",
    ".numpy()",
)
each("writes through numpy", lambda m, w: (m.p.data.copy_(w), m.g.detach().numpy().fill(3)), "F", ".numpy()")
each("tolist", lambda m, i: m.p.data.copy_(m.g.data[i.tolist()]), "F", ".tolist()", wanted="i")
each(
    "tolist of what was written",
    lambda m, w: (m.p.data.copy_(w), m.g.data.fill_(m.p.data.tolist()[0][1])),
    "F",
    ".tolist()",
)
each(
    "item of what was written",
    lambda m, w: (m.p.data.copy_(w), m.g.data.fill_(m.p.data[0, 1].item() * 2)),
    "F",
    ".item()",
)
each("data_ptr in a set", lambda m, w: m.p.data.copy_(w) if w.data_ptr() not in {1, 2} else None, "F", ".data_ptr()")
each("storage", lambda m, w: m.p.data.copy_(w) if w.untyped_storage().nbytes() == 64 else None, "F", "storage")
each("fills through the storage", lambda m, w: (m.g.data.copy_(w), m.p.untyped_storage().fill_(0)), "F", "storage")
each("dlpack", lambda m, w: m.p.data.copy_(torch.from_dlpack(w)), "F", "DLPack")
each("deepcopy", lambda m, w: m.p.data.copy_(copy.deepcopy(w)), "F", "deepcopy")
each(
    "deepcopy of what was written",
    lambda m, w: (m.p.data.copy_(w), m.g.data.copy_(copy.deepcopy(m.p.data))),
    "F",
    "deepcopy",
)
each(
    "deepcopy of scratch",
    lambda m, w: (lambda s: (s.copy_(w), m.g.data.copy_(copy.deepcopy(s))))(torch.zeros(4, 4)),
    "F",
    "deepcopy",
)
each("pickle", lambda m, w: m.p.data.copy_(pickle.loads(pickle.dumps(w))), "F", "")
each("swallows a value read", lambda m, w: swallowed_read(m, w), "F", ".item()")
each(
    "swallows what it keeps",
    lambda m, w: swallowed(lambda: m.p.data.copy_(w * float(w[0, 0])), lambda: m.p.data.copy_(w)),
    "F",
    ".item()",
)
each(
    "swallows an unsupported operation",
    lambda m, w: swallowed(lambda: m.p.data.copy_(w[w > 0.5].sum()), lambda: m.p.data.copy_(w)),
    "F|refused",
    "",
)
each(
    "swallows an operation torch cannot do on meta",
    lambda m, w: swallowed(lambda: m.q.data[0].copy_(torch.histc(w, 4)), lambda: m.p.data.copy_(w)),
    "F|P",
    "",
)
each("swallows a real error", lambda m, w: swallowed(lambda: m.p.data.copy_(w[:3]), lambda: m.p.data.copy_(w)), "C")
each("unique", lambda m, w: m.p.data.copy_(torch.unique(w).view(4, 4)), "F", "")
each("nonzero", lambda m, w: m.p.data.view(-1)[:16].copy_(w.view(-1)[w.view(-1).nonzero().squeeze(1)]), "F", "")
each("branches on is_meta", lambda m, w: m.p.data.copy_(w) if not w.is_meta else None, "C")
each(
    "branches on the device", lambda m, w: m.p.data.copy_(w) if w.device.type == "cpu" and not w.is_cuda else None, "C"
)
each(
    "branches on dtype, layout, contiguity, stride",
    lambda m, w: (
        m.p.data.copy_(w)
        if w.dtype == torch.float32
        and w.is_contiguous()
        and w.stride() == (4, 1)
        and w.layout == torch.strided
        and not w.is_sparse
        and w.is_floating_point()
        and not w.requires_grad
        and w.storage_offset() == 0
        and w.nbytes == 64
        and len(w) == 4
        else None
    ),
    "C",
)
each("asks the model's own state", lambda m, w: m.p.data.copy_(w) if m.expert_map[1].item() >= 0 else None, "C")
each(
    "asks the model's own state as a list",
    lambda m, w: m.p.data.copy_(w) if m.expert_map.tolist()[1] >= 0 else None,
    "C",
)
each(
    "asks the model's own state by way of arithmetic",
    lambda m, w: m.q.data[int((m.expert_map + 2)[1])].copy_(w[0]),
    "C",
)
each(
    "isinstance Tensor",
    lambda m, w: m.p.data.copy_(w) if isinstance(w, torch.Tensor) and torch.is_tensor(w) else None,
    "C",
)
each("random", lambda m, w: m.p.data.copy_(w + torch.manual_seed(7).initial_seed() * 0 + torch.rand(4)), "P")
each(
    "random like the fake tensor",
    lambda m, w: (torch.manual_seed(7), m.p.data.copy_(w + torch.rand_like(w))),
    "F",
    "random",
)
each("random into the model", lambda m, w: (torch.manual_seed(7), m.g.data.normal_(), m.p.data.copy_(w)), "F", "random")
each("dropout", lambda m, w: (torch.manual_seed(7), m.p.data.copy_(F.dropout(w, 0.5))), "F", "random")


def swallowed_read(model, tensor):
    try:
        scale = tensor.max().item()
        model.p.data.copy_(tensor / scale)
    except Exception:
        model.p.data.copy_(tensor)


def swallowed(write, otherwise):
    try:
        write()
    except Exception:
        otherwise()


# --- rebinding -------------------------------------------------------------------------------------------------------

each("rebinds .data", lambda m, w: setattr(m.p, "data", w.clone()), "F", ".data =")
each(
    "rebinds .data to its own",
    lambda m, w: (setattr(m.p, "data", torch.zeros(4, 4)), m.p.data.copy_(w)),
    "F",
    ".data =",
)
each(
    "rebinds .data to a view of itself",
    lambda m, w: (setattr(m.p, "data", m.p.data.t()), m.p.data.copy_(w)),
    "F",
    ".data =",
)
each(
    "rebinds .data to a new shape",
    lambda m, w: (setattr(m.p, "data", torch.zeros(2, 2)), m.p.data.copy_(w[:2, :2])),
    "F",
    ".data =",
)
each(
    "rebinds .data of a parameter to another",
    lambda m, w: (m.p.data.copy_(w), setattr(m.g, "data", m.p.data)),
    "F",
    ".data =",
)
each("setattr of a parameter", lambda m, w: setattr(m, "p", nn.Parameter(w, requires_grad=False)), "F", "rebinding p")
each(
    "setattr of a scaled parameter",
    lambda m, w: setattr(m, "p", nn.Parameter(w * 2, requires_grad=False)),
    "F",
    "rebinding p",
)
each(
    "setattr of a real parameter, then a copy",
    lambda m, w: (setattr(m, "p", nn.Parameter(torch.zeros(4, 4), requires_grad=False)), m.p.data.copy_(w)),
    "F",
    "rebinding p",
)
each(
    "register_parameter",
    lambda m, w: m.register_parameter("fresh", nn.Parameter(w, requires_grad=False)),
    "F",
    "rebinding fresh",
)
each("register_buffer", lambda m, w: m.register_buffer("perm", w.argsort(dim=0)[0]), "F", "rebinding perm")
each("deletes a parameter", lambda m, w: (m.p.data.copy_(w), delattr(m, "g") if hasattr(m, "g") else None), "F", "g")
each("replaces a module", lambda m, w: (setattr(m, "inner", nn.Identity()), m.p.data.copy_(w)), "F", "inner")
each("load_state_dict assign", lambda m, w: m.load_state_dict({"p": w}, strict=False, assign=True), "F", "")
each("set_", lambda m, w: m.p.data.set_(w), "F", "set_")
each("set_ on the parameter", lambda m, w: m.p.set_(w.clone()), "F", "set_")
each("resize_", lambda m, w: (lambda d: (d.resize_(2, 4), d.copy_(w[:2])))(m.p.data), "F", "resize_")
each("resize_as_", lambda m, w: (m.p.data.resize_as_(w[:2]), m.q.data[:4].copy_(w)), "F", "")
each("swap_tensors", lambda m, w: torch.utils.swap_tensors(m.p, nn.Parameter(w.clone(), requires_grad=False)), "F", "")
each("to() of a module", lambda m, w: (m.inner.to(torch.float64), m.p.data.copy_(w)), "F", "")
each("requires_grad_", lambda m, w: (m.p.data.copy_(w), m.p.requires_grad_(True)), "F", "rebinding p.requires_grad")
each(
    "sets a gradient", lambda m, w: (m.p.data.copy_(w), setattr(m.g, "grad", torch.ones(4, 4))), "F", "rebinding g.grad"
)
each("changes a class", lambda m, w: (m.p.data.copy_(w), setattr(m.g, "__class__", Marked)), "C|F")
each("trains and evaluates", lambda m, w: (m.eval(), m.p.data.copy_(w), m.inner.train()), "C")
each(
    "sets attributes of parameters",
    lambda m, w: (m.p.data.copy_(w), setattr(m.p, "loaded", True), m.p.__dict__.pop("gone", None)),
    "C",
)
each("sets attributes of an object", lambda m, w: (m.p.data.copy_(w), setattr(m.holder, "count", 9)), "C")
each("share_memory_", lambda m, w: (m.p.data.copy_(w), m.inner.share_memory()), "F", "")


class Marked(nn.Parameter):
    """A parameter of another class."""


# --- threads and streams ---------------------------------------------------------------------------------------------


@row("thread pool", "C")
def thread_pool(model, pairs):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(model.p.data.copy_, tensor) for name, tensor in pairs if name == "w"]:
            done.result()


@row("thread pool by map", "P")
def pool_map(model, pairs):
    def write(pair):
        if pair[0] == "w":
            model.p.data.copy_(pair[1])
            model.p.data[0].fill_(7)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(write, pairs))


@row("threads of a class of their own", "P")
def own_threads(model, pairs):
    class Worker(threading.Thread):
        def __init__(self, tensor):
            super().__init__()
            self.tensor = tensor

        def run(self):
            model.p.data.copy_(self.tensor)
            model.p.data[0].fill_(7)

    for name, tensor in pairs:
        if name == "w":
            worker = Worker(tensor)
            worker.start()
            worker.join()


@row("multiprocessing's thread pool", "P")
def other_pool(model, pairs):
    with multiprocessing.pool.ThreadPool(2) as pool:
        tensor = dict(pairs)["w"]
        pool.apply(lambda: (model.p.data.copy_(tensor), model.p.data[0].fill_(7)))


@row("side effects", "C")
def side_effects(model, pairs):
    for name, tensor in pairs:
        model.seen.append(name)
        model.flag = True
        if name == "w":
            model.p.data.copy_(tensor)


@row("stops early", "C")
def stops_early(model, pairs):
    for name, tensor in pairs:
        if name == "w":
            model.p.data.copy_(tensor)
            return


@row("iterates twice", "C")
def twice(model, pairs):
    pairs = list(pairs)
    names = [name for name, _ in pairs]
    for name, tensor in pairs:
        if name == names[0]:
            model.p.data.copy_(tensor)


@row("a generator that renames", "C")
def renames(model, pairs):
    for name, tensor in ((name.replace("w", "p"), tensor) for name, tensor in pairs if name not in ("s", "e")):
        if name == "p":
            dict(model.named_parameters())[name].data.copy_(tensor)


@row("raises on unknown names", "refused", "KeyError")
def raises(model, pairs):
    params = dict(model.named_parameters())
    for name, tensor in pairs:
        params[{"w": "p"}.get(name, name)].data.copy_(tensor)


@row("asserts the shape", "refused", "AssertionError")
def asserts(model, pairs):
    for name, tensor in pairs:
        if name == "w":
            assert tensor.shape == model.q.shape


@row("wrong shape", "refused", "RuntimeError")
def wrong_shape(model, pairs):
    for name, tensor in pairs:
        if name == "w":
            model.q.data.copy_(tensor)


@row("zeros everything first, and reads a value", "F", ".item()")
def zeros_first(model, pairs):
    for param in model.parameters():
        param.data.zero_()
    for name, tensor in pairs:
        if name == "w":
            model.p.data.copy_(tensor)
        if name == "e":
            model.q.data[:2].copy_(tensor * float(tensor.max()))


@row("transforms everything last, and reads a value", "F", ".item()")
def transforms_last(model, pairs):
    for name, tensor in pairs:
        if name == "w":
            model.p.data.copy_(tensor)
        if name == "e":
            model.q.data[:2].copy_(tensor * float(tensor.max()))
    model.p.data.mul_(2)
    model.q.data.mul_(2)


@row("jit-scripted helper", "P|F")
def scripted(model, pairs):
    for name, tensor in pairs:
        if name == "w":
            model.p.data.copy_(_doubled(tensor))


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def _doubled(tensor):
    return _Doubled.apply(tensor)
