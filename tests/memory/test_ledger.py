import gc

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autofit.memory.ledger import Ledger

KB = 1024


def test_storages_are_counted_once_and_dropped_when_the_last_view_goes():
    with Ledger() as ledger:
        a = torch.zeros(KB, dtype=torch.uint8)
        view = a[:10].view(2, 5)
        assert ledger.live_bytes == KB
        del a
        assert ledger.live_bytes == KB
        del view
        assert ledger.live_bytes == 0
        assert ledger.peak_bytes == KB
        ledger.reset_peak()
        assert ledger.peak_bytes == 0


def test_what_was_made_elsewhere_is_counted_when_told():
    weight = torch.zeros(KB, dtype=torch.uint8)
    ledger = Ledger()
    ledger.hold([weight, weight[:4]])
    assert ledger.live_bytes == KB


def test_meta_tensors_are_no_bytes_of_the_cpu():
    with Ledger() as ledger:
        kept = torch.zeros(KB, device="meta")
        assert ledger.live_bytes == 0
    with Ledger(device_type="meta") as ledger:
        kept = torch.zeros(KB, device="meta")
        assert ledger.live_bytes == 4 * KB
    del kept


def test_the_crossing_allocation_raises_what_an_allocator_raises():
    with Ledger(limit_bytes=3 * KB) as ledger:
        kept = torch.zeros(2 * KB, dtype=torch.uint8)
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2048 bytes"):
            kept + 1
        assert ledger.live_bytes == 2 * KB
        assert torch.zeros(KB, dtype=torch.uint8).numel() == KB  # exactly the limit is within it


@pytest.fixture
def trainer_of_two_steps():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).train()
    model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ids = torch.zeros(2, 16, dtype=torch.long)

    def steps(ledger: Ledger) -> None:
        for _ in range(2):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    ledger = Ledger()
    ledger.hold([*model.parameters(), *model.buffers()])
    with ledger:
        steps(ledger)  # the optimizer's states exist from here on
    optimizer.zero_grad()
    gc.collect()
    return ledger, steps, optimizer


def test_every_budget_between_base_and_peak_ends_in_one_error_and_leaves_nothing_behind(trainer_of_two_steps):
    ledger, steps, optimizer = trainer_of_two_steps
    base, peak = ledger.live_bytes, ledger.peak_bytes
    assert base < peak
    for limit in range(base, peak, (peak - base) // 25):
        ledger.limit_bytes = limit
        with ledger, pytest.raises(torch.OutOfMemoryError):
            steps(ledger)
        optimizer.zero_grad()
        gc.collect()
        assert ledger.live_bytes == base
    ledger.limit_bytes = peak
    with ledger:
        steps(ledger)
    assert ledger.peak_bytes == peak
