"""CUDA's autocast on meta tensors: its lists, its casts, and nothing of it outside Dispatch."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from autofit.memory import autocast
from autofit.memory.dispatch import Dispatch
from autofit.memory.ledger import Ledger
from autofit.space.facts import DeviceFacts

H100 = DeviceFacts(type="cuda", name="NVIDIA H100", total_bytes=80 * 2**30, compute_capability=(9, 0))
BF16, F32 = torch.bfloat16, torch.float32
HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
MACROS = {
    "LOWER_PRECISION": "AT_FORALL_LOWER_PRECISION_FP",
    "FLOAT32": "AT_FORALL_FP32",
    "FLOAT32_RESULT": "AT_FORALL_FP32_SET_OPT_DTYPE",
    "WIDEST": "AT_FORALL_PROMOTE",
}


def of_the_header(macro):
    lines = re.search(rf"#define {macro}\(_\)((?:.*\\\n)*.*\n)", HEADER.read_text())[1]
    return [entry.replace(", ", ".") for entry in re.findall(r"_\(([\w, ]+)\)", lines)]


@pytest.mark.parametrize("kind", MACROS)
def test_the_lists_are_those_of_the_installed_header(kind):
    assert getattr(autocast, kind) == of_the_header(MACROS[kind])


@pytest.mark.parametrize("kind", MACROS)
def test_every_name_is_an_operation_of_this_torch(kind):
    assert None not in map(autocast.overload, getattr(autocast, kind))


@pytest.fixture
def gpu():
    with Dispatch(H100):
        yield


def meta(*shape, dtype=F32, grad=False):
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)


RESULTS = {
    "linear": (lambda a, b: torch.nn.functional.linear(a, b), BF16),
    "matmul": (lambda a, b: a @ b.T, BF16),
    "einsum": (lambda a, b: torch.einsum("ij,kj->ik", a, b), BF16),
    "softmax": (lambda a, b: a.softmax(-1), F32),
    "softmax told a type": (lambda a, b: a.softmax(-1, dtype=torch.float16), torch.float16),
    "sum": (lambda a, b: a.sum(), F32),
    "cumsum": (lambda a, b: a.cumsum(0), F32),
    "layer_norm": (lambda a, b: torch.nn.functional.layer_norm(a, (8,)), F32),
    "rsqrt": (lambda a, b: a.rsqrt(), F32),
    "pow": (lambda a, b: a.pow(2), F32),
    "cross_entropy": (lambda a, b: torch.nn.functional.cross_entropy(a, torch.zeros_like(a[:, 0]).long()), F32),
    "addcmul": (lambda a, b: torch.addcmul(a, a, b[:1]), None),
    "mul": (lambda a, b: a * b[:1], None),
    "silu": (lambda a, b: torch.nn.functional.silu(a), None),
}


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("name", RESULTS)
def test_results_have_the_types_that_a_gpu_gives_them(gpu, name, dtype):
    operation, expected = RESULTS[name]
    with torch.autocast("cuda", dtype=BF16):
        assert operation(meta(4, 8, dtype=dtype), meta(6, 8, dtype=dtype)).dtype is (expected or dtype)


def test_the_widest_input_decides_what_is_promoted(gpu):
    with torch.autocast("cuda", dtype=BF16):
        assert torch.addcmul(meta(4, dtype=BF16), meta(4), meta(4, dtype=BF16)).dtype is F32


def test_double_and_integers_are_left_alone(gpu):
    with torch.autocast("cuda", dtype=BF16):
        assert (meta(4, 4, dtype=torch.float64) @ meta(4, 4, dtype=torch.float64)).dtype is torch.float64
        assert meta(4, dtype=torch.int64).sum().dtype is torch.int64


def test_autocast_can_be_switched_off_within(gpu):
    with torch.autocast("cuda", dtype=BF16):
        with torch.autocast("cuda", enabled=False):
            assert (meta(4, 4) @ meta(4, 4)).dtype is F32
        assert (meta(4, 4) @ meta(4, 4)).dtype is BF16
    assert (meta(4, 4) @ meta(4, 4)).dtype is F32


def test_what_models_ask_about_meta_is_answered_for_cuda(gpu):
    with torch.autocast("meta", dtype=BF16):
        assert torch.is_autocast_enabled("meta")
        assert torch.get_autocast_dtype("meta") is BF16
    assert not torch.is_autocast_enabled("meta")
    assert torch.amp.is_autocast_available("meta")


def test_tensors_on_the_host_are_no_part_of_it(gpu):
    with torch.autocast("cuda", dtype=BF16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is F32
        assert torch.ones(2, 2, dtype=torch.float16).softmax(-1).dtype is torch.float16


def test_casts_are_recorded_by_autograd(gpu):
    weight = meta(6, 8, grad=True)
    with torch.autocast("cuda", dtype=BF16):
        out = torch.nn.functional.linear(meta(4, 8), weight)
    assert out.dtype is BF16
    out.sum().backward()
    assert weight.grad.dtype is F32
    assert weight.grad.shape == weight.shape


def test_recomputation_casts_as_the_first_pass_did(gpu):
    seen = []

    def layer(rows, weight):
        out = torch.nn.functional.linear(rows, weight)
        seen.append(out.dtype)
        return out.float().softmax(-1)

    weight = meta(8, 8, grad=True)
    with torch.autocast("cuda", dtype=BF16):
        out = checkpoint(layer, meta(4, 8, grad=True), weight, use_reentrant=False)
    out.sum().backward()
    assert seen == [BF16, BF16]
    assert weight.grad.dtype is F32


class Held(Ledger):
    """Live bytes on meta."""

    def __init__(self):
        super().__init__(device_type="meta")


def test_leaf_weights_are_cast_once_for_each_outermost_context(gpu):
    rows, weight, buffer = meta(4, 8), meta(8, 8, grad=True), meta(8, 8)
    with Held() as held, torch.autocast("cuda", dtype=BF16):
        outs = [torch.nn.functional.linear(rows, weight) for _ in range(3)]
        kept = held.live_bytes - sum(out.nbytes for out in outs)
        # One cast of the weight, kept; those of the rows live as long as autograd wants them: three.
        assert kept == 2 * weight.numel() + 3 * 2 * rows.numel()
        with torch.autocast("cuda", dtype=BF16):
            torch.nn.functional.linear(rows, weight)
        assert held.live_bytes - sum(out.nbytes for out in outs) == kept
        del outs
        assert held.live_bytes == 2 * weight.numel()
        torch.nn.functional.linear(rows, buffer)
        assert held.live_bytes == 2 * weight.numel()  # what needs no gradient is not kept
        del rows
    assert held.live_bytes == 0


def test_after_dispatch_meta_tensors_are_as_they_were():
    before = (torch.autocast.__init__, torch.autocast.__exit__, torch.is_autocast_enabled, torch.tensor)
    with Dispatch(H100):
        assert torch.tensor is not before[3]
    assert (torch.autocast.__init__, torch.autocast.__exit__, torch.is_autocast_enabled, torch.tensor) == before
    out = torch.nn.functional.linear(meta(4, 8, dtype=BF16), meta(8, 8, dtype=BF16))
    assert out.dtype is BF16
    assert meta(4, dtype=BF16).softmax(-1).dtype is BF16
    assert torch.ones(4, dtype=BF16).exp().dtype is BF16


def test_an_error_inside_leaves_nothing_behind():
    with pytest.raises(ZeroDivisionError), Dispatch(H100), torch.autocast("cuda", dtype=BF16):
        1 / 0  # noqa: B018
    assert not torch.is_autocast_enabled("cuda")
    assert (meta(2, 2) @ meta(2, 2)).dtype is F32


def test_dropout_keeps_a_byte_an_element_as_the_gpu_does(gpu):
    rows = meta(64, 64, grad=True)
    with Held() as held:
        out = torch.nn.functional.dropout(rows, 0.1)
        assert held.live_bytes - out.nbytes == rows.numel()
