"""Rows for recomputation, on a landscape with figures near those measured on an H100: 1 × 2,048 took 18.8 GB and ran
4,700 to 8,200 tokens/s, as its host let it; 8 × 2,048 with all layers checkpointed 14.8 GB and 7,900 tokens/s."""

from autofit.search.controller import measure
from autofit.search.outcome import SearchSpace, Trial
from autofit.space.budget import MemoryBudget
from autofit.space.candidate import Candidate
from autofit.space.ladder import DEFAULT_ORDER, Limits
from autofit.trial.result import TrialResult, TrialStatus
from tests.search.landscapes import MemoryStore, ignore

WISH = Candidate(micro_batch_size=16, max_seq_length=2048, quantization_bits=4, accumulates=True)
LIMITS = Limits(global_batch_size=16, checkpointable_layers=32, can_page=True)


class Card:
    """Llama-3-8B in 4 bits: 6.3 GB and 6.1 MB a token, or 0.52 MB checkpointed; a micro-batch takes `wait` seconds."""

    def __init__(self, budget_bytes, wait):
        self.budget_bytes, self.wait = budget_bytes, wait

    def run(self, candidate):
        share = candidate.checkpointed_layers / 32
        need = int(6.3e9 + candidate.token_budget * (6.1e6 * (1 - share) + 0.52e6 * share))
        if need > self.budget_bytes:
            return TrialResult(status=TrialStatus.OOM, phase="forward", static_bytes=int(5.9e9), projected_bytes=need)
        busy = candidate.token_budget * (1 + share / 3) / 10_700
        speed = candidate.token_budget / max(busy, self.wait)
        return TrialResult(
            status=TrialStatus.FIT, phase="done", static_bytes=int(5.9e9), device_bytes=need, tokens_per_second=speed
        )


def search(wait, order=DEFAULT_ORDER, **limits):
    limits = Limits(**{**LIMITS.__dict__, **limits})
    space = SearchSpace(wish=WISH, limits=limits, order=order)
    budget = MemoryBudget(total_bytes=24 * 10**9)
    return measure(space, budget, Card(budget.total_bytes, wait), MemoryStore(), ignore)


def test_where_the_device_waits_for_the_host_rows_are_worth_recomputing():
    outcome = search(wait=0.43)
    winner: Trial = outcome.winner
    assert outcome.rung.candidate.micro_batch_size == 1
    assert outcome.rung.candidate.checkpointed_layers == 0
    assert winner.candidate.checkpointed_layers == 32
    assert winner.candidate.micro_batch_size >= 8
    assert winner.result.tokens_per_second > 1.5 * outcome.rung.result.tokens_per_second
    assert len(outcome.trials) <= 5


def test_where_it_does_not_wait_nothing_more_is_recomputed():
    outcome = search(wait=0.0)
    assert outcome.winner == outcome.rung


def test_pinned_or_unordered_checkpointing_is_not_traded():
    for held in (search(0.43, pins=frozenset({"checkpointed_layers"})), search(0.43, order=("batch", "bits"))):
        assert held.winner.candidate.checkpointed_layers == 0
