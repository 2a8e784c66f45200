"""`autofit probe` on the CPU: real children, real figures, one line for each case."""

import json
import sys

import pytest

from autofit.cases import make_case
from autofit.cli.main import main
from autofit.cli.probe import Prober
from autofit.trial.child import run_trial
from autofit.trial.phases import PhaseReport


@pytest.fixture
def prober(sandbox, tmp_path):
    return Prober(sandbox, tmp_path / "probe", None, 60.0, False)


@pytest.fixture
def probe(monkeypatch, capsys, tmp_path, sandbox):
    """Runs the command in this process, its children in the shared sandbox."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("autofit.trial.sandbox.Sandbox", lambda preload: _Shared(sandbox))

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["autofit", "probe", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, [json.loads(line) for line in out.splitlines()], err

    return run


class _Shared:
    """The session's sandbox, not closed by those who use it."""

    def __init__(self, sandbox):
        self.sandbox = sandbox

    def __enter__(self):
        return self.sandbox

    def __exit__(self, *_):
        return None


def case(model, **fields):
    return {"model": str(model), "device": "cpu", "max_seq_length": 48, "micro_batch_size": 2, **fields}


def test_a_file_of_cases_is_answered_line_by_line(probe, tiny_model, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((tiny_model / "config.json").read_text())
    cases = [
        case(tiny_model),
        case(bare),
        case(bare, checkpointed_layers="all", quantization_bits=4, lora_targets=["q_proj", "v_proj"]),
        case(tiny_model, lora_rnk=3),
        case(tiny_model, device="cuda"),
        case(tmp_path / "nowhere"),
        case(tiny_model, max_seq_length=600),
    ]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, cases)) + "\n")
    code, answers, err = probe("--cases", "cases.jsonl")
    assert code == 0
    assert err == ""
    real, random, quantized, unknown, gpu, missing, long = answers
    assert "the weights on disk" in real["note"]
    assert "random weights" in random["note"]
    assert random["peak_allocated_bytes"] == real["peak_allocated_bytes"] > 0
    assert real["tokens_per_second"] > 0
    assert real["seconds"] > 0
    assert real["breakdown_bytes"] is None
    assert real["lora_targets_used"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (real["quantization_bits"], real["dtype"], real["checkpointed_layers"]) == (16, "float32", 0)
    assert quantized["lora_targets_used"] == ["q_proj", "v_proj"]
    assert (quantized["checkpointed_layers"], quantized["double_quant"]) == (4, True)
    assert quantized["peak_allocated_bytes"] < random["peak_allocated_bytes"]
    assert unknown["line"] == 4
    assert "no GPU here" in gpu["error"]
    assert "nowhere" in missing["error"]
    assert "beyond the model's 512 positions" in long["note"]


def test_a_probe_is_the_trial_that_a_search_runs(prober, tiny_model, tmp_path):
    from autofit.space.candidate import Candidate
    from autofit.space.source import ModelSource
    from autofit.trial.request import TrialRequest
    from tests.conftest import CPU

    candidate = Candidate(micro_batch_size=2, max_seq_length=48, dtype="float32", accumulates=True)
    request = TrialRequest(
        candidate=candidate,
        source=ModelSource(model=str(tiny_model)),
        device=CPU,
        cap_bytes=10**9,
        budget_bytes=10**9,
        lora_alpha=32,
        seed=0,
    )
    trial = run_trial(request.to_json(), PhaseReport())
    found = prober.measure(make_case(case(tiny_model, accumulates=True)))
    assert found["peak_allocated_bytes"] == trial["peak_allocated_bytes"]
    assert found["device_bytes"] == trial["device_bytes"]


def test_one_candidate_by_flags_under_a_cap(probe, tiny_model):
    flags = ["--model", tiny_model, "--device", "cpu", "--max-seq-length", 48, "--checkpointed-layers", 2]
    code, (fits,), _ = probe(*flags)
    assert code == 0
    assert fits["checkpointed_layers"] == 2
    code, (capped,), _ = probe(*flags, "--gpu-mem", f"{fits['peak_allocated_bytes'] - 1000}B")
    assert code == 1
    assert capped["error"].startswith("OOM: ")
    assert "out of memory" in capped["error"]
    assert 0 < capped["peak_allocated_bytes"] < fits["peak_allocated_bytes"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "--cases FILE"),
        (["--cases", "none.jsonl"], "none.jsonl"),
        (["--cases", "."], "cases ."),
        (["--cases", "c.jsonl", "--model", "m"], "--model beside --cases"),
        (["--cases", "c.jsonl", "--output", "no/such"], "output no/such"),
        (["--model", "m", "--lora-rank", "0"], "lora_rank 0"),
        (["--model", "m", "--checkpointed-layers", "most"], "all, none or a number"),
        (["--model", "./nowhere", "--device", "cpu"], "nowhere is no folder"),
        (["--model", "m", "--gpu-mem", "24GBB"], "24GB"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_2(probe, tmp_path, args, says):
    (tmp_path / "c.jsonl").write_text("{}\n")
    code, answers, err = probe(*args)
    assert code == 2
    assert answers == []
    (line,) = err.splitlines()
    assert line.startswith("autofit: ")
    assert says in line
