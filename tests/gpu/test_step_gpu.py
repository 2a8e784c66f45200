"""What only a GPU can show: autocast, loss scaling, offloading, paging, and a budget that binds."""

import pytest
import torch

from autofit.memory.device import detect_device
from autofit.search.runner import SandboxRunner
from autofit.space.budget import MemoryBudget
from autofit.space.candidate import Candidate
from autofit.space.source import ModelSource
from autofit.step.batch import worst_micro_batches
from autofit.step.optimizer import build_optimizer
from autofit.step.policy import resolve_policy
from autofit.step.step import build_step
from autofit.trial.result import TrialStatus

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

CANDIDATE = Candidate(micro_batch_size=4, max_seq_length=256)
(BATCH,) = worst_micro_batches(4 * 256, 256, 250)
TRAINED = BATCH.targets.numel()


def gradients(source, candidate):
    step = build_step(candidate, source, resolve_policy(candidate, detect_device()), lora_alpha=32, seed=0)
    for name, parameter in step.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator("cuda").manual_seed(0))
    loss = step.accumulate([BATCH], TRAINED)
    return loss, torch.cat([p.grad.flatten() for p in step.model.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpointed_layers": 4},
        {"checkpointed_layers": 2, "offload_activations": "checkpoints"},
        {"offload_activations": "all"},
        {"checkpointed_layers": 4, "offload_activations": "all"},
        {"quantization_bits": 4},
        {"quantization_bits": 8},
    ],
)
def test_lossless_knobs_leave_the_gradient_and_bits_change_it(tiny_source, changes):
    loss, grads = gradients(tiny_source, CANDIDATE)
    other_loss, other = gradients(tiny_source, CANDIDATE.replace(**changes))
    apart = (other - grads).norm() / grads.norm()
    if "quantization_bits" in changes:
        assert 0.01 < apart < 1
    else:
        torch.testing.assert_close(other_loss, loss, rtol=1e-3, atol=1e-3)
        assert apart < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_steps_are_near_those_in_float32(tiny_source, dtype):
    loss, grads = gradients(tiny_source, CANDIDATE.replace(dtype="float32"))
    low_loss, low = gradients(tiny_source, CANDIDATE.replace(dtype=dtype))
    scale = 65536 if dtype == "float16" else 1
    assert low_loss.item() == pytest.approx(loss.item(), rel=2e-2)
    assert (low / scale - grads).norm() / grads.norm() < 0.1


@pytest.mark.parametrize("optimizer", ["adamw_torch", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_optimizer_trains(tiny_source, optimizer, dtype):
    candidate = CANDIDATE.replace(optimizer=optimizer, dtype=dtype)
    step = build_step(candidate, tiny_source, resolve_policy(candidate, detect_device()), lora_alpha=32, seed=0)
    made = build_optimizer(step.model, candidate, step.policy, 1e-2)
    losses = []
    for _ in range(8):
        losses.append(step.accumulate([BATCH], TRAINED).item())
        step.unscale(made)
        made.step()
        made.zero_grad()
    assert losses[-1] < losses[0] - 0.1


def test_a_budget_far_below_the_card_binds(tiny_model, sandbox, tmp_path):
    device = detect_device()

    def run(budget_bytes, candidate):
        return SandboxRunner(
            sandbox=sandbox,
            folder=tmp_path,
            source=ModelSource(model=str(tiny_model), random_weights=True),
            device=device,
            budget=MemoryBudget(total_bytes=budget_bytes, headroom_bytes=2**28),
            lora_alpha=32,
            seed=0,
            deadline_seconds=120,
        ).run(candidate)

    # Tensors far larger than what the context grows by while kernels are loaded.
    big = CANDIDATE.replace(micro_batch_size=512, max_seq_length=512)
    whole = run(device.total_bytes, big)
    assert whole.status is TrialStatus.FIT
    assert whole.device_bytes > whole.peak_reserved_bytes >= whole.peak_allocated_bytes
    assert whole.peak_reserved_bytes < 1.2 * whole.peak_allocated_bytes + 2**27
    tight = run(whole.device_bytes - whole.peak_allocated_bytes // 2, big)
    assert (tight.status, tight.phase) == (TrialStatus.OOM, "forward")
    assert tight.projected_bytes > 0
    roomy = run(whole.device_bytes + 2**28 + 2**26, big)
    assert roomy.status is TrialStatus.FIT
