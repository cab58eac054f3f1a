"""From a trainer to workers on one host: ``Sender`` and ``Receiver``."""

from .receiver import Receiver
from .report import SendReport
from .sender import Sender
from .sending import Sending

__all__ = ["Receiver", "SendReport", "Sender", "Sending"]
