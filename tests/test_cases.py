"""Lines of cases: what they mean, and that a bad one is answered and the rest go on."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofit.cases import ANSWERED, Case, answer_lines, make_case, parse_case
from autofit.errors import AccessError, UsageError

GOOD = b'{"model": "m"}'


def measured(case):
    return {"peak_allocated_bytes": 7, "quantization_bits": 4, "checkpointed_layers": 3}


def test_the_contracts_fields_and_defaults():
    case = make_case({"model": "m"}).to_json()
    assert case == {
        "model": "m",
        "device": "cuda",
        "card": None,
        "quantization_bits": None,
        "double_quant": True,
        "lora_rank": 16,
        "dtype": None,
        "lora_targets": "all-linear",
        "lora_dropout": 0.0,
        "max_seq_length": None,
        "micro_batch_size": 1,
        "checkpointed_layers": "none",
        "offload_activations": "none",
        "prepare_kbit": False,
        "accumulates": False,
        "optimizer": "adamw_torch",
        "loss": "chunked",
        "kernels": "stock",
        "layout": "padded",
        "step": "autofit",
    }


def test_an_answer_is_the_settled_case_and_what_was_found():
    (answer,) = answer_lines([GOOD], measured)
    assert list(answer) == [*make_case({"model": "m"}).to_json(), *ANSWERED]
    assert (answer["quantization_bits"], answer["checkpointed_layers"], answer["peak_allocated_bytes"]) == (4, 3, 7)
    assert answer["device_bytes"] is None
    assert parse_case(json.dumps({k: v for k, v in answer.items() if k not in ANSWERED}).encode())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{nope", "not a line of JSON"),
        (b"\xff", "not a line of JSON"),
        (b"[" * 100_000, "not a line of JSON"),
        (b"[1]", "JSON object"),
        (b"{}", "model"),
        (b'{"model": ""}', "model"),
        (b'{"model": "m", "lora_rnk": 8}', "did you mean 'lora_rank'"),
        (b'{"model": "m", "lora_rank": "8"}', "lora_rank '8'"),
        (b'{"model": "m", "lora_rank": 8.5}', "lora_rank 8.5"),
        (b'{"model": "m", "lora_rank": 0}', "lora_rank 0"),
        (b'{"model": "m", "lora_dropout": NaN}', "lora_dropout"),
        (b'{"model": "m", "double_quant": "yes"}', "double_quant"),
        (b'{"model": "m", "quantization_bits": 5}', "16, 8 or 4"),
        (b'{"model": "m", "device": "tpu"}', "'cuda' or 'cpu'"),
        (b'{"model": "m", "card": "h300"}', "h200"),
        (b'{"model": "m", "checkpointed_layers": "some"}', "all, none or a number"),
        (b'{"model": "m", "checkpointed_layers": -1}', "all, none or a number"),
        (b'{"model": "m", "checkpointed_layers": true}', "all, none or a number"),
        (b'{"model": "m", "lora_targets": []}', "all-linear or a list"),
        (b'{"model": "m", "lora_targets": [3]}', "all-linear or a list"),
        (b'{"model": "m", "optimizer": "sgd"}', "adamw_torch"),
        (b'{"model": "m", "kernels": "mine"}', "stock"),
        (b'{"model": "m", "max_seq_length": 1' + b"0" * 5000 + b"}", "not a line of JSON"),
    ],
)
def test_a_bad_line_is_answered_by_its_number_and_the_rest_go_on(line, says):
    first, bad, last = answer_lines([GOOD, b"", line, GOOD], measured)
    assert "error" not in first
    assert first == last
    assert bad.keys() == {"line", "error"}
    assert bad["line"] == 3
    assert says in bad["error"]
    assert "\n" not in bad["error"]
    assert len(bad["error"]) < 1000


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.binary(), st.dictionaries(st.sampled_from([*Case.model_fields, "x"]), st.text()))))
def test_whatever_the_lines_each_is_answered_in_order(lines):
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    raw = [line.replace(b"\n", b" ") for line in raw]
    answers = list(answer_lines(raw, measured))
    assert len(answers) == sum(bool(line.strip()) for line in raw)
    numbers = [a["line"] for a in answers if "line" in a]
    assert numbers == sorted(numbers)


def test_what_the_measurement_raises_is_the_lines_error():
    def fails(case):
        raise {"access": AccessError("gated"), "bug": RuntimeError("two\nlines")}[case.model]

    first, second = answer_lines([b'{"model": "access"}', b'{"model": "bug"}'], fails)
    assert first["error"] == "gated"
    assert second["error"] == "RuntimeError: two lines"
    assert first["model"] == "access"
    assert first["peak_allocated_bytes"] is None


def test_targets_and_cards_are_read_in_more_than_one_spelling():
    case = make_case({"model": "m", "lora_targets": "q_proj,v_proj", "card": "RTX 4090"})
    assert case.lora_targets == ("q_proj", "v_proj")
    assert case.card == "rtx-4090"


def test_flags_that_make_no_case_are_refused():
    with pytest.raises(UsageError, match="model"):
        make_case({})
