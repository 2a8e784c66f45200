import pytest
from hypothesis import given
from hypothesis import strategies as st

from autofit.errors import UsageError
from autofit.space.budget import MemoryBudget
from autofit.space.facts import DataFacts, ModelFacts
from autofit.space.wish import check_pins, make_wish

EIGHT_B = ModelFacts(
    architecture="LlamaForCausalLM",
    num_parameters=8 * 10**9,
    weight_bytes_16bit=16 * 10**9,
    checkpointable_layers=32,
    max_positions=8192,
)
DATA = DataFacts(num_examples=3, longest=9000, lengths=(9000, 10, 50), trained_tokens=(8000, 5, 20))


def wish(model=EIGHT_B, gigabytes=24, **asked):
    return make_wish(model, DATA, MemoryBudget(total_bytes=gigabytes * 10**9), "bfloat16", 16, asked)


def test_the_defaults_are_those_of_the_readme():
    candidate = wish()
    assert candidate.micro_batch_size == 16
    assert candidate.accumulates
    assert candidate.max_seq_length == 8192  # the data's longest, up to the model's positions
    assert candidate.quantization_bits == 4
    assert candidate.double_quant
    assert (candidate.lora_rank, candidate.lora_targets) == (16, ("all-linear",))
    assert (candidate.optimizer, candidate.loss, candidate.checkpointed_layers) == ("adamw_torch", "chunked", 0)


def test_sixteen_bits_where_the_weights_take_at_most_half():
    assert wish(gigabytes=32).quantization_bits == 16
    assert wish(gigabytes=31).quantization_bits == 4


def test_a_quantized_checkpoint_pins_its_bits():
    quantized = ModelFacts.from_json({**EIGHT_B.to_json(), "quantized_bits": 8})
    assert wish(model=quantized).quantization_bits == 8
    with pytest.raises(UsageError, match="already quantized to 8 bits"):
        wish(model=quantized, quantization_bits=4)


def test_the_full_loss_where_the_chunked_one_cannot_be_right():
    other = ModelFacts(**{**EIGHT_B.to_json(), "chunked_loss": False})
    assert wish(other).loss == "full"


def test_what_the_user_set_is_the_wish():
    candidate = wish(micro_batch_size=2, lora_rank=64, max_seq_length=1024, checkpointed_layers=8)
    assert (candidate.micro_batch_size, candidate.lora_rank, candidate.max_seq_length) == (2, 64, 1024)


def test_a_length_beyond_the_datas_is_only_kept_where_it_is_pinned():
    short = DataFacts(num_examples=1, longest=300, lengths=(300,), trained_tokens=(9,))
    budget = MemoryBudget(total_bytes=24 * 10**9)
    asked = {"max_seq_length": 2048}
    assert make_wish(EIGHT_B, short, budget, "bfloat16", 16, asked).max_seq_length == 300
    assert make_wish(EIGHT_B, short, budget, "bfloat16", 16, asked, {"max_seq_length": 1}).max_seq_length == 2048


@pytest.mark.parametrize(
    ("asked", "says"),
    [({"max_seq_length": 9000}, "8192 positions"), ({"checkpointed_layers": 33}, "32 layers")],
)
def test_beyond_the_model_is_refused(asked, says):
    with pytest.raises(UsageError, match=says):
        wish(**asked)


def test_pinned_bits_that_cannot_fit_are_refused_before_anything_runs():
    budget = MemoryBudget(total_bytes=10 * 10**9)
    with pytest.raises(UsageError, match="8 or 4 bits would fit"):
        check_pins(wish(quantization_bits=16), frozenset({"quantization_bits"}), EIGHT_B, budget)
    check_pins(wish(quantization_bits=16), frozenset(), EIGHT_B, budget)  # not pinned: the ladder steps down


def test_the_cost_of_a_shorter_sequence_is_counted():
    examples, share = DATA.truncation_cost(40)
    assert examples == 2
    assert share == pytest.approx((8000 + 10) / 8025)


def of_lengths(lengths):
    return DataFacts(num_examples=len(lengths), longest=max(lengths), lengths=lengths, trained_tokens=lengths)


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=400), st.sampled_from([100, 2000, 9000]))
def test_the_pace_is_that_of_all_but_one_in_a_hundred(lengths, cut_to):
    pace = of_lengths(tuple(lengths)).pace_length(cut_to)
    if pace is not None:
        assert sum(length > pace for length in lengths) <= len(lengths) / 100
        assert min(max(lengths), cut_to) >= 1.5 * pace
    if len(lengths) < 100:
        assert pace is None


def test_few_long_sequences_do_not_set_the_pace():
    budget = MemoryBudget(total_bytes=24 * 10**9)
    tailed = of_lengths((500,) * 199 + (8000,))
    asked = make_wish(EIGHT_B, tailed, budget, "bfloat16", 16, {})
    assert (asked.max_seq_length, asked.pace_length, asked.micro_batch_size) == (8000, 512, 16)
    assert make_wish(EIGHT_B, tailed, budget, "bfloat16", 16, {"max_seq_length": 700}).pace_length is None
    assert make_wish(EIGHT_B, tailed, budget, "bfloat16", 16, {"tokens_per_micro_batch": 900}).pace_length is None
    assert make_wish(EIGHT_B, of_lengths((500,) * 200), budget, "bfloat16", 16, {}).pace_length is None
    without = ModelFacts.from_json({**EIGHT_B.to_json(), "checkpointable_layers": 0})
    assert make_wish(without, tailed, budget, "bfloat16", 16, {}).pace_length is None
