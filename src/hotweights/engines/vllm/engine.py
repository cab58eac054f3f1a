"""Updates of an engine as whoever holds it sees them: paused, updated, caches reset, resumed. It moves no weights."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from ...errors import CommitHookError, HotweightsError, UnknownName, UpdateAborted, UsageError

Mode = Literal["wait", "abort", "keep"]
"""What becomes of requests in flight: they finish first; they are ended; they go on afterwards, with what they have
said so far computed anew by the new weights."""


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


def update(
    llm: Any, source: str, *, version: str | int | None = None, mode: Mode = "wait", timeout: float = 60.0
) -> Outcome:
    """Give a ``vllm.LLM`` new weights, all ranks or none, and drop what its caches have from the old ones.

    Args:
        llm: was started with ``load_format="hotweights"`` and
            ``worker_extension_cls="hotweights.engines.vllm.Worker"``.
        source: path of a checkpoint, or ``unix:PATH`` of a ``hotweights.Sender`` that has a receiver for each rank.
        version: its name.
        mode: what becomes of requests in flight. ``"wait"`` needs somebody who steps the engine meanwhile: one in this
            process has nobody.
        timeout: seconds that each single wait for a sender may take.

    Raises:
        UpdateAborted: a rank could not take it; the message names each with its cause. All ranks have the version
            from before, caches are as they were, the engine goes on.
        CommitHookError: the new version is live, and a cache could not be emptied. The engine stays paused.
        UsageError: the engine has no such worker, or requests would wait for ever.
        Exception: anything else (a worker that died, replicas that differ, Ctrl-C): what the workers hold is not known,
            and caches may be stale. The engine stays paused; ``status`` asks, ``llm.wake_up(["scheduling"])`` resumes.
    """
    engine = llm.llm_engine
    paused = _pause(llm, mode)
    try:
        answers = _called(lambda: llm.collective_rpc("hotweights_update", args=(source, version, timeout)))
        found = _agreed(answers)
    except (UpdateAborted, UsageError):
        if paused:
            llm.wake_up(tags=["scheduling"])
        raise
    reset = _resets(llm, engine, mode)
    failures = [_failure(name, act) for name, act in reset]
    _raise_if(failures, found)
    if hasattr(engine, "set_weight_version"):
        engine.set_weight_version(str(found))
    if paused:
        llm.wake_up(tags=["scheduling"])
    return Outcome(found, tuple(answers), tuple(name for name, _ in reset))


async def update_async(
    engine: Any, source: str, *, version: str | int | None = None, mode: Mode = "wait", timeout: float = 60.0
) -> Outcome:
    """As ``update``, of an ``AsyncLLM``. New requests wait meanwhile."""
    _check_mode(mode)
    was_paused = await engine.is_paused()
    # Caches are emptied after a commit only.
    await engine.pause_generation(mode=mode, clear_cache=False)
    try:
        answers = await _awaited(engine.collective_rpc("hotweights_update", args=(source, version, timeout)))
        found = _agreed(answers)
    except (UpdateAborted, UsageError):
        if not was_paused:
            await engine.resume_generation()
        raise
    reset = _resets(engine, engine, mode)
    failures = [await _failure_async(name, act) for name, act in reset]
    _raise_if(failures, found)
    if hasattr(engine, "update_weight_version"):
        await engine.update_weight_version(str(found))
    if not was_paused:
        await engine.resume_generation()
    return Outcome(found, tuple(answers), tuple(name for name, _ in reset))


def status(llm: Any, *, digest: bool = True) -> list[dict[str, Any]]:
    """What each rank of a ``vllm.LLM`` holds, see ``Worker.hotweights_status``."""
    return list(_called(lambda: llm.collective_rpc("hotweights_status", args=(digest,))))


async def status_async(engine: Any, *, digest: bool = True) -> list[dict[str, Any]]:
    """As ``status``, of an ``AsyncLLM``."""
    return list(await _awaited(engine.collective_rpc("hotweights_status", args=(digest,))))


def _resets(holder: Any, engine: Any, mode: Mode) -> list[tuple[str, Callable[[], Any]]]:
    """What empties each cache that this vLLM has, by name. Requests that were kept lose their part of the first."""
    prefix = partial(holder.reset_prefix_cache, mode == "keep", True)
    encoder = getattr(engine, "reset_encoder_cache", None)
    found: list[tuple[str, Callable[[], Any]]] = [("prefix", prefix), ("multimodal", holder.reset_mm_cache)]
    return found if encoder is None else [*found, ("encoder", encoder)]


def _check_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        raise UnknownName("mode", mode, get_args(Mode))


def _pause(llm: Any, mode: Mode) -> bool:
    """Keep the engine from stepping. Returns whether it was running before."""
    _check_mode(mode)
    engine = llm.llm_engine
    if engine.is_sleeping():
        return False
    in_process = hasattr(engine.engine_core, "engine_core")
    if mode == "wait" and in_process:
        if engine.has_unfinished_requests():
            raise UsageError(
                "requests are in flight, and an engine in this process steps only when you do: finish them first, or "
                'use mode="keep" or "abort"'
            )
        mode = "keep"  # There is nothing to keep.
    if mode == "abort" and in_process:  # Pausing would end them in the scheduler alone, and the front end wait on.
        engine.abort_request(list(engine.output_processor.request_states), internal=True)
    llm.sleep(level=0, mode=mode)
    return True


_NO_WORKER = (
    "the engine's workers have no hotweights_update; start it with "
    'worker_extension_cls="hotweights.engines.vllm.Worker"'
)


def _called(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except Exception as error:
        raise _explained(error) from error


async def _awaited(act: Awaitable[Any]) -> Any:
    try:
        return await act
    except Exception as error:
        raise _explained(error) from error


def _explained(error: Exception) -> Exception:
    lacking = "hotweights_" in str(error) and ("attribute" in str(error) or "not implemented" in str(error))
    return UsageError(_NO_WORKER) if lacking else error


def _agreed(answers: Sequence[Mapping[str, Any]]) -> str | int:
    """The version that all ranks have, or the error that says why they have not."""
    problems = [f"rank {one['rank']}: {one['error']}" for one in answers if one["error"] is not None]
    versions = {one["version"] for one in answers}
    if len(versions) > 1:  # Its data-parallel replicas do not decide together.
        held = ", ".join(f"rank {one['rank']} has {one['version']!r}" for one in answers)
        raise HotweightsError(f"not all ranks have one version: {held}; {'; '.join(problems)}; the engine stays paused")
    if problems:
        raise UpdateAborted(f"version {versions.pop()!r} is live on all ranks; {_shortest(problems)}")
    found: str | int = versions.pop()
    return found


def _shortest(problems: Sequence[str]) -> str:
    """Each cause once: ranks that are well repeat what they heard of the others."""
    own = [one for one in problems if ": Refused: " not in one]
    return "; ".join(own or problems[:1])


def _failure(name: str, act: Callable[[], Any]) -> str | None:
    try:
        return _refused(name, act())
    except Exception as error:
        return f"{name} cache: {error!r}"


async def _failure_async(name: str, act: Callable[[], Any]) -> str | None:
    try:
        return _refused(name, await act())
    except Exception as error:
        return f"{name} cache: {error!r}"


def _refused(name: str, answer: object) -> str | None:
    return f"{name} cache: its reset was refused, because requests use it" if answer is False else None


def _raise_if(failures: Sequence[str | None], version: str | int) -> None:
    problems = [one for one in failures if one is not None]
    if problems:
        raise CommitHookError(
            f"version {version!r} is live, and the engine stays paused, because caches are stale", problems
        )
