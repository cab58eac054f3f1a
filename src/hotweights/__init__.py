"""Put weights into live PyTorch models: fast, exact, all or nothing. Importing this does nothing."""

from .errors import (
    BorrowedTensor,
    CheckpointChanged,
    CheckpointError,
    Closed,
    CommitHookError,
    HotweightsError,
    IncompleteLoad,
    MissingPackage,
    NoManifest,
    PlanDiffers,
    PlanError,
    PlanFileError,
    PoolTimeout,
    RoutingError,
    SourceError,
    StaleLease,
    TiedWeightsDiffer,
    UnknownName,
    UnsupportedDtype,
    UpdateAborted,
    UsageError,
)
from .live import Digest, LiveModel, State, Update, UpdateReport
from .load import load
from .manifest import Manifest, OpaqueDtype, TensorSpec
from .memory import Lease, Pool, PoolStats
from .plan import Fate, LoadPlan
from .report import LoadReport, RouteReport
from .route import route
from .routing import Component
from .sources import from_iterator, open
from .trace import trace

__all__ = [
    "BorrowedTensor",
    "CheckpointChanged",
    "CheckpointError",
    "Closed",
    "CommitHookError",
    "Component",
    "Digest",
    "Fate",
    "HotweightsError",
    "IncompleteLoad",
    "Lease",
    "LiveModel",
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
    "RouteReport",
    "RoutingError",
    "SourceError",
    "StaleLease",
    "State",
    "TensorSpec",
    "TiedWeightsDiffer",
    "UnknownName",
    "UnsupportedDtype",
    "Update",
    "UpdateAborted",
    "UpdateReport",
    "UsageError",
    "from_iterator",
    "load",
    "open",
    "route",
    "trace",
]
