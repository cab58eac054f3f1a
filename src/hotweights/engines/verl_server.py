"""ServerAdapter: how verl's process beside an engine of vLLM has the engine's workers take versions by themselves."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from verl.workers.rollout.vllm_rollout import vllm_rollout

from ..errors import UsageError
from .refit import Directions


class ServerAdapter(vllm_rollout.ServerAdapter):  # type: ignore[misc]  # No verl where types are checked.
    """verl's own, which knows the checkpoint engine's ``direct`` besides."""

    def __init__(self, config: Any, *given: Any, **named: Any) -> None:
        """Raises ``UsageError`` where ``direct`` is asked for and the workers could not do it."""
        options = config.checkpoint_engine
        direct = options.backend == "hotweights" and options.engine_kwargs.get("hotweights", {}).get("direct")
        if direct and config.load_format != "hotweights":
            raise UsageError(
                "engine_kwargs.hotweights.direct=True is for vLLM's workers that hotweights has loaded; found "
                f"load_format={config.load_format!r}. Add actor_rollout_ref.rollout.load_format=hotweights, or leave "
                "out direct"
            )
        super().__init__(config, *given, **named)

    async def update_weights(
        self, weights: Any, global_steps: int | None = None, wire_format: str = "named_tensors", **named: Any
    ) -> None:
        """Push the weights, as verl does; or where they are directions, have the workers follow them.

        Raises:
            Exception: no worker of any rollout has the version; it has the words of those that refused it.
        """
        if not isinstance(weights, Directions):
            await super().update_weights(weights, global_steps=global_steps, wire_format=wire_format, **named)
        elif self._ensure_server_handle():
            name = f"replica {self.replica_rank}"
            await self._execute_method("hotweights_take", kwargs={"name": name, **asdict(weights)})
            # All have it, so nobody goes back to what the caches were made of.
            await self.server_handle.clear_kv_cache.remote()
            if global_steps is not None:
                await self.server_handle.set_global_steps.remote(global_steps)
