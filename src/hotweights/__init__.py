"""Put weights into live PyTorch models: fast, exact, all or nothing. Importing this does nothing."""

from .errors import (
    BorrowedTensor,
    CheckpointChanged,
    CheckpointError,
    Closed,
    HotweightsError,
    IncompleteLoad,
    MissingPackage,
    PlanDiffers,
    PlanError,
    PlanFileError,
    PoolTimeout,
    RoutingError,
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
from .report import LoadReport, RouteReport
from .route import route
from .routing import Component
from .sources import open
from .trace import trace

__all__ = [
    "BorrowedTensor",
    "CheckpointChanged",
    "CheckpointError",
    "Closed",
    "Component",
    "Fate",
    "HotweightsError",
    "IncompleteLoad",
    "Lease",
    "LoadPlan",
    "LoadReport",
    "Manifest",
    "MissingPackage",
    "OpaqueDtype",
    "PlanDiffers",
    "PlanError",
    "PlanFileError",
    "Pool",
    "PoolStats",
    "PoolTimeout",
    "RouteReport",
    "RoutingError",
    "StaleLease",
    "TensorSpec",
    "TiedWeightsDiffer",
    "UnknownName",
    "UnsupportedDtype",
    "UsageError",
    "load",
    "open",
    "route",
    "trace",
]
