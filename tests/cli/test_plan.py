"""`autofit plan` as a user runs it: no GPU, no hub, no weights; real estimates in a real child."""

import json
import sys

import pytest

from autofit.cli.main import main
from autofit.space.cards import CARDS

# One rung and few rows: what is tested here is the way through, not the size of the space.
SMALL = ("--order", "batch", "--pin", "micro_batch_size=2")


@pytest.fixture
def plan(monkeypatch, capsys, tmp_path, sandbox):
    """Runs the command in this process, its children in the shared sandbox."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("autofit.trial.sandbox.Sandbox", lambda preload: _Shared(sandbox))

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["autofit", "plan", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


class _Shared:
    """The session's sandbox, not closed by those who use it."""

    def __init__(self, sandbox):
        self.sandbox = sandbox

    def __enter__(self):
        return self.sandbox

    def __exit__(self, *_):
        return None


def test_a_known_name_is_planned_with_no_files_at_all(plan, tmp_path):
    code, out, err = plan("--model", "llama-3.2-1b", "--gpu-mem", "rtx-3060", *SMALL, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert list(tmp_path.iterdir()) == []
    assert document["model"]["num_parameters"] == 1_235_814_400
    assert document["device"]["name"] == "rtx-3060"
    assert document["wish"]["max_seq_length"] == 2048
    assert any("2,048 tokens are assumed" in note for note in document["notes"])
    best = document["best"]
    assert 2 * 1_235_814_400 < best["device_bytes"] <= document["budget"]["usable_bytes"]
    assert sum(best["breakdown_bytes"].values()) == best["device_bytes"]
    assert best["tokens_per_second"] > 0
    assert best["candidate"]["micro_batch_size"] == 2
    assert document["given_up"] == []
    lengths = {point["max_seq_length"] for point in document["frontier"]}
    assert lengths == {512, 1024, 2048, 4096, 8192}
    least = document["cheapest"]
    assert least["device_bytes"] < CARDS["rtx-3060"].total_bytes
    assert CARDS[document["cheapest_card"]].total_bytes <= CARDS["rtx-3060"].total_bytes


def test_a_card_without_bfloat16_computes_in_float16(plan, tiny_model):
    _, out, _ = plan("--model", tiny_model, "--gpu-mem", "t4", *SMALL, "--json")
    assert json.loads(out)["best"]["candidate"]["dtype"] == "float16"
    _, out, _ = plan("--model", tiny_model, "--gpu-mem", "t4", *SMALL, "--dtype", "float32", "--json")
    assert json.loads(out)["best"]["candidate"]["dtype"] == "float32"


def test_it_is_told_in_100_columns_and_40_lines(plan, tiny_model):
    code, out, err = plan("--model", tiny_model, "--gpu-mem", "8GB", "--order", "checkpointing", *SMALL[2:])
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) <= 40
    assert all(len(line.rstrip()) <= 100 + len(str(tiny_model)) for line in lines)
    assert "no GPU here: planned for " in out
    assert "nothing is given up that changes the result" in out
    assert "best     2 × 512 tokens, not quantized (bfloat16), rank 16" in out
    assert "largest micro-batch at" in out
    assert "cheapest card that runs this as asked: " in out
    assert "± 25 %" in out


def test_without_a_gpu_auto_is_the_cpu(plan, tiny_model):
    code, out, _ = plan("--model", tiny_model, *SMALL, "--json")
    assert code == 0
    document = json.loads(out)
    assert document["device"]["type"] == "cpu"
    assert document["best"]["tokens_per_second"] is None
    assert document["best"]["candidate"]["dtype"] == "float32"
    assert document["best"]["candidate"]["checkpointed_layers"] == 0
    assert any("plan for the CPU" in note for note in document["notes"])


def test_data_says_how_long_sequences_are(plan, tiny_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "x" * 99}) + "\n" + json.dumps({"text": "y" * 30}) + "\n")
    code, out, _ = plan("--model", tiny_model, "--data", "rows.jsonl", "--gpu-mem", "t4", *SMALL)
    assert code == 0
    assert "2 examples, at most 100 tokens" in out
    assert "2 × 100" in out
    assert "assumed" not in out


def test_a_few_long_sequences_are_planned_alone(plan, tiny_model, tmp_path):
    lengths = [60] * 200 + [400]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in lengths))
    arguments = ("--model", tiny_model, "--data", "rows.jsonl", "--gpu-mem", "t4", *SMALL)
    code, out, err = plan(*arguments, "--json")
    assert (code, err) == (0, "")
    best = json.loads(out)["best"]["candidate"]
    assert (best["micro_batch_size"], best["pace_length"], best["max_seq_length"]) == (2, 64, 401)
    code, out, _ = plan(*arguments)
    assert "2 × 64 tokens, up to 401 alone" in out


def test_nothing_fits_is_exit_3_with_the_nearest_miss_and_a_card(plan, tiny_model):
    code, out, err = plan("--model", tiny_model, "--gpu-mem", "1200MB", *SMALL, "--pin", "quantization_bits=16")
    assert code == 3
    (line,) = err.splitlines()
    assert "nothing fits 1.20 GB; the nearest miss (micro-batch 2, length 512, " in line
    assert "the cheapest card that would run this as asked" in line
    assert "best " not in out


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ((), 2, "give --model"),
        (("--model", "lama-3-8b"), 4, "llama-3-8b"),
        (("--model", "llama-3-8b", "--max-seq-length", "8193"), 2, "beyond the model's 8192 positions"),
        (("--model", "llama-3-8b", "--gpu-mem", "rtx-4091"), 2, "rtx-4090"),
        (("--model", "llama-3-8b", "--gpu-mem", "500GB"), 2, "the largest is h200"),
        (("--model", "llama-3-8b", "--gpu-mem", "24GB", "--pin", "lora_rank"), 2, "write knob=value"),
        (("--model", "llama-3-8b", "--gpu-mem", "24GB", "--dtype", "fp8"), 2, "dtype 'fp8'"),
        (("--model", "llama-3-8b", "--gpu-mem", "24GB", "--order", "batch,luck"), 2, "'luck' is not a knob"),
        (("--model", "llama-3-70b", "--gpu-mem", "t4", "--pin", "quantization_bits=16"), 2, "the weights alone take"),
        (("--model", "llama-3-8b", "--data", "none.jsonl", "--gpu-mem", "t4"), 4, "none.jsonl"),
        (("nowhere.yaml",), 2, "nowhere.yaml does not exist"),
    ],
)
def test_a_wrong_request_is_one_line(plan, args, code, says):
    ended, out, err = plan(*args)
    assert (ended, out) == (code, "")
    (line,) = err.splitlines()
    assert line.startswith("autofit: ")
    assert says in line
