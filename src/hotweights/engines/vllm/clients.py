"""Clients: how a ``Trainer`` asks engines. They make the four calls of vLLM's ``VLLMWeightSyncClient``.

What belongs to an update they do too: an engine is paused from its start to its end, and caches are emptied after a
commit. vLLM's own clients leave both to their user.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from ...arguments import check_choices, check_seconds
from ...errors import TransferError, UsageError
from .engine import AsyncEngine, Call, Mode, OfflineEngine, done, emptied

T = TypeVar("T")


class Client(ABC):
    """One engine. The trainer makes one call after another, ``update_weights`` in a thread.

    ``mode`` says what becomes of requests in flight. With ``None`` whoever made the client pauses the engine, empties
    its caches and resumes it.

    Attributes:
        stall_seconds: from the pause to the end of it, in the last update.
    """

    def __init__(self, mode: Mode | None) -> None:
        if mode is not None:
            check_choices(mode=(mode, Mode))
        self._mode = mode
        self._began = 0.0
        self.stall_seconds = 0.0

    @abstractmethod
    def world_size(self) -> int:
        """How many workers the engine has."""

    @abstractmethod
    def _ask(self, what: str, given: Any = None) -> None:
        """One of vLLM's calls."""

    @abstractmethod
    def _pause(self, mode: Mode) -> object:
        """Keep the engine from stepping."""

    @abstractmethod
    def _resume(self) -> None:
        """Let it step again, unless it sleeps."""

    @abstractmethod
    def _caches(self, mode: Mode) -> Mapping[str, Call]:
        """What empties each cache, and returns ``False`` if it did not."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Tell the workers where the trainer is."""
        self._ask("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Pause the engine and begin an update."""
        self._began = time.monotonic()
        if self._mode is not None:
            self._pause(self._mode)
        try:
            self._ask("start_weight_update")
        except BaseException:
            self._go_on()
            raise

    def update_weights(self, update_info: Any) -> None:
        """Have the workers take a version. Returns when they have taken or refused it."""
        self._ask("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End an update and let the engine go on; with a version, that was taken: caches are emptied before.

        Raises:
            CommitHookError: a cache could not be emptied. The engine stays paused: it would answer from stale caches.
        """
        self._ask("finish_weight_update", {"weight_version": weight_version} if weight_version is not None else None)
        if weight_version is not None and self._mode is not None:
            done(emptied(self._caches(self._mode), weight_version))
        self._go_on()

    def _go_on(self) -> None:
        # Also if it was paused before: by a trainer, maybe, that died in an update.
        if self._mode is not None:
            self._resume()
        self.stall_seconds = time.monotonic() - self._began


class HTTPClient(Client):
    """A server of vLLM, started with ``VLLM_SERVER_DEV_MODE=1``."""

    def __init__(self, url: str, *, mode: Mode | None = "keep", timeout: float = 300.0) -> None:
        """Nothing is asked yet.

        Args:
            url: such as ``http://127.0.0.1:8000``.
            mode: what becomes of requests in flight.
            timeout: seconds that a single answer may take.
        """
        super().__init__(mode)
        check_seconds(timeout=timeout)
        self.url = url.rstrip("/")
        self._timeout = timeout

    def world_size(self) -> int:
        """How many workers the server has, replicas included."""
        return int(self._called("GET", "get_world_size")["world_size"])

    def _ask(self, what: str, given: Any = None) -> None:
        self._called("POST", what, given)

    def _pause(self, mode: Mode) -> None:
        # Caches are emptied after a commit only: a refused update leaves them as they were.
        self._called("POST", f"pause?mode={mode}&clear_cache=false")

    def _resume(self) -> None:
        self._called("POST", "wake_up?tags=scheduling")  # ``resume`` would let an engine step whose weights sleep.

    def _caches(self, mode: Mode) -> Mapping[str, Call]:
        running = "true" if mode == "keep" else "false"
        prefix = f"reset_prefix_cache?reset_running_requests={running}&reset_external=true"
        return {
            "prefix": lambda: self._called("POST", prefix)["success"],
            "multimodal": partial(self._called, "POST", "reset_mm_cache"),
            "encoder": partial(self._called, "POST", "reset_encoder_cache"),
        }

    def _called(self, method: str, path: str, given: Any = None) -> Any:
        """The answer; ``None`` if it is empty."""
        body = None if given is None else json.dumps(given).encode()
        request = urllib.request.Request(
            f"{self.url}/{path}", body, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                answer = response.read()
        except urllib.error.HTTPError as error:
            advice = "; the server's routes for this need VLLM_SERVER_DEV_MODE=1" if error.code == 404 else ""
            words = error.read().decode(errors="replace")[:500]
            raise TransferError(f"{method} {self.url}/{path}: {error.code} {words}{advice}") from error
        except OSError as error:
            raise TransferError(f"{method} {self.url}/{path}: {error}") from error
        return json.loads(answer) if answer else None

    def __repr__(self) -> str:
        return f"<HTTPClient of {self.url}>"


class LLMClient(Client):
    """A ``vllm.LLM`` in this process. Nobody else uses it while a version is sent."""

    def __init__(self, llm: Any, *, mode: Mode | None = "keep") -> None:
        super().__init__(mode)
        self._llm, self._engine = llm, OfflineEngine(llm)

    def world_size(self) -> int:
        """How many workers it has."""
        return int(self._llm.llm_engine.vllm_config.parallel_config.world_size_across_dp)

    def _ask(self, what: str, given: Any = None) -> None:
        method = getattr(self._llm, what)
        if what in ("init_weight_transfer_engine", "update_weights"):
            method(given)
        else:
            method(**(given or {}))

    def _pause(self, mode: Mode) -> None:
        self._engine.pause(mode)

    def _resume(self) -> None:
        self._engine.resume()

    def _caches(self, mode: Mode) -> Mapping[str, Call]:
        return self._engine.caches(mode)


class AsyncLLMClient(Client):
    """An ``AsyncLLM`` of this process. The trainer runs in another thread than its event loop."""

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop, *, mode: Mode | None = "keep") -> None:
        super().__init__(mode)
        self._llm, self._engine, self._loop = engine, AsyncEngine(engine), loop

    def world_size(self) -> int:
        """How many workers it has."""
        return int(self._llm.vllm_config.parallel_config.world_size_across_dp)

    def _ask(self, what: str, given: Any = None) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

        method = getattr(self._llm, what)
        if what == "init_weight_transfer_engine":
            self._waited(method(WeightTransferInitRequest(**given)))
        elif what == "update_weights":
            self._waited(method(WeightTransferUpdateRequest(**given)))
        else:
            self._waited(method(**(given or {})))

    def _pause(self, mode: Mode) -> None:
        self._waited(self._engine.pause(mode))

    def _resume(self) -> None:
        self._waited(self._llm.wake_up(["scheduling"]))

    def _caches(self, mode: Mode) -> Mapping[str, Call]:
        caches = self._engine.caches(mode)
        return {name: lambda reset=reset: self._waited(reset()) for name, reset in caches.items()}  # type: ignore[misc]

    def _waited(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if threading.get_ident() == getattr(self._loop, "_thread_id", None):
            coroutine.close()
            raise UsageError("a trainer waits for its engine; let it run in another thread: asyncio.to_thread(...)")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


class Clients:
    """Several engines, which take each version together.

    Attributes:
        clients: one for each engine.
    """

    def __init__(self, *clients: Client) -> None:
        if not clients:
            raise UsageError("one client for each engine; found none")
        self.clients = clients

    def world_size(self) -> int:
        """How many workers all engines have."""
        return sum(client.world_size() for client in self.clients)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Tell all workers where the trainer is."""
        self._each(lambda client: client.init_weight_transfer_engine(init_info))

    def start_weight_update(self) -> None:
        """Begin in all engines, or in none."""
        begun: list[Client] = []

        def start(client: Client) -> None:
            client.start_weight_update()
            begun.append(client)

        try:
            self._each(start)
        except BaseException as error:
            for client in begun:
                try:
                    client.finish_weight_update()
                except Exception as second:  # The next trainer finishes it when it connects.
                    error.add_note(f"and could not be ended: {second!r}")
            raise

    def update_weights(self, update_info: Any) -> None:
        """Have all workers take a version."""
        self._each(lambda client: client.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End the update in all engines."""
        self._each(lambda client: client.finish_weight_update(weight_version))

    def _each(self, act: Callable[[Client], object]) -> None:
        """Do it for all at once, to the end; then raise what failed first."""
        with ThreadPoolExecutor(len(self.clients)) as executor:
            failures = [call.exception() for call in [executor.submit(act, client) for client in self.clients]]
        if wrong := [failure for failure in failures if failure is not None]:
            for other in wrong[1:]:
                wrong[0].add_note(f"and: {other!r}")
            raise wrong[0]
