"""The command line: each command has a file of its own, which parses, calls the library and prints.

Exit codes: 0 done; 1 refused (a broken checkpoint, a model that does not fit); 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import typer

from .demo.demo import demo
from .inspect import inspect
from .load import load
from .plan import plan
from .receive import receive
from .send import send

__all__ = ["app", "main"]

app = typer.Typer(
    name="hotweights",
    help="Put weights into live PyTorch models: fast, exact, all or nothing.",
    epilog="Exit codes: 0 done, 1 refused, 2 wrong usage, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(inspect)
app.command()(plan)
app.command()(load)
app.command()(send)
app.command()(receive)
app.command()(demo)


def main() -> None:
    """The entry point of the ``hotweights`` command."""
    app()
