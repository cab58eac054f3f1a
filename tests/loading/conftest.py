"""What the tests of loading share."""

import pytest


@pytest.fixture
def address(tmp_path):
    """Where a sender may listen: nobody does yet."""
    return f"unix:{tmp_path / 'run' / 'socket'}"
