"""What a trial measures, in this process and in real children."""

import pytest

from autofit.errors import UsageError
from autofit.search.runner import SandboxRunner, trial_result
from autofit.space.budget import MemoryBudget
from autofit.space.candidate import Candidate
from autofit.space.source import ModelSource
from autofit.trial.child import run_trial
from autofit.trial.phases import PhaseReport
from autofit.trial.request import TrialRequest
from autofit.trial.result import TrialResult, TrialStatus
from tests.conftest import CPU

CANDIDATE = Candidate(micro_batch_size=4, max_seq_length=64, dtype="float32", accumulates=True)


def request(source, candidate=CANDIDATE, cap=10**9):
    return TrialRequest(
        candidate=candidate, source=source, device=CPU, cap_bytes=cap, budget_bytes=cap, lora_alpha=32, seed=0
    )


def measured(source, candidate=CANDIDATE):
    return TrialResult.from_json(run_trial(request(source, candidate).to_json(), PhaseReport()))


def runner(sandbox, tmp_path, source, budget_bytes, deadline=60.0):
    return SandboxRunner(
        sandbox=sandbox,
        folder=tmp_path / "trials",
        source=source,
        device=CPU,
        budget=MemoryBudget(total_bytes=budget_bytes),
        lora_alpha=32,
        seed=0,
        deadline_seconds=deadline,
    )


def test_a_request_survives_json(tiny_source):
    assert TrialRequest.from_json(request(tiny_source).to_json()) == request(tiny_source)


def test_a_fit_measures_every_phase(tiny_source):
    result = measured(tiny_source)
    assert result.status is TrialStatus.FIT
    assert 0 < result.static_bytes < result.peak_allocated_bytes
    assert result.device_bytes == max(result.peak_allocated_bytes, result.eval_peak_bytes, result.save_peak_bytes)
    assert result.eval_peak_bytes > result.static_bytes
    assert result.tokens_per_second > 0
    assert result.trainable_parameters == 4 * 16 * (64 + 64 + 64 + 32 + 64 + 32 + 64 + 64 + 3 * (64 + 128))


def test_the_second_micro_batch_of_a_step_peaks_higher(tiny_source):
    alone = measured(tiny_source, CANDIDATE.replace(accumulates=False))
    # In float32 the gradients that are kept: 4 bytes for each trained parameter.
    kept = 4 * alone.trainable_parameters
    assert measured(tiny_source).peak_allocated_bytes == pytest.approx(alone.peak_allocated_bytes + kept, abs=kept / 10)


def test_a_child_measures_the_same_bytes_as_this_process(tiny_source, sandbox, tmp_path):
    here = measured(tiny_source)
    there = runner(sandbox, tmp_path, tiny_source, 10**9).run(CANDIDATE)
    assert there.status is TrialStatus.FIT
    assert there.device_bytes == here.device_bytes
    assert there.static_bytes == here.static_bytes


@pytest.mark.parametrize(
    ("share", "phase"),
    [(0.2, "build"), (0.6, "forward"), (0.999999, "backward")],
)
def test_the_budget_binds_in_every_phase(tiny_source, sandbox, tmp_path, share, phase):
    whole = measured(tiny_source)
    budget = int(whole.static_bytes * share) if phase == "build" else int(whole.device_bytes * share)
    result = runner(sandbox, tmp_path, tiny_source, budget).run(CANDIDATE)
    assert result.status is TrialStatus.OOM
    assert result.phase == phase
    assert "out of memory" in result.message.lower()
    if phase == "forward":
        assert result.requested_bytes > 0
        assert result.projected_bytes == pytest.approx(whole.device_bytes, rel=0.25)
    assert runner(sandbox, tmp_path, tiny_source, whole.device_bytes).run(CANDIDATE).status is TrialStatus.FIT


def test_the_optimizers_states_count(tiny_source, sandbox, tmp_path):
    small = Candidate(micro_batch_size=1, max_seq_length=8, dtype="float32", lora_rank=128, checkpointed_layers=4)
    whole = measured(tiny_source, small)
    result = runner(sandbox, tmp_path, tiny_source, whole.device_bytes - 1000).run(small)
    assert (result.status, result.phase) == (TrialStatus.OOM, "optimizer")


def test_a_trial_that_takes_too_long_is_ended(tiny_source, sandbox, tmp_path):
    long = Candidate(micro_batch_size=512, max_seq_length=512, dtype="float32")
    result = runner(sandbox, tmp_path, tiny_source, 8 * 10**9, deadline=1.0).run(long)
    assert result.status is TrialStatus.TIMEOUT
    assert result.seconds < 10


def test_what_can_never_be_built_ends_the_search_with_its_reason(sandbox, tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        runner(sandbox, tmp_path, ModelSource(model=str(tmp_path)), 10**9).run(CANDIDATE)


def test_each_trial_has_a_folder_of_its_own_even_after_a_restart(tiny_source, sandbox, tmp_path):
    for _ in range(2):
        runner(sandbox, tmp_path, tiny_source, 10**6).run(CANDIDATE)
    assert sorted(p.name for p in (tmp_path / "trials").iterdir()) == ["01", "02"]


def test_an_outcome_without_a_result_keeps_what_the_phase_record_knew():
    from autofit.trial.job import Outcome

    outcome = Outcome(phase="forward", phase_record={"phase": "forward", "static_bytes": 7, "x": 1}, signal=9)
    result = trial_result(outcome)
    assert (result.status, result.static_bytes, result.phase) == (TrialStatus.CRASHED, 7, "forward")
