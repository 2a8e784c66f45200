"""`autofit estimate`: a line for each case, in order; one candidate in short, as JSON, or explained; bad input."""

import json
import re
import sys
from pathlib import Path

import pytest

from autofit.cases import ANSWERED, Case, make_case
from autofit.cli.estimate import Estimator
from autofit.cli.main import main
from autofit.memory.advice import advice
from autofit.memory.settled import unquantized_weights
from autofit.report import explain
from autofit.report.explain import grouped
from autofit.space.units import parse_bytes
from autofit.trial.phases import PhaseReport
from autofit.trial.probe import run_probe

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "estimate_accuracy-h200.json"


@pytest.fixture
def autofit(monkeypatch, capsys, tmp_path):
    """Runs `autofit estimate` in this process, on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["autofit", "estimate", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def case(model, **fields):
    return {"model": str(model), "device": "cpu", "max_seq_length": 48, "micro_batch_size": 2, **fields}


@pytest.fixture
def mixture(tmp_path):
    """A config of a small mixture of experts, without weights."""
    from transformers import Qwen3MoeConfig

    small = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_hidden_layers": 12}
    Qwen3MoeConfig(**small, **experts).save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


def test_a_file_of_cases_is_answered_line_by_line(autofit, tiny_model, tmp_path):
    cases = [
        case(tiny_model, device="cuda"),
        case(tiny_model, device="cuda", card="T4", checkpointed_layers=2, lora_targets=["q_proj", "v_proj"]),
        case(tiny_model, lora_rnk=3),
        case(tiny_model, card="t4"),
        case(tmp_path / "nowhere"),
        case(tiny_model, max_seq_length=600),
        case(tiny_model, device="cuda", step="trainer", checkpointed_layers="all"),
    ]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, cases)) + "\n")
    code, out, err = autofit("--cases", "cases.jsonl", "--output", "answers.jsonl")
    assert (code, out, err) == (0, "", "")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    default, t4, unknown, two_devices, missing, long, trainer = answers
    assert list(default) == [*Case.model_fields, *ANSWERED]
    assert "estimated for h200" in default["note"]
    assert "no GPU here" in default["note"]
    assert (default["quantization_bits"], default["dtype"], default["checkpointed_layers"]) == (4, "bfloat16", 0)
    assert default["lora_targets"] == "all-linear"
    assert default["lora_targets_used"] == [*(f"{n}_proj" for n in ("down", "gate", "k", "o", "q", "up", "v"))]
    assert default["peak_allocated_bytes"] <= default["peak_reserved_bytes"] < default["device_bytes"]
    assert sum(default["breakdown_bytes"].values()) == default["device_bytes"]
    assert default["tokens_per_second"] > 0
    assert default["bracket"] is None
    assert (t4["card"], t4["dtype"], t4["checkpointed_layers"]) == ("t4", "float16", 2)
    assert t4["lora_targets_used"] == ["q_proj", "v_proj"]
    assert (unknown["line"], "lora_rank" in unknown["error"]) == (3, True)
    assert "card t4 beside device cpu" in two_devices["error"]
    assert "nowhere" in missing["error"]
    assert "beyond the model's 512 positions" in long["note"]
    assert (trainer["loss"], trainer["checkpointed_layers"]) == ("full", 4)


def test_on_the_cpu_it_is_what_a_probe_counts(tiny_model):
    estimator = Estimator()
    changes = ({}, {"checkpointed_layers": 2, "accumulates": True}, {"quantization_bits": 4, "loss": "full"})
    for asked in (case(tiny_model, **change) for change in changes):
        one = make_case(asked)
        found = estimator.measure(one)
        request = {"asked": one.asked, "model": one.model, "trust_remote_code": False, "device": "cpu"}
        report = PhaseReport()
        measured = run_probe({**request, "gpu_mem": None, "seed": 0}, report)
        assert found["peak_allocated_bytes"] == measured["peak_allocated_bytes"]
        assert found["lora_targets_used"] == report.record["lora_targets_used"]
        assert found["checkpointed_layers"] == report.record["candidate"]["checkpointed_layers"]
        assert found["device_bytes"] == found["peak_allocated_bytes"]
        assert found["tokens_per_second"] is None


def test_a_model_that_cannot_checkpoint_says_so(tmp_path):
    from benchmarks.tiny_architectures import tiny_config

    tiny_config("ctrl").save_pretrained(tmp_path)
    found = Estimator().measure(make_case(case(tmp_path, checkpointed_layers="all")))
    assert found["checkpointed_layers"] == 0
    assert "cannot checkpoint" in found["note"]


def test_one_candidate_in_short_or_as_a_line(autofit, tiny_model):
    flags = ["--model", tiny_model, "--card", "rtx-4090", "--checkpointed-layers", 2]
    code, out, _ = autofit(*flags, "--json")
    assert code == 0
    (answer,) = map(json.loads, out.splitlines())
    assert (answer["card"], answer["checkpointed_layers"]) == ("rtx-4090", 2)
    code, out, _ = autofit(*flags)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["peak", "speed", "mostly", "note"]
    assert "fits the card's 25.76 GB" in out


def sizes(page):
    """Sizes of the page's lines with a bar, and the one that they should add up to, in bytes."""
    parts = re.findall(r"^(?!together)[a-z][a-z, ]+?  +([\d.]+ k?[MG]?B) +\d+%", page, re.MULTILINE)
    (total,) = re.findall(r"^together +([\d.]+ k?[MG]?B)", page, re.MULTILINE)
    return [0 if size == "0 B" else parse_bytes(size) for size in parts], parse_bytes(total)


@pytest.mark.parametrize("device", [("--card", "rtx-4090"), ("--device", "cpu")])
def test_the_page_adds_up_to_what_the_device_will_show(autofit, tiny_model, device):
    code, page, err = autofit("--model", tiny_model, *device, "--micro-batch-size", 4, "--explain")
    assert (code, err) == (0, "")
    parts, total = sizes(page)
    assert sum(parts) == pytest.approx(total, rel=0.01)
    for told in ("weights", "adapters", "gradients", "optimizer", "activations", "logits and loss", "token and layer"):
        assert told in page
    assert "The peak:" in page
    on_gpu = device[0] == "--card"
    assert ("nvidia-smi" in page) == on_gpu
    assert (explain.ACCURACY in page.replace("\n", " ").replace("  ", " ")) == on_gpu


def test_the_page_names_what_stays_unquantized_and_what_was_guessed(autofit, mixture):
    code, page, _ = autofit("--model", mixture, "--card", "t4", "--explain")
    assert code == 0
    assert "not quantized: model.layers.*.mlp.experts.gate_up_proj (12 of them)" in page
    assert "taken for: even routing by topk" in " ".join(page.split())


def test_unquantized_weights_are_those_of_every_layer(mixture):
    settled, _ = Estimator().estimate(make_case({"model": str(mixture), "card": "t4"}))
    kinds = {name: (count, size) for name, count, size in grouped(unquantized_weights(settled))}
    # 12 layers × 4 experts × (2 × 32) × 64 in two bytes each.
    assert kinds["model.layers.*.mlp.experts.gate_up_proj"] == (12, 12 * 4 * 64 * 64 * 2)
    assert not any("q_proj" in name for name in kinds)


def test_advice_is_what_needs_less_and_was_estimated_for_it(tiny_model):
    estimator = Estimator()
    rows = {"micro_batch_size": 8, "max_seq_length": 256, "quantization_bits": 16, "card": "t4"}
    settled, now = estimator.estimate(make_case({"model": str(tiny_model), **rows}))
    changes = advice(settled, now)
    assert len(changes) >= 2
    needs = [change.estimate.device_bytes for change in changes]
    assert needs == sorted(needs)
    assert needs[-1] < now.device_bytes
    for change in changes:
        keys = ("micro_batch_size", "checkpointed_layers", "quantization_bits", "accumulates", "optimizer")
        asked = {key: getattr(change.candidate, key) for key in keys}
        again = estimator.estimate(make_case({"model": str(tiny_model), **rows, **asked}))[1]
        assert again.device_bytes == change.estimate.device_bytes
        assert change.lossy == (change.candidate.quantization_bits == 4)


def test_the_accuracy_that_the_page_tells_is_the_measured_one():
    found = json.loads(RESULTS.read_text())["summary"]
    told = re.findall(r"([\d.]+) %", explain.ACCURACY)
    figures = [found[name][key] for name in ("allocated", "reserved") for key in ("median_percent", "worst_percent")]
    assert told == [f"{figure:.2f}" for figure in figures]
    assert f"on {found['rows']} measured rows" in explain.ACCURACY


@pytest.mark.parametrize(
    ("args", "exit_code", "says"),
    [
        ([], 2, "--cases FILE"),
        (["--cases", "none.jsonl"], 2, "none.jsonl"),
        (["--cases", "c.jsonl", "--model", "m"], 2, "--model beside --cases"),
        (["--cases", "c.jsonl", "--explain"], 2, "--explain"),
        (["--model", "llama-3-8b", "--json", "--explain"], 2, "--explain"),
        (["--model", "llama-3-8b", "--card", "rtx-4091"], 2, "rtx-4090"),
        (["--model", "llama-3-8b", "--card", "t4", "--device", "cpu"], 2, "card t4 beside device cpu"),
        (["--model", "llama-3-8b", "--device", "cpu", "--optimizer", "paged_adamw_8bit"], 2, "nowhere to page to"),
        (["--model", "llama-3-8b", "--checkpointed-layers", "33"], 2, "32 layers"),
        (["--model", "./nowhere"], 2, "nowhere is no folder"),
        (["--model", "."], 2, "no config.json"),
    ],
)
def test_a_wrong_request_is_one_line(autofit, tmp_path, args, exit_code, says):
    (tmp_path / "c.jsonl").write_text("{}\n")
    code, out, err = autofit(*args)
    assert (code, out) == (exit_code, "")
    (line,) = err.splitlines()
    assert line.startswith("autofit: ")
    assert says in line
