"""PlannedLoader: SGLang's load format ``hotweights``. It loads a model by plan, and keeps it for updates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.arg_groups.choices import LOAD_FORMAT_CHOICES, add_load_format_choices
from sglang.srt.configs.load_config import LoadConfig, LoadFormat
from sglang.srt.model_loader.loader import (
    DefaultModelLoader,
    _get_quantization_config,
    _initialize_model,
    device_loading_context,
)
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import nn

from ... import signals
from ...errors import UsageError
from ...live.model import LiveModel
from ...sources.opening import open as open_source
from ..vllm.attached import attach

_LOG = logging.getLogger("hotweights")


def register_loader() -> None:
    """Make the format known."""
    if "hotweights" not in LOAD_FORMAT_CHOICES:
        add_load_format_choices(["hotweights"])
        HookRegistry.register("sglang.srt.configs.load_config.LoadConfig.__post_init__", _chosen, HookType.BEFORE)


def _chosen(config: Any, *_: Any, **__: Any) -> None:
    """SGLang's formats are an enumeration, or a class: so the name becomes our class."""
    if config.load_format == "hotweights":
        config.load_format = PlannedLoader


class PlannedLoader(DefaultModelLoader):  # type: ignore[misc]  # SGLang is not installed where types are checked.
    """What SGLang makes of ``--load-format hotweights``."""

    def __init__(self, load_config: Any) -> None:
        """Raises ``UsageError`` if there are options: it has none."""
        if load_config.model_loader_extra_config:
            raise UsageError("load format hotweights has no options; leave --model-loader-extra-config away")
        super().__init__(load_config)

    def load_model(self, *, model_config: Any, device_config: Any) -> nn.Module:
        """Build the model, load it by plan, process its layers, and keep what updates need with it.

        Raises:
            CheckpointError, PlanError: as ``hotweights.load``, before a byte of a weight is read.
        """
        device = torch.device(device_config.device)
        quantisation = _get_quantization_config(model_config, self.load_config)
        with set_default_torch_dtype(model_config.dtype):
            with device:
                model: nn.Module = _initialize_model(model_config, self.load_config, quantisation).eval()
            self._load(model, model_config, device)
        return model

    def _load(self, model: nn.Module, model_config: Any, device: torch.device) -> None:
        for what in ("secondary_weights", "allow_patterns_overrides"):
            if getattr(model, what, None):
                raise UsageError(
                    f"{type(model).__name__} takes its weights from several places ({what}), which the load format "
                    "hotweights does not; use auto"
                )
        live = LiveModel(model, process=processing(device), layers=is_processed)
        with open_source(self._directory(model_config)) as source:
            report = live.load(source, device=device, show_progress=False)
        attach(model, live)
        _LOG.info("hotweights: %s", report)

    def _directory(self, model_config: Any) -> str:
        """Where the checkpoint lies, downloaded by SGLang's own means if need be."""
        theirs = DefaultModelLoader(LoadConfig(load_format=LoadFormat.AUTO, download_dir=self.load_config.download_dir))
        directory, *_ = theirs._prepare_weights(model_config.model_path, model_config.revision, False)
        return str(directory)


def is_processed(layer: nn.Module) -> bool:
    """Whether SGLang does anything with it after loading."""
    if type(layer).__module__.startswith("sglang.srt.lora."):  # It stands before the layer that has the method.
        return False
    return getattr(layer, "quant_method", None) is not None


def processing(device: torch.device) -> Callable[[nn.Module], None]:
    """What SGLang does with one layer; ``device`` is where it is done."""

    def process(layer: nn.Module) -> None:
        with device_loading_context(layer, device):
            layer.quant_method.process_weights_after_loading(layer)  # type: ignore[union-attr,operator]

    return process


@contextmanager
@signals.held
def as_loaded(dtype: torch.dtype) -> Iterator[None]:
    """Inside, what loading code and processing look at is as it was for the first load."""
    with (
        set_default_torch_dtype(dtype),
        torch.inference_mode(False),  # Tensors made inside could not be written outside.
    ):
        yield
