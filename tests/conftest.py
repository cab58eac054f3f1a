"""What every test shares."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Random tensors are the same in every run."""
    torch.manual_seed(0)
