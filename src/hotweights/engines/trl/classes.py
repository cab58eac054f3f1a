"""What TRL's classes do instead: the methods and names that ``enable`` replaces, each where TRL keeps it."""

from __future__ import annotations

import atexit
import functools
import importlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from trl.generation import vllm_client, vllm_generation

from ...errors import UsageError
from ...sources.pairs import Pair
from .colocated import Colocated
from .server import Communicator
from .sync import SyncOptions
from .walk import WeightStream, as_saved, buffers

_OPTIONS = [SyncOptions()]
"""What the last ``enable`` was given."""


def replace_methods(options: SyncOptions) -> None:
    """Replace them; the second time only the options."""
    _OPTIONS[0] = options
    client, generation = vllm_client.VLLMClient, vllm_generation.VLLMGeneration
    _replace(client, "init_communicator", _init_communicator)
    _replace(client, "weight_update", _weight_update)
    _replace(client, "update_named_params", _update_named_params)
    _replace(client, "close_communicator", _close_communicator)
    _replace(vllm_generation, "LLM", _llm)
    _replace(generation, "_iter_named_params", _iter_named_params)
    _replace(generation, "sync_weights", _sync_weights)
    if (online_dpo := _experimental("online_dpo.online_dpo_trainer")) is not None:
        _replace(online_dpo, "LLM", _llm)
        _replace(online_dpo.OnlineDPOTrainer, "_move_model_to_vllm", _move_model_to_vllm)
        _replace(online_dpo.OnlineDPOTrainer, "_move_model_to_vllm_inner", _move_model_to_vllm_inner)
        if torch.accelerator.current_accelerator() is None:
            online_dpo.torch = _TorchOfCPU()  # type: ignore[attr-defined]
    for name in ("async_grpo", "async_distillation"):
        if (transfer := _experimental(f"{name}.weight_transfer")) is not None:
            _replace(transfer.WeightTransferClient, "init_weight_transfer", _init_weight_transfer)
            _replace(transfer.WeightTransferClient, "send_weights", _send_weights)
            _replace(transfer.WeightTransferClient, "destroy", _destroy)
            trainers = vars(importlib.import_module(f"trl.experimental.{name}.{name}_trainer")).values()
            for trainer in trainers:
                if isinstance(trainer, type) and "_streaming_iter" in vars(trainer):
                    _replace(trainer, "_streaming_iter", _streaming_iter)


def _replace(owner: Any, name: str, act: Callable[..., Any]) -> None:
    """Let ``act``, called with what the owner has by this name and with its arguments, stand there."""
    theirs = getattr(owner, name)
    if hasattr(theirs, "_hotweights_instead_of"):
        return

    @functools.wraps(theirs, updated=())
    def ours(*args: Any, **kwargs: Any) -> Any:
        return act(theirs, *args, **kwargs)

    ours._hotweights_instead_of = theirs  # type: ignore[attr-defined]
    setattr(owner, name, ours)


def _experimental(name: str) -> ModuleType | None:
    """A module of ``trl.experimental``, unless this TRL has it not, or it needs a package that is not here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Whoever uses it imports it and is warned.
        try:
            return importlib.import_module(f"trl.experimental.{name}")
        except ImportError:
            return None


# Of ``VLLMClient``, by which a trainer speaks to a server. One that was connected before keeps what it has.


def _init_communicator(theirs: Any, client: Any, device: object = 0) -> None:
    client.close_communicator()
    client.communicator = Communicator(client.base_url, client.get_server_info(), _OPTIONS[0])
    atexit.register(client.close_communicator)


def _close_communicator(theirs: Any, client: Any) -> None:
    if not isinstance(client.communicator, Communicator):
        theirs(client)
        return
    communicator, client.communicator = client.communicator, None
    atexit.unregister(client.close_communicator)
    communicator.close()


def _weight_update(theirs: Any, client: Any) -> AbstractContextManager[None]:
    communicator = _communicator(client)
    together: AbstractContextManager[None] = theirs(client) if communicator is None else communicator.collecting()
    return together


def _update_named_params(theirs: Any, client: Any, metadata: list[Any], named_params: Iterator[Pair]) -> None:
    communicator = _communicator(client)
    if communicator is None:
        theirs(client, metadata, named_params)
    else:
        communicator.send(metadata, named_params)


def _communicator(client: Any) -> Communicator | None:
    """That of a client; ``None`` if it is TRL's own."""
    if client.communicator is None:
        raise UsageError("this client is not connected to its server; call its init_communicator() first")
    return client.communicator if isinstance(client.communicator, Communicator) else None


# Of ``VLLMGeneration``, by which most trainers generate.


def _llm(theirs: Any, *args: Any, **options: Any) -> Any:
    if options.get("quantization") == "bitsandbytes":
        raise UsageError(
            "vLLM quantises with bitsandbytes while its own loader reads, and the load format hotweights does not; "
            'train a model that is not quantised, or use vllm_mode="server"'
        )
    return theirs(*args, **{"load_format": "hotweights", **options})


def _iter_named_params(theirs: Any, generation: Any) -> Iterator[Pair]:
    walk = theirs(generation)
    try:
        yield from as_saved(generation.model, itertools.chain(walk, buffers(generation.model)))
    finally:
        for _ in walk:  # TRL unmerges adapters after its last tensor, and only there.
            pass


def _sync_weights(theirs: Any, generation: Any) -> None:
    if generation.mode != "colocate":
        theirs(generation)
        return
    try:
        with _colocated(generation).update(generation._iter_named_params):
            theirs(generation)
    except BaseException:
        if generation.enable_sleep_mode:  # It has slept, and lost the version before: it may not generate.
            generation._llm_weights_sleeping = True
        raise


def _colocated(holder: Any) -> Colocated:
    """That of whatever holds an engine in this process."""
    if "_hotweights" not in vars(holder):
        holder._hotweights = Colocated(holder.llm, _OPTIONS[0])
    colocated: Colocated = holder._hotweights
    return colocated


# Of ``OnlineDPOTrainer``, which has its own walk over a model.


def _move_model_to_vllm(theirs: Any, trainer: Any) -> None:
    if trainer.vllm_mode != "colocate":
        theirs(trainer)
        return
    colocated = _colocated(trainer)
    with colocated.update(lambda: _walked(trainer, colocated)):
        theirs(trainer)


def _move_model_to_vllm_inner(theirs: Any, trainer: Any) -> None:
    if trainer.vllm_mode == "colocate":
        colocated = _colocated(trainer)
        feed = colocated.load_weights
        with colocated.handing(lambda pairs: feed(as_saved(trainer.model, pairs))):
            theirs(trainer)
        feed(as_saved(trainer.model, buffers(trainer.model)))
    else:
        theirs(trainer)
        communicator = _communicator(trainer.vllm_client) if trainer.accelerator.is_main_process else None
        if communicator is not None:
            communicator.complete(lambda pairs: as_saved(trainer.model, itertools.chain(pairs, buffers(trainer.model))))


def _walked(trainer: Any, colocated: Colocated) -> list[Pair]:
    """What the walk meets: names, and tensors without data."""
    met: list[Pair] = []
    with colocated.handing(lambda pairs: met.extend((name, tensor.to("meta")) for name, tensor in pairs)):
        trainer._move_model_to_vllm_inner()
    return met


class _TorchOfCPU:
    """torch as that trainer uses it where there is no accelerator: it takes one for granted and asks which it is."""

    accelerator = SimpleNamespace(current_accelerator=lambda: torch.device("cpu"))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


# Of ``WeightTransferClient``, of asynchronous trainers: they pause the server themselves.


def _init_weight_transfer(theirs: Any, transfer: Any) -> None:
    transfer.vllm.wait_for_server_ready()
    config = transfer.vllm.get_server_info()
    transfer.model_update_group = Communicator(transfer.vllm.server_url, config, _OPTIONS[0], mode=None)


def _send_weights(theirs: Any, transfer: Any, iterator: Iterator[Pair]) -> None:
    if not isinstance(transfer.model_update_group, Communicator):
        theirs(transfer, iterator)
        return
    info = transfer._weight_update_info
    told = list(zip(info["names"], info["dtype_names"], info["shapes"], strict=True))
    if isinstance(iterator, WeightStream):
        told = iterator.told(told)
    try:
        transfer.model_update_group.send(told, iterator)
    except Exception:
        with suppress(Exception):  # The first is the one to tell.
            transfer.resume()  # It has the weights from before; TRL, whose server would have a mix, lets it stand.
        raise


def _streaming_iter(theirs: Any, trainer: Any) -> WeightStream:
    transfer = trainer.weight_transfer
    sends = transfer is None or isinstance(getattr(transfer, "model_update_group", None), Communicator)
    model = trainer.accelerator.unwrap_model(trainer.model)
    return WeightStream(model, theirs(trainer), trainer.accelerator.device, sends=sends)


def _destroy(theirs: Any, transfer: Any) -> None:
    if not isinstance(transfer.model_update_group, Communicator):
        theirs(transfer)
        return
    communicator, transfer.model_update_group = transfer.model_update_group, None
    communicator.close()
