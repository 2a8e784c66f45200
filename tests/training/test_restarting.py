"""What a training's process dies of, the next one mends: real children that are killed, exit or run out of memory."""

import json
import os
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from autofit.config import RunConfig
from autofit.errors import AutofitError, OutOfBudget, UsageError
from autofit.report.words import mended_words
from autofit.training import stalling, watching
from autofit.training.mending import MOST_WITHOUT_PROGRESS
from autofit.training.supervisor import PRELOAD, execute
from autofit.trial.sandbox import Sandbox

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a preloaded module reaches forked children only")

STEPS = 6


@pytest.fixture(scope="module")
def faulty():
    with Sandbox(preload=(*PRELOAD, "tests.training.faulty")) as sandbox:
        sandbox.start()
        assert not sandbox.notes
        yield sandbox


@pytest.fixture(scope="module")
def run(tiny_model, faulty, tmp_path_factory):
    """Runs a config with faults; returns what became of it."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"row {i} " * (1 + i % 7)}) + "\n" for i in range(40)))

    def start(*faults, folder=None, **settings):
        folder = folder or tmp_path_factory.mktemp("runs") / "run"
        (folder.parent / "faults.json").write_text(
            json.dumps([{"how": how, "step": step, "times": times} for how, step, times in faults])
        )
        config = RunConfig(
            model=str(tiny_model),
            data=str(data),
            output_dir=str(folder),
            max_steps=STEPS,
            save_steps=2,
            learning_rate=1e-2,
            **settings,
        )
        told = Told()
        summary = error = None
        try:
            summary = execute(config, told, faulty)
        except AutofitError as caught:
            error = caught
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        return SimpleNamespace(folder=folder, summary=summary, error=error, events=events, told=told.lines)

    return start


@pytest.fixture(scope="module")
def undisturbed(run):
    return run()


class Told:
    """A narrator that keeps its lines."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    warn = say

    def trial(self, event):
        pass

    def plan(self, report):
        pass

    def training(self, record):
        pass


def mended(run):
    return [event for event in run.events if event["event"] == "training_mended"]


def losses(run):
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def adapter(run):
    return load_file(run.folder / "adapter" / "adapter_model.safetensors")


def same(one, other, tolerance):
    assert losses(one).keys() == losses(other).keys() == set(range(1, STEPS + 1))
    for step, loss in losses(one).items():
        assert losses(other)[step] == pytest.approx(loss, abs=tolerance)
    weights, others = adapter(one), adapter(other)
    assert all(torch.allclose(weights[name], others[name], rtol=0, atol=tolerance) for name in weights)


@pytest.mark.parametrize("how", ["kill", "exit", "poison"])
def test_a_process_that_dies_is_replaced_without_a_trace_in_the_result(run, undisturbed, how):
    found = run((how, 4, 1))
    assert found.error is None
    same(undisturbed, found, 0)
    (event,) = mended(found)
    assert (event["how"], event["step"], event["from_step"], event["changed"]) == ("crashed", 3, 2, {})
    assert event["reason"].startswith("train: CRASHED in train: ")
    assert sum("a new process goes on from step 2" in line for line in found.told) == 1
    record = {key: event[key] for key in ("how", "step", "from_step", "changed")}
    assert found.summary.training["mended"] == [record]
    assert mended_words(found.summary.training) == ["crashed after step 3, went on from step 2: same result"]


def hasty(monkeypatch, *, grace_seconds):
    """Has a silence told of after 0.4 seconds, and ended after one."""
    for name, value in {"TOLD_SECONDS": 0.4, "TOLD_TIMES": 0, "ENDED_SECONDS": 1, "ENDED_TIMES": 0}.items():
        monkeypatch.setattr(stalling, name, value)
    monkeypatch.setattr(watching, "GRACE_SECONDS", grace_seconds)


def test_a_process_that_hangs_is_replaced_without_a_trace_in_the_result(run, undisturbed, monkeypatch):
    hasty(monkeypatch, grace_seconds=0.5)
    found = run(("hang", 4, 1))
    assert found.error is None
    same(undisturbed, found, 0)
    (event,) = mended(found)
    assert (event["how"], event["step"], event["from_step"], event["changed"]) == ("hung", 3, 2, {})
    stalled = [event for event in found.events if event["event"] == "training_stalled" and event["step"] == 3]
    assert [(event["phase"], event["ended"]) for event in stalled[:2]] == [("train", False), ("train", True)]
    assert any("in train after step 3; it may hang" in line for line in found.told)


def test_a_process_that_is_only_slow_saves_before_it_is_replaced(run, undisturbed, monkeypatch):
    hasty(monkeypatch, grace_seconds=30)
    found = run(("slow", 4, 1))
    assert found.error is None
    same(undisturbed, found, 0)
    (event,) = mended(found)
    assert (event["how"], event["step"], event["from_step"]) == ("hung", 4, 4)


def test_an_out_of_memory_is_on_record_beside_what_the_step_was_estimated_to_need(run, undisturbed):
    found = run(("within", 4, 1))
    same(undisturbed, found, 0)
    assert not mended(found)
    (event,) = (event for event in found.events if event["event"] == "oom")
    assert (event["phase"], event["step"], event["requested_bytes"]) == ("step", 3, 2048)
    estimated = event["estimated_bytes"]
    assert {"weights", "adapters", "gradients", "optimizer", "activations", "logits and loss"} <= estimated.keys()
    model = sum(estimated.get(part, 0) for part in ("weights", "adapters", "buffers"))
    assert model == pytest.approx(event["held_bytes"]["weights"], rel=0.01)
    # The winner's estimate, which a trial confirmed.
    assert sum(estimated.values()) == pytest.approx(found.summary.report.winner.predicted_bytes, rel=0.01)


def test_before_the_first_step_too_and_again_wherever_it_came_further(run, undisturbed):
    found = run(("kill", 1, 1), ("exit", 3, 1), ("kill", 6, 1))
    same(undisturbed, found, 0)
    assert [(event["step"], event["from_step"]) for event in mended(found)] == [(0, 0), (2, 2), (5, 4)]


@pytest.mark.parametrize(("how", "step"), [("budget", 4), ("memory", 1)])
def test_out_of_memory_goes_on_leaner_with_the_same_result(run, undisturbed, how, step):
    found = run((how, step, 1))
    assert found.error is None
    if how == "budget":
        (event,) = mended(found)
        assert (event["how"], event["step"], event["from_step"]) == ("out of memory", 3, 2)
        assert event["changed"] == {"micro_batch_size": [16, 8]}
        trained = json.loads((found.folder / "work" / "train" / "request.json").read_text())["request"]["candidate"]
        assert trained["micro_batch_size"] == 8
    else:
        assert mended(found)[0]["changed"] == {"micro_batch_size": [16, 8]}
    same(undisturbed, found, 1e-4)
    plan = json.loads((found.folder / "plan.json").read_text())
    assert plan["chosen"]["micro_batch_size"] == 16
    assert plan.pop("trained")["micro_batch_size"] == 8
    assert plan == found.summary.report.to_json()


def test_pins_and_order_hold_while_it_is_mended(run, undisturbed):
    found = run(("budget", 4, 1), pin={"micro_batch_size": 16}, order="checkpointing,batch", micro_batch_size=16)
    (event,) = mended(found)
    assert event["changed"] == {"checkpointed_layers": [0, 1]}
    same(undisturbed, found, 1e-4)


def test_what_never_fits_ends_with_its_error_and_the_run_can_go_on(run, undisturbed):
    found = run(("budget", 4, 99))
    assert isinstance(found.error, OutOfBudget)
    assert found.error.exit_code == 3
    assert "what changes the result stays as it is" in str(found.error)
    assert "checkpoint-2 of" in str(found.error)
    first, second = (event["changed"] for event in mended(found))
    assert first == {"micro_batch_size": [16, 8]}
    assert second == {"micro_batch_size": [8, 1], "checkpointed_layers": [0, 4]}  # straight to what needs least
    assert found.events[-1]["event"] == "training_failed"
    again = run(folder=found.folder)
    assert again.error is None
    same(undisturbed, again, 1e-4)


def test_where_nothing_lossless_is_left_the_rank_goes_before_the_first_step_and_with_consent(run):
    settings = {"pin": {"micro_batch_size": 16, "checkpointed_layers": 0}, "micro_batch_size": 16}
    settings |= {"checkpointed_layers": 0, "min": {"max_seq_length": 512}, "order": "batch,rank"}
    refused = run(("budget", 1, 1), allow=[], **settings)
    assert isinstance(refused.error, OutOfBudget)
    assert not mended(refused)
    late = run(("budget", 2, 1), **settings)
    assert isinstance(late.error, OutOfBudget)
    assert not mended(late)

    found = run(("budget", 1, 1), ("usage", 4, 1), **settings)
    (event,) = mended(found)
    assert event["changed"] == {"lora_rank": [16, 8]}
    assert any("THIS CHANGES THE RESULT" in line for line in found.told)
    other = run(folder=found.folder, **{**settings, "order": "batch", "lora_rank": 16, "gpu_mem": "7GB"})
    assert other.error is None  # the same is chosen, so the same goes on
    plan = json.loads((found.folder / "plan.json").read_text())
    assert (plan["chosen"]["lora_rank"], plan["trained"]["lora_rank"]) == (16, 8)
    assert json.loads((found.folder / "adapter" / "adapter_config.json").read_text())["r"] == 8


def test_what_dies_at_the_same_step_for_ever_is_given_up(run, undisturbed):
    found = run(("exit", 4, 99))
    assert type(found.error) is AutofitError
    assert found.error.exit_code == 1
    assert "ended with exit code 1" in str(found.error)
    assert "not for the first time after step 3" in str(found.error)
    assert "checkpoint-2 of" in str(found.error)
    assert len(mended(found)) == 1 < MOST_WITHOUT_PROGRESS
    same(undisturbed, run(folder=found.folder), 0)


def test_what_the_user_must_mend_is_not_tried_again(run):
    found = run(("usage", 4, 1))
    assert isinstance(found.error, UsageError)
    assert "not like that" in str(found.error)
    assert not mended(found)


@pytest.mark.parametrize(("before", "after"), [("auto", "11MB"), ("11MB", "auto")], ids=["smaller", "larger"])
def test_in_the_same_folder_it_goes_on_on_a_card_of_another_size(run, undisturbed, before, after):
    """What is free is searched anew for that card; what decides the result is as it was."""
    rows = {"auto": 16, "11MB": 4}
    first = run(("usage", 5, 1), gpu_mem=before)
    assert isinstance(first.error, UsageError)
    plans = [json.loads((first.folder / "plan.json").read_text())]
    again = run(folder=first.folder, gpu_mem=after)
    assert again.error is None
    assert "going on from step 4 of 6" in again.told
    plans.append(json.loads((again.folder / "plan.json").read_text()))
    assert [plan["chosen"]["micro_batch_size"] for plan in plans] == [rows[before], rows[after]]
    assert [plan["budget"]["total_bytes"] for plan in plans].index(11 * 10**6) == (after == "11MB")
    trained = json.loads((again.folder / "work" / "train" / "request.json").read_text())["request"]["candidate"]
    assert trained == plans[1]["chosen"]
    same(undisturbed, again, 1e-4)


def test_a_card_on_which_only_another_result_would_fit_is_refused(run, undisturbed):
    first = run(("usage", 5, 1))
    again = run(folder=first.folder, gpu_mem="1800KB")
    assert isinstance(again.error, UsageError)
    refused = r"holds a run at step 4 that this would not continue: quantization_bits was 16 and would be \d; ask"
    assert re.search(refused, str(again.error)), again.error
    same(undisturbed, run(folder=first.folder), 0)
