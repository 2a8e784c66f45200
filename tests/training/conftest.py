"""What all trainings of the tests have: few threads, and a quick collector."""

import gc

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def quick():
    """One thread, for models this small; and a collector that need not go through all that was ever imported."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)
