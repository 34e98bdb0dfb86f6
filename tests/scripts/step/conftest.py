"""What tests of measured steps share."""

import pytest
import torch

from scripts.step.bench import Variant


@pytest.fixture
def plain():
    """A variant that the references compute."""
    return Variant(impl="ref")


@pytest.fixture
def run_out_of_memory():
    """Raise what torch raises when a GPU has no memory left."""

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. And more")

    return fail
