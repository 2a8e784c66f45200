"""The trials on disk: whatever kills the controller, no finished trial runs again and the answer is the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from autofit.search.controller import SearchOutcome, TrialEvent, measure
from autofit.search.study import JOURNAL, TRIALS, TrialStudy
from autofit.space.candidate import Candidate
from autofit.trial.result import TrialResult, TrialStatus

from .landscapes import Landscape, MemoryStore, budget_of, ignore, plausible

CANDIDATE = Candidate(micro_batch_size=2, max_seq_length=64)
OTHER = Candidate(micro_batch_size=1, max_seq_length=64)
FIT = TrialResult(
    status=TrialStatus.FIT, phase="done", device_bytes=7, peak_allocated_bytes=5, tokens_per_second=3.0, seconds=0.5
)

# A landscape whose search takes five trials: the wish, a rung too low, the rung, the one above, a growth.
SEED = "plausible 0 22"
DIES = """
import os, random, signal, sys
from pathlib import Path
from autofit.search.controller import measure
from autofit.search.study import TrialStudy
from tests.search.landscapes import budget_of, ignore, plausible

folder, seed, point, number = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
space, landscape = plausible(random.Random(seed))

def die(at, trial):
    if (at, trial) == (point, number):
        os.kill(os.getpid(), signal.SIGKILL)

class Dying(TrialStudy):
    def begin(self, candidate):
        die("before begin", len(self.trials()))
        return super().begin(candidate)
    def end(self, trial, result):
        die("before end", trial)
        super().end(trial, result)
        die("after end", trial)
    def _tell(self, trial, result):
        die("before tell", trial)
        super()._tell(trial, result)
        die("before trials.jsonl", trial)

class Runner:
    def run(self, candidate):
        with open(folder / "ran", "a") as file:
            print(candidate, file=file, flush=True)
        return landscape.run(candidate)

measure(space, budget_of(landscape.usable), Runner(), Dying(folder, "question"), ignore)
"""


def whole_search() -> tuple[SearchOutcome, Landscape]:
    space, landscape = plausible(random.Random(SEED))
    return measure(space, budget_of(landscape.usable), landscape, MemoryStore(), ignore), landscape


def killed(folder: Path, point: str, number: int) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", DIES, str(folder), SEED, point, str(number)]
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize(
    ("point", "number"),
    [
        ("before begin", 0),
        ("before begin", 2),
        ("before end", 0),
        ("before end", 3),
        ("before tell", 1),
        ("before trials.jsonl", 2),
        ("after end", 4),
    ],
)
def test_a_killed_search_goes_on_where_it_was(tmp_path: Path, point: str, number: int) -> None:
    expected, _ = whole_search()
    killed(tmp_path, point, number)
    ran_before = (tmp_path / "ran").read_text().splitlines() if (tmp_path / "ran").exists() else []
    events: list[TrialEvent] = []
    space, landscape = plausible(random.Random(SEED))
    study = TrialStudy(tmp_path, "question")
    outcome = measure(space, budget_of(landscape.usable), landscape, study, events.append)
    assert [(t.number, t.candidate, t.result) for t in outcome.trials] == [
        (t.number, t.candidate, t.result) for t in expected.trials
    ]
    assert outcome.winner == expected.winner
    finished = number + (point in ("before tell", "before trials.jsonl", "after end"))
    assert [e.kind for e in events].count("stored") == finished
    # Only the trial during which it died runs twice.
    assert len(ran_before) + len(landscape.runs) == len(expected.trials) + (point == "before end")
    lines = [json.loads(line) for line in (tmp_path / TRIALS).read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(len(expected.trials)))


def test_dying_twice_in_a_trial_ends_it(tmp_path: Path) -> None:
    killed(tmp_path, "before end", 1)
    killed(tmp_path, "before end", 1)
    _, landscape = whole_search()
    landscape.runs.clear()
    study = TrialStudy(tmp_path, "question")
    second = study.trials()[1]
    assert second.result.status is TrialStatus.CRASHED
    assert "died twice" in second.result.message
    space, _ = plausible(random.Random(SEED))
    outcome = measure(space, budget_of(landscape.usable), landscape, study, ignore)
    assert second.candidate not in landscape.runs
    assert outcome.winner is not None


def test_the_intent_is_on_disk_before_the_trial(tmp_path: Path) -> None:
    study = TrialStudy(tmp_path, "q")
    study.begin(CANDIDATE)
    assert '"micro_batch_size":2' in (tmp_path / JOURNAL).read_text()


def test_an_abandoned_trial_may_run_as_if_new(tmp_path: Path) -> None:
    for _ in range(4):
        study = TrialStudy(tmp_path, "q")
        study.abandon(study.begin(CANDIDATE))
    study = TrialStudy(tmp_path, "q")
    assert study.finished(CANDIDATE) is None
    assert study.begin(CANDIDATE) == 0


@pytest.mark.parametrize("torn", [b'{"op_code":4,"work', b"\0\0\0\0", b'{"op_code":\n', b"17\n"])
def test_a_torn_tail_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    study = TrialStudy(tmp_path, "q")
    study.end(study.begin(CANDIDATE), FIT)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(torn)
    again = TrialStudy(tmp_path, "q")
    assert [t.result for t in again.trials()] == [FIT]
    again.end(again.begin(OTHER), replace(FIT, tokens_per_second=None))
    assert [t.candidate for t in TrialStudy(tmp_path, "q").trials()] == [CANDIDATE, OTHER]


def test_cut_anywhere_the_journal_opens(tmp_path: Path) -> None:
    study = TrialStudy(tmp_path, "q")
    study.end(study.begin(CANDIDATE), FIT)
    whole = (tmp_path / JOURNAL).read_bytes()
    for length in range(0, len(whole) + 1, 97):
        (tmp_path / JOURNAL).write_bytes(whole[:length])
        study = TrialStudy(tmp_path, "q")
        if study.finished(CANDIDATE) is None:
            study.end(study.begin(CANDIDATE), FIT)
        assert [(t.number, t.result) for t in study.trials()] == [(0, FIT)]


def test_a_dead_controllers_lock_does_not_hold_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    TrialStudy(Path("run"), "q")
    (tmp_path / "run" / f"{JOURNAL}.lock").touch()
    began = time.monotonic()
    study = TrialStudy(Path("run"), "q")
    study.end(study.begin(CANDIDATE), FIT)
    assert time.monotonic() - began < 10


def test_another_question_begins_afresh_and_keeps_the_old_journal(tmp_path: Path) -> None:
    study = TrialStudy(tmp_path, "24 GB")
    study.end(study.begin(CANDIDATE), FIT)
    for number, question in enumerate(("16 GB", "24 GB"), start=1):
        study = TrialStudy(tmp_path, question)
        assert study.trials() == []
        assert (tmp_path / TRIALS).read_text() == ""
        assert (tmp_path / f"{JOURNAL}.{number}").exists()
        study.end(study.begin(CANDIDATE), FIT)


def test_a_line_of_trials_jsonl_is_one_flat_object(tmp_path: Path) -> None:
    study = TrialStudy(tmp_path, "q")
    study.end(study.begin(CANDIDATE), FIT)
    study.begin(OTHER)
    (line,) = (tmp_path / TRIALS).read_text().splitlines()
    row = json.loads(line)
    assert row["number"] == 0
    assert Candidate.from_json(row) == CANDIDATE
    assert TrialResult.from_json(row) == FIT
    assert {"status", "phase", "peak_allocated_bytes", "device_bytes", "tokens_per_second", "seconds"} <= row.keys()
    assert not any(isinstance(value, dict) for value in row.values())


def test_optuna_can_read_the_study(tmp_path: Path) -> None:
    study = TrialStudy(tmp_path, "q")
    study.end(study.begin(CANDIDATE), FIT)
    study.end(study.begin(OTHER), TrialResult(status=TrialStatus.OOM, phase="forward"))
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(tmp_path / JOURNAL)))
    trials = optuna.load_study(study_name=None, storage=storage).trials
    assert [t.state.name for t in trials] == ["COMPLETE", "FAIL"]
    assert trials[0].value == 3.0


def test_importing_the_controller_imports_neither_optuna_nor_torch() -> None:
    code = (
        "import sys, autofit.search.controller, autofit.search.study; "
        "sys.exit(bool({'optuna', 'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_optuna_is_silent(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from autofit.search.study import TrialStudy; "
        "TrialStudy(Path(sys.argv[1]), 'one'); TrialStudy(Path(sys.argv[1]), 'two')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
