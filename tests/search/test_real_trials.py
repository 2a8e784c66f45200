"""The measured search with real trials in real children: real out-of-memory errors under the CPU's budget."""

import json

import pytest

from autofit.search.controller import measure
from autofit.search.outcome import SearchSpace
from autofit.search.study import TrialStudy
from autofit.space.budget import MemoryBudget
from autofit.space.candidate import KNOBS, Candidate
from autofit.space.ladder import Limits
from autofit.space.source import ModelSource
from autofit.trial.result import TrialStatus
from tests.trial.test_child import runner

WISH = Candidate(micro_batch_size=8, max_seq_length=128, dtype="float32", lora_rank=16, accumulates=True)


def limits(**changes):
    return Limits(**{"global_batch_size": 8, "checkpointable_layers": 4, "can_page": False, **changes})


def search(sandbox, folder, source, space, budget_bytes):
    seen = []
    outcome = measure(
        space,
        MemoryBudget(total_bytes=budget_bytes),
        runner(sandbox, folder, source, budget_bytes),
        TrialStudy(folder, "test"),
        seen.append,
    )
    return outcome, seen


@pytest.fixture(scope="module")
def random_source(tiny_model):
    return ModelSource(model=str(tiny_model), random_weights=True)


@pytest.fixture(scope="module")
def first_peak(sandbox, random_source, tmp_path_factory):
    """Bytes that the wish needs."""
    return runner(sandbox, tmp_path_factory.mktemp("first"), random_source, 10**10).run(WISH).device_bytes


@pytest.mark.parametrize("share", [1.0, 0.9, 0.6, 0.35])
def test_ends_in_a_measured_fit_within_any_share_of_the_first_peak(sandbox, random_source, first_peak, tmp_path, share):
    budget = int(first_peak * share)
    outcome, _ = search(sandbox, tmp_path, random_source, SearchSpace(wish=WISH, limits=limits()), budget)
    assert outcome.winner.result.status is TrialStatus.FIT
    assert outcome.winner.result.device_bytes <= budget
    assert len(outcome.trials) <= 5
    ooms = [t for t in outcome.trials if t.result.status is TrialStatus.OOM]
    assert bool(ooms) == (share < 1)
    assert outcome.winner.candidate.quantization_bits == 16  # lossless knobs sufficed
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == [t.result.status.value for t in outcome.trials]
    assert {"micro_batch_size", "phase", "peak_allocated_bytes", "peak_reserved_bytes", "seconds"} <= lines[0].keys()


SMALL = Candidate(micro_batch_size=1, max_seq_length=16, dtype="float32", checkpointed_layers=4, lora_rank=4)


@pytest.mark.parametrize(
    ("knob", "wish", "least"),
    [
        ("micro_batch_size", WISH, {"micro_batch_size": 1}),
        ("max_seq_length", WISH, {"max_seq_length": 64}),
        ("checkpointed_layers", WISH, {"checkpointed_layers": 4}),
        ("quantization_bits", SMALL, {"quantization_bits": 4}),
        ("lora_rank", SMALL.replace(lora_rank=64), {"lora_rank": 4}),
    ],
)
def test_each_knob_alone_steps_down_to_a_fit(sandbox, random_source, tmp_path, knob, wish, least):
    def peak(candidate, where):
        return runner(sandbox, tmp_path / where, random_source, 10**10).run(candidate).device_bytes

    most, fewest = peak(wish, "most"), peak(wish.replace(**least), "least")
    assert fewest < most
    space = SearchSpace(wish=wish, limits=limits(pins=frozenset(set(KNOBS) - {knob})))
    budget = (most + fewest) // 2
    outcome, _ = search(sandbox, tmp_path, random_source, space, budget)
    assert outcome.trials[0].result.status is TrialStatus.OOM
    winner = outcome.winner
    assert winner.result.device_bytes <= budget
    assert getattr(winner.candidate, knob) != getattr(wish, knob)
    assert all(getattr(winner.candidate, other) == getattr(wish, other) for other in KNOBS if other != knob)


def test_nothing_fits_names_the_nearest_miss(sandbox, random_source, tmp_path):
    space = SearchSpace(wish=WISH, limits=limits())
    outcome, _ = search(sandbox, tmp_path, random_source, space, 300_000)
    assert outcome.winner is None
    assert outcome.nearest_miss.result.status is TrialStatus.OOM


def test_a_search_that_was_interrupted_goes_on_without_repeating_a_trial(sandbox, random_source, first_peak, tmp_path):
    budget = int(first_peak * 0.35)
    space = SearchSpace(wish=WISH, limits=limits())

    class Interrupted(Exception):
        pass

    def stop_after_one(event):
        if event.kind == "end":
            raise Interrupted

    with pytest.raises(Interrupted):
        measure(
            space,
            MemoryBudget(total_bytes=budget),
            runner(sandbox, tmp_path, random_source, budget),
            TrialStudy(tmp_path, "test"),
            stop_after_one,
        )
    outcome, seen = search(sandbox, tmp_path, random_source, space, budget)
    assert [event.number for event in seen if event.kind == "stored"] == [0]
    assert 0 not in [event.number for event in seen if event.kind == "end"]
    assert outcome.winner.result.device_bytes <= budget
