"""TRL: its trainers give vLLM new weights, all or nothing. Importing this imports neither TRL nor vLLM."""

from __future__ import annotations

import os
from collections.abc import Callable

from ...arguments import check_callable, check_flags, check_seconds
from ...errors import MissingPackage
from .sync import Sync, SyncOptions

__all__ = ["Sync", "enable"]


def enable(
    *,
    address: str | None = None,
    timeout: float = 60.0,
    on_sync: Callable[[Sync], object] | None = None,
    keys: str | os.PathLike[str] | None = None,
    insecure: bool = False,
) -> None:
    """Let every trainer of TRL that generates with vLLM sync its weights by hotweights. Call it before one is made.

    It replaces methods of TRL's classes in this process. In server mode, on any device, versions go to a server of vLLM
    that was started with ``--load-format hotweights --weight-transfer-config '{"backend": "hotweights"}'``. In colocate
    mode vLLM loads by the load format ``hotweights``, and processes take each version together. What fails is raised
    from the trainer's ``train()``, and vLLM has the weights from before. A second call replaces the options, for
    trainers that are made after it.

    Args:
        address: where a server's workers find this trainer, ``unix:PATH``, by default in a new folder in the directory
            for temporary files; for a server on another host ``tcps://HOST:PORT``, or what else ``hotweights.Sender``
            takes.
        timeout: seconds that each single wait for a server's workers may take.
        on_sync: called with each version that was taken, in the process that sent it.
        keys: the directory of the job's keys, for ``tcps:``. Servers use the same path, unless their
            ``model_loader_extra_config`` has ``keys``.
        insecure: go without keys in a network where anybody may send and take weights.

    Raises:
        UsageError: an option is of the wrong kind.
        MissingPackage: TRL or vLLM is not installed.
    """
    check_seconds(timeout=timeout)
    check_callable(on_sync=on_sync)
    check_flags(insecure=insecure)
    try:
        from .classes import replace_methods
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        if package not in ("trl", "vllm"):
            raise
        raise MissingPackage(package, f"hotweights[{package}]") from error
    replace_methods(SyncOptions(address, timeout, on_sync, keys, insecure))
