"""Tests with the real verl, Ray and vLLM: only where they are installed (``make test-verl``)."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.find_spec("verl")
if spec is None or spec.origin is None:  # This directory itself is all that goes by the name.
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items):
    """An engine starts in 20 s where nothing else runs, and in minutes where everything does."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(1800))
