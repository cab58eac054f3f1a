"""Live models: new weights into a model while it serves, in place, all or nothing."""

from ..memory.digest import Digest
from ..timeline import TimelineEvent
from .model import LiveModel
from .report import UpdateReport
from .state import State
from .update import Update

__all__ = ["Digest", "LiveModel", "State", "TimelineEvent", "Update", "UpdateReport"]
