"""A model such as SGLang's: fused weights, and layers that keep something derived of them after loading."""

import types

import torch
from safetensors.torch import save_file
from sglang.srt.layers.quantization.base_config import QuantizeMethodBase
from torch import nn


class Packing(QuantizeMethodBase):
    """Keeps the weight transposed, as kernels want it, and lets go of the other."""

    def create_weights(self, layer, *args, **kwargs): ...

    def apply(self, layer, *args, **kwargs): ...

    def process_weights_after_loading(self, layer):
        layer.packed = layer.weight.data.t().contiguous()


class Fused(nn.Module):
    """Queries and keys in one tensor."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 * size, size), requires_grad=False)
        self.quant_method = Packing()


class Toy(nn.Module):
    def __init__(self, size=8):
        super().__init__()
        self.size = size
        self.qk = Fused(size)
        self.out = nn.Linear(size, size)
        self.requires_grad_(False)

    def load_weights(self, weights):
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            if name in ("q.weight", "k.weight"):
                start = 0 if name == "q.weight" else self.size
                parameters["qk.weight"].data[start : start + self.size].copy_(tensor)
            else:
                parameters[name].data.copy_(tensor)

    def held(self):
        """Everything that it would answer by."""
        tensors = {**self.state_dict(), "packed": self.qk.packed}
        return {name: tensor.clone() for name, tensor in tensors.items()}


def weights_of(seed, size=8):
    made = torch.Generator().manual_seed(seed)
    shapes = {"q.weight": (size, size), "k.weight": (size, size), "out.weight": (size, size), "out.bias": (size,)}
    return {name: torch.randn(shape, generator=made) for name, shape in shapes.items()}


def checkpoint(folder, seed, without=()):
    folder.mkdir(parents=True)
    tensors = {name: tensor for name, tensor in weights_of(seed).items() if name not in without}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return str(folder)


def expected(seed):
    """What a fresh model holds."""
    model = Toy()
    model.load_weights(weights_of(seed).items())
    model.qk.quant_method.process_weights_after_loading(model.qk)
    return model.held()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Runner:
    """Has SGLang's own updater for a model."""

    def __init__(self, model, path):
        from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

        self.model, self.fields, self.recaptured = model, [], 0
        self.config = types.SimpleNamespace(dtype=torch.float32, model_path=path, revision=None)
        self.weight_updater = WeightUpdater(
            tp_rank=0,
            device="cpu",
            gpu_id=0,
            model_config=self.config,
            custom_weight_loaders=[],
            get_model=lambda: model,
            update_model_fields=lambda new, **fields: self.fields.append(fields),
            recapture_cuda_graph=lambda: None,
            get_model_runner=lambda: self,
        )


def loaded(path):
    """A runner whose model our load format has loaded."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import get_model_loader

    loader = get_model_loader(LoadConfig(load_format="hotweights"))
    config = types.SimpleNamespace(dtype=torch.float32, model_path=path, revision=None)
    model = loader.load_model(model_config=config, device_config=types.SimpleNamespace(device="cpu"))
    return Runner(model, path)
