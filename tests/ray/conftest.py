"""Tests with the real Ray: only where it is installed (``make test-ray``)."""

import importlib.util
import os
import sys

import pytest
from namespaces import why_not

spec = importlib.util.find_spec("ray")
if spec is None or spec.origin is None:  # This directory itself is all that goes by the name.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module")
def cluster():
    """Three hosts, which are network namespaces."""
    if reason := why_not():
        pytest.skip(reason)
    from cluster import Cluster

    with Cluster() as made:
        yield made


@pytest.fixture(scope="module")
def node():
    """A cluster of this host alone, of which this process is a part."""
    import ray

    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=80_000_000,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}},
    )
    yield ray
    ray.shutdown()
