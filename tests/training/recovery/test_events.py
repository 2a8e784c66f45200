"""Each out-of-memory is on record with its phase, what was asked for, what held the memory, and what was done."""

import json
import re

import pytest
import torch
from torch.nn.functional import cross_entropy

from autofit.errors import OutOfBudget, UsageError
from autofit.training.recovery.capping import Cap
from autofit.training.recovery.trainers import AutoFitTrainer
from tests.training.recovery.conftest import FailingAllocations, examples


def own_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].float().flatten(0, 1)
    return cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def test_of_every_allocation_of_a_step_it_is_known_where_it_was(made):
    given = {"max_steps": 1, "compute_loss_func": own_loss, "max_grad_norm": 0.5}
    with FailingAllocations(least=1) as counter:
        made(AutoFitTrainer, **given).train()
    phases = []
    for number in range(0, counter.count, 3):
        ours = made(AutoFitTrainer, **given)
        try:
            with FailingAllocations({number}, least=1) as faults:
                ours.train()
        except torch.OutOfMemoryError:  # of the stock loop itself
            continue
        if faults.count <= number:  # what is made the first time only
            continue
        (event,) = ours.recovery.events
        phases.append(event["phase"])
        assert event["held_bytes"]["weights"] >= sum(p.nbytes for p in ours.model.parameters())
        assert event["did"]
    order = list(dict.fromkeys(phases))
    assert {"forward", "backward", "loss", "optimizer"} <= set(order)
    assert order.index("forward") < order.index("loss") < order.index("backward") < order.index("optimizer")


def test_the_end_says_what_was_tried_and_what_would_fit(made, tmp_path, caplog):
    given = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 8}
    lengths = [len(row["input_ids"]) for row in examples()]
    ours = made(AutoFitTrainer, output_dir=str(tmp_path), **given)

    def look(module, args, kwargs):
        if args[0].shape[1] >= max(lengths):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    ours.model.model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    with pytest.raises(OutOfBudget) as caught, caplog.at_level("WARNING"):
        ours.train()
    said = re.fullmatch(
        r"step (\d+) does not fit: a single row of 30 tokens is too much; tried: freed memory and tried the same "
        r"again, recomputes all activations of pieces of 30 tokens or more; up to (\d+) tokens at once have fitted: "
        r"make sequences shorter, or give more memory; CUDA out of memory\. Tried to allocate 2\.00 GiB\.",
        str(caught.value),
    )
    assert int(said[1]) == ours.state.global_step + 1
    assert int(said[2]) in lengths
    # The summary, too, where it does not end well.
    assert "out of memory 3 times: 3 in forward" in caplog.text
    last = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert (last["phase"], last["did"], last["requested_bytes"]) == ("forward", "gave up", 2 * 2**30)


@pytest.mark.parametrize("four_bits", [False, True])
def test_a_model_in_four_bits_is_not_told_to_load_fewer(made, four_bits):
    ours = made(AutoFitTrainer)
    ours.model.is_loaded_in_4bit = four_bits

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    ours.model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(OutOfBudget, match="nothing of its kind has fitted yet: give more memory") as caught:
        ours.train()
    with pytest.raises(UsageError, match=r"weights alone take .* give more$") as small:
        Cap("1KB", ours.model, torch.device("cpu"))
    assert ("in fewer bits" in str(caught.value), "load_in_4bit" in str(small.value)) == (not four_bits,) * 2
