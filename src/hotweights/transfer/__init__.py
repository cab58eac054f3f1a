"""From a trainer to workers on one host: ``Sender`` and ``Receiver``."""

from .receiver import Receiver
from .report import SendReport
from .send_handle import SendHandle
from .sender import Sender

__all__ = ["Receiver", "SendHandle", "SendReport", "Sender"]
