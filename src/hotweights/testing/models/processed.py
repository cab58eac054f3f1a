"""Processed: a model of layers that are processed after loading as engines do it, each odd in one way.

Every layer has a ``quant_method``, whose ``process_weights_after_loading`` an engine calls once, after loading.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import linear, pad

SIZE = 8
"""How wide every layer is."""


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class _Method:
    """What an engine hangs on a layer: it knows how to process it."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make of the layer what its kernel uses."""
        layer.process()


class ProcessedLayer(nn.Module):
    """A square weight that is used as it is. The others differ in ``process`` and ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = _parameter(torch.zeros(SIZE, SIZE))
        self.quant_method: Any = _Method()

    def process(self) -> None:
        """Processing: nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ weight.T``, with ``[n, SIZE]`` in and out."""
        return linear(x, self.weight)


class LateParameter(ProcessedLayer):
    """Registers a parameter that was not there, and takes one away."""

    def process(self) -> None:
        """Two halves in the place of one weight."""
        upper, lower = self.weight.chunk(2)
        self.register_parameter("upper", _parameter(upper.clone()))
        self.register_buffer("lower", lower.clone(), persistent=False)
        del self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As before."""
        return torch.cat([linear(x, self.upper), linear(x, self.lower)], -1)  # type: ignore[arg-type]


class KernelWeight(nn.Parameter):
    """A parameter of another class, with attributes."""


class OtherClass(ProcessedLayer):
    """The weight becomes a parameter of another class, dtype and shape."""

    def process(self) -> None:
        """Half the precision, side by side."""
        new = KernelWeight(self.weight.to(torch.bfloat16).reshape(-1, 2), requires_grad=False)
        new.largest = float(self.weight.abs().max())  # type: ignore[attr-defined]
        self.weight = new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As before."""
        largest: float = self.weight.largest  # type: ignore[attr-defined]
        return linear(x, self.weight.float().view(SIZE, SIZE)) + largest


class Prepacked(ProcessedLayer):
    """The weight is emptied; a closure holds what the kernel uses. vLLM does so on CPUs."""

    def process(self) -> None:
        """Pack it out of sight."""
        packed = self.weight.t().contiguous()
        self.kernel: Callable[[torch.Tensor], torch.Tensor] = lambda x: x @ packed
        self.handle: Callable[[torch.Tensor], torch.Tensor] = partial(torch.add, packed.sum())
        self.weight = _parameter(torch.empty(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """By the closure alone."""
        return self.handle(self.kernel(x))


class Transposed(ProcessedLayer):
    """The kernel's layout of a square weight has the checkpoint's shape."""

    def process(self) -> None:
        """Another tensor of the same shape."""
        self.weight = _parameter(self.weight.t().contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As before."""
        return x @ self.weight


class Padded(ProcessedLayer):
    """The kernel wants another multiple; the padding is not zero."""

    def process(self) -> None:
        """Pad."""
        self.weight.data = pad(self.weight.data, (0, 3), value=0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The padding takes part."""
        return linear(pad(x, (0, 3), value=1.0), self.weight)


class Derived(ProcessedLayer):
    """A buffer views the weight; then ``.data`` is rebound, and it is derived anew. Mamba's ``conv_weights``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flat", self.weight.data.view(-1), persistent=False)
        self.register_buffer("constant", torch.tensor(0.0188), persistent=False)  # No checkpoint has it.

    def process(self) -> None:
        """The view keeps the old memory, the weight gets new one."""
        self.weight.data = self.weight.data * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both are used."""
        return linear(x, self.weight) + self.flat.view(SIZE, SIZE)[0] * self.constant  # type: ignore[operator]


class OnceOnly(ProcessedLayer):
    """Notes in three places that it was processed, and then does nothing. vLLM's Qwen3-MoE on CPUs.

    An update must put all three back, or the second processing is skipped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.quant_method.done = False
        self.state: dict[str, Any] = {"steps": [], "count": 0}

    def process(self) -> None:
        """Reverse the rows, unless any of the three says that this was done."""
        if self.quant_method.done or self.state["steps"] or hasattr(self, "repacked"):
            return
        self.quant_method.done = self.repacked = True
        self.state["steps"].append("repack")
        self.state["count"] += 1
        self.weight.data.copy_(self.weight.data.flip(0).clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A wrong count changes the result."""
        result: torch.Tensor = linear(x, self.weight) * self.state["count"]
        return result


class Kernel:
    """A kernel's object: a prepared tensor, and a workspace."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.scale = weight.abs().max() / 127
        self.tensors = {"packed": (weight / self.scale).round().to(torch.int8)}
        self.parts: Any = (weight[0].clone(), [weight[1].clone()], 0.5)
        self.shape = tuple(weight.shape)


class Hidden(ProcessedLayer):
    """What the kernel uses hangs in a list, a dict, a tuple, ``quant_method`` and an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pair: Any = ()
        self.history = [torch.zeros(SIZE)]  # is there before, and written in place

    def process(self) -> None:
        """Put it everywhere but in parameters."""
        self.kernel = Kernel(self.weight)
        self.quant_method.sums = [self.weight.sum(0), (self.weight.sum(1), "rows")]
        self.table: dict[Any, Any] = {"first": self.weight[0].clone(), 7: {"deep": self.weight[1].clone()}}
        self.pair = (self.weight[2].clone(), self.weight.amax())
        self.history[0].add_(self.weight[3])
        self.weight = _parameter(torch.empty(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All of it takes part."""
        result: torch.Tensor = linear(x, self.kernel.tensors["packed"].float()) * self.kernel.scale
        result = result + self.kernel.parts[0] + self.kernel.parts[1][0] + self.kernel.parts[2]
        result = result + self.quant_method.sums[0] + self.quant_method.sums[1][0]
        rest: torch.Tensor = self.table["first"] + self.table[7]["deep"] + self.pair[0] * self.pair[1] + self.history[0]
        return result + rest


class _Library:
    """Stands for a kernel library in C++: it holds a prepared weight, and a pointer to the scale, by number."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[int, tuple[torch.Tensor, weakref.ref[Any]]] = {}

    def prepare(self, weight: torch.Tensor, scale: torch.Tensor) -> int:
        """Copy the weight, point to the scale; returns a number for them."""
        number = next(self._numbers)
        self._open[number] = (weight.clone(), weakref.ref(scale.untyped_storage()))
        return number

    def use(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and scale. Fails where C++ would read memory that is free."""
        weight, memory = self._open[number]
        storage = memory()
        assert storage is not None, "this memory was freed"
        return weight, torch.empty(0).set_(storage, 0, (1,), (1,))

    def free(self, number: int) -> None:
        """Twice is an error, as it is in C++."""
        del self._open[number]


_LIBRARY = _Library()


class Handle:
    """Owns what a library prepared. vLLM's int8 layers have one for oneDNN."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self.number = _LIBRARY.prepare(weight, scale)

    def __del__(self) -> None:
        """Free it."""
        _LIBRARY.free(self.number)


class Pointing(ProcessedLayer):
    """A handle of a library has the weight, and the address of the scale."""

    def process(self) -> None:
        """Hand it to the library."""
        self.scale = _parameter(self.weight.abs().amax().view(1))
        self.quant_method.handle = Handle(self.weight / self.scale, self.scale)
        self.register_parameter("weight", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """By the handle alone."""
        weight, scale = _LIBRARY.use(self.quant_method.handle.number)
        return linear(x, weight) * scale


class _ModuleMethod(nn.Module):
    """A method that is a module: a child of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel: Kernel | None = None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Repack, the first time only."""
        if self.kernel is None:
            self.kernel = Kernel(layer.weight)
            layer.weight = _parameter(layer.weight.t().contiguous())


class MethodIsModule(ProcessedLayer):
    """Its ``quant_method`` is a module, and holds the kernel. vLLM's experts."""

    def __init__(self) -> None:
        super().__init__()
        self.quant_method = _ModuleMethod()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both take part."""
        return x @ self.weight + linear(x, self.quant_method.kernel.tensors["packed"].float())


class SharedKernel(ProcessedLayer):
    """Layers of one shape share one kernel object, which knows each of them and counts them."""

    def __init__(self, kernels: dict[str, Any]) -> None:
        super().__init__()
        self.kernels = kernels
        self.number = kernels["made"] = kernels.get("made", 0) + 1

    def process(self) -> None:
        """Under a name of its own."""
        self.kernels[f"layer {self.number}"] = self.weight * 3
        self.kernels["processed"] = self.kernels.get("processed", 0) + 1
        self.rank = self.kernels["processed"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Its own entry, and its turn."""
        result: torch.Tensor = linear(x, self.kernels[f"layer {self.number}"]) + self.rank
        return result


class Remade(ProcessedLayer):
    """Processing makes one tensor anew, with the same value each time; users of the layer replace another one."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.tensor(1.0)
        self.cache = torch.tensor([])  # Replaced by whoever runs the layer, not by processing.

    def process(self) -> None:
        """Defaults, as vLLM's attention has for its scales."""
        self.one = torch.tensor(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As before."""
        return linear(x, self.weight) * self.one


class Fp8(ProcessedLayer):
    """Quantised as it comes: fp8 with one scale for each channel."""

    def process(self) -> None:
        """From the checkpoint's precision."""
        scale = self.weight.abs().amax(1, keepdim=True).clamp(min=1e-6) / torch.finfo(torch.float8_e4m3fn).max
        self.weight_scale = _parameter(scale)
        self.weight = _parameter((self.weight / scale).to(torch.float8_e4m3fn).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Dequantised."""
        return x @ (self.weight.float() * self.weight_scale.t())


class ScaledPair(ProcessedLayer):
    """Comes quantised, as int8 and scales; compressed-tensors does so. ``input_scale`` need not come."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = _parameter(torch.zeros(SIZE, SIZE, dtype=torch.int8))
        self.weight_scale = _parameter(torch.ones(SIZE, 1))
        self.input_scale = _parameter(torch.tensor(-1.0))

    def process(self) -> None:
        """Transpose; a scale that did not come is computed."""
        self.weight = _parameter(self.weight.t().contiguous())
        self.weight_scale = _parameter(self.weight_scale.flatten().clone())
        if self.input_scale < 0:
            self.input_scale.data.fill_(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Dequantised."""
        return x @ self.weight.float() * self.weight_scale * self.input_scale


class Attention(nn.Module):
    """Its scales have no dimension and come of other layers; ``late`` is processed after all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = Fp8()
        self.late = _Scales(lambda: self.projection)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scaled."""
        return self.projection(x) * self.late.k_scale + self.late.product + self.late.k_scale_float  # type: ignore[no-any-return]


class _Scales(nn.Module):
    def __init__(self, projection: Callable[[], Fp8]) -> None:
        super().__init__()
        self.k_scale = _parameter(torch.tensor(0.0))
        self.v_scale = _parameter(torch.tensor(-1.0))  # no checkpoint brings it
        self.quant_method: Any = _Method()
        self.projection = projection  # Not a child.

    def process(self) -> None:
        """Reads the processed projection."""
        self.product = self.projection().weight_scale.amax() * self.k_scale
        if self.v_scale < 0:
            self.v_scale.data.fill_(0.75)
        self.k_scale_float = float(self.k_scale)


class TiedHead(nn.Module):
    """A head that is tied to the embedding and prepacked; only the embedding has a name in files. Qwen3 does so."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = ProcessedLayer(), Prepacked()
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both are used."""
        result: torch.Tensor = self.head(self.embed(x))
        return result


PROCESSED_LAYERS: Mapping[str, Callable[[], list[nn.Module]]] = {
    "plain": lambda: [ProcessedLayer()],
    "late parameter": lambda: [LateParameter()],
    "other class": lambda: [OtherClass()],
    "prepacked": lambda: [Prepacked()],
    "transposed": lambda: [Transposed()],
    "padded": lambda: [Padded()],
    "derived": lambda: [Derived()],
    "once only": lambda: [OnceOnly()],
    "hidden": lambda: [Hidden()],
    "shared kernel": lambda: [SharedKernel(shared) for shared in [dict[str, Any]()] for _ in range(3)],
    "remade": lambda: [Remade()],
    "pointing": lambda: [Pointing()],
    "method is module": lambda: [MethodIsModule()],
    "fp8": lambda: [Fp8()],
    "scaled pair": lambda: [ScaledPair()],
    "attention": lambda: [Attention()],
    "tied head": lambda: [TiedHead()],
}
"""What makes the layers of each kind, by what is odd about it."""


class Processed(nn.Module):
    """A model of processed layers, in checkpoint format.

    Attributes:
        deferred: names of layers that are processed after all others.
        allow_missing: names of tensors that no checkpoint brings.
    """

    deferred: ClassVar = ("*.late",)
    allow_missing: ClassVar = ("*.input_scale", "*.v_scale")

    def __init__(self, kinds: Iterable[str] = PROCESSED_LAYERS) -> None:
        """Of these kinds, by default of all."""
        super().__init__()
        self.layers = nn.ModuleList(layer for kind in kinds for layer in PROCESSED_LAYERS[kind]())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, SIZE, layers]``: what each layer makes of ``x``, ``[n, SIZE]``."""
        return torch.stack([layer(x) for layer in self.layers], -1)

    def process(self) -> None:
        """What an engine does after loading: each layer once, the deferred ones last."""
        layers = [layer for layer in self.modules() if hasattr(layer, "quant_method")]
        with torch.no_grad():
            for layer in sorted(layers, key=lambda layer: isinstance(layer, _Scales)):
                layer.quant_method.process_weights_after_loading(layer)  # type: ignore[union-attr, operator]


def processed_checkpoint(kinds: Iterable[str] = PROCESSED_LAYERS, *, seed: int) -> dict[str, torch.Tensor]:
    """Tensors for ``Processed(kinds)``; fp32, and int8 where the layer comes quantised."""
    return dict(_tensors(Processed(kinds), torch.Generator().manual_seed(seed)))


def _tensors(model: nn.Module, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if name.endswith(("input_scale", "v_scale")):
            continue
        if parameter.dtype is torch.int8:
            yield name, torch.randint(-128, 128, parameter.shape, generator=generator, dtype=torch.int8)
        else:
            yield name, torch.rand(parameter.shape, generator=generator)
