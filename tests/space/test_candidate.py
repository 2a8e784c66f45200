import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autofit.space.candidate import Candidate, is_checkpointed


def test_two_spellings_of_the_same_bytes_are_one_candidate():
    plain = Candidate(micro_batch_size=4, max_seq_length=128)
    assert Candidate(micro_batch_size=4, max_seq_length=128, tokens_per_micro_batch=512) == plain
    assert Candidate(micro_batch_size=4, max_seq_length=128, double_quant=False) == plain  # 16 bits have no statistics
    assert plain.replace(offload_activations="checkpoints") == plain  # nothing is checkpointed
    assert plain.replace(micro_batch_size=2).token_budget == 256
    tight = plain.replace(tokens_per_micro_batch=200)
    assert tight.replace(micro_batch_size=2).token_budget == 200  # no more than before
    assert tight.replace(micro_batch_size=1).token_budget == 128


def test_a_stock_step_has_its_own_loss_and_takes_whole_rows():
    sft = Candidate(micro_batch_size=4, max_seq_length=128, step="sft", loss="full")
    trainer = sft.replace(step="trainer", prepare_kbit=True)
    assert (sft.loss, trainer.loss) == ("chunked", "full")
    assert Candidate.from_json(json.loads(json.dumps(trainer.to_json()))) == trainer
    with pytest.raises(ValueError, match="tokens_per_micro_batch must be"):
        sft.replace(tokens_per_micro_batch=100)
    with pytest.raises(ValueError, match="offload_activations must be none or checkpoints with step trainer"):
        trainer.replace(offload_activations="all")


def test_what_decides_memory_tells_candidates_apart():
    four = Candidate(micro_batch_size=4, max_seq_length=128, quantization_bits=4)
    assert four != Candidate(micro_batch_size=4, max_seq_length=128, quantization_bits=4, double_quant=False)
    assert four != four.replace(accumulates=True)
    assert four != four.replace(tokens_per_micro_batch=100)


def test_json_and_back():
    candidate = Candidate(micro_batch_size=3, max_seq_length=99, lora_targets=("q_proj",), tokens_per_micro_batch=200)
    flat = json.loads(json.dumps({**candidate.to_json(), "status": "FIT"}))
    assert Candidate.from_json(flat) == candidate


@pytest.mark.parametrize(
    "wrong", [{"lora_rank": 0}, {"quantization_bits": 5}, {"checkpointed_layers": -1}, {"loss": "x"}, {"step": "x"}]
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Candidate(micro_batch_size=1, max_seq_length=8, **wrong)


@given(st.integers(1, 100), st.data())
def test_n_layers_are_checkpointed_evenly_spread(layers, data):
    n = data.draw(st.integers(0, layers))
    chosen = [i for i in range(layers) if is_checkpointed(i, n, layers)]
    assert len(chosen) == n
    gaps = {b - a for a, b in itertools.pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    if n and layers % n == 0:
        assert chosen == list(range(0, layers, layers // n))  # transformers' every_n_layers


def test_a_few_long_sequences_are_another_micro_batch_than_the_rest():
    paced = Candidate(micro_batch_size=2, max_seq_length=1000, pace_length=100, checkpointed_layers=1)
    assert (paced.token_budget, paced.has_long_rows) == (200, True)
    assert paced.usual() == Candidate(micro_batch_size=2, max_seq_length=100, checkpointed_layers=1)
    alone = Candidate(micro_batch_size=1, max_seq_length=1000, checkpointed_layers=7)
    assert paced.alone(7, offloads=False) == alone
    assert paced.alone(7, offloads=True) == alone.replace(offload_activations="checkpoints")
    assert paced.replace(offload_activations="all").alone(7, offloads=True).offload_activations == "all"
    assert paced.replace(layout="packed").alone(7, offloads=False) == alone
    roomy = paced.replace(micro_batch_size=10)
    assert (roomy.token_budget, roomy.has_long_rows) == (1000, False)
    assert paced.replace(max_seq_length=100) == paced.usual()
    assert paced.replace(tokens_per_micro_batch=150).replace(micro_batch_size=1).token_budget == 100
    tight = Candidate(micro_batch_size=1, max_seq_length=1000, tokens_per_micro_batch=300)
    assert tight.has_long_rows
    assert tight.usual() == Candidate(micro_batch_size=1, max_seq_length=300)
    assert Candidate.from_json(json.loads(json.dumps(paced.to_json()))) == paced


@given(st.integers(1, 9), st.integers(1, 300), st.integers(1, 300), st.sampled_from(["padded", "packed"]), st.data())
def test_the_usual_micro_batch_holds_what_the_whole_candidate_s_does(rows, longest, pace, layout, data):
    tokens = data.draw(st.none() | st.integers(1, rows * min(longest, pace)))
    whole = Candidate(
        micro_batch_size=rows,
        max_seq_length=longest,
        pace_length=pace,
        tokens_per_micro_batch=tokens,
        layout=layout,
    )
    usual = whole.usual()
    assert not usual.has_long_rows
    assert usual.token_budget == whole.token_budget
    assert usual.usual() == usual
    assert whole.has_long_rows or usual.max_seq_length in (pace, longest)


def test_the_usual_form_keeps_a_budget_beyond_its_rows():
    wide = Candidate(
        micro_batch_size=1, max_seq_length=256, pace_length=64, tokens_per_micro_batch=256, layout="packed"
    )
    assert wide.usual().token_budget == wide.token_budget == 256
