"""Sources: where weights come from. ``open`` chooses one; each kind has a file of its own."""

from typing import TYPE_CHECKING

from ..on_demand import on_demand

if TYPE_CHECKING:
    from .contracts import Addressed, IOMode, Read, Source
    from .dcp.source import DcpSource
    from .files.source import FileSource
    from .iterator import IteratorSource, from_iterator
    from .opening import open
    from .readers.source import READERS, ReaderSource
    from .state_dict import StateSource
    from .streams import LeaseStream

__all__ = [
    "READERS",
    "Addressed",
    "DcpSource",
    "FileSource",
    "IOMode",
    "IteratorSource",
    "LeaseStream",
    "Read",
    "ReaderSource",
    "Source",
    "StateSource",
    "from_iterator",
    "open",
]

_HOMES = {
    "READERS": "readers.source",
    "Addressed": "contracts",
    "DcpSource": "dcp.source",
    "FileSource": "files.source",
    "IOMode": "contracts",
    "IteratorSource": "iterator",
    "LeaseStream": "streams",
    "Read": "contracts",
    "ReaderSource": "readers.source",
    "Source": "contracts",
    "StateSource": "state_dict",
    "from_iterator": "iterator",
    "open": "opening",
}

if not TYPE_CHECKING:  # Type checkers would take any name for one of ours.
    __getattr__ = on_demand(__name__, _HOMES)
