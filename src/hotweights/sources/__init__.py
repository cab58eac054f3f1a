"""Sources: where weights come from. ``open`` chooses one; each kind has a file of its own."""

from .contracts import Addressed, IOMode, Read, Source
from .files.source import FileSource
from .iterator import IteratorSource, from_iterator
from .opening import open
from .readers.source import READERS, ReaderSource
from .state_dict import StateSource
from .streams import LeaseStream

__all__ = [
    "READERS",
    "Addressed",
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
