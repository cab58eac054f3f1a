"""Updates as whoever holds a vLLM engine sees them: pause it, ask its workers, empty its caches, resume it."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, cast

from ...arguments import check_choices, check_flags
from ...errors import CommitHookError, HotweightsError, UpdateAborted, UsageError

Mode = Literal["wait", "abort", "keep"]
"""What becomes of requests in flight: they finish first; they are ended; or they go on afterwards, and the new weights
compute anew what they have said so far."""

Address = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an update of an engine did.

    Attributes:
        version: what all ranks have now.
        ranks: what each of them returned, see ``Worker.hotweights_update``.
        reset: the caches that were emptied.
    """

    version: str | int
    ranks: tuple[Mapping[str, Any], ...]
    reset: tuple[str, ...]


class RanksDiffer(HotweightsError):
    """Not all ranks have one version: data-parallel replicas do not decide together. The engine stays paused.

    Attributes:
        problems: what each rank has, and why it did not take the version.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return f"not all ranks have one version, and the engine stays paused: {'; '.join(self.problems)}"


def update(
    llm: Any,
    source: str | os.PathLike[str],
    *,
    version: str | int | None = None,
    mode: Mode = "wait",
    timeout: float = 60.0,
    keys: str | os.PathLike[str] | None = None,
    insecure: bool = False,
) -> Outcome:
    """Give a ``vllm.LLM`` new weights, all ranks or none, and empty the caches that hold what the old ones made.

    Args:
        llm: was started with ``load_format="hotweights"`` and
            ``worker_extension_cls="hotweights.engines.vllm.Worker"``.
        source: path of a checkpoint, or address of a ``hotweights.Sender`` that has a receiver for each rank.
        version: its name.
        mode: what becomes of requests in flight. ``"wait"`` needs somebody who steps the engine meanwhile; an engine
            in this process has nobody.
        timeout: seconds that each single wait for a sender may take.
        keys: the directory where the engine's host has the job's keys, for ``tcps:``; ``keys`` in
            ``model_loader_extra_config`` goes before it.
        insecure: go without keys in a network where anybody may send and take weights.

    Raises:
        UpdateAborted: a rank could not take it; the message names each with its cause. All ranks have the version
            from before, caches are as they were, the engine goes on.
        CommitHookError: the new version is live, and a cache could not be emptied. The engine stays paused.
        RanksDiffer: replicas have different versions. The engine stays paused.
        UsageError: the engine has no such worker, or requests would wait for ever.
        Exception: anything else (a worker that died, Ctrl-C): what the workers hold is not known, and caches may be
            stale. The engine stays paused; ``status`` asks, ``llm.wake_up(["scheduling"])`` resumes.
    """
    check_choices(mode=(mode, Mode))
    return done(_update(OfflineEngine(llm), mode, _given(source, version, timeout, keys, insecure)))


async def update_async(
    engine: Any,
    source: str | os.PathLike[str],
    *,
    version: str | int | None = None,
    mode: Mode = "wait",
    timeout: float = 60.0,
    keys: str | os.PathLike[str] | None = None,
    insecure: bool = False,
) -> Outcome:
    """As ``update``, of an ``AsyncLLM``. New requests wait meanwhile.

    Whoever cancels it, or lets it time out, does not know what the workers hold: the engine stays paused until somebody
    asks ``status_async`` and calls ``engine.resume_generation()``.
    """
    check_choices(mode=(mode, Mode))
    return await _awaited(_update(AsyncEngine(engine), mode, _given(source, version, timeout, keys, insecure)))


def status(llm: Any, *, digest: bool = True) -> list[dict[str, Any]]:
    """What each rank of a ``vllm.LLM`` holds, see ``Worker.hotweights_status``."""
    return list(done(_ask(llm, "hotweights_status", (digest,))))


async def status_async(engine: Any, *, digest: bool = True) -> list[dict[str, Any]]:
    """As ``status``, of an ``AsyncLLM``."""
    return list(await _awaited(_ask(engine, "hotweights_status", (digest,))))


# What is done is written once, as generators: each yields a call to the engine and is sent what came of it. ``done``
# makes the calls; ``_awaited`` awaits them.

Call = Callable[[], Any]
"""One thing that an engine is asked to do. An ``AsyncLLM`` returns an awaitable."""
T = TypeVar("T")


def done(calls: Generator[Call, Any, T]) -> T:
    """Make the calls, and return what comes of them."""
    try:
        call = next(calls)
        while True:
            try:
                answer = call()
            except BaseException as error:
                call = calls.throw(error)
            else:
                call = calls.send(answer)
    except StopIteration as end:
        return cast(T, end.value)


async def _awaited(calls: Generator[Call, Any, T]) -> T:
    try:
        call = next(calls)
        while True:
            try:
                answer = await call()
            except BaseException as error:
                call = calls.throw(error)
            else:
                call = calls.send(answer)
    except StopIteration as end:
        return cast(T, end.value)


def _update(engine: OfflineEngine | AsyncEngine, mode: Mode, given: tuple[Any, ...]) -> Generator[Call, Any, Outcome]:
    paused = yield partial(engine.pause, mode)
    try:
        answers = yield from _ask(engine.holder, "hotweights_update", given)
        version = _agreed(answers)
    except (UpdateAborted, UsageError):  # After anything else nobody knows what the workers hold.
        if paused:
            yield engine.resume
        raise
    caches = engine.caches(mode)
    yield from emptied(caches, version)
    yield partial(engine.set_version, str(version))
    if paused:
        yield engine.resume
    return Outcome(version, tuple(answers), tuple(caches))


def _given(
    source: Address, version: str | int | None, timeout: float, keys: Address | None, insecure: bool
) -> tuple[Any, ...]:
    """What ``Worker.hotweights_update`` is given."""
    check_flags(insecure=insecure)
    return os.fspath(source), version, timeout, None if keys is None else os.fspath(keys), insecure


def _ask(holder: Any, method: str, given: tuple[Any, ...]) -> Generator[Call, Any, Any]:
    """What each worker answers."""
    try:
        answers = yield lambda: holder.collective_rpc(method, args=given)
    except Exception as error:
        words = str(error)
        if "hotweights_" in words and ("attribute" in words or "not implemented" in words):
            raise UsageError(
                f"the engine's workers have no {method}; start it with "
                'worker_extension_cls="hotweights.engines.vllm.Worker"'
            ) from error
        raise
    return answers


def emptied(caches: Mapping[str, Call], version: str | int) -> Generator[Call, Any, None]:
    """Empty the caches after the commit of a version; an error names those that could not be."""
    problems = []
    for name, reset in caches.items():
        try:
            answer = yield reset
        except Exception as error:
            problems.append(f"{name} cache: {error!r}")
        else:
            if answer is False:
                problems.append(f"{name} cache: its reset was refused, because requests use it")
    if problems:
        raise CommitHookError(
            f"version {version!r} is live, and the engine stays paused, because caches are stale", problems
        )


class OfflineEngine:
    """A ``vllm.LLM``."""

    def __init__(self, llm: Any) -> None:
        self.holder = llm
        self._engine = llm.llm_engine

    def pause(self, mode: Mode) -> bool:
        """Keep the engine from stepping. Returns whether it was running before."""
        engine = self._engine
        if engine.is_sleeping():
            return False
        in_process = hasattr(engine.engine_core, "engine_core")
        if mode == "wait" and in_process:
            if engine.has_unfinished_requests():
                raise UsageError(
                    "requests are in flight, and an engine in this process steps only when you do: finish them first, "
                    'or use mode="keep" or "abort"'
                )
            mode = "keep"  # There is nothing to keep.
        if mode == "abort" and in_process:
            # Pausing would end them in the scheduler alone, and the front end would wait for them for ever.
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
        self.holder.sleep(level=0, mode=mode)
        return True

    def resume(self) -> None:
        """Let the engine step again."""
        self.holder.wake_up(tags=["scheduling"])

    def caches(self, mode: Mode) -> dict[str, Call]:
        """What empties each cache."""
        return _caches(self.holder, self._engine, mode)

    def set_version(self, name: str) -> None:
        """Have it stand in outputs."""
        if hasattr(self._engine, "set_weight_version"):
            self._engine.set_weight_version(name)


class AsyncEngine:
    """An ``AsyncLLM``."""

    def __init__(self, engine: Any) -> None:
        self.holder = engine

    async def pause(self, mode: Mode) -> bool:
        """Keep the engine from stepping. Returns whether it was running before."""
        was_paused = await self.holder.is_paused()
        # Caches are emptied after a commit only: a refused update must leave them as they were.
        await self.holder.pause_generation(mode=mode, clear_cache=False)
        return not was_paused

    async def resume(self) -> None:
        """Let the engine step again."""
        await self.holder.resume_generation()

    def caches(self, mode: Mode) -> dict[str, Call]:
        """What empties each cache."""
        return _caches(self.holder, self.holder, mode)

    async def set_version(self, name: str) -> None:
        """Have it stand in outputs."""
        if hasattr(self.holder, "update_weight_version"):
            await self.holder.update_weight_version(name)


def _caches(holder: Any, engine: Any, mode: Mode) -> dict[str, Call]:
    """What empties each cache that this vLLM has. Requests that are kept lose their part of the prefix cache."""
    caches = {"prefix": partial(holder.reset_prefix_cache, mode == "keep", True), "multimodal": holder.reset_mm_cache}
    encoder = getattr(engine, "reset_encoder_cache", None)
    return caches if encoder is None else {**caches, "encoder": encoder}


def _agreed(answers: Sequence[Mapping[str, Any]]) -> str | int:
    """The version that all ranks have, or the error that says why they have not."""
    versions = {answer["version"] for answer in answers}
    if len(versions) > 1:
        raise RanksDiffer([f"rank {answer['rank']} has {answer['version']!r}{_why(answer)}" for answer in answers])
    version: str | int = versions.pop()
    problems = [f"rank {answer['rank']}{_why(answer)}" for answer in answers if answer["error"] is not None]
    if problems:
        raise UpdateAborted(f"version {version!r} is live on all ranks; {_shortest(problems)}")
    return version


def _why(answer: Mapping[str, Any]) -> str:
    return "" if answer["error"] is None else f": {answer['error']}"


def _shortest(problems: Sequence[str]) -> str:
    """Each cause once: ranks that are well repeat what they heard of the others."""
    own = [problem for problem in problems if ": Refused: " not in problem]
    return "; ".join(own or problems[:1])
