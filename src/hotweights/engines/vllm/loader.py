"""ModelLoader: the load format ``hotweights``. It loads a model by plan, layer by layer, and keeps it for updates."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import replace
from vllm.logger import init_logger
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ...dtypes import OpaqueDtype
from ...errors import CheckpointError, UsageError
from ...live.model import LiveModel
from ...live.report import UpdateReport
from ...loading.load import load
from ...manifest import Manifest, TensorSpec
from ...plan.steps import Fate
from ...sources.dcp.source import DcpSource
from ...sources.files.source import FileSource
from ...sources.opening import open as open_source
from ...sources.readers.source import ReaderSource
from ...text import size
from .attached import attach, attached
from .layers import deferred, is_processed, may_be_missing, processes_itself, processing, unwrap
from .options import options_from
from .tied_head import keep_head_bias, reconcile_head

logger = init_logger("vllm.hotweights")  # Below vLLM's own, so that its handlers and levels apply.


def register_loader() -> None:
    """Make the format known; twice does nothing."""
    if _LOAD_FORMAT_TO_MODEL_LOADER.get("hotweights") is not ModelLoader:
        register_model_loader("hotweights")(ModelLoader)


class ModelLoader(BaseModelLoader):  # type: ignore[misc]  # vLLM is not installed where types are checked.
    """What vLLM makes of ``--load-format hotweights``."""

    def __init__(self, load_config: Any) -> None:
        """Check the options in ``model_loader_extra_config``.

        Raises:
            UsageError: one is unknown, or of the wrong kind.
        """
        super().__init__(load_config)
        self._options = options_from(load_config.model_loader_extra_config)

    def download_model(self, model_config: Any) -> None:
        """Download the checkpoint if it is not on this machine."""
        self._directory(model_config)

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """Build the model, load and process it layer by layer, and keep what updates need with it.

        Raises:
            CheckpointError, PlanError: as ``hotweights.load``, before a byte of a weight is read.
        """
        device = torch.device(self.load_config.device or vllm_config.device_config.device)
        _without_amx(vllm_config, model_config)
        with set_default_torch_dtype(model_config.dtype):
            with device:
                model: nn.Module = self.create_model(vllm_config, model_config, prefix).eval()
            live, report = self._loaded(model, model_config, device)
            if processes_itself(model):
                model.process_weights_after_loading()  # type: ignore[operator]
        attach(model, live)
        # Of the worker, whose class is made by now: verl's pushes weights in a way that could serve half of them.
        if "verl.workers.rollout.vllm_rollout.utils" in sys.modules:
            from ..verl_colocated import take_over

            take_over()
        logger.info("hotweights: %s", _told(report))
        for warning in report.warnings:
            logger.warning("hotweights: %s", warning)
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        return model

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Load into a model that is built already: an update if this format loaded it, else without processing."""
        live = attached(model)
        with self._opened(model, model_config) as source:
            if live is not None:
                live.update(source, threads=self._options.threads)
            else:
                load(model, source, **self._allowed(model, source.manifest), threads=self._options.threads)

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the checkpoint, for vLLM's own ``reload_weights``, of which the live model learns nothing."""
        with self._opened(model, model_config) as source:
            yield from source.tensors()

    def _loaded(self, model: nn.Module, model_config: Any, device: torch.device) -> tuple[LiveModel, UpdateReport]:
        unwrap(model)
        reconcile_head(model, model_config)
        options = self._options
        live = LiveModel(
            model,
            process=processing(model_config.dtype, device),
            layers=is_processed,
            deferred=deferred(model),
            memory_limit=options.memory_limit,
        )
        with self._opened(model, model_config) as files:
            with device:
                keep_head_bias(model, files.manifest)
            report = live.load(
                dummy(files.manifest) if options.dummy else files,
                version="dummy" if options.dummy else None,
                device=device,
                threads=options.threads,
                verify=options.verify,
                show_progress=False,
                **self._allowed(model, files.manifest),
            )
        return live, report

    def _allowed(self, model: nn.Module, manifest: Manifest) -> dict[str, Any]:
        return {
            "allow_missing": [*may_be_missing(model, manifest), *self._options.allow_missing],
            "allow_unexpected": self._options.allow_unexpected,
        }

    def _opened(self, model: nn.Module, model_config: Any) -> FileSource | DcpSource | ReaderSource:
        for what in ("secondary_weights", "allow_patterns_overrides"):
            if getattr(model, what, None):
                raise UsageError(
                    f"{type(model).__name__} takes its weights from several places ({what}), which the load format "
                    "hotweights does not; use auto"
                )
        return checkpoint(self._directory(model_config))

    def _directory(self, model_config: Any) -> str:
        """Where the checkpoint lies, downloaded by vLLM's own means if need be."""
        theirs = DefaultModelLoader(replace(self.load_config, load_format="hf", model_loader_extra_config={}))
        directory, *_ = theirs._prepare_weights(model_config.model, None, model_config.revision, True, None)
        return str(directory)


_SUFFIXES = (".safetensors", ".bin", ".pt")
"""Of files of weights; those of the first kind that is there are taken."""


def checkpoint(path: str) -> FileSource | DcpSource | ReaderSource:
    """A checkpoint on this machine, open: of safetensors, or as ``torch.save`` wrote it where there are none.

    Several files of other names, without an index, are one checkpoint, as vLLM takes them.
    """
    names = sorted(os.listdir(path)) if os.path.isdir(path) else []
    suffix = next((each for each in _SUFFIXES if any(name.endswith(each) for name in names)), _SUFFIXES[0])
    files = [os.path.join(path, name) for name in names if name.endswith(suffix)]
    opened: Callable[[Any], Any] = open_source if suffix == _SUFFIXES[0] else partial(open_source, reader="torch")
    try:
        return opened(files if suffix == ".pt" else path)  # type: ignore[no-any-return]
    except CheckpointError as error:
        if error.cause != "ambiguous" or len(files) < 2:
            raise
        try:
            return opened(files)  # type: ignore[no-any-return]
        except CheckpointError:  # They have tensors in common.
            raise error from None


def dummy(manifest: Manifest) -> dict[str, torch.Tensor]:
    """Values that nobody has trained, for all of these; they take no memory. Tied weights are equal."""
    return {spec.name: _dummy(spec) for spec in manifest.values()}


def _dummy(spec: TensorSpec) -> torch.Tensor:
    if isinstance(spec.dtype, OpaqueDtype):
        raise UsageError(f"dummy in model_loader_extra_config has no values for {spec}: torch has no such type")
    value = torch.zeros((), dtype=spec.dtype)
    return (value.fill_(1e-3) if spec.dtype.is_floating_point else value).expand(spec.shape)


def _without_amx(vllm_config: Any, model_config: Any) -> None:
    """Let latent attention keep its weights in its layer: with AMX it packs them where no update finds them."""
    attention = vllm_config.attention_config
    if not (current_platform.is_cpu() and model_config.use_mla):
        return
    if attention.backend is AttentionBackendEnum.AMX_MLA:
        raise UsageError(
            "the attention backend AMX_MLA packs weights where no update finds them; start the engine with "
            "--attention-backend CPU_MLA"
        )
    attention.backend = AttentionBackendEnum.CPU_MLA


def _told(report: UpdateReport) -> str:
    """One line of vLLM's log."""
    words = {Fate.MISSING: "left as they are"}
    counts = ", ".join(f"{len(names)} {words.get(fate, fate.value)}" for fate, names in report.tensors.items() if names)
    return f"loaded {size(report.bytes_read)} in {report.seconds:.2f} s by plan ({counts})" + "".join(
        f"; fell back: {why}" for why in report.fell_back
    )
