"""``env:``: the address and the keys that a launcher, torchrun or Slurm, or its user has put into the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from ..errors import UsageError

ENV = "env:"
"""The address that stands for what the environment says."""

_ADDRESS, _PORT, _KEYS = "HOTWEIGHTS_ADDRESS", "HOTWEIGHTS_PORT", "HOTWEIGHTS_KEYS"
_MASTER, _MASTER_PORT = "MASTER_ADDR", "MASTER_PORT"
_SLURM = "SLURM_JOB_NODELIST"
_FIRST = re.compile(r"(?P<before>[^,\[]+)(\[(?P<number>\d+)[^\]]*\])?(?P<after>[^,\[]*)")


class Named(NamedTuple):
    """What the environment says.

    Attributes:
        address: in words that are no longer about the environment.
        variable: which variable says so, for errors.
        keys: a directory of keys; ``None`` where no variable names one.
    """

    address: str
    variable: str
    keys: str | None


def named(address: str, environment: Mapping[str, str] = os.environ) -> Named:
    """What ``env:`` stands for in this process.

    Raises:
        UsageError: a variable is missing or wrong; it is named.
    """
    if address != ENV:
        raise UsageError(
            f"env: stands alone, and {_ADDRESS} or the launcher's variables say the rest; this is {address!r}"
        )
    keys = environment.get(_KEYS) or None
    if given := environment.get(_ADDRESS):
        if given.startswith(ENV):
            raise UsageError(
                f"{_ADDRESS} is {given!r}, which refers to itself; set it to tcps://HOST:PORT or unix:PATH"
            )
        return Named(given, _ADDRESS, keys)
    for variable in (_MASTER, _SLURM):
        if value := environment.get(variable):
            host = value if variable == _MASTER else _first_of(value)
            shown = f"[{host}]" if ":" in host else host
            return Named(f"tcps://{shown}:{_port(variable, host, environment)}", variable, keys)
    raise UsageError(
        f"env: needs {_ADDRESS}, such as tcps://trainer:7600; or {_MASTER}, which torchrun sets, or {_SLURM}, which "
        f"Slurm sets, beside {_PORT}. None of them is set in this process"
    )


def _port(variable: str, host: str, environment: Mapping[str, str]) -> int:
    value = environment.get(_PORT, "")
    if not value:
        raise UsageError(
            f"env: {variable} says that the sender is on {host}, and {_PORT} does not say at which port. Set it to one "
            f"that is free there, the same for all processes: export {_PORT}=7600"
        )
    if not (value.isascii() and value.isdigit() and 0 < int(value) < 1 << 16):
        raise UsageError(f"{_PORT} is {value!r}; a port is a number from 1 to 65535: export {_PORT}=7600")
    if value == environment.get(_MASTER_PORT):
        raise UsageError(f"{_PORT} and {_MASTER_PORT} are both {value}, where torch's own store listens; take another")
    return int(value)


def _first_of(nodes: str) -> str:
    """The first host of a list as Slurm writes it, ``gpu[07-09,12],big1``."""
    found = _FIRST.match(nodes)
    if found is None:
        raise UsageError(f"{_SLURM} is {nodes!r}, which begins with no host; set {_ADDRESS}")
    return f"{found['before']}{found['number'] or ''}{found['after']}"
