"""The generators as they were, and whether anyone has drawn from them since."""

import random

import numpy as np
import pytest
import torch

from autofit.training.recovery.random_states import RandomStates

DRAWS = {
    "torch": lambda: torch.rand(3).tolist(),
    "Python": random.random,
    "NumPy": lambda: np.random.rand(3).tolist(),
    "NumPy, the second of two": lambda: np.random.randn(),  # the state says whether one is left
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_what_is_drawn_is_seen_and_taken_back(draw):
    states = RandomStates()
    assert not states.have_moved()
    drawn = draw()
    assert states.have_moved()
    for _ in range(2):
        states.restore()
        assert not states.have_moved()
        assert draw() == drawn


def test_another_generator_of_numpys():
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        test_what_is_drawn_is_seen_and_taken_back(DRAWS["NumPy"])
    finally:
        np.random.set_bit_generator(before)
