"""What a candidate that is asked for becomes on a model and a device."""

import pytest

from autofit.errors import UsageError
from autofit.space.facts import DeviceFacts, ModelFacts
from autofit.space.settle import settle

MODEL = ModelFacts(
    architecture="X", num_parameters=1, weight_bytes_16bit=2, checkpointable_layers=6, max_positions=1024
)
GPU = DeviceFacts(type="cuda", name="card", total_bytes=2**34, compute_capability=(8, 0))
CPU = DeviceFacts(type="cpu", name="cpu", total_bytes=2**34)


def facts(**changes):
    return ModelFacts(**{**MODEL.to_json(), **changes})


def settled(asked, model=MODEL, device=GPU):
    return settle({"micro_batch_size": 1, **asked}, model, device, "bfloat16")


def test_defaults_follow_the_device_and_the_model():
    candidate, notes = settled({"quantization_bits": None, "dtype": None})
    assert (candidate.quantization_bits, candidate.double_quant, candidate.dtype) == (4, True, "bfloat16")
    assert candidate.max_seq_length == 1024
    assert notes == ()
    assert settled({}, device=CPU)[0].quantization_bits == 16
    assert settled({}, facts(max_positions=None))[0].max_seq_length == 2048
    assert settled({}, facts(attention="eager"))[0].attention == "eager"


@pytest.mark.parametrize(("asked", "layers"), [("all", 6), ("none", 0), (0, 0), (3, 3), (6, 6)])
def test_layers_become_a_number(asked, layers):
    assert settled({"checkpointed_layers": asked})[0].checkpointed_layers == layers


@pytest.mark.parametrize("asked", ["all", 3])
def test_a_model_that_cannot_checkpoint_has_zero_layers_and_a_note(asked):
    candidate, notes = settled({"checkpointed_layers": asked}, facts(checkpointable_layers=0))
    assert candidate.checkpointed_layers == 0
    assert "cannot checkpoint" in notes[0]


def test_a_length_beyond_the_positions_is_kept_and_noted():
    candidate, notes = settled({"max_seq_length": 1025})
    assert candidate.max_seq_length == 1025
    assert "1024 positions" in notes[0]


def test_the_full_loss_is_taken_where_the_chunked_one_cannot_be_right():
    candidate, notes = settled({"loss": "chunked"}, facts(chunked_loss=False))
    assert candidate.loss == "full"
    assert "loss full" in notes[0]
    assert settled({"loss": "full"}, facts(chunked_loss=False))[1] == ()


def test_a_quantized_checkpoint_keeps_its_bits():
    assert settled({}, facts(quantized_bits=8))[0].quantization_bits == 8
    with pytest.raises(UsageError, match="already quantized to 8 bits"):
        settled({"quantization_bits": 4}, facts(quantized_bits=8))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"checkpointed_layers": 7}, "has 6 layers"),
        ({"offload_activations": "all"}, "nowhere to offload"),
        ({"optimizer": "paged_adamw_8bit"}, "nowhere to page"),
        ({"lora_rank": 0}, "lora_rank"),
    ],
)
def test_what_cannot_be_is_refused(asked, says):
    with pytest.raises(UsageError, match=says):
        settled(asked, device=CPU)
