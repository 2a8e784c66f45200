import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autofit.errors import UsageError
from autofit.space.candidate import KNOBS, LOSSY, Candidate
from autofit.space.ladder import DEFAULT_ORDER, RUNGS, Limits, ladder, parse_order, with_knob

WISH = Candidate(micro_batch_size=16, max_seq_length=2048)
LIMITS = Limits(global_batch_size=16, checkpointable_layers=32, can_page=True)


def moves(chain):
    """The knob that each step down moved."""
    return [{k for k in KNOBS if getattr(a, k) != getattr(b, k)} for a, b in itertools.pairwise(chain)]


def test_the_default_order_spends_each_knob_before_the_next():
    chain = ladder(WISH, LIMITS)
    assert chain[0] == WISH
    assert all(len(m) == 1 for m in moves(chain))
    order = [RUNGS[name] for name in DEFAULT_ORDER]
    places = [order.index(next(iter(m))) for m in moves(chain)]
    assert places == sorted(places)
    assert set(places) == set(range(len(order)))
    last = chain[-1]
    assert (last.micro_batch_size, last.checkpointed_layers, last.quantization_bits, last.lora_rank) == (1, 32, 4, 4)
    assert last.optimizer == "paged_adamw_32bit"
    assert last.offload_activations == "all"


def test_without_a_place_to_page_to_nothing_is_paged_or_offloaded():
    for candidate in ladder(WISH, Limits(global_batch_size=16, checkpointable_layers=32, can_page=False)):
        assert candidate.optimizer == "adamw_torch"
        assert candidate.offload_activations == "none"


def test_any_other_order():
    order = parse_order("batch,seq,checkpointing,bits,rank")
    knobs = [next(iter(m)) for m in moves(ladder(WISH, LIMITS, order))]
    first = {knob: knobs.index(knob) for knob in set(knobs)}
    assert sorted(first, key=first.__getitem__) == [RUNGS[name] for name in order]


@pytest.mark.parametrize("text", ["batch,speed", "", "batch,batch"])
def test_an_order_of_no_knobs_is_refused(text):
    with pytest.raises(UsageError, match="valid: batch"):
        parse_order(text)


@given(
    pins=st.sets(st.sampled_from(KNOBS)),
    allow=st.sets(st.sampled_from(LOSSY)),
    minima=st.dictionaries(st.sampled_from(["max_seq_length", "lora_rank", "micro_batch_size"]), st.integers(1, 2048)),
    batch=st.integers(1, 64),
    length=st.integers(8, 9000),
    rank=st.integers(1, 128),
    order=st.permutations(DEFAULT_ORDER),
)
def test_pins_minima_and_consent_are_never_crossed(pins, allow, minima, batch, length, rank, order):
    wish = Candidate(micro_batch_size=batch, max_seq_length=length, lora_rank=rank)
    limits = Limits(
        global_batch_size=batch,
        checkpointable_layers=12,
        can_page=True,
        pins=frozenset(pins),
        minima=minima,
        allow=frozenset(allow),
    )
    chain = ladder(wish, limits, tuple(order))
    assert len(set(chain)) == len(chain)
    for candidate in chain:
        for knob in pins | (set(LOSSY) - allow):
            assert getattr(candidate, knob) == getattr(wish, knob)
        for knob, least in minima.items():
            assert getattr(candidate, knob) >= min(least, getattr(wish, knob))


def test_double_quant_is_the_users():
    limits = Limits(global_batch_size=16, checkpointable_layers=32, can_page=True, double_quant=False)
    assert not with_knob(WISH, "quantization_bits", 4, limits).double_quant
