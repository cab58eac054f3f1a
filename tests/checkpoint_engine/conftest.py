"""Tests with the real checkpoint-engine: only where it is installed (``make test-verl``)."""

import importlib.util

spec = importlib.util.find_spec("checkpoint_engine")
if spec is None or spec.origin is None:  # This directory itself is all that goes by the name.
    collect_ignore_glob = ["test_*.py"]
