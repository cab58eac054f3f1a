"""From a trainer to workers: ``Sender``, ``Receiver``, and between hosts ``Relay``."""

from typing import TYPE_CHECKING

from ..on_demand import on_demand

if TYPE_CHECKING:
    from .receiver import Receiver
    from .relay import Relay
    from .report import SendReport
    from .send_handle import SendHandle
    from .sender import Sender

__all__ = ["Receiver", "Relay", "SendHandle", "SendReport", "Sender"]

_HOMES = {
    "Receiver": "receiver",
    "Relay": "relay",
    "SendHandle": "send_handle",
    "SendReport": "report",
    "Sender": "sender",
}

if not TYPE_CHECKING:  # Type checkers would take any name for one of ours.
    __getattr__ = on_demand(__name__, _HOMES)
