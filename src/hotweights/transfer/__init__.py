"""From a trainer to workers: ``Sender``, ``Receiver``, and between hosts ``Relay``."""

from .receiver import Receiver
from .relay import Relay
from .report import SendReport
from .send_handle import SendHandle
from .sender import Sender

__all__ = ["Receiver", "Relay", "SendHandle", "SendReport", "Sender"]
