"""The command line: each command has a file of its own, which parses, calls the library and prints.

Exit codes: 0 done; 1 refused (a broken checkpoint, a model that does not fit); 2 wrong usage; 3 the output cannot be
written, or a defect; 130 interrupted; 141 nobody reads the output. Of ``diff``: 0 equal; 1 different; 2 trouble.
"""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .outcome import FAILED, print_any_name, quiet_end, running

__all__ = ["COMMANDS", "app", "main"]

COMMANDS = {
    "inspect": "inspect",
    "verify": "verify",
    "diff": "diff",
    "copy": "copy",
    "convert": "copy",
    "follow": "follow",
    "plan": "plan",
    "load": "load",
    "send": "send",
    "receive": "receive",
    "relay": "relay",
    "keys": "keys",
    "resolve": "resolve",
    "demo": "demo.demo",
}
"""The commands, and the file in which each lies. It is imported when the command is typed: most wait for torch."""


class Commands(TyperGroup):
    """The commands of the table."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name; ``None`` if there is none."""
        if cmd_name not in COMMANDS:
            return None
        single = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
        single.command(cmd_name)(getattr(import_module(f".{COMMANDS[cmd_name]}", __package__), cmd_name))
        command: Any = typer.main.get_command(single)
        options, invoke = {option for each in command.params for option in each.opts}, command.invoke
        parse = command.parse_args

        def parse_so(context: Any, args: list[str]) -> Any:
            try:
                return parse(context, args)
            except Exception as error:  # Of typer's own click, which has no public name.
                wrong = getattr(error, "option_name", None)
                for other in COMMANDS if wrong and wrong not in options else ():
                    if other != cmd_name and COMMANDS[other] == COMMANDS[cmd_name]:
                        theirs = {option for each in self.get_command(ctx, other).params for option in each.opts}
                        if wrong in theirs:
                            context.fail(f"No such option: {wrong}; hotweights {other} has it")
                raise

        command.parse_args = parse_so

        def invoke_so(context: Any) -> Any:
            with running(options):
                return invoke(context)

        command.invoke = invoke_so
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that was typed; of one that is misspelt, what was meant is said."""
        if args and args[0] not in COMMANDS and (near := get_close_matches(args[0], COMMANDS, n=1)):
            ctx.fail(f"No such command {args[0]!r}; did you mean {near[0]}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Import the command and run it."""
        with quiet_end():
            return super().invoke(ctx)


app = typer.Typer(
    name="hotweights",
    cls=Commands,
    help="Put weights into live PyTorch models: fast, exact, all or nothing.",
    epilog="Exit codes: 0 done, 1 refused, 2 wrong usage, 3 the output cannot be written or a defect, 130 interrupted, "
    "141 nobody reads the output. Of diff: 0 equal, 1 different, 2 trouble.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(import_module("..", __package__).__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point of the ``hotweights`` command."""
    print_any_name()
    try:
        app()
    except Exception:  # A defect; Python's own exit code for it, 1, has a meaning here.
        sys.excepthook(*sys.exc_info())
        sys.exit(FAILED)
