"""What meta tensors are known to hold: through views, writes, masks and reads; and what is guessed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from autofit.memory.guesses import even_routing
from autofit.memory.values import Values


class Under(TorchDispatchMode):
    """Operations run by `Values`."""

    def __init__(self, fill=False):
        super().__init__()
        self.values = Values(fill)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.values.run(func, args, kwargs or {})

    def of(self, tensor):
        """The values of a meta tensor, or None."""
        with torch.utils._python_dispatch._disable_current_modes():
            found = self.values.shadow(tensor)
            return None if found is None else found.clone()


@pytest.fixture
def under():
    with Under() as mode:
        yield mode


def hollow(values):
    return torch.tensor(values).to("meta")


def test_views_and_writes_through_them_are_followed(under):
    rows = hollow([[1, 2, 3], [4, 5, 6]])
    column = rows[:, 1]
    column += 10
    rows.T[2] = 0
    assert rows.is_meta
    assert under.of(rows).tolist() == [[1, 12, 0], [4, 15, 0]]
    assert under.of(column).tolist() == [12, 15]


def test_masks_that_are_filled_pick_what_they_would(under):
    ids = hollow([7, 0, 7, 3])
    picked = ids[ids != 7]
    ids[ids == 0] = 9
    assert picked.shape == (2,)
    assert under.of(picked).tolist() == [0, 3]
    assert under.of(ids).tolist() == [7, 9, 7, 3]
    assert under.of(ids.masked_fill(ids == 7, -1)).tolist() == [-1, 9, -1, 3]


def test_what_the_host_reads_is_what_it_is(under):
    ids = hollow([2, 4, 2])
    assert ids.max().item() == 4
    assert bool((ids == 2).any())
    assert ids.tolist() == [2, 4, 2]
    assert torch.equal(ids, hollow([2, 4, 2]))
    assert not torch.equal(ids, hollow([2, 4, 3]))
    assert not under.values.guesses


def test_shapes_that_values_decide(under):
    ids = hollow([2, 0, 2])
    assert ids.nonzero().shape == (2, 1)
    assert under.of(torch.bincount(ids, minlength=4)).tolist() == [1, 0, 2, 0]
    assert torch.nn.functional.one_hot(ids).shape == (3, 3)
    assert under.of(torch.nn.functional.one_hot(ids, 4)).sum().item() == 3
    assert under.of(ids.unique()).tolist() == [0, 2]
    assert under.of(torch.repeat_interleave(hollow([1, 2, 3]), ids)).tolist() == [1, 1, 3, 3]
    assert under.of(torch.masked_select(ids, ids > 0)).tolist() == [2, 2]


def test_floating_rows_are_picked_by_known_indices(under):
    rows = torch.empty(4, 8, device="meta")
    assert rows[hollow([True, False, True, True])].shape == (3, 8)
    rows[hollow([0, 3])] = 1.0
    assert rows.index_select(0, hollow([1])).shape == (1, 8)
    assert not under.values.guesses


def test_values_end_with_their_storage(under):
    ids = hollow([1, 2])
    known = len(under.values._known)
    view = ids[1:]
    del ids
    assert len(under.values._known) == known
    assert under.of(view).tolist() == [2]
    del view
    assert len(under.values._known) < known


def test_large_floats_are_not_remembered_and_small_ones_are(under):
    assert under.of(torch.zeros(8, device="meta") + 2).tolist() == [2.0] * 8
    assert under.of(torch.zeros(1 << 12, device="meta") + 2) is None


def test_random_numbers_that_are_written_over_known_ones_are_unknown(under):
    weight = torch.zeros(300, device="meta")
    weight.normal_()
    assert under.of(weight) is None


def routed(mode, scores=None):
    scores = torch.empty(6, 4, device="meta") if scores is None else scores
    return scores.topk(2, dim=-1).indices


def test_a_guess_is_on_record_only_once_it_is_read(under):
    chosen = routed(under)
    assert not under.values.guesses
    chosen.add(1).reshape(-1)
    assert not under.values.guesses
    counts = torch.bincount(chosen.flatten(), minlength=4)
    assert under.values.guesses == {"even routing by topk": 1}
    assert under.of(counts).tolist() == [3, 3, 3, 3]


def test_what_follows_from_a_guess_is_one(under):
    mask = routed(under) == 1
    assert not under.values.guesses
    assert mask.nonzero().shape == (3, 2)
    assert under.values.guesses == {"even routing by topk": 1}


def test_an_unknown_number_that_the_host_reads_is_a_guess(under):
    assert torch.empty((), device="meta").item() == 1.0
    assert under.values.guesses == {"a float32 read by the host": 1}


@pytest.mark.parametrize(("fill", "picked"), [(False, 0), (True, 5)])
def test_fill_is_what_unknown_masks_are_taken_for(fill, picked):
    with Under(fill) as mode:
        rows = torch.empty(5, 3, device="meta")
        assert rows[rows[:, 0] > 0].shape == (picked, 3)
        assert sum(mode.values.guesses.values()) >= 1


def test_fill_routes_every_row_alike():
    with Under(fill=True) as mode:
        counts = torch.bincount(routed(mode).flatten(), minlength=4)
        assert mode.of(counts).tolist() == [6, 6, 0, 0]


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("question", ["isnan", "isinf"])
def test_numbers_are_taken_to_be_finite(question, fill):
    with Under(fill) as mode:
        assert not bool(getattr(torch.empty(3000, device="meta"), question)().any())
        assert not mode.values.guesses


@given(st.integers(1, 40), st.integers(1, 16), st.data())
def test_even_routing_is_even_and_never_twice_to_one(rows, choices, data):
    picks = data.draw(st.integers(1, choices))
    chosen = even_routing((rows, picks), choices)
    counts = torch.bincount(chosen.flatten(), minlength=choices)
    assert counts.shape == (choices,)
    assert counts.max() - counts.min() <= 1
    assert all(len(set(row)) == picks for row in chosen.tolist())
    assert torch.equal(even_routing((picks, rows), choices, dim=0), chosen.T)


# Little programs of integers: each step takes what the steps before it made.
UNARY = {
    "transpose": lambda a: a.transpose(0, -1),
    "flatten": lambda a: a.flatten(),
    "first": lambda a: a[:1],
    "every second": lambda a: a[..., ::2],
    "negate": lambda a: -a,
    "absolute": lambda a: a.abs().clamp(max=5),
    "sum": lambda a: a.sum(0, keepdim=True),
    "cumsum": lambda a: a.cumsum(-1),
    "sort": lambda a: a.sort(dim=-1, stable=True).values,
    "argsort": lambda a: a.argsort(dim=-1, stable=True),
    "largest": lambda a: a.amax(-1, keepdim=True) if a.shape[-1] else a,
    "positive": lambda a: a[a > 0],
    "where": lambda a: torch.where(a > 1, a, a * 2),
    "nonzero": lambda a: a.nonzero(),
    "counts": lambda a: torch.bincount(a.flatten().abs() % 7, minlength=3),
    "one hot": lambda a: torch.nn.functional.one_hot(a.abs() % 4, 4),
    "stack": lambda a: torch.stack([a, a + 1]),
    "pad": lambda a: torch.nn.functional.pad(a, (1, 0)),
    "as bool": lambda a: (a % 2 == 0).long(),
    "zeros": lambda a: torch.zeros_like(a),
    "add in place": lambda a: a.add_(3) if not is_broadcast(a) else a,
    "write a column": lambda a: put(a, 8),
    "by a number": lambda a: a * int(a.sum().item() % 5) if a.numel() else a,
    "count": lambda a: torch.arange(a.numel() % 9, device=a.device),
}


def is_broadcast(tensor):
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def put(tensor, value):
    if not is_broadcast(tensor) and tensor.dim():
        tensor.select(-1, 0).fill_(value) if tensor.shape[-1] else None
    return tensor


@settings(max_examples=120, deadline=None)
@given(st.lists(st.lists(st.integers(-9, 9), min_size=3, max_size=3), min_size=1, max_size=4), st.data())
def test_a_program_of_integers_is_followed(start, data):
    real, under = [torch.tensor(start)], Under()
    with under:
        meta = [hollow(start)]
    for name in data.draw(st.lists(st.sampled_from(list(UNARY)), max_size=8)):
        at = data.draw(st.integers(0, len(real) - 1))
        if real[at].dim() == 0 or real[at].numel() > 3000:
            continue
        real.append(UNARY[name](real[at]))
        with under:
            meta.append(UNARY[name](meta[at]))
    for wanted, found in zip(real, meta, strict=True):
        assert found.is_meta
        assert found.shape == wanted.shape
        assert found.dtype is wanted.dtype
        assert torch.equal(under.of(found), wanted)
    assert not under.values.guesses
