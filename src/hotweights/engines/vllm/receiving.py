"""The receivers of an engine's workers: which of a sender's addresses a worker connects to, and with which keys."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ...errors import UsageError
from ...transfer.address import path_of
from ...transfer.endpoint import SCHEMES, is_local, plain
from ...transfer.receiver import Receiver
from .options import options_from


def is_address(source: str) -> bool:
    """Whether it is a sender's address; else it is a path."""
    return source.partition(":")[0] in SCHEMES


def receiver_of(
    vllm_config: Any,
    address: str | Sequence[str],
    *,
    name: str,
    timeout: float,
    keys: str | None = None,
    insecure: bool = False,
    reconnect: bool = True,
) -> Receiver:
    """A worker's receiver.

    Args:
        vllm_config: of the engine; ``keys`` in ``model_loader_extra_config`` goes before ``keys=`` here.
        address: of a sender. Of several, one on this host if somebody listens there.
        name: the worker's.
        timeout: seconds of each single wait, also of that for the next version.
        keys: the directory of the job's keys; not looked at for an address on this host.
        insecure: go without keys in a network.
        reconnect: see ``Receiver``.

    Raises:
        UsageError: an address is wrong, or keys are missing.
    """
    chosen = _nearest([address] if isinstance(address, str) else list(address))
    how: dict[str, Any] = {}
    if not is_local(chosen):
        ours = options_from(vllm_config.load_config.model_loader_extra_config).keys
        how = {"keys": ours or keys, "insecure": insecure and not (ours or keys)}
    try:
        return Receiver(chosen, name=name, timeout=timeout, offer_timeout=timeout, reconnect=reconnect, **how)
    except UsageError as error:
        if not how or how["keys"] is not None:
            raise
        raise UsageError(
            f'{error}. An engine is told where its host has them by --model-loader-extra-config \'{{"keys": "DIR"}}\''
        ) from error


def _nearest(addresses: list[str]) -> str:
    """One that is a socket on this host, of a sender or of a relay, or else the first on the network."""
    if not addresses:
        raise UsageError("a sender has an address at least; found none")
    here = [each for each in addresses if is_local(each) and os.path.exists(path_of(plain(each)))]
    return (here or [each for each in addresses if not is_local(each)] or addresses)[0]
