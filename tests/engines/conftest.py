"""What the tests of engines share: transformers neither asks the network nor draws progress bars."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # Read when huggingface_hub is imported, so before any test is.

import pytest
import transformers


@pytest.fixture(autouse=True, scope="session")
def quiet():
    """Log lines of transformers about tiny configurations would bury those of a failure."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
