"""Which attention kernel a device takes, and that what runs for it takes the same memory as the real one."""

import pytest
import torch
from torch.nn import functional as F

from autofit.memory.attention import cuda_kernel
from autofit.memory.dispatch import Dispatch
from autofit.memory.ledger import Ledger
from autofit.space.facts import DeviceFacts
from tests.conftest import CPU

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
H100, A100, RTX3090, RTX4090, RTX5090, T4 = (9, 0), (8, 0), (8, 6), (8, 9), (12, 0), (7, 5)
COMMON_HEADS = (64, 96, 128, 256)


def kernel(
    capability, dtype, head=128, *, masked=False, keys=None, grad=True, dropout=0.0, causal=True, gqa=True, length=64
):
    """What is taken for 8 heads of queries and `keys` heads of keys and values."""

    def made(heads):
        return torch.empty(2, heads, length, head, dtype=dtype, device="meta", requires_grad=grad)

    mask = torch.empty(2, 1, length, length, dtype=torch.bool, device="meta") if masked else None
    query, key, value = made(8), made(keys or 8), made(keys or 8)
    return cuda_kernel(query, key, value, mask, dropout, causal and not masked, gqa, capability)


# Seen on an H100 with torch 2.11.
@pytest.mark.parametrize("head", COMMON_HEADS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys", [None, 2])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_hopper_takes_cudnn_in_half_precision(head, masked, keys, dtype):
    assert kernel(H100, dtype, head, masked=masked, keys=keys) == "cudnn"


@pytest.mark.parametrize("head", COMMON_HEADS)
@pytest.mark.parametrize("masked", [False, True])
def test_float32_takes_the_efficient_kernel_and_math_where_heads_are_grouped(head, masked):
    for capability in (H100, A100, RTX4090, RTX5090):
        assert kernel(capability, F32, head, masked=masked) == "efficient"
        assert kernel(capability, F32, head, masked=masked, keys=2) == "math"


@pytest.mark.parametrize("capability", [A100, RTX3090, RTX4090, RTX5090])
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("head", [64, 96, 128, 192])
def test_other_cards_take_flash_where_there_is_no_mask(capability, dtype, head):
    assert kernel(capability, dtype, head) == "flash"
    assert kernel(capability, dtype, head, keys=2) == "flash"
    assert kernel(capability, dtype, head, masked=True) == "efficient"
    assert kernel(capability, dtype, head, masked=True, keys=2) == "math"


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"head": 256}, "flash"),
        ({"head": 224}, "efficient"),
        ({"head": 256, "dropout": 0.1}, "efficient"),
        ({"head": 224, "dropout": 0.1, "grad": False}, "flash"),
        ({"head": 264}, "efficient"),
    ],
)
@pytest.mark.parametrize("capability", [RTX3090, RTX4090, RTX5090])
def test_cards_with_little_shared_memory_are_choosy_about_large_heads(capability, facts, expected):
    assert kernel(capability, BF16, **facts) == expected


def test_an_a100_is_not():
    assert kernel(A100, BF16, 224) == kernel(A100, BF16, 256, dropout=0.1) == "flash"


@pytest.mark.parametrize(
    ("dtype", "facts", "expected"),
    [
        (F16, {}, "efficient"),
        (F16, {"masked": True}, "efficient"),
        (F16, {"keys": 2}, "math"),
        (F16, {"head": 100}, "math"),
        (BF16, {}, "math"),
        (F32, {}, "efficient"),
    ],
)
def test_a_turing_card_has_no_flash_and_no_bfloat16(dtype, facts, expected):
    assert kernel(T4, dtype, **facts) == expected


@pytest.mark.parametrize("capability", [H100, A100, T4])
@pytest.mark.parametrize("dtype", [F16, F32])
def test_heads_that_are_broadcast_are_math(capability, dtype):
    assert kernel(capability, dtype, keys=1, gqa=False) == "math"


def test_a_head_size_that_is_no_multiple_of_8_is_padded_for_flash_and_not_for_cudnn():
    assert kernel(A100, BF16, 100) == "flash"
    assert kernel(H100, BF16, 100) == "flash"


def test_a_hopper_with_a_dropout_that_cudnn_cannot_do_takes_flash():
    assert kernel(H100, BF16, dropout=0.125) == "cudnn"
    assert kernel(H100, BF16, dropout=0.1) == "flash"


def test_one_key_and_no_query_are_no_work_for_cudnn():
    assert kernel(H100, BF16, length=1) == "flash"
    assert kernel(H100, BF16, length=0) == "math"


def test_what_is_not_of_four_dimensions_is_math():
    flat = torch.empty(8, 64, 64, dtype=BF16, device="meta")
    assert cuda_kernel(flat, flat, flat, None, 0.0, True, False, H100) == "math"


SHAPES = [
    {},
    {"heads": 1, "keys": 1},
    {"keys": 2},
    {"head": 20},
    {"value_head": 24},
    {"mask": torch.bool},
    {"mask": F32},
    {"mask": F32, "keys": 2},
    {"dropout": 0.25},
    {"causal": True},
    {"causal": True, "keys": 2},
    {"length": 1},
    {"dtype": BF16},
    {"dtype": BF16, "mask": torch.bool},
    {"grad": False},
    {"transposed": True},
]


def attention(device, kwargs):
    """Live bytes after the forward pass, at its peak, after and at the peak of the backward pass; all above before."""
    options = {"heads": 4, "keys": 4, "length": 33, "head": 16, "value_head": None, "mask": None, "dropout": 0.0}
    options |= {"causal": False, "dtype": F32, "grad": True, "transposed": False} | kwargs
    length, grad = options["length"], options["grad"]

    def made(heads, head):
        shape = (2, length, heads, head) if options["transposed"] else (2, heads, length, head)
        leaf = torch.zeros(shape, dtype=options["dtype"], device=device, requires_grad=grad)
        return leaf.transpose(1, 2) if options["transposed"] else leaf

    inputs = [made(options["heads"], options["head"]), made(options["keys"], options["head"])]
    inputs.append(made(options["keys"], options["value_head"] or options["head"]))
    mask = options["mask"] and torch.zeros(2, 1, length, length, device=device).to(options["mask"])
    with Ledger(device_type=torch.device(device).type) as ledger:
        out = F.scaled_dot_product_attention(
            *inputs, mask, options["dropout"], options["causal"], enable_gqa=options["keys"] != options["heads"]
        )
        seen = [ledger.live_bytes, ledger.peak_bytes]
        if grad:
            ledger.reset_peak()
            out.backward(torch.zeros_like(out))
            seen += [ledger.live_bytes, ledger.peak_bytes]
    return out.shape, out.dtype, out.stride(), seen


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_on_the_cpu_it_takes_what_the_real_one_takes(options):
    with Dispatch(CPU):
        hollow = attention("meta", options)
    assert hollow == attention("cpu", options)


@pytest.mark.parametrize(
    ("capability", "dtype", "masked", "kept"),
    [
        (H100, BF16, False, lambda out, rows: out + 4 * rows),  # its result, and the row sums in float32
        (A100, BF16, False, lambda out, rows: out + 4 * rows),
    ],
)
def test_a_fused_kernel_keeps_its_result_and_the_row_sums(capability, dtype, masked, kept):
    device = DeviceFacts(type="cuda", name="card", total_bytes=2**34, compute_capability=capability)
    query = torch.empty(2, 4, 256, 64, dtype=dtype, device="meta", requires_grad=True)
    with Dispatch(device), Ledger(device_type="meta") as ledger:
        out = F.scaled_dot_product_attention(query, query, query, is_causal=True)
        rows = 2 * 4 * 256
        # Random states are a few bytes more.
        assert kept(out.nbytes, rows) <= ledger.live_bytes <= kept(out.nbytes, rows) + 64


def test_math_keeps_the_scores():
    device = DeviceFacts(type="cuda", name="card", total_bytes=2**34, compute_capability=T4)
    query = torch.empty(2, 4, 256, 64, dtype=BF16, device="meta", requires_grad=True)
    with Dispatch(device), Ledger(device_type="meta") as ledger:
        out = F.scaled_dot_product_attention(query, query, query, is_causal=True)
        assert ledger.live_bytes - out.nbytes >= 2 * 4 * 256 * 256 * 2
