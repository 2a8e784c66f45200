"""The step on the card beside the step on meta tensors: the same operations, of the same sizes, in the same order."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autofit.memory.device import detect_device
from autofit.memory.dispatch import Dispatch
from autofit.memory.trace import Tracer
from autofit.memory.values import Values
from autofit.space.candidate import Candidate
from autofit.space.facts import DeviceFacts
from autofit.space.source import ModelSource
from autofit.step.model import skeleton_of
from autofit.step.policy import resolve_policy
from autofit.step.rehearsal import Rehearsal
from autofit.step.step import build_step, costliest_batches

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

# Triton's kernels and cuBLAS's addition into float32 are no operations on meta tensors, and take no memory.
ONLY_ON_THE_CARD = ("aten.addmm.dtype_out",)
BOOKKEEPING = ("aten.detach.default", "aten.alias.default", "aten.lift_fresh.default", "aten.empty.memory_format")


class Operations(TorchDispatchMode):
    """Writes down each operation with its results' bytes and types."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, str]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if str(func) not in (*ONLY_ON_THE_CARD, *BOOKKEEPING):
            results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.seen.append((str(func), [(t.untyped_storage().nbytes(), str(t.dtype)) for t in results]))
        return out


def _rehearse(candidate: Candidate, source: ModelSource, device: DeviceFacts, where: str) -> list[Any]:
    policy = replace(resolve_policy(candidate, device), device=where)
    step = build_step(candidate, source, policy, 16, 0, skeleton_of(source, candidate, policy))
    batch = costliest_batches(candidate, step.model.get_input_embeddings().num_embeddings)[0]
    rehearsal = Rehearsal(step, candidate)
    with Operations() as operations:
        for count in rehearsal.counts:
            rehearsal.optimizer_step(batch, count)
    return operations.seen


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("checkpointed", [0, 2])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
def test_meta_tensors_run_the_cards_operations(
    model_type: str, checkpointed: int, bits: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = {
        "model_type": model_type,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 20_000,
    }
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    candidate = Candidate(
        micro_batch_size=2,
        max_seq_length=128,
        checkpointed_layers=checkpointed,
        quantization_bits=bits,
        lora_dropout=0.05,
        attention="eager" if model_type == "gemma2" else "sdpa",
        accumulates=True,
    )
    source, device = ModelSource(model=str(folder), random_weights=True), detect_device()
    on_card = _rehearse(candidate, source, device, "cuda")
    with Dispatch(device), Tracer(Values()):
        on_meta = _rehearse(candidate, source, device, "meta")
    assert on_meta == on_card
