"""Put weights into live PyTorch models: fast, exact, all or nothing. Importing this does nothing."""

from .dtypes import OpaqueDtype
from .errors import (
    AddressTaken,
    BorrowedTensor,
    CheckpointChanged,
    CheckpointError,
    Closed,
    CommitHookError,
    HotweightsError,
    IncompleteLoad,
    LiveModelError,
    MissingPackage,
    NoManifest,
    PeerLost,
    PlanDiffers,
    PlanError,
    PlanFileError,
    PoolTimeout,
    ProtocolError,
    RoutingError,
    SourceError,
    StaleLease,
    TiedWeightsDiffer,
    TransferAborted,
    TransferError,
    TransferIncomplete,
    TransferTimeout,
    UnknownName,
    UnsupportedDtype,
    UpdateAborted,
    UsageError,
)
from .live.model import LiveModel
from .live.report import UpdateReport
from .live.state import State
from .live.update import Update
from .loading.load import load
from .loading.report import LoadReport
from .manifest import Manifest, TensorSpec
from .memory.lease import Lease
from .memory.pool import Pool, PoolStats
from .model.digests import Digest
from .plan.plan import LoadPlan
from .plan.steps import Fate
from .routing.component import Component
from .routing.report import RouteReport
from .routing.route import route
from .sources.iterator import from_iterator
from .sources.opening import open
from .tracing.trace import trace
from .transfer.receiver import Receiver
from .transfer.report import SendReport
from .transfer.sender import Sender

__all__ = [
    "AddressTaken",
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
    "LiveModelError",
    "LoadPlan",
    "LoadReport",
    "Manifest",
    "MissingPackage",
    "NoManifest",
    "OpaqueDtype",
    "PeerLost",
    "PlanDiffers",
    "PlanError",
    "PlanFileError",
    "Pool",
    "PoolStats",
    "PoolTimeout",
    "ProtocolError",
    "Receiver",
    "RouteReport",
    "RoutingError",
    "SendReport",
    "Sender",
    "SourceError",
    "StaleLease",
    "State",
    "TensorSpec",
    "TiedWeightsDiffer",
    "TransferAborted",
    "TransferError",
    "TransferIncomplete",
    "TransferTimeout",
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
