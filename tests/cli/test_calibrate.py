"""`autofit calibrate` on the CPU, with real probes: what is kept is what later estimates take."""

import json
import sys

import pytest

from autofit.cli.main import main
from autofit.memory.calibration import Calibration, calibration_file, load_calibration
from tests.conftest import CPU


@pytest.fixture
def calibrate(monkeypatch, capsys, tmp_path, sandbox):
    """Runs the command in this process, its children in the shared sandbox, the cache in a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("autofit.trial.sandbox.Sandbox", lambda preload: _Shared(sandbox))

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["autofit", "calibrate", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


class _Shared:
    """The session's sandbox, not closed by those who use it."""

    def __init__(self, sandbox):
        self.sandbox = sandbox

    def __enter__(self):
        return self.sandbox

    def __exit__(self, *_):
        return None


def test_on_a_cpu_the_estimates_are_exact_and_nothing_is_corrected(calibrate):
    code, out, err = calibrate("--json")
    assert code == 0, err
    document = json.loads(out)
    assert len(document["samples"]) == 4
    assert len({sample["model"] for sample in document["samples"]}) == 2
    assert {sample["candidate"]["checkpointed_layers"] for sample in document["samples"]} == {0, 4}
    for sample in document["samples"]:
        assert sample["measured"]["peak_allocated_bytes"] == sample["estimated"]["peak_allocated_bytes"]
        assert sample["measured"]["tokens_per_second"] > 0
        assert sample["estimated"]["tokens_per_second"] is None
    assert document["calibration"] == {"context_bytes": 0, "allocated_bytes": 0, "speed": 1.0}
    assert document["before"] == document["after"] == {"device_bytes": [0.0, 0.0], "tokens_per_second": None}
    assert document["file"] == str(calibration_file())
    assert load_calibration(CPU) == Calibration()


def test_a_model_of_ones_own_in_words(calibrate, tiny_model):
    code, out, _ = calibrate("--model", tiny_model)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("calibrating for CPU")
    assert sum(line.startswith(str(tiny_model)) for line in lines) == 2
    assert lines[-3].startswith("before   memory off by 0.00%")
    assert lines[-2].startswith("after    memory off by 0.00%")
    assert str(calibration_file()) in lines[-1]


def test_no_such_model_is_one_line(calibrate):
    code, out, err = calibrate("--model", "./nowhere", "--json")
    assert code == 2
    assert out == ""
    assert "nowhere" in err.splitlines()[-1]
    assert not calibration_file().exists()
