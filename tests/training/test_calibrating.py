"""A calibration is medians of what probes say: one odd probe moves nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autofit.errors import AutofitError
from autofit.memory.calibration import Calibration
from autofit.space.candidate import Candidate
from autofit.training.calibrating import Figures, Sample, calibrate, corrected, errors

MB = 10**6


def sample(allocated, context=500 * MB, beyond=0, ratio=1.0, speed=1000.0):
    """A probe that took `beyond` bytes more than estimated, with a context of its own, `ratio` times as fast."""
    reserved = allocated + 20 * MB
    return Sample(
        model="m",
        candidate=Candidate(micro_batch_size=1, max_seq_length=8),
        measured=Figures(
            peak_allocated_bytes=allocated + beyond,
            peak_reserved_bytes=reserved + beyond,
            device_bytes=reserved + beyond + context,
            tokens_per_second=speed * ratio,
        ),
        estimated=Figures(
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=reserved,
            device_bytes=reserved + 900 * MB,
            tokens_per_second=speed,
        ),
    )


@given(st.integers(0, 900 * MB), st.integers(-MB, MB), st.floats(0.3, 3), st.permutations([1000, 2000, 3000, 9000]))
def test_constants_of_a_card_are_found_and_leave_no_error(context, beyond, ratio, sizes):
    samples = [sample(size * MB, context, beyond, ratio) for size in sizes]
    found = calibrate(samples)
    assert found == Calibration(context_bytes=context, allocated_bytes=beyond, speed=pytest.approx(ratio))
    after = errors(samples, found)
    assert after.device_bytes == (0, 0)
    assert max(after.tokens_per_second) < 1e-9
    assert max(errors(samples).device_bytes) >= 0


def test_one_odd_probe_moves_nothing():
    odd = sample(1000 * MB, context=3000 * MB, beyond=700 * MB, ratio=0.1)
    samples = [*(sample(n * 1000 * MB, 400 * MB, 5, 1.5) for n in range(1, 5)), odd]
    assert calibrate(samples) == Calibration(context_bytes=400 * MB, allocated_bytes=5, speed=1.5)


def test_without_estimated_speeds_there_is_nothing_to_correct():
    samples = [sample(1000 * MB, speed=1.0) for _ in range(3)]
    samples = [
        Sample(model=s.model, candidate=s.candidate, measured=s.measured, estimated=without_speed(s.estimated))
        for s in samples
    ]
    assert calibrate(samples).speed == 1.0
    assert errors(samples).tokens_per_second is None
    assert corrected(samples[0].estimated, Calibration(speed=2.0)).tokens_per_second is None


def without_speed(figures):
    return Figures(**{**vars(figures), "tokens_per_second": None})


def test_a_single_probe_is_not_enough():
    with pytest.raises(AutofitError, match="only 1 of the probes fit"):
        calibrate([sample(1000 * MB)])
