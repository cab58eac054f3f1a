"""RayRelay: a relay that is an actor of Ray, on one node, for the workers there."""

from __future__ import annotations

import os
import threading
import traceback

from ...errors import HotweightsError
from ..relay import Relay
from .rendezvous import RayDirections, folder_on, remove

_PATIENCE = 3.0  # seconds that it may take to end


class RayRelay:
    """A relay for the workers on its node. Ray starts it again when it dies; it has the same address then."""

    def __init__(self, address: str, keep: int | None = None) -> None:
        """``keep``: as of ``Relay``."""
        import ray

        self._folder = folder_on(ray.get_runtime_context(), f"relay {address}")
        self._told = RayDirections(f"unix:{self._folder / 'socket'}")
        self._relay: Relay | None = None
        try:
            self._relay = Relay(address, self._told.address, keep=keep)
        except HotweightsError as error:
            self._told = RayDirections(problem=str(error))
            return
        self._thread = threading.Thread(target=self._run, args=(self._relay,), daemon=True)
        self._thread.start()

    def where(self) -> RayDirections:
        """Where its workers connect."""
        return self._told

    def end(self) -> None:
        """Let go of the address."""
        if self._relay is not None:
            self._relay.close()
            self._thread.join(_PATIENCE)
        remove(self._folder)

    def _run(self, relay: Relay) -> None:
        try:
            with relay:
                relay.run()
        except Exception:
            traceback.print_exc()
            os._exit(1)  # Ray starts it again. As it is, workers would wait for it in vain.
