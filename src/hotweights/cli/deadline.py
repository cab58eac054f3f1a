"""The deadline of a store, as it is typed: it is for those of a command's paths that are addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated

import typer

from ..errors import UsageError

Deadline = Annotated[
    float | None,
    typer.Option(
        help="Of an address: seconds in which something of each request must come, all tries together; 60 unless said."
    ),
]


def deadline_of(deadline: float | None, paths: Iterable[str]) -> Callable[[str], float | None]:
    """What ``deadline=`` of each path is.

    Raises:
        UsageError: it was typed, and no path is an address.
    """
    if deadline is None:  # Most often: then nothing is imported.
        return lambda path: None
    from ..sources.objects.address import is_address

    addresses = set(filter(is_address, paths))
    if not addresses:
        raise UsageError("--deadline is for addresses, such as s3://bucket/model; leave it out")
    return lambda path: deadline if path in addresses else None
