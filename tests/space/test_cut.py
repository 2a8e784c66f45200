from hypothesis import given
from hypothesis import strategies as st

from autofit.space.cut import OVERHEAD_TOKENS, cut, most_sequences, pack, padded_tokens

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(lengths, st.integers(1, 2000))
def test_every_sequence_once_and_never_over_the_budget_unless_alone(lengths, budget):
    groups = cut(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[i] for i in group)
        assert len(group) == 1 or len(group) * longest <= budget
    assert padded_tokens(lengths, budget) == sum(len(g) * max(lengths[i] for i in g) for g in groups)


@given(lengths, st.integers(1, 2000))
def test_neighbours_are_alike_in_length(lengths, budget):
    in_order = [lengths[i] for group in cut(lengths, budget) for i in group]
    assert in_order == sorted(lengths, reverse=True)


def cost(groups, lengths):
    return sum(len(g) * max(lengths[i] for i in g) + OVERHEAD_TOKENS for g in groups)


def contiguous_cuts(order):
    """Every way to cut a sequence of indices into runs."""
    if not order:
        yield []
    for end in range(1, len(order) + 1):
        for rest in contiguous_cuts(order[end:]):
            yield [order[:end], *rest]


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=9), st.integers(1, 9000))
def test_no_allowed_cut_of_neighbours_is_cheaper(lengths, budget):
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    allowed = [
        groups
        for groups in contiguous_cuts(order)
        if all(len(g) == 1 or len(g) * lengths[g[0]] <= budget for g in groups)
    ]
    assert cost(cut(lengths, budget), lengths) == min(cost(groups, lengths) for groups in allowed)


def test_unequal_lengths_are_not_padded_to_the_longest():
    lengths = [2000] + [100] * 15
    assert padded_tokens(lengths, 16 * 2000) == 2000 + 15 * 100
    assert len(cut([100] * 16, 16 * 100)) == 1


@given(lengths, st.integers(1, 2000))
def test_packed_rows_hold_every_sequence_once_and_no_more_than_their_tokens_and_their_number(lengths, budget):
    rows = pack(lengths, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(lengths[i] for i in row) <= budget
        assert len(row) <= most_sequences(budget)


@given(st.lists(st.integers(100, 2048), min_size=1, max_size=64), st.sampled_from([2048, 4096, 8192]))
def test_there_are_hardly_more_packed_rows_than_the_tokens_need(lengths, budget):
    needed = max(-(-sum(lengths) // budget), -(-len(lengths) // most_sequences(budget)))
    assert needed <= len(pack(lengths, budget)) <= 1.5 * needed + 1


def test_packed_rows_are_about_equal():
    lengths = [300 + 7 * k for k in range(60)]
    sizes = [sum(lengths[i] for i in row) for row in pack(lengths, 8192)]
    assert len(sizes) == -(-sum(lengths) // 8192)
    assert max(sizes) - min(sizes) <= 720


def test_packed_rows_are_filled_where_equal_ones_would_not_do():
    # To the emptiest row first: 500 + 300, 500 + 300, 400 + 400, and no room for the last 300.
    rows = pack([500, 500, 400, 400, 300, 300, 300], 900)
    assert sorted(sorted(row) for row in rows) == [[0, 2], [1, 3], [4, 5, 6]]
