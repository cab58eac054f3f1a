"""Public contract tests for sources and pools, tiny checkpoints, faulty sources. Needs no GPU, no network, no luck.

A contract is a tuple of checks; each takes what makes the thing under test and raises ``AssertionError``::

    @pytest.mark.parametrize("check", hotweights.testing.SOURCE_CONTRACT, ids=lambda check: check.__name__)
    def test_my_source(check):
        check(lambda: MySource(...), expected_tensors)
"""

from .checkpoints import write_checkpoint, write_safetensors
from .checks import assert_same_bits, bits
from .faults import FailingSource, ManualEvent, ReusedBuffer
from .pools import POOL_CONTRACT
from .sources import SOURCE_CONTRACT

__all__ = [
    "POOL_CONTRACT",
    "SOURCE_CONTRACT",
    "FailingSource",
    "ManualEvent",
    "ReusedBuffer",
    "assert_same_bits",
    "bits",
    "write_checkpoint",
    "write_safetensors",
]
