"""Put weights into live PyTorch models: fast, exact, all or nothing. Importing this does nothing."""

from typing import TYPE_CHECKING

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
    SaveError,
    SourceError,
    StaleLease,
    StoreError,
    TiedWeightsDiffer,
    TransferAborted,
    TransferError,
    TransferIncomplete,
    TransferInDoubt,
    TransferTimeout,
    UnknownName,
    UnsupportedDtype,
    UpdateAborted,
    UsageError,
)
from .manifest import Manifest, TensorSpec
from .on_demand import on_demand

if TYPE_CHECKING:
    from .engines.build import build
    from .live.model import LiveModel
    from .live.report import UpdateReport
    from .live.state import State
    from .live.update import Update
    from .loading.load import load
    from .loading.report import LoadReport
    from .memory.digest import Digest
    from .memory.lease import Lease
    from .memory.pool import Pool, PoolStats
    from .plan.plan import LoadPlan
    from .plan.steps import Fate
    from .routing.component import Component
    from .routing.report import RouteReport
    from .routing.route import route
    from .sources.follow import follow
    from .sources.iterator import from_iterator
    from .sources.opening import open
    from .sources.save import SaveReport, save
    from .sources.versions import Version, Versions
    from .tracing.trace import trace
    from .transfer.receiver import Receiver
    from .transfer.report import SendReport
    from .transfer.sender import Sender
    from .transfer.sharded.shard import Shard

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
    "SaveError",
    "SaveReport",
    "SendReport",
    "Sender",
    "Shard",
    "SourceError",
    "StaleLease",
    "State",
    "StoreError",
    "TensorSpec",
    "TiedWeightsDiffer",
    "TransferAborted",
    "TransferError",
    "TransferInDoubt",
    "TransferIncomplete",
    "TransferTimeout",
    "UnknownName",
    "UnsupportedDtype",
    "Update",
    "UpdateAborted",
    "UpdateReport",
    "UsageError",
    "Version",
    "Versions",
    "build",
    "follow",
    "from_iterator",
    "load",
    "open",
    "route",
    "save",
    "trace",
]

__version__ = "0.1.0.dev0"

# Where the names lie that are imported above for type checkers only: all of them need torch.
_HOMES = {
    "Component": "routing.component",
    "Digest": "memory.digest",
    "Fate": "plan.steps",
    "Lease": "memory.lease",
    "LiveModel": "live.model",
    "LoadPlan": "plan.plan",
    "LoadReport": "loading.report",
    "Pool": "memory.pool",
    "PoolStats": "memory.pool",
    "Receiver": "transfer.receiver",
    "RouteReport": "routing.report",
    "SaveReport": "sources.save",
    "SendReport": "transfer.report",
    "Sender": "transfer.sender",
    "Shard": "transfer.sharded.shard",
    "State": "live.state",
    "Update": "live.update",
    "UpdateReport": "live.report",
    "Version": "sources.versions",
    "Versions": "sources.versions",
    "build": "engines.build",
    "follow": "sources.follow",
    "from_iterator": "sources.iterator",
    "load": "loading.load",
    "open": "sources.opening",
    "route": "routing.route",
    "save": "sources.save",
    "trace": "tracing.trace",
}

if not TYPE_CHECKING:  # Type checkers would take any name for one of ours.
    __getattr__ = on_demand(__name__, _HOMES)


def __dir__() -> list[str]:
    """The public words. Folders of the package, such as ``plan``, are none of them."""
    return sorted([*__all__, "__doc__", "__file__", "__name__", "__path__", "__version__"])
