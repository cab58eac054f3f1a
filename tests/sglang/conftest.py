"""Tests with SGLang's own code: only where it is installed (``make test-sglang``); elsewhere they are not collected."""

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
import warnings
from unittest.mock import MagicMock


def absent(name):
    """Stand for a package whose builds do not fit this torch; SGLang imports it, and what is tested does not use it."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    module.__getattr__ = lambda key: MagicMock() if not key.startswith("__") else _no(name, key)
    sys.modules[name] = module


def _no(name, key):
    raise AttributeError(f"{name} has no {key}")


spec = importlib.util.find_spec("sglang")
if spec is None or spec.origin is None:  # This directory itself is all that goes by the name.
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", GLOO_SOCKET_IFNAME="lo")
    import transformers  # noqa: F401  # It looks for torchvision once; it must not find this one.

    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.io"):
        absent(name)
    with warnings.catch_warnings():  # Those of its own imports are nothing to these tests.
        warnings.simplefilter("ignore")
        for name in (
            "sglang.srt.managers.scheduler_components.weight_updater",
            "sglang.srt.managers.tokenizer_control_mixin",
            "sglang.srt.model_executor.model_runner_components.weight_updater",
        ):
            importlib.import_module(name)
