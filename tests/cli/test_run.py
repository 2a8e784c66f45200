"""The main job as a user runs it: the command in a process of its own, its files, its signals."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from autofit.config import RunConfig
from autofit.report.words import loss_words
from autofit.training import checkpoints
from autofit.training.supervisor import execute

RUN = [sys.executable, "-m", "autofit", "run"]
FOLDER = {
    *("resolved.yaml", "plan.json", "trials.jsonl", "metrics.jsonl", "events.jsonl", "env.json"),
    *("adapter", "README.md", "report.html", "study.journal", "work"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": f"it is {i} " * (i % 9)},
            ]
        }
        for i in range(1, 120)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_json_prints_one_document_and_the_adapter_loads(tiny_model, data, tmp_path):
    command = [
        *RUN,
        "--model",
        tiny_model,
        "--data",
        data,
        "--max-steps",
        "3",
        "--json",
        "--output-dir",
        tmp_path / "run",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert "Traceback" not in done.stderr
    folder = tmp_path / "run"
    assert FOLDER | {"checkpoint-3"} == {p.name for p in folder.iterdir()}
    assert document["training"]["steps"] == 3
    assert document["plan"] == json.loads((folder / "plan.json").read_text())
    chosen, measured = document["plan"]["chosen"], document["plan"]["measured"]
    assert measured["status"] == "FIT"
    assert document["training"]["device_bytes"] <= measured["device_bytes"]
    assert chosen["micro_batch_size"] == 16
    assert not (folder / "base").exists()

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, str(folder / "adapter"))
    assert model.peft_config["default"].r == 16
    assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    assert AutoTokenizer.from_pretrained(folder / "adapter").eos_token_id == 257
    assert chosen["lora_rank"] == 16
    assert "loss" in (folder / "report.html").read_text()
    assert str(tiny_model) in (folder / "README.md").read_text()

    again = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "finished run" in again.stderr


@pytest.mark.parametrize(("share", "search"), [(1.0, "plan"), (0.5, "plan"), (0.5, "measure")])
def test_a_run_fits_a_tight_budget_on_nothing_but_the_longest(tiny_model, tmp_path, share, search):
    data = tmp_path / "long.jsonl"
    data.write_text((json.dumps({"text": "x" * 99}) + "\n") * 40)

    def run(folder, *flags):
        command = [*RUN, "--model", tiny_model, "--data", data, "--max-steps", "3", "--output-dir", tmp_path / folder]
        done = subprocess.run(list(map(str, [*command, *flags])), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        plan = json.loads((tmp_path / folder / "plan.json").read_text())
        events = [json.loads(line) for line in (tmp_path / folder / "events.jsonl").read_text().splitlines()]
        return plan, events[-1]

    plan, _ = run("roomy")
    budget = int(plan["measured"]["device_bytes"] * share)
    plan, end = run("tight", "--gpu-mem", f"{budget}B", "--search", search)
    assert plan["measured"]["device_bytes"] <= budget
    assert end["event"] == "training_end"
    assert 0.9 * plan["measured"]["device_bytes"] < end["device_bytes"] <= budget
    assert any(trial["status"] == "OOM" for trial in plan["trials"]) == (search == "measure")
    if search == "plan":
        (trial,) = plan["trials"]
        assert trial["predicted_bytes"] == plan["predicted_bytes"] == plan["measured"]["device_bytes"]


def test_the_embedded_default_trains_on_real_text_and_keeps_its_base(tmp_path):
    command = [*RUN, "--gpu-mem", "24GB", "--pin", "max_seq_length=160", "--max-steps", "8", "--output-dir", "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.5
    assert "of the trained tokens are cut" in done.stdout  # a shorter sequence is announced
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(folder / "base")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), str(folder / "adapter"))


def test_an_interrupted_run_goes_on_where_it_was(tiny_model, data, tmp_path):
    folder = tmp_path / "run"
    command = [*RUN, "--model", tiny_model, "--data", data, "--max-steps", "60", "--output-dir", folder]
    command = list(map(str, command))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        wait_for(lambda: (folder / "metrics.jsonl").is_file(), process)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    checkpoints = list(folder.glob("checkpoint-*"))
    assert len(checkpoints) == 1
    assert not (folder / "adapter").exists()
    trials = (folder / "trials.jsonl").read_text()

    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "from an earlier start" in done.stdout
    assert (folder / "trials.jsonl").read_text() == trials
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 61))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_search_that_was_stopped_goes_on(tiny_model, data, tmp_path, how):
    folder = tmp_path / "run"
    command = [*RUN, "--model", tiny_model, "--data", data, "--max-steps", "2", "--output-dir", folder]
    command = [*map(str, command), "--gpu-mem", "9MB", "--search", "measure"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        wait_for(lambda: (folder / "trials.jsonl").is_file() and (folder / "trials.jsonl").read_text(), process)
        process.send_signal(how)
        output, _ = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted" in output
        assert str(folder) in output  # how to go on
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "trial 1  OOM" in done.stdout
    assert "from an earlier start" in done.stdout
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_a_folder_that_another_process_runs_in_is_not_written_to(tiny_model, data, tmp_path):
    folder = tmp_path / "run"
    command = [*RUN, "--model", tiny_model, "--data", data, "--max-steps", "2000", "--output-dir", folder]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: (folder / "metrics.jsonl").is_file(), process)
        other = [*RUN, "--max-steps", "2000", "--output-dir", folder, "--model", tiny_model, "--data", data]
        before = {p: p.stat().st_mtime_ns for p in (folder / "work" / "data").rglob("*")}
        done = subprocess.run(list(map(str, other)), capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "another autofit is running" in done.stderr
        assert {p: p.stat().st_mtime_ns for p in (folder / "work" / "data").rglob("*")} == before
        process.kill()


def test_a_killed_controller_leaves_no_process_behind_and_the_run_goes_on(tiny_model, data, tmp_path, sandbox):
    settings = {"model": str(tiny_model), "data": str(data), "max_steps": 40, "save_steps": 4, "learning_rate": 1e-2}
    config, folder = tmp_path / "run.yaml", tmp_path / "run"
    config.write_text(json.dumps(settings))
    command = [*RUN, str(config), "--output-dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: (folder / "checkpoint-4").is_dir(), process)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2  # the fork server and the training child
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    assert not (folder / "adapter").exists()
    left = list(folder.glob("checkpoint-*"))
    assert left
    assert not any(checkpoints.verify(path) for path in left)
    adapters = []
    for name in ("run", "undisturbed"):
        execute(RunConfig(**settings, output_dir=str(tmp_path / name)), Quiet(), sandbox)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
        adapters.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(adapters[1][name], value) for name, value in adapters[0].items())


def test_sigterm_saves_and_the_run_goes_on_to_the_same_adapter(tiny_model, data, tmp_path, sandbox):
    """As a cluster's scheduler sends it, to the command alone."""
    settings = {"model": str(tiny_model), "data": str(data), "max_steps": 60, "learning_rate": 1e-2}
    settings |= {"lora_dropout": 0.1, "eval_fraction": 0.2, "global_batch_size": 4, "max_seq_length": 48}
    config, folder = tmp_path / "run.yaml", tmp_path / "run"
    config.write_text(json.dumps(settings))
    command = [*RUN, str(config), "--output-dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        wait_for(lambda: (folder / "metrics.jsonl").is_file(), process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert f"to go on: the same command with --output-dir {folder}" in output
    (checkpoint,) = folder.glob("checkpoint-*")
    assert checkpoints.verify(checkpoint) == []
    assert checkpoints.step_of(checkpoint) < 60
    (stopped,) = [event for event in events_of(folder) if event["event"] == "stopped"]
    assert (stopped["signal"], stopped["step"]) == ("SIGTERM", checkpoints.step_of(checkpoint))
    assert not (folder / "adapter").exists()
    adapters = []
    for name in ("run", "undisturbed"):
        training = execute(RunConfig(**settings, output_dir=str(tmp_path / name)), Quiet(), sandbox).training
        adapters.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(adapters[1][name], value) for name, value in adapters[0].items())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert [training["first_eval_loss"], training["last_eval_loss"]] == pytest.approx([evaluated[0], evaluated[-1]])
    assert loss_words(training).endswith(f", evaluation {evaluated[0]:.3f} → {evaluated[-1]:.3f}")


def events_of(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


class Quiet:
    """A narrator who says nothing."""

    def __getattr__(self, name):
        return lambda *args: None


@pytest.mark.soak
def test_a_run_killed_at_random_ends_as_if_it_had_not_been(tiny_model, data, tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    config = tmp_path / "often.yaml"
    config.write_text("save_steps: 2\n")
    command = [*RUN, config, "--model", tiny_model, "--data", data, "--max-steps", "60"]

    def start(name):
        log = (tmp_path / "log").open("w")
        return subprocess.Popen([*map(str, command), "--output-dir", str(tmp_path / name)], stdout=log, stderr=log)

    def result(name):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        adapter = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        return [(line["step"], line["loss"]) for line in lines if "loss" in line], adapter

    assert start("undisturbed").wait() == 0
    for _ in range(8):
        process = start("killed")
        with contextlib.suppress(subprocess.TimeoutExpired):
            wait_for(lambda: list((tmp_path / "killed").glob("metrics.jsonl")), process)
            process.wait(draw.uniform(0, 1))
        victims = psutil.Process(process.pid).children(recursive=True)
        for victim in draw.choice([victims, []]):
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        process.kill()
        process.wait()
        psutil.wait_procs(victims, timeout=10)
    process = start("killed")
    assert process.wait() == 0, (seed, (tmp_path / "log").read_text())
    (expected, weights), (found, other) = result("undisturbed"), result("killed")
    assert found == expected, seed
    assert all(torch.equal(weights[name], other[name]) for name in weights), seed


def wait_for(condition, process, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
