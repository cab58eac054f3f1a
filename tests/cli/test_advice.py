"""What messages tell people to type is there: the commands and their options."""

import ast
import re
from pathlib import Path

import pytest
import typer

import hotweights
from hotweights.cli import COMMANDS, app, outcome

SOURCE = Path(hotweights.__file__).parent
GROUP = typer.main.get_command(app)
OF_COMMAND = {
    name: {option for each in GROUP.get_command(None, name).params for option in each.opts} for name in COMMANDS
}


def texts():
    """Each text of the code that is no docstring; what is put into it stands as ``{}``."""
    for file in SOURCE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                yield file, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                yield file, node.value


def test_a_command_that_is_advised_is_there():
    advised = 0
    for file, text in texts():
        for command, rest in re.findall(r"(?<![\w./-])hotweights ([a-z]+)\b((?:[^`;.]|\.\w)*)", text):
            if text.startswith("hotweights plan\n"):
                continue  # The first line of a plan's file.
            if command in COMMANDS:
                advised += 1
                for option in re.findall(r"(?<!\S)--[a-z-]+", rest):
                    assert option in OF_COMMAND[command], f"{file.name}: {text}"
            else:
                assert not rest.lstrip().startswith("--"), f"{file.name}: {text}"
    assert advised > 5


@pytest.mark.parametrize("argument", outcome._OPTIONS.split("|"))
def test_an_argument_that_is_told_as_an_option_is_one(argument):
    option = outcome.typed(f"say {argument}='x' instead").split()[1]
    assert any(option in options for options in OF_COMMAND.values()), option
