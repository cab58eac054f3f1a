"""How a command ends: with its result or an error, printed for people or as JSON, and its exit code."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from contextvars import ContextVar

import typer

from ..errors import HotweightsError, UsageError

REFUSED = 1
WRONG_USAGE = 2
INTERRUPTED = 130
FAILED = 3
NOBODY_READS = 141  # what a shell says of a program that SIGPIPE ended

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_OPTIONS = (
    "variant|subfolder|reader|cast|overflow|shard_size|dtype|digests|device|threads|io|interval|timeout|offer_timeout|"
    "marker|pattern|latest|on_lost|carrier|encrypt|receivers|keys|insecure|relay|allow_missing|allow_unexpected|"
    "allow_mismatched|deadline"
)
_ARGUMENT = re.compile(rf"\b({_OPTIONS})=(?:([\"'])([^\"']+)\2|True\b|torch\.(\w+)|(?=[\s;,:]|\.(?!\.)|DIR\b|$))")


_OPENED = re.compile(r"\bhotweights\.open\(([\"'])([^\"']+)\1\)")  # To a command the path itself is given.
_DEADLINE = re.compile(r'hotweights\.open\(address, store=\{"deadline": seconds\}\)|store=\{"deadline": seconds\}')
_SECONDS = re.compile(r"\b(deadline|timeout)=seconds\b")
_OF_OPEN = re.compile(r" of hotweights\.open, whose source load and update take,")  # A command has an option for it.
_CALL = r"\bhotweights(?:\.\w+)+\((?:[^()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*\)"
_ONLY_PYTHON = r"\b(?:store|cache_dir|rename|init_missing|allow_partial|by|manifest|process|components|factory)="
_PYTHON = re.compile(rf"{_CALL}|{_ONLY_PYTHON}(?:\{{[^}}]*\}}|[\"'][^\"']*[\"']|\w+)?(?! in Python)")


_options: ContextVar[Set[str] | None] = ContextVar("options of the command that runs", default=None)


def print_json(content: object) -> None:
    """Print one JSON document on standard output."""
    typer.echo(json.dumps(content, indent=2))


def shown(text: object) -> str:
    """A name of somebody's as part of a line: one that holds line ends or tabs is written as Python writes them."""
    return "".join(
        letter if letter.isprintable() or "\udc80" <= letter <= "\udcff" else repr(letter)[1:-1] for letter in str(text)
    )


@contextmanager
def ending(
    *, as_json: bool, json_lines: bool = False, code: int | None = None, about: Mapping[str, object] | None = None
) -> Iterator[None]:
    """Print our errors, and Ctrl-C, as a message or as JSON, and exit with their code.

    Args:
        as_json: whether as JSON.
        json_lines: whether each line of the output is a document, so that an error must be one line, too.
        code: the exit code of all errors, where 1 means something else.
        about: what the command was to read, for JSON.
    """
    try:
        yield
    except HotweightsError as error:
        _print_error(error, as_json, json_lines, about)
        raise typer.Exit(exit_code(error) if code is None else code) from None
    except KeyboardInterrupt as error:
        _print_error(error, as_json, json_lines, about)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def quiet_end() -> Iterator[None]:
    """See that Ctrl-C during an import, and output that nobody takes, leave no traceback."""
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        typer.echo("KeyboardInterrupt: stopped", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        _forget_output()
        raise typer.Exit(NOBODY_READS) from None
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        _forget_output()
        typer.echo(f"the output cannot be written: {error.strerror}", err=True)
        raise typer.Exit(FAILED) from None


def _forget_output() -> None:
    # Python flushes once more at its end, and would complain then.
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.__stdout__.fileno())  # type: ignore[union-attr]


def print_any_name() -> None:
    """See that a file's name can be printed that is no text, or none in the terminal's encoding."""
    for stream in (sys.stdout, sys.stderr):
        # By surrogateescape the bytes of a name come out as they are on the disk.
        stream.reconfigure(errors="surrogateescape" if stream.encoding.lower() == "utf-8" else "backslashreplace")  # type: ignore[union-attr]


def exit_code(error: HotweightsError) -> int:
    """The exit code of a command that ends with this error."""
    return WRONG_USAGE if isinstance(error, UsageError) else REFUSED


def as_dict(error: BaseException) -> dict[str, object]:
    """The error, for JSON."""
    cause = getattr(error, "cause", None) or _snake(type(error).__name__)
    return {
        "error": {
            "kind": type(error).__name__,
            "cause": cause,
            "causes": list(getattr(error, "causes", (cause,))),
            "message": typed(str(error)),
            "problems": [typed(problem) for problem in getattr(error, "problems", ()) or (str(error),)],
            "notes": list(getattr(error, "__notes__", ())),
        }
    }


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def typed(text: str) -> str:
    """An error's advice as it is typed in a shell: ``--variant fp16`` for ``variant="fp16"``.

    What the command that runs has no option for is said to be Python's: nobody would find it by ``--help``.
    """
    text = _OF_OPEN.sub("", text)
    there = _options.get() or ()
    if "--deadline" in there:
        text = _DEADLINE.sub("--deadline SECONDS", text)
    text = _SECONDS.sub(lambda match: f"--{match[1]} SECONDS" if f"--{match[1]}" in there else match[0], text)
    text = _ARGUMENT.sub(_as_option, _OPENED.sub(lambda match: shlex.quote(match[2]), text))
    return text if _options.get() is None else _PYTHON.sub(lambda match: f"{match[0]} in Python", text)


@contextmanager
def running(options: Set[str]) -> Iterator[None]:
    """Inside, a command that has these options runs: advice is told for it."""
    token = _options.set(options)
    try:
        yield
    finally:
        _options.reset(token)


def _as_option(match: re.Match[str]) -> str:
    options = _options.get()
    value = match[3] or match[4]
    option = f"--{match[1].replace('_', '-')}"
    if options is not None and option not in options:
        return _by_convert(match, value) if match[1] == "reader" and value else f"{match[0]} in Python"
    if value is None:
        return option if match.string[match.end() :][:3] != "DIR" else f"{option} "
    return f"{option} {shlex.quote(value)}"


def _by_convert(match: re.Match[str], reader: str) -> str:
    """How what only another reader opens comes to a command that has none."""
    path = match.string[match.string.rfind("\n", 0, match.start()) + 1 : match.start()].partition(": ")[0].strip()
    what = shlex.quote(path) if os.path.isdir(path) or path.endswith((".bin", ".pt", ".pth")) else "PATH"
    return f"`hotweights convert {what} NEW --reader {shlex.quote(reader)}` (then give NEW here)"


def _print_error(error: BaseException, as_json: bool, json_lines: bool, about: Mapping[str, object] | None) -> None:
    if as_json:
        typer.echo(json.dumps({**(about or {}), **as_dict(error)}, indent=None if json_lines else 2))
        return
    text = typed(str(error))
    for name in map(str, (about or {}).values()):
        text = text.replace(name, shown(name)) if name else text
    typer.secho(f"{type(error).__name__}:", fg="red", bold=True, err=True, nl=False)
    # Not wrapped: whoever searches it finds names.
    typer.echo(f" {text}" if text else " stopped", err=True)
    for note in getattr(error, "__notes__", ()):
        typer.echo(note, err=True)
