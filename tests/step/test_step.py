"""The one step: losses, cuts and the sums they must add up to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autofit.space.candidate import Candidate
from autofit.space.cut import cut
from autofit.space.facts import DeviceFacts
from autofit.step.batch import IGNORED, collate, micro_batches, trained_tokens, worst_micro_batches
from autofit.step.model import checkpointable_layers
from autofit.step.policy import StepPolicy, default_dtype, resolve_policy
from autofit.step.step import build_step, costliest_batches
from tests.conftest import CPU

CANDIDATE = Candidate(micro_batch_size=4, max_seq_length=64, dtype="float32")


def example(length, prompt, seed):
    ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


EXAMPLES = [example(n, p, n) for n, p in ((40, 10), (7, 0), (64, 60), (12, 3), (33, 1), (5, 4))]


@pytest.fixture(scope="module")
def step(tiny_source):
    return build_step(CANDIDATE, tiny_source, resolve_policy(CANDIDATE, CPU), lora_alpha=32, seed=0)


def gradients(step, batches, normalizer):
    """(loss, all adapter gradients) of one global batch. B is made non-zero, or A would have none."""
    for name, parameter in step.model.named_parameters():
        parameter.grad = None
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    loss = step.accumulate(batches, normalizer)
    return loss, torch.cat([p.grad.flatten() for p in step.model.parameters() if p.requires_grad])


def test_rows_are_right_padded_and_positions_point_at_what_predicts():
    batch = collate([{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}], 9)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch.positions.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [2, 3, 5]
    assert batch.tokens == 6


def test_the_loss_is_transformers_own(step):
    batch = collate(EXAMPLES, 0)
    longest = batch.input_ids.shape[1]
    labels = torch.tensor([e["labels"] + [IGNORED] * (longest - len(e["labels"])) for e in EXAMPLES])
    mask = torch.tensor([[1] * len(e["labels"]) + [0] * (longest - len(e["labels"])) for e in EXAMPLES])
    with torch.no_grad():
        theirs = step.model(input_ids=batch.input_ids, attention_mask=mask, labels=labels, use_cache=False).loss
    ours = step.evaluate(batch) / trained_tokens(EXAMPLES)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_chunked_and_full_loss_agree_in_value_and_gradient(tiny_source, step):
    full = CANDIDATE.replace(loss="full")
    other = build_step(full, tiny_source, resolve_policy(full, CPU), lora_alpha=32, seed=0)
    count = trained_tokens(EXAMPLES)
    loss, grads = gradients(step, [collate(EXAMPLES, 0)], count)
    full_loss, full_grads = gradients(other, [collate(EXAMPLES, 0)], count)
    torch.testing.assert_close(loss, full_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, full_grads, rtol=1e-4, atol=1e-6)


@settings(max_examples=12, deadline=None)
@given(budget=st.integers(1, 400))
def test_no_cut_changes_the_gradient(step, budget):
    count = trained_tokens(EXAMPLES)
    whole_loss, whole = gradients(step, [collate(EXAMPLES, 0)], count)
    loss, grads = gradients(step, micro_batches(EXAMPLES, budget, 0), count)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-5, atol=1e-6)
    assert (grads - whole).norm() <= 1e-5 * whole.norm()


def test_padding_decides_nothing(step):
    count = trained_tokens(EXAMPLES)
    loss, grads = gradients(step, [collate(EXAMPLES, 0)], count)
    other_loss, other = gradients(step, [collate(EXAMPLES, 77)], count)
    assert torch.equal(loss, other_loss)
    assert torch.equal(grads, other)


def test_a_micro_batch_without_trained_tokens_adds_nothing(step):
    silent = {"input_ids": [1, 2, 3], "labels": [IGNORED] * 3}
    loss, grads = gradients(step, [collate([silent], 0)], 5)
    assert loss == 0
    assert not grads.any()


def test_the_costliest_micro_batches_fill_the_budget_and_have_the_longest_length():
    def shapes(budget, longest):
        return [tuple(b.input_ids.shape) for b in worst_micro_batches(budget, longest, vocabulary=50)]

    assert shapes(90, 30) == [(3, 30)]
    assert shapes(20, 30) == [(1, 30)]  # runs alone
    assert shapes(100, 60) == [(1, 60), (2, 50)]
    (batch,) = worst_micro_batches(90, 30, vocabulary=50)
    assert batch.targets.numel() == 3 * 29
    assert batch.input_ids.max() < 50


@pytest.mark.parametrize(("budget", "length"), [(1, 1), (7, 7), (30, 7), (64, 16), (50, 100)])
def test_the_costliest_micro_batches_are_collated_ones_of_whole_rows(budget, length):
    for made in worst_micro_batches(budget, length, vocabulary=40):
        rows = made.input_ids.tolist()
        collated = collate([{"input_ids": row, "labels": row} for row in rows], pad_token_id=0)
        for one, other in zip(made.tensors, collated.tensors, strict=True):
            assert one.dtype is other.dtype
            assert torch.equal(one, other)
            assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes()


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), budget=st.integers(1, 400))
def test_no_cut_makes_a_costlier_one(lengths, budget):
    longest = max(lengths)
    worst = [b.input_ids.shape for b in worst_micro_batches(budget, longest, vocabulary=50)]
    for group in cut(lengths, budget):
        tokens = len(group) * lengths[group[0]]
        # Within a row of the fullest: equal rows cannot always fill the budget to the last token.
        assert tokens <= max(r * n + max(r - 1, 0) for r, n in worst)


@pytest.mark.parametrize(
    ("capability", "dtype", "scaled"),
    [((8, 0), "bfloat16", False), ((9, 0), "bfloat16", False), ((7, 5), "float16", True)],
)
def test_the_policy_follows_the_target_device(capability, dtype, scaled):
    card = DeviceFacts(type="cuda", name="card", total_bytes=2**34, compute_capability=capability)
    candidate = Candidate(micro_batch_size=1, max_seq_length=8, dtype=default_dtype(card))
    policy = resolve_policy(candidate, card)
    assert (policy.weight_dtype, policy.autocast_dtype, policy.loss_scaling) == (dtype, dtype, scaled)
    assert policy.fused_optimizer
    on_cpu = resolve_policy(candidate.replace(dtype="float32"), CPU)
    assert (on_cpu.autocast_dtype, on_cpu.loss_scaling, on_cpu.fused_optimizer) == (None, False, False)


def test_a_step_whose_scaled_gradients_overflow_changes_nothing(tiny_source):
    policy = resolve_policy(CANDIDATE, CPU)
    scaled = StepPolicy(**{**policy.__dict__, "loss_scaling": True})
    step = build_step(CANDIDATE, tiny_source, scaled, lora_alpha=32, seed=0)
    optimizer = torch.optim.AdamW([p for p in step.model.parameters() if p.requires_grad], lr=0.1)
    parameter = next(p for n, p in step.model.named_parameters() if "lora_B" in n)
    count = trained_tokens(EXAMPLES)

    step.accumulate([collate(EXAMPLES, 0)], count)
    scaled_gradient = parameter.grad.clone()
    step.unscale(optimizer)
    torch.testing.assert_close(parameter.grad * 65536, scaled_gradient)
    optimizer.step()
    before = parameter.detach().clone()
    assert before.any()

    step.accumulate([collate(EXAMPLES, 0)], count)
    parameter.grad[0, 0] = float("inf")
    step.unscale(optimizer)
    optimizer.step()
    assert torch.equal(parameter, before)
    assert step.scaler.get_scale() == 65536 / 2


def test_a_sequence_too_long_for_a_micro_batch_runs_alone_with_all_layers_recomputed(step, tiny_source):
    _, expected = gradients(step, micro_batches(EXAMPLES, 256, 0), 100)
    paced = CANDIDATE.replace(micro_batch_size=1, pace_length=40, checkpointed_layers=1)
    built = build_step(paced, tiny_source, resolve_policy(paced, CPU), lora_alpha=32, seed=0)
    layers = checkpointable_layers(built.model)
    met = []
    built.report = lambda phase: met.append((phase, sum(layer.gradient_checkpointing for layer in layers)))
    batches = list(micro_batches(EXAMPLES, paced.token_budget, 0))
    _, found = gradients(built, batches, 100)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert [flags for phase, flags in met if phase == "forward"] == [4 if b.tokens > 40 else 1 for b in batches]
    assert {4, 1} == {flags for _, flags in met}
    longest = costliest_batches(paced, 256)[-1]
    assert longest.input_ids.shape == (1, 64)
