"""Packed rows on a GPU: the kernel's gradient, and the memory that a row of any sequences takes."""

import pytest
import torch

from autofit.memory.device import detect_device
from autofit.space.candidate import Candidate
from autofit.step.batch import collate, micro_batches, trained_tokens, worst_packed
from autofit.step.policy import resolve_policy
from autofit.step.rehearsal import Rehearsal
from autofit.step.step import build_step
from tests.step.test_step import example

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

PADDED = Candidate(micro_batch_size=4, max_seq_length=256)
ROWS = [example(n, n // 4, seed) for seed, n in enumerate((250, 180, 31, 96, 7, 203, 64, 120, 15, 88))]


def gradients(source, candidate):
    step = build_step(candidate, source, resolve_policy(candidate, detect_device()), lora_alpha=32, seed=0)
    for name, parameter in step.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator("cuda").manual_seed(0))
    count = trained_tokens(ROWS)
    batches = (
        micro_batches(ROWS, 1024, 0, "packed") if candidate.layout == "packed" else [collate([row], 0) for row in ROWS]
    )
    step.accumulate(batches, count)
    return torch.cat([p.grad.flatten() for p in step.model.parameters() if p.requires_grad])


def test_the_gradient_is_as_near_to_float32s_as_the_padded_ones(tiny_source):
    exact = gradients(tiny_source, PADDED.replace(dtype="float32"))
    padded, packed = (
        (gradients(tiny_source, PADDED.replace(layout=layout)) - exact).norm() / exact.norm()
        for layout in ("padded", "packed")
    )
    assert packed < 0.05
    assert packed < 1.2 * padded


def test_in_float32_it_is_the_padded_ones(tiny_source):
    exact, packed = (
        gradients(tiny_source, PADDED.replace(dtype="float32", layout=layout)) for layout in ("padded", "packed")
    )
    assert (packed - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("layers", [0, 4])
def test_no_row_takes_more_than_the_trials(tiny_source, layers):
    candidate = PADDED.replace(layout="packed", micro_batch_size=16, checkpointed_layers=layers)
    step = build_step(candidate, tiny_source, resolve_policy(candidate, detect_device()), lora_alpha=32, seed=0)
    rehearsal = Rehearsal(step, candidate)

    def peak(batch):
        torch.cuda.reset_peak_memory_stats()
        rehearsal.optimizer_step(batch, 2)
        return torch.cuda.max_memory_allocated()

    worst = worst_packed(candidate.token_budget, 256, 250)
    peak(worst)
    most = peak(worst)
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        lengths = torch.randint(2, 256, (40,), generator=draw).tolist()
        rows = [example(n, 0, n) for n in lengths]
        assert max(peak(batch) for batch in micro_batches(rows, candidate.token_budget, 0, "packed")) <= most
