"""What follows a death: how it is judged, how often another try is worth it, and which candidate comes next."""

import random
import signal
from dataclasses import replace

import pytest

from autofit.errors import AutofitError, OutOfBudget, UsageError
from autofit.search.facts import Facts
from autofit.search.outcome import Trial
from autofit.space.candidate import LOSSY
from autofit.training.mending import MOST_WITHOUT_PROGRESS, How, Patience, changed_knobs, judge_death, next_candidate
from autofit.trial.job import Outcome
from autofit.trial.record import describe_exception
from autofit.trial.result import TrialResult, TrialStatus
from tests.search.landscapes import default_space, plausible
from tests.search.test_planned import Estimates

GB = 10**9


def landscape(seed=0):
    return plausible(random.Random(seed))[1]


def following(died, space, how=How.MEMORY, *, standstill=False, steps_done=True, estimates=None, trials=()):
    facts = Facts(24 * GB)
    for trial in trials:
        facts.add(trial)
    return next_candidate(
        died,
        space,
        how,
        standstill=standstill,
        steps_done=steps_done,
        facts=facts,
        forecaster=estimates or Estimates(landscape()),
    )


def limited(space, **limits):
    return replace(space, limits=replace(space.limits, **limits))


def raised(error):
    return Outcome(error=describe_exception(error), phase="train", exit_code=1)


@pytest.mark.parametrize(
    ("outcome", "how", "kind"),
    [
        (raised(OutOfBudget("too much")), How.MEMORY, OutOfBudget),
        (raised(RuntimeError("CUDA error: out of memory")), How.MEMORY, OutOfBudget),
        (Outcome(exit_code=1, stderr_tail="Error out of memory at line 89 in file /a.cu"), How.MEMORY, OutOfBudget),
        (Outcome(signal=9, host_oom_kill=True), How.HOST_MEMORY, AutofitError),
        (raised(MemoryError()), How.HOST_MEMORY, AutofitError),
        (Outcome(signal=9), How.CRASH, AutofitError),
        (Outcome(signal=11), How.CRASH, AutofitError),
        (Outcome(exit_code=1), How.CRASH, AutofitError),
        (Outcome(note="the server died"), How.CRASH, AutofitError),
        (raised(RuntimeError("CUDA error: an illegal memory access was encountered")), How.CRASH, AutofitError),
        (raised(UsageError("no")), How.FINAL, UsageError),
        (raised(AutofitError("the loss became nan")), How.FINAL, AutofitError),
        (raised(KeyboardInterrupt()), How.FINAL, AutofitError),
        (Outcome(signal=signal.SIGTERM), How.FINAL, AutofitError),
        (Outcome(signal=9, interrupted=True), How.FINAL, AutofitError),
        (Outcome(timed_out=True), How.HANG, AutofitError),
    ],
)
def test_how_a_process_died(outcome, how, kind):
    death = judge_death("train", outcome)
    assert death.how is how
    assert type(death.error) is kind


def test_patience_with_crashes_is_one_try_for_each_bit_of_progress():
    patience = Patience()
    assert [patience.lasts(How.CRASH, step) for step in (0, 0)] == [True, False]
    patience = Patience()
    assert [patience.lasts(How.CRASH, step) for step in (3, 7, 8, 8)] == [True, True, True, False]
    patience = Patience()  # a replay that dies earlier than the one before came no further
    assert [patience.lasts(How.CRASH, step) for step in (7, 5)] == [True, False]
    patience = Patience()
    assert [patience.lasts(How.MEMORY, 3), patience.lasts(How.CRASH, 3), patience.lasts(How.CRASH, 3)] == [1, 1, 0]
    assert not Patience().lasts(How.FINAL, 3)


def test_patience_ends_where_nothing_comes_further():
    patience = Patience()
    lasted = [patience.lasts(How.MEMORY, 3) for _ in range(MOST_WITHOUT_PROGRESS + 2)]
    assert lasted == [True] * (MOST_WITHOUT_PROGRESS + 1) + [False]
    patience = Patience()
    assert all(patience.lasts(How.MEMORY, step) for step in range(50))


def test_after_a_crash_the_same():
    space = default_space()
    assert following(space.wish, space, How.CRASH) == space.wish


def test_the_next_rung_of_the_users_order_that_needs_less():
    space = default_space()
    assert changed_knobs(space.wish, following(space.wish, space)) == {"micro_batch_size": (16, 8)}
    other = replace(space, order=("offloading", "batch"))
    assert changed_knobs(space.wish, following(space.wish, other)) == {"offload_activations": ("none", "all")}
    lean = following(space.wish, space, standstill=True)
    assert (lean.micro_batch_size, lean.checkpointed_layers, lean.offload_activations) == (1, 32, "all")


def test_no_rung_is_taken_that_is_not_known_to_need_less():
    space = default_space()
    more = Estimates(landscape(), need=lambda c, need: need * (2 if c.micro_batch_size == 8 else 1))
    assert following(space.wish, space, estimates=more).micro_batch_size == 6
    assert following(space.wish, space, estimates=Estimates(landscape(), need=lambda c, need: GB)) is None
    # Where nothing can be estimated, only what follows from one candidate being no larger in anything.
    blind = Estimates(landscape(), fails=lambda c: True)
    assert following(space.wish, space, estimates=blind).micro_batch_size == 8


def test_trials_outweigh_estimates():
    space = default_space()
    rows8 = space.wish.replace(micro_batch_size=8)

    def trial(candidate, status, size=None):
        return Trial(number=0, candidate=candidate, result=TrialResult(status=status, phase="", device_bytes=size))

    measured = [trial(space.wish, TrialStatus.FIT, 20 * GB), trial(rows8, TrialStatus.FIT, 21 * GB)]
    assert following(space.wish, space, trials=measured).micro_batch_size == 6
    crashed = [trial(rows8, TrialStatus.CRASHED)]
    assert following(space.wish, space, trials=crashed).micro_batch_size == 6


def test_pins_minima_and_order_bound_it():
    space = default_space()
    pinned = limited(space, pins=frozenset({"micro_batch_size"}))
    assert changed_knobs(space.wish, following(space.wish, pinned)) == {"checkpointed_layers": (0, 8)}
    least = limited(space, minima={"micro_batch_size": 8})
    leanest = following(space.wish, least, standstill=True)
    assert leanest.micro_batch_size == 8
    assert following(leanest, least) is None
    assert following(leanest, replace(least, order=("checkpointing",)), steps_done=False) is None


def test_what_changes_the_result_comes_last_with_consent_and_never_after_a_step():
    space = default_space()
    lean = following(space.wish, space, standstill=True, steps_done=False)
    assert lean.optimizer == "paged_adamw_32bit"
    assert following(lean, space) is None
    first = following(lean, space, steps_done=False)
    assert set(changed_knobs(lean, first)) & set(LOSSY) == {"quantization_bits"}
    assert following(lean, limited(space, allow=frozenset({"lora_rank"})), steps_done=False).lora_rank == 8
    for none in (limited(space, allow=frozenset()), limited(space, pins=frozenset(LOSSY))):
        found = following(lean, none, steps_done=False)
        assert found is None


def test_after_a_step_only_an_optimizer_that_loads_its_states():
    space = replace(default_space(), order=("paging", "offloading"))
    early = following(space.wish, space, steps_done=False)
    assert changed_knobs(space.wish, early) == {"optimizer": ("adamw_torch", "paged_adamw_32bit")}
    assert changed_knobs(space.wish, following(space.wish, space)) == {"offload_activations": ("none", "all")}
    eight = space.wish.replace(optimizer="adamw_8bit")
    assert changed_knobs(eight, following(eight, space)) == {"optimizer": ("adamw_8bit", "paged_adamw_8bit")}


def test_where_the_hosts_memory_ran_out_nothing_is_moved_there():
    space = replace(default_space(), order=("paging", "offloading", "batch"))
    found = following(space.wish, space, How.HOST_MEMORY, steps_done=False)
    assert changed_knobs(space.wish, found) == {"micro_batch_size": (16, 8)}
    small = space.wish.replace(micro_batch_size=1)
    fixed = limited(space, pins=frozenset({"micro_batch_size"}))
    assert following(small, fixed, How.HOST_MEMORY) == small
    assert following(small, fixed, How.HOST_MEMORY, standstill=True) is None
