"""The planned search with real estimates and real trials in real children, under budgets that need stepping down."""

import pytest

from autofit.search.forecast import Prediction, SandboxForecaster
from autofit.search.outcome import SearchSpace
from autofit.search.planned import NoForecast, plan_and_probe
from autofit.search.study import TrialStudy
from autofit.space.budget import MemoryBudget
from autofit.space.candidate import Candidate
from autofit.space.ladder import Limits
from autofit.space.source import ModelSource
from tests.conftest import CPU
from tests.trial.test_child import runner

WISH = Candidate(micro_batch_size=8, max_seq_length=128, dtype="float32", lora_rank=16, accumulates=True)
SPACE = SearchSpace(wish=WISH, limits=Limits(global_batch_size=8, checkpointable_layers=4, can_page=False))


@pytest.fixture(scope="module")
def source(tiny_model):
    return ModelSource(model=str(tiny_model), random_weights=True)


def forecaster(sandbox, folder, source):
    return SandboxForecaster(
        sandbox=sandbox,
        folder=folder / "forecast",
        source=source,
        device=CPU,
        checkpointable_layers=4,
        calibration=None,
        deadline_seconds=120.0,
    )


@pytest.fixture(scope="module")
def wished_bytes(sandbox, source, tmp_path_factory):
    """What the wish is estimated to need."""
    (prediction,) = forecaster(sandbox, tmp_path_factory.mktemp("wish"), source).predict([WISH])
    assert isinstance(prediction, Prediction)
    return prediction.device_bytes


@pytest.mark.parametrize("share", [1.0, 0.5, 0.2, 0.1])
def test_one_trial_confirms_the_estimate(sandbox, source, wished_bytes, tmp_path, share):
    budget = int(wished_bytes * share)
    outcome = plan_and_probe(
        SPACE,
        MemoryBudget(total_bytes=budget),
        forecaster(sandbox, tmp_path, source),
        runner(sandbox, tmp_path, source, budget),
        TrialStudy(tmp_path, "test"),
        lambda event: None,
    )
    (trial,) = outcome.trials
    assert outcome.winner is trial
    assert trial.result.device_bytes == pytest.approx(trial.predicted_bytes, rel=1e-3)
    assert max(trial.result.device_bytes, trial.predicted_bytes) <= budget
    assert (trial.candidate == WISH) == (share == 1.0)
    assert (trial.candidate.quantization_bits == 16) == (share >= 0.2)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_long_sequence_alone_is_foreseen(sandbox, source, tmp_path, rows):
    """What the trial measures, usual rows and the long one together, is what was predicted from each."""
    paced = WISH.replace(micro_batch_size=rows, pace_length=32, quantization_bits=16)
    alike = WISH.replace(micro_batch_size=rows, quantization_bits=16)
    predicted, whole = forecaster(sandbox, tmp_path, source).predict([paced, alike])
    assert paced.has_long_rows is (rows < 4)
    assert predicted.device_bytes < whole.device_bytes
    trials = runner(sandbox, tmp_path, source, whole.device_bytes)
    measured = trials.run(paced).device_bytes
    assert measured == pytest.approx(predicted.device_bytes, rel=1e-3)
    assert trials.run(paced.usual()).device_bytes <= measured * 1.001


def test_a_stored_trial_is_not_run_again(sandbox, source, wished_bytes, tmp_path):
    def search(seen):
        return plan_and_probe(
            SPACE,
            MemoryBudget(total_bytes=wished_bytes),
            forecaster(sandbox, tmp_path, source),
            runner(sandbox, tmp_path, source, wished_bytes),
            TrialStudy(tmp_path, "test"),
            seen.append,
        )

    first, again = [], []
    assert search(first) == search(again)
    assert [event.kind for event in first] == ["start", "end"]
    assert [event.kind for event in again] == ["stored"]


def test_a_model_that_cannot_be_estimated_says_so(sandbox, tmp_path):
    bad = ModelSource(model=str(tmp_path / "nowhere"), random_weights=True)
    budget = 10**9
    with pytest.raises(NoForecast, match="nowhere"):
        plan_and_probe(
            SPACE,
            MemoryBudget(total_bytes=budget),
            forecaster(sandbox, tmp_path, bad),
            runner(sandbox, tmp_path, bad, budget),
            TrialStudy(tmp_path, "test"),
            lambda event: None,
        )
