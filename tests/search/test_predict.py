"""Predictions against a device whose needs are known."""

from __future__ import annotations

import pytest

from autofit.search.facts import Facts
from autofit.search.outcome import Trial
from autofit.search.predict import Predictor
from autofit.space.candidate import Candidate

from .landscapes import Landscape

USABLE = 20 * 10**9
LAYERS = 32
WISH = Candidate(micro_batch_size=16, max_seq_length=1024)


def device(**changes: float) -> Landscape:
    return Landscape(
        usable=USABLE,
        layers=LAYERS,
        base={16: 6e9, 8: 7e9, 4: 3e9},
        per_token=2.5e6,
        kept=changes.get("kept", 0.1),
        floor=1e5,
        rank_bytes=5e6,
    )


def measured(landscape: Landscape, *candidates: Candidate) -> Predictor:
    facts = Facts(USABLE)
    for number, candidate in enumerate(candidates):
        facts.add(Trial(number=number, candidate=candidate, result=landscape.run(candidate)))
    return Predictor(facts, WISH, LAYERS)


def test_one_projection_predicts_the_smaller_batches() -> None:
    landscape = device()
    predictor = measured(landscape, WISH)
    for rows in (8, 4, 2, 1):
        candidate = WISH.replace(micro_batch_size=rows)
        assert predictor.need(candidate) == pytest.approx(landscape.need(candidate), rel=0.1)


@pytest.mark.parametrize("kept", [0.03, 0.1, 0.4])
def test_two_levels_of_checkpointing_predict_those_between(kept: float) -> None:
    landscape = device(kept=kept)
    at = WISH.replace(micro_batch_size=4)
    predictor = measured(landscape, at, at.replace(checkpointed_layers=LAYERS))
    for layers in (8, 16, 24):
        candidate = at.replace(checkpointed_layers=layers)
        assert predictor.need(candidate) == pytest.approx(landscape.need(candidate), rel=0.1)


def test_passes_through_what_was_measured() -> None:
    landscape = device()
    tried = [WISH, WISH.replace(micro_batch_size=4), WISH.replace(micro_batch_size=1, checkpointed_layers=16)]
    predictor = measured(landscape, *tried)
    for candidate in tried:
        assert predictor.need(candidate) == pytest.approx(landscape.need(candidate), rel=1e-6)


def test_bits_that_were_not_measured_are_not_predicted() -> None:
    predictor = measured(device(), WISH)
    assert predictor.need(WISH.replace(quantization_bits=4)) is None
    assert predictor.cautious_need(WISH.replace(quantization_bits=8)) is None


def test_facts_bound_predictions() -> None:
    landscape = device()
    landscape.reports = "static"
    fits, too_big = WISH.replace(micro_batch_size=4), WISH.replace(micro_batch_size=6)
    predictor = measured(landscape, too_big, fits)
    assert (predictor.need(WISH.replace(micro_batch_size=8)) or 0) > USABLE
    assert (predictor.need(fits.replace(checkpointed_layers=1)) or USABLE) <= landscape.need(fits)


def test_caution_grows_with_the_distance() -> None:
    landscape = device()
    at = WISH.replace(micro_batch_size=1, checkpointed_layers=LAYERS)
    predictor = measured(landscape, at)
    margins = []
    for layers in (28, 16, 0):
        candidate = at.replace(checkpointed_layers=layers)
        cautious, plain = predictor.cautious_need(candidate), predictor.need(candidate)
        assert cautious is not None
        assert plain is not None
        margins.append(cautious - plain)
    assert 0 < margins[0] < margins[1] < margins[2]
