"""Benchmarks run, at a size that measures nothing. Their flags are tested with the READMEs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.long


def test_readers(tmp_path):
    """Every contender brings the right bytes: one that does not is left out of the numbers."""
    found = tmp_path / "out.json"
    command = [sys.executable, ROOT / "benchmarks" / "readers.py", "--quick", "--json", found, "--dir", tmp_path]
    done = subprocess.run(command, check=True, timeout=100, capture_output=True, text=True)
    seconds = json.loads(found.read_text())["seconds"]["16"]
    assert len(seconds) == 14, done.stdout
    assert "hw runai leases" in done.stdout


def test_quantised():
    """Its results are those of a cold load, or it ends with an error."""
    flags = ["--layers", "2", "--width", "64", "--repeats", "1"]
    command = [sys.executable, ROOT / "benchmarks" / "quantised.py", *flags]
    done = subprocess.run(command, check=True, timeout=100, capture_output=True, text=True)
    assert "journal" in done.stdout


def test_decision():
    """It fails where anything else than the decision of the rule comes out."""
    command = [sys.executable, ROOT / "benchmarks" / "decision.py", "--members", "20", "--repeats", "1"]
    done = subprocess.run(command, check=True, timeout=100, capture_output=True, text=True)
    assert "20 members" in done.stdout


def test_carriers():
    """Every receiver has the right bytes, or it ends with an error."""
    flags = ["--size", "1MB", "--tensors", "4", "--rounds", "2"]
    command = [sys.executable, ROOT / "benchmarks" / "carriers.py", *flags]
    done = subprocess.run(command, check=True, timeout=100, capture_output=True, text=True)
    assert "socket copy" in done.stdout
    assert "gloo send/recv" in done.stdout
