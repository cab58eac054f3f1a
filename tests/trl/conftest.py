"""Tests with real trainers of TRL and real engines of vLLM: only where both are (``make test-trl``)."""

import importlib.util
import os
from pathlib import Path

import pytest

for package in ("trl", "vllm"):
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # A directory of tests is all that goes by the name.
        collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """Checkpoints with a tokenizer, and engines; every engine and every trainer is a process of its own."""
    from trained import Zoo

    # Before the server of processes starts, which finds what it imports by the environment alone.
    here, beside = os.path.dirname(__file__), os.path.join(os.path.dirname(__file__), "..", "vllm")
    paths = os.pathsep.join(filter(None, (here, beside, os.environ.get("PYTHONPATH"))))
    os.environ.update(Zoo.environment, PYTHONPATH=paths, PYTHONWARNINGS="ignore")
    return Zoo(tmp_path_factory.mktemp("zoo"))


def pytest_collection_modifyitems(items):
    """An engine starts in 20 s where nothing else runs, and in minutes where everything does."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(1800))
