"""Put weights into live PyTorch models: fast, exact, all or nothing. Importing this does nothing."""

from .errors import (
    BorrowedTensor,
    CheckpointChanged,
    CheckpointError,
    Closed,
    HotweightsError,
    IncompleteLoad,
    MissingPackage,
    NoManifest,
    PlanDiffers,
    PlanError,
    PlanFileError,
    PoolTimeout,
    SourceError,
    StaleLease,
    TiedWeightsDiffer,
    UnknownName,
    UnsupportedDtype,
    UsageError,
)
from .load import load
from .manifest import Manifest, OpaqueDtype, TensorSpec
from .memory import Lease, Pool, PoolStats
from .plan import Fate, LoadPlan
from .report import LoadReport
from .sources import from_iterator, open
from .trace import trace

__all__ = [
    "BorrowedTensor",
    "CheckpointChanged",
    "CheckpointError",
    "Closed",
    "Fate",
    "HotweightsError",
    "IncompleteLoad",
    "Lease",
    "LoadPlan",
    "LoadReport",
    "Manifest",
    "MissingPackage",
    "NoManifest",
    "OpaqueDtype",
    "PlanDiffers",
    "PlanError",
    "PlanFileError",
    "Pool",
    "PoolStats",
    "PoolTimeout",
    "SourceError",
    "StaleLease",
    "TensorSpec",
    "TiedWeightsDiffer",
    "UnknownName",
    "UnsupportedDtype",
    "UsageError",
    "from_iterator",
    "load",
    "open",
    "trace",
]
