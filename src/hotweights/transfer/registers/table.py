"""The table of registers: what is made of which URL."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...errors import UsageError
from .directory import DirectoryRegister
from .etcd import EtcdRegister
from .object import ObjectRegister
from .register import Register

REGISTERS: Mapping[str, Callable[[str], Register]] = {
    "file": DirectoryRegister,
    "s3": ObjectRegister,
    "etcd": EtcdRegister,
}
"""What a URL may begin with."""


def register_of(url: str) -> Register:
    """The register at a URL, or the one that ``Register.told`` says. Nothing is looked up yet.

    Raises:
        UsageError: there is no such kind of register.
    """
    scheme = url.partition(":")[0] if isinstance(url, str) else ""
    if scheme not in REGISTERS:
        raise UsageError(
            "decision= is a place that all hosts see: file:///shared/run, s3://bucket/run or etcd://host:2379/run; "
            f"found {url!r}"
        )
    where, _, mark = url.partition("#")
    register = REGISTERS[scheme](where)
    register.mark = mark
    return register
