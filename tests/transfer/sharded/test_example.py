"""The example of the docs: four ranks train, two workers hold what ``full_tensor()`` gives after each step."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "sharded_refit.py"


@pytest.mark.long
def test_the_example_runs():
    ended = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=110, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("both workers hold the trainer's weights") == 3
