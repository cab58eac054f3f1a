"""Hooks: what SGLang's calls do where ``--load-format hotweights`` has loaded the model; elsewhere they do as before.

Each hook is given SGLang's own function first. The functions of a ``WeightUpdater`` answer for one runner, those of the
manager for all of an engine's, in the scheduler. A call whose message is not a success has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.managers.io_struct import EndWeightUpdateReqOutput
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from ...live.model import LiveModel
from ..vllm.attached import attached
from ..vllm.ranks import words_of
from .session import WeightSession, ended, open_session, parallel_ranks, session_of, updated_from

_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
_MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_FRONT = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"

Answer = tuple[bool, str]


def register_hooks() -> None:
    """Put them where SGLang applies them, which it does once all plug-ins are loaded."""
    for owner, hooks in ((_UPDATER, _UPDATERS), (_MANAGER, _MANAGERS), (_FRONT, _FRONTS)):
        for name, hook in hooks.items():
            HookRegistry.register(f"{owner}.{name}", hook, HookType.AROUND)


# One runner.


def begin_weight_update(original: Callable[..., None], updater: Any) -> None:
    """Begin; a problem is told by the calls that follow."""
    live = attached(updater.get_model())
    if live is None:
        original(updater)
    else:
        _begin(updater, live)


def update_weights_from_tensor(
    original: Callable[..., Answer], updater: Any, named_tensors: Any, load_format: str | None = None
) -> Answer:
    """Take tensors. Outside a session they are a whole version."""
    live = attached(updater.get_model())
    if live is None:
        return original(updater, named_tensors, load_format)
    if load_format not in (None, "flattened_bucket"):
        return _refused(
            updater, f"load_format={load_format!r} is not for a model that hotweights has loaded; leave it away"
        )
    return _fed(updater, live, "update_weights_from_tensor", lambda: _tensors(updater, named_tensors, load_format))


def load_weights_from_distributed(original: Callable[..., Answer], updater: Any, named_tensors: Any) -> Answer:
    """Take tensors that were broadcast."""
    live = attached(updater.get_model())
    if live is None:
        return original(updater, named_tensors)
    return _fed(updater, live, "update_weights_from_distributed", lambda: named_tensors)


def end_weight_update(original: Callable[..., None], updater: Any, *, run_post_load: bool) -> None:
    """End; where the manager has done so already, nothing is left."""
    model = updater.get_model()
    if attached(model) is None:
        original(updater, run_post_load=run_post_load)
    elif (session := session_of(model)) is not None:
        open_session(model, None)
        ended([session], parallel_ranks())


def update_weights_from_disk(
    original: Callable[..., Answer],
    updater: Any,
    model_path: str,
    load_format: str,
    weight_name_filter: Any = None,
    recapture_cuda_graph: bool = False,
) -> Answer:
    """Take a checkpoint, whole."""
    model = updater.get_model()
    live = attached(model)
    if live is None:
        return original(updater, model_path, load_format, weight_name_filter, recapture_cuda_graph)
    problem = _impossible(updater, "update_weights_from_disk")
    if problem is None and weight_name_filter is not None:
        problem = "weight_name_filter is not for a model that hotweights has loaded: versions are whole"
    if problem is None and session_of(model) is not None:
        problem = "a weight-update session is open; call end_weight_update() first"
    problem = problem or updated_from(live, model_path, updater.model_config.dtype, parallel_ranks())
    if problem is not None:
        return False, f"the model is as it was: {problem}"
    from sglang.srt.configs.load_config import LoadConfig

    updater.model_config.model_path = model_path
    config = LoadConfig(load_format="hotweights")
    updater.update_model_fields(model, model_path=model_path, load_format="hotweights", load_config=config)
    if recapture_cuda_graph:
        updater.recapture_cuda_graph()
    return True, "Succeeded to update model weights."


def update_weights_from_ipc(original: Callable[..., Answer], updater: Any, recv_req: Any) -> Answer:
    """Refused: checkpoint-engine writes into the model itself."""
    if attached(updater.get_model()) is None:
        return original(updater, recv_req)
    return False, (
        "update_weights_from_ipc is not for a model that hotweights has loaded; use update_weights_from_tensor, "
        "update_weights_from_distributed or update_weights_from_disk"
    )


def _begin(updater: Any, live: LiveModel) -> WeightSession:
    session = WeightSession(live, updater.model_config.dtype)
    open_session(updater.get_model(), session)
    return session


def _fed(updater: Any, live: LiveModel, what: str, pairs: Callable[[], Any]) -> Answer:
    model = updater.get_model()
    session = session_of(model)
    is_whole = session is None
    session = session or _begin(updater, live)
    problem = session.feed(lambda: _checked(updater, what, pairs))
    if is_whole:
        open_session(model, None)
        problem = ended([session], parallel_ranks())
    return (True, "Success") if problem is None else (False, f"the model is as it was: {problem}")


def _refused(updater: Any, why: str) -> Answer:
    session = session_of(updater.get_model())
    if session is not None:
        session.problem = session.problem or why
    return False, why


def _checked(updater: Any, what: str, pairs: Callable[[], Any]) -> Any:
    problem = _impossible(updater, what)
    if problem is not None:
        raise RuntimeError(problem)
    return pairs()


def _impossible(updater: Any, what: str) -> str | None:
    """Why SGLang itself would not have this model updated."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import _unsupported_derived_weight_cache_error

    try:
        updater._assert_weight_cache_inactive(what)
        problem: str | None = _unsupported_derived_weight_cache_error(updater.get_model())
    except Exception as error:
        return words_of(error)
    return problem


def _tensors(updater: Any, given: Any, load_format: str | None) -> Any:
    """The tensors of one call, as SGLang's own function reads them."""
    import torch
    from sglang.srt.model_executor.model_runner_components import weight_updater as theirs

    theirs.monkey_patch_torch_reductions()
    if load_format == "flattened_bucket":
        return theirs.FlattenedTensorBucket(
            flattened_tensor=given["flattened_tensor"], metadata=given["metadata"]
        ).reconstruct_tensors()
    device = torch.get_device_module(updater.device).current_device()
    rank = theirs.get_parallel().tp_rank
    return [(name, theirs._unwrap_tensor(tensor, tp_rank=rank, device=device)) for name, tensor in given]


# All runners of an engine.


def _sessions(manager: Any) -> list[WeightSession]:
    """Those that are open, of the models that we have loaded."""
    if manager._session is None:
        return []
    models = [runner.weight_updater.get_model() for _, runner in manager._select_runners(manager._session.selector)]
    return [session for model in models if (session := session_of(model)) is not None]


def manager_end_weight_update(original: Callable[..., Any], manager: Any, recv_req: Any) -> Any:
    """End on all runners and ranks: all have the new version then, or none has. The answer says which."""
    sessions = _sessions(manager)
    if not sessions:
        return original(manager, recv_req)
    problem = ended(sessions, parallel_ranks())
    for _, runner in manager._select_runners(manager._session.selector):
        if attached(model := runner.weight_updater.get_model()) is not None:
            open_session(model, None)
    answer = original(manager, recv_req)
    if problem is not None:
        return EndWeightUpdateReqOutput(success=False, message=f"the models are as they were: {problem}")
    versions = [session.weight_version for session in sessions if session.weight_version is not None]
    if versions:
        manager.record_weight_version_after_update(versions[-1])
    if any(session.flush_cache for session in sessions) and not manager.flush_cache(empty_cache=False):
        return EndWeightUpdateReqOutput(
            success=False,
            message="the new version is live, and the cache was not flushed, because requests are running or queued; "
            "retract or finish them, then call /flush_cache",
        )
    return answer


def record_weight_version_after_update(original: Callable[..., None], manager: Any, weight_version: str | None) -> None:
    """Note the name until the session's end: the version is not live before."""
    sessions = _sessions(manager)
    if not sessions:
        original(manager, weight_version)
    for session in sessions:
        session.weight_version = weight_version or session.weight_version


def flush_cache_after_weight_update(
    original: Callable[..., Answer], manager: Any, recv_req: Any, success: bool, message: str
) -> Answer:
    """Flush at the session's end: requests that run before it fill the cache by the version before."""
    sessions = _sessions(manager)
    if not sessions:
        return original(manager, recv_req, success, message)
    for session in sessions:
        session.flush_cache |= bool(recv_req.flush_cache)
    return success, message


# The front end, in another process: it has a note of its own of the version's name.

_NOTE = "_hotweights_weight_version"


async def front_begin_weight_update(original: Callable[..., Any], front: Any, *given: Any, **named: Any) -> Answer:
    """Keep names back from here on, where the models are ours."""
    answer: Answer = await original(front, *given, **named)
    if answer[0] and front.config_value("load_format") == "hotweights":
        setattr(front, _NOTE, [])
    return answer


async def front_end_weight_update(original: Callable[..., Any], front: Any, *given: Any, **named: Any) -> Answer:
    """Note the name of a version that was taken."""
    answer: Answer = await original(front, *given, **named)
    names: list[str] = front.__dict__.pop(_NOTE, [])
    if answer[0] and names:
        front._update_weight_version_if_provided(names[-1])
    return answer


def _update_weight_version_if_provided(original: Callable[..., None], front: Any, weight_version: str | None) -> None:
    """In a session: when it ends."""
    names = front.__dict__.get(_NOTE)
    if names is None:
        original(front, weight_version)
    elif weight_version is not None:
        names.append(weight_version)


_UPDATERS = {
    hook.__name__: hook
    for hook in (
        begin_weight_update,
        update_weights_from_tensor,
        load_weights_from_distributed,
        end_weight_update,
        update_weights_from_disk,
        update_weights_from_ipc,
    )
}
_MANAGERS = {
    "end_weight_update": manager_end_weight_update,
    "record_weight_version_after_update": record_weight_version_after_update,
    "flush_cache_after_weight_update": flush_cache_after_weight_update,
}
_FRONTS = {
    "begin_weight_update": front_begin_weight_update,
    "end_weight_update": front_end_weight_update,
    "_update_weight_version_if_provided": _update_weight_version_if_provided,
}
