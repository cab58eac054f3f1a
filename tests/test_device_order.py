"""Order on a device. What ``device_order.py`` says runs in a process of its own.

Once torch has seen such a device, autograd has a thread for it, and no forked child can go back through a model then.
"""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__)


@pytest.mark.timeout(1200)
def test_order_on_a_device():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        HERE.with_name("device_order.py"),
    ]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
