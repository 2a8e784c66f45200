"""A shortcut that answers gives what torch's own meta kernel gives: shape, type, strides that matter, storage."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autofit.memory.shortcuts import SHORTCUTS

aten = torch.ops.aten
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = st.integers(0, 4)
SHAPES = st.lists(SIZES, max_size=4).map(tuple)
IN_PLACE = (aten.uniform_.default, aten.normal_.default, aten.add_.Tensor, aten.mul_.Tensor)
TWO = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)
REDUCED = (aten.mean.dim, aten.sum.dim_IntList)
OTHERS = (aten._to_copy.default, aten.mm.default, aten.silu_backward.default, aten.slice_backward.default)
ONE = tuple(operation for operation in SHORTCUTS if operation not in (*IN_PLACE, *TWO, *REDUCED, *OTHERS))
NUMBERS = {aten.mul.Scalar: (2.5,), aten.add.Scalar: (1,), aten.div.Scalar: (3,), aten.pow.Tensor_Scalar: (2,)}


@st.composite
def tensors(draw, shape=None, dtypes=FLOATS):
    """A meta tensor of any layout: as made, transposed, sliced, expanded, or a slice of something larger."""
    shape = draw(SHAPES) if shape is None else shape
    dtype = draw(st.sampled_from(dtypes))
    kind = draw(st.sampled_from(("plain", "permuted", "sliced", "expanded", "shifted")))
    if kind == "permuted":
        order = draw(st.permutations(range(len(shape))))
        made = torch.empty([shape[i] for i in order], dtype=dtype, device="meta")
        return made.permute([order.index(i) for i in range(len(shape))])
    if kind == "sliced":
        return torch.empty([2 * size for size in shape], dtype=dtype, device="meta")[
            tuple(slice(None, None, 2) for _ in shape)
        ]
    if kind == "expanded" and shape and shape[0]:
        return torch.empty((1, *shape[1:]), dtype=dtype, device="meta").expand(shape)
    if kind == "shifted":
        return torch.empty((3, *shape), dtype=dtype, device="meta")[1]
    return torch.empty(shape, dtype=dtype, device="meta")


@st.composite
def broadcast_shapes(draw):
    whole = draw(SHAPES)
    part = tuple(draw(st.sampled_from((1, size))) for size in whole)[draw(st.integers(0, len(whole))) :]
    return draw(st.permutations([whole, part]))


def same_as_torch(operation, args, kwargs=None):
    kwargs = kwargs or {}
    short = SHORTCUTS[operation](args, kwargs)
    if short is None:
        return
    own = operation(*args, **kwargs)
    assert short.shape == own.shape
    assert short.dtype is own.dtype
    assert short.device == own.device
    assert short.untyped_storage().nbytes() == own.untyped_storage().nbytes()
    assert short.is_contiguous() == own.is_contiguous()
    told = [(s, size) for s, size in zip(short.stride(), short.shape, strict=True) if size > 1]
    if short.numel():
        assert told == [(s, size) for s, size in zip(own.stride(), own.shape, strict=True) if size > 1]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ONE), tensors(dtypes=(*FLOATS, torch.int64, torch.bool)))
def test_one_tensor(operation, tensor):
    if operation in (aten.neg.default, aten.mean.default) and not tensor.is_floating_point():
        return  # torch refuses
    same_as_torch(operation, (tensor, *NUMBERS.get(operation, ())))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(REDUCED), tensors(), st.data())
def test_reductions(operation, tensor, data):
    if not tensor.dim():
        return
    dims = data.draw(st.lists(st.integers(-tensor.dim(), tensor.dim() - 1), unique_by=lambda d: d % tensor.dim()))
    same_as_torch(operation, (tensor, dims, *data.draw(st.sampled_from(((), (True,), (False,))))))


@settings(max_examples=60, deadline=None)
@given(tensors(), st.integers(0, 3))
def test_the_gradient_of_a_slice(gradient, more):
    if gradient.dim():
        sizes = [gradient.shape[0] + more, *gradient.shape[1:]]
        same_as_torch(aten.slice_backward.default, (gradient, sizes, 0, more, sizes[0], 1))


@settings(max_examples=250, deadline=None)
@given(st.sampled_from((*TWO, aten.silu_backward.default)), broadcast_shapes(), st.data())
def test_two_tensors(operation, shapes, data):
    one, other = (data.draw(tensors(shape=shape)) for shape in shapes)
    if operation is aten.silu_backward.default and one.shape != other.shape:
        return
    same_as_torch(operation, (one, other))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(TWO), tensors(), st.sampled_from((2, 0.5)))
def test_a_tensor_and_a_number(operation, tensor, number):
    same_as_torch(operation, (tensor, number))


@settings(max_examples=200, deadline=None)
@given(
    tensors(dtypes=(*FLOATS, torch.int32)),
    st.sampled_from((*FLOATS, torch.int64, None)),
    st.sampled_from(({}, {"device": "meta"}, {"layout": torch.strided}, {"memory_format": torch.contiguous_format})),
)
def test_copies_to_another_type(tensor, dtype, more):
    kwargs = {**more, **({} if dtype is None else {"dtype": dtype})}
    same_as_torch(aten._to_copy.default, (tensor,), kwargs)


@settings(max_examples=100, deadline=None)
@given(SIZES, SIZES, SIZES, st.data())
def test_matrix_products(rows, inner, columns, data):
    dtypes = (torch.float32, torch.bfloat16)
    one, other = data.draw(tensors((rows, inner), dtypes)), data.draw(tensors((inner, columns), dtypes))
    if one.dtype is other.dtype:
        same_as_torch(aten.mm.default, (one, other))
    else:
        assert SHORTCUTS[aten.mm.default]((one, other), {}) is None


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(IN_PLACE), tensors())
def test_in_place_operations_give_back_their_tensor(operation, tensor):
    args = (tensor, 2.0) if operation in (aten.add_.Tensor, aten.mul_.Tensor) else (tensor,)
    assert SHORTCUTS[operation](args, {}) is tensor


def test_every_shortcut_answers_for_plain_tensors():
    for operation, shortcut in SHORTCUTS.items():
        two = operation in (*TWO, aten.mm.default, aten.silu_backward.default, aten.add_.Tensor, aten.mul_.Tensor)
        tensor = torch.empty(4, 4, device="meta")
        more = {**NUMBERS, **dict.fromkeys(REDUCED, ([1],)), aten.slice_backward.default: ((4, 6), 1, 0, 4, 1)}
        args = (tensor, tensor) if two else (tensor, *more.get(operation, ()))
        assert shortcut(args, {}) is not None, operation


def test_tensors_on_the_host_have_none():
    host, hollow = torch.ones(2, 2), torch.empty(2, 2, device="meta")
    assert SHORTCUTS[aten.mul.Tensor]((host, host), {}) is None
    assert SHORTCUTS[aten.mul.Tensor]((hollow, host), {}) is None
    assert SHORTCUTS[aten._to_copy.default]((host,), {"device": "meta"}) is None
    assert SHORTCUTS[aten.mm.default]((host, hollow), {}) is None
