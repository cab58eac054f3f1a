"""For tests: contracts of sources, pools, transports and carriers; tiny checkpoints, models; faults on demand.

A contract is a tuple of checks. Each takes a function that makes the thing under test, and raises ``AssertionError``
if the thing breaks the contract. Nothing here needs a GPU or the network::

    @pytest.mark.parametrize("check", hotweights.testing.SOURCE_CONTRACT, ids=lambda check: check.__name__)
    def test_my_source(check):
        check(lambda: MySource(...), expected_tensors)
"""

from .checkpoints import write_checkpoint, write_safetensors
from .checks import assert_same_bits, bits
from .contracts.carriers import CARRIER_CONTRACT
from .contracts.pools import POOL_CONTRACT
from .contracts.sources import SOURCE_CONTRACT
from .contracts.transports import TRANSPORT_CONTRACT
from .faults import FailingSource, ManualEvent, ReusedBuffer
from .models.engine import Engine, engine_checkpoint
from .models.processed import PROCESSED_LAYERS, Processed, ProcessedLayer, processed_checkpoint
from .models.vision import VisionLanguage, vision_language_checkpoint

__all__ = [
    "CARRIER_CONTRACT",
    "POOL_CONTRACT",
    "PROCESSED_LAYERS",
    "SOURCE_CONTRACT",
    "TRANSPORT_CONTRACT",
    "Engine",
    "FailingSource",
    "ManualEvent",
    "Processed",
    "ProcessedLayer",
    "ReusedBuffer",
    "VisionLanguage",
    "assert_same_bits",
    "bits",
    "engine_checkpoint",
    "processed_checkpoint",
    "vision_language_checkpoint",
    "write_checkpoint",
    "write_safetensors",
]
