from hypothesis import given
from hypothesis import strategies as st

from autofit.space.cut import cut, padded_tokens

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
