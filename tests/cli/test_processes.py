"""The commands as processes of their own: what they import, what they print where, and how they end."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from hotweights.cli import COMMANDS
from hotweights.testing import write_checkpoint

HOTWEIGHTS = (sys.executable, "-m", "hotweights")


def start(*args, **how):
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.Popen([*HOTWEIGHTS, *map(os.fspath, args)], **how)


def ended(process, stdin=None):
    out, err = process.communicate(stdin, timeout=100)
    return process.returncode, out, err


def test_what_needs_no_torch_does_not_import_it(tmp_path):
    """Wrong usage and help of all commands, in one process that has no torch."""
    place = write_checkpoint(tmp_path / "a", {"a": torch.zeros(2)})
    lines = [[name, "--help"] for name in COMMANDS if name != "demo"]
    lines += [[name, "--wrong"] for name in COMMANDS if name != "demo"]
    lines += [["inspect", str(place)], ["inspect", str(place), str(place), "--json"], ["verify"]]
    lines += [["follow", str(tmp_path), "--versions", "1", "--interval", "0.001"], ["inspect", str(tmp_path / "none")]]
    lines += [["keys", str(tmp_path / "keys"), "--hosts", "127.0.0.1"]]
    code = """
import contextlib, io, json, sys
sys.modules["torch"] = None  # Importing it fails.
from hotweights.cli import app
for line in json.loads(sys.argv[1]):
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            app(line)
    except SystemExit as end:
        print(end.code)
"""
    done = subprocess.run([sys.executable, "-c", code, json.dumps(lines)], capture_output=True, text=True, timeout=100)
    count = len(COMMANDS) - 1
    assert done.stderr == ""
    assert done.stdout.split() == ["0"] * count + ["2"] * count + ["0", "0", "2", "0", "1", "0"]


class TestNames:
    """Of files, as Linux has them: bytes."""

    NAMES = ("with space", "new\nline", "tab\t", "ünï🙂", os.fsdecode(b"raw\xff"), "-dash", "'quote\"")

    @pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
    def test_all_are_printed_and_read(self, encoding, tmp_path):
        for name in self.NAMES:
            write_checkpoint(tmp_path / name, {"a": torch.zeros(2)})
        stdin = b"\0".join(os.fsencode(tmp_path / name) for name in self.NAMES) + b"\0"
        env = {**os.environ, "PYTHONIOENCODING": encoding}
        code, out, err = ended(start("inspect", "--files-from", "-", stdin=subprocess.PIPE, env=env), stdin)
        assert (code, err) == (0, b"")
        lines = out.splitlines()
        assert [b"1 tensor (1 F32), 8 B in 1 file" in line for line in lines] == [True] * len(self.NAMES)
        if encoding == "utf-8":
            shown = [os.fsencode(name) for name in self.NAMES]
            shown[1:3] = [rb"new\nline", rb"tab\t"]
            assert [line.rpartition(b": ")[0].rpartition(b"/")[2] for line in lines] == shown
        code, out, err = ended(start("inspect", "--json", "--files-from", "-", stdin=subprocess.PIPE, env=env), stdin)
        assert [json.loads(line)["path"] for line in out.splitlines()] == [str(tmp_path / name) for name in self.NAMES]

    def test_of_one_path_and_in_errors(self, tmp_path):
        for name in self.NAMES:
            code, out, err = ended(start("inspect", tmp_path / name))
            assert (code, out) == (1, b"")
            assert err.startswith(b"CheckpointError: ")
            assert err.endswith(b": there is no such file or directory\n")
            assert err.count(b"\n") == 1


def test_a_reader_that_goes_away(tmp_path):
    place = write_checkpoint(tmp_path / "a", {f"t{number}": torch.zeros(1) for number in range(3000)})
    read, write = os.pipe()
    os.close(read)
    code, _, err = ended(start("inspect", place, "--limit", "0", stdout=write))
    os.close(write)
    assert (code, err) == (141, b"")


def test_a_full_disk(tmp_path):
    place = write_checkpoint(tmp_path / "a", {"a": torch.zeros(1)})
    with open("/dev/full", "wb") as full:
        code, _, err = ended(start("inspect", place, stdout=full))
    assert (code, err) == (3, b"the output cannot be written: No space left on device\n")


class TestCtrlC:
    def test_while_it_waits(self, tmp_path):
        process = start("follow", tmp_path, "--interval", "0.001", "--json")
        write_checkpoint(tmp_path / "one", {"a": torch.zeros(1)})
        assert json.loads(process.stdout.readline())["name"] == "one"  # It runs.
        process.send_signal(signal.SIGINT)
        code, out, err = ended(process)
        assert (code, err) == (130, b"")
        assert json.loads(out)["error"]["kind"] == "KeyboardInterrupt"

    def test_during_the_import_of_a_command(self):
        code = """
import signal, sys
from hotweights import cli
class Slow(dict):
    def __getitem__(self, name):
        signal.raise_signal(signal.SIGINT)
cli.COMMANDS = Slow(cli.COMMANDS)
sys.argv[1:] = ["verify", "x"]
cli.main()
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "KeyboardInterrupt: stopped\n")


def test_a_defect_is_no_difference(tmp_path):
    """Python's exit code of an exception is 1, which says of ``diff`` that two differ."""
    code = """
import sys
from hotweights import cli
from hotweights.cli import diff
diff._opened = None
sys.argv[1:] = ["diff", "a", "b"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 3
    assert "Traceback" in done.stderr


def test_no_noise_of_other_packages(tmp_path):
    """transformers imports torchao, which logs what it lacks."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path)
    code, out, err = ended(start("load", tmp_path, "--model", tmp_path, "--json"))
    assert (code, err) == (0, b"")
    assert json.loads(out)["path"] == str(tmp_path)
