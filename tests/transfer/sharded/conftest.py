"""Where the ranks of trainers of tests find each other."""

import pytest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "stores").mkdir()
    return tmp_path / "stores"
