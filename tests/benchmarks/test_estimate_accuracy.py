"""benchmarks/estimate_accuracy.py on a few of the measured rows: within the bounds, and past them where a row lies."""

import json
from pathlib import Path

import pytest

from autofit.errors import AutofitError, UsageError

ROOT = Path(__file__).parents[2]
ROWS = (ROOT / "benchmarks" / "data" / "ground_truth_llama_3_8b.jsonl").read_text().splitlines()
# Plain, every second layer checkpointed, the Trainer with full logits.
CHOSEN = (0, 24, 26)


@pytest.fixture
def accuracy(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import estimate_accuracy

    def run(rows, *args):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        return estimate_accuracy.run([str(tmp_path / "rows.jsonl"), *args])

    return run


def rows(*lines):
    return [json.loads(ROWS[line]) for line in lines]


def test_measured_rows_are_within_the_bounds(accuracy, capsys):
    assert len(ROWS) == 46
    assert accuracy(rows(*CHOSEN)) == 0
    out = capsys.readouterr().out
    assert "within the bounds" in out
    assert "16 layers checkpointed" in out
    assert "trainer: 1 × 2,048 tokens, 32 layers checkpointed" in out


@pytest.mark.parametrize("field", ["peak_allocated", "peak_reserved"])
def test_a_row_that_lies_is_exit_5(accuracy, capsys, field):
    (row,) = rows(0)
    row[field] = int(row[field] * 1.06)
    assert accuracy([row]) == 5
    assert "PAST THE BOUNDS" in capsys.readouterr().out


def test_answers_of_a_probe_are_rows_too(accuracy, capsys, tiny_model):
    from autofit.cases import make_case
    from autofit.cli.estimate import Estimator

    case = make_case({"model": str(tiny_model), "device": "cpu", "max_seq_length": 48})
    answer = {**case.to_json(), **Estimator().measure(case)}
    failed = {**case.to_json(), "error": "OOM: out of memory"}
    assert accuracy([answer, failed]) == 0
    assert "allocated median 0.000 %" in capsys.readouterr().out


def test_a_config_beside_the_rows_is_the_model(accuracy, capsys, tiny_model, tmp_path):
    (tmp_path / "mine.config.json").write_text((tiny_model / "config.json").read_text())
    assert accuracy([{**rows(0)[0], "model": "mine", "seq": 64}]) == 5
    assert "mine sft: 1 × 64 tokens, 4 layers checkpointed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bits": 5}, "line 1: quantization_bits"),
        ({"ckpt": "most"}, "line 1: ckpt 'most'"),
        ({"model": "no-such-model-9b"}, "no-such-model-9b"),
        ({"face": "unsloth"}, "line 1: step"),
    ],
)
def test_a_row_that_makes_no_case_is_named(accuracy, change, says):
    with pytest.raises(AutofitError, match=says):
        accuracy([{**rows(0)[0], **change}])


def test_a_field_that_is_missing_is_named(accuracy):
    row = rows(0)[0]
    del row["optim"]
    with pytest.raises(UsageError, match="no optim"):
        accuracy([row])
