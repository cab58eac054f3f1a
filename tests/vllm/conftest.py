"""Tests with a real engine: only where vLLM is installed (``make test-vllm``); elsewhere they are not collected."""

import importlib.util
import os
from pathlib import Path

import pytest

spec = importlib.util.find_spec("vllm")
if spec is None or spec.origin is None:  # This directory itself is all that goes by the name.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """Checkpoints and engines, each made once; every engine is a process of its own."""
    from drive import Zoo

    # Before the server of processes starts, which finds what it imports by the environment alone.
    paths = os.pathsep.join(filter(None, (os.path.dirname(__file__), os.environ.get("PYTHONPATH"))))
    os.environ.update(Zoo.environment, PYTHONPATH=paths)
    return Zoo(tmp_path_factory.mktemp("zoo"))


def pytest_collection_modifyitems(items):
    """An engine starts in 20 s where nothing else runs, and in minutes where everything does."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(1800))
