"""The documents say what the program does: flags, keys, knobs, exit codes, files, and the wording of its output."""

import io
import re
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from rich.console import Console

import autofit
from autofit import errors
from autofit.cli.main import app
from autofit.cli.main import main as entry_point
from autofit.config import RunConfig, load_run_config
from autofit.memory.estimate import estimate
from autofit.report.files import write_reports
from autofit.report.terminal import Terminal
from autofit.report.words import candidate_words
from autofit.search.controller import MAX_TRIALS
from autofit.search.outcome import TrialEvent
from autofit.space.candidate import LOSSY, Candidate
from autofit.space.cards import CARDS
from autofit.space.facts import DeviceFacts
from autofit.space.ladder import LOWEST_RANK, RUNGS, SHORTEST_SEQUENCE
from autofit.space.source import ModelSource
from autofit.space.target import target_device
from autofit.space.units import MIB, parse_bytes
from autofit.step.data_columns import FORMATS
from autofit.step.data_files import SUFFIXES
from autofit.training.supervisor import execute
from autofit.trial.result import TrialResult, TrialStatus

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PLAN_HEADING = "Know before running: `autofit plan`"
KNOBS_HEADING = "What it may give up, and in which order"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def section(heading: str, text: str = README) -> str:
    """What stands under a heading, up to the next one."""
    parts = re.split(r"^#{2,3} (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[heading]


def rows(text: str) -> list[list[str]]:
    """The cells of a section's one table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def code(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def run_options(name: str = "run") -> dict[str, object]:
    """A command's own options by flag."""
    command = typer.main.get_command(app).commands[name]
    return {flag: p for p in command.params for flag in p.opts if flag.startswith("--")}


# ---- configs ----


def test_there_are_configs():
    assert len(CONFIGS) >= 4


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_a_config_is_one_that_the_command_takes(file):
    config = load_run_config(str(file), {})
    assert config.model
    assert config.data
    size = re.search(r"(\d+gb)\.yaml$", file.name)
    if size:
        assert parse_bytes(config.gpu_mem) == parse_bytes(size[1])
    assert f"autofit run configs/{file.name} --data {config.data}" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_flags_win_over_a_config(file):
    config = load_run_config(str(file), {"gpu_mem": "12GB", "data": "mine.jsonl", "min": {"lora_rank": 8}})
    assert (config.gpu_mem, config.data) == ("12GB", "mine.jsonl")
    assert config.min["lora_rank"] == 8


# ---- the command ----


def test_every_flag_is_in_the_readme_and_every_flag_of_the_readme_exists():
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README))
    assert named - {"--help"} == {*run_options(), *run_options("plan")} - {"--help"}
    in_table = [flag for row in rows(section("Flags")) for flag in code(row[0])]
    assert sorted(in_table) == sorted(set(run_options()) - {"--help"})


def test_the_flags_of_plan_are_in_its_table():
    in_table = [flag for row in rows(section(PLAN_HEADING)) for flag in code(row[0])]
    assert sorted(in_table) == sorted(set(run_options("plan")) - {"--help"})


def test_the_flags_of_calibrate_are_in_its_table():
    in_table = [flag for row in rows(section("Calibrate for your card")) for flag in code(row[0])]
    assert sorted(in_table) == sorted(set(run_options("calibrate")) - {"--help"})


def test_what_is_repeatable_is_said_to_be():
    for flag, _, what in rows(section("Flags")):
        assert ("repeatable" in what) == run_options()[code(flag)[0]].multiple, flag


def test_every_key_of_a_config_is_in_the_readme_with_its_default():
    keys = {code(key)[0]: default for key, default, _ in rows(section("The YAML file"))}
    flags = {p.name for p in run_options().values()} | {"min"}
    assert set(keys) == set(RunConfig.model_fields) - flags
    for key, said in keys.items():
        default = RunConfig.model_fields[key].default
        default = ",".join(default) if isinstance(default, tuple) else default
        assert (None if said == "–" else yaml.safe_load(said)) == default, key


def test_the_defaults_in_the_flags_table_are_the_configs():
    said = {code(flag)[0]: default.strip("`") for flag, default, _ in rows(section("Flags"))}
    config = RunConfig()
    assert said["--gpu-mem"] == config.gpu_mem
    assert int(said["--seed"]) == config.seed
    assert said["--search"] == config.search
    assert {RUNGS[name] for name in said["--allow"].split(",")} == set(config.allow)
    embedded = load_run_config(None, {})
    assert f"(the demo, without model and data: {embedded.max_steps})" in section("Flags")


def test_the_exit_codes_are_those_of_the_code():
    said = {int(number): what for number, what in rows(section("Exit codes"))}
    assert set(said) == {0, 130} | {error.exit_code for error in errors.BY_NAME.values()}
    words = dict(re.findall(r"(\d+) ([a-z ]+)", " ".join(entry_point.__doc__.split()).partition("Exit codes:")[2]))
    assert set(map(int, words)) == set(said)
    for number, what in words.items():
        assert said[int(number)].startswith(what), number


def test_the_knobs_stand_in_the_order_of_the_ladder():
    knobs = [(code(name)[0], code(knob)[0], "yes" in lossy) for name, knob, lossy, _ in rows(section(KNOBS_HEADING))]
    assert knobs == [(name, knob, knob in LOSSY) for name, knob in RUNGS.items()]
    steps = {code(name)[0]: what for name, _, _, what in rows(section(KNOBS_HEADING))}
    assert f"down to {SHORTEST_SEQUENCE} tokens" in steps["seq"]
    assert f"down to rank {LOWEST_RANK}" in steps["rank"]
    assert f"{MAX_TRIALS} trials at most" in README


def test_the_examples_of_limits_are_taken_by_the_config():
    examples = re.findall(r"^autofit run … --(pin|min|allow|order) (\S+)", section(KNOBS_HEADING), flags=re.MULTILINE)
    assert {name for name, _ in examples} == {"pin", "min", "allow", "order"}
    for name, value in examples:
        knob, equals, number = value.partition("=")
        load_run_config(None, {name: {knob: int(number)} if equals else value})


def test_sizes_and_cards_are_known():
    budget = next(what for flag, _, what in rows(section("Flags")) if code(flag) == ["--gpu-mem"])
    for size in code(budget):
        if size != "auto":
            assert parse_bytes(size) > 0
    listed = re.search(r"Cards known by name: (.+?)\.\n\n", README, flags=re.DOTALL)
    assert listed is not None
    assert code(listed[1]) == list(CARDS)
    assert f"`rtx-4090` is {CARDS['rtx-4090'].total_bytes // MIB:,} MiB" in README


def test_the_kinds_of_data_are_all_named_in_their_order():
    said = [tuple(code(columns)) for columns, _ in rows(section("The data it reads"))]
    assert said == [form.required for form in FORMATS]
    assert set(SUFFIXES) <= set(code(section("The data it reads")))


# ---- the output ----


def test_the_picture_of_the_output_is_what_the_terminal_writes():
    """The lines of the README's trials, rendered again from the numbers in them."""
    wide = {"quantization_bits": 16, "max_seq_length": 1600, "dtype": "float32", "lora_rank": 16}
    lines = [line for line in README.splitlines() if line.startswith("trial ")]
    assert len(lines) == 4
    pattern = re.compile(
        r"trial (\d) +(FIT|OOM) +(\d+) ×.*? (?:worst case (?P<peak>[\d.]+ .B), (?P<speed>[\d,]+) tokens/s|"
        r"out of memory in (?P<phase>\w+), asking for (?P<asked>[\d.]+ .B) more"
        r"(?: \(would need about (?P<need>[\d.]+ .B)\))?)"
        r"(?: \(predicted (?P<predicted>[\d.]+ .B)\))?"
    )
    for line in lines:
        match = pattern.fullmatch(line)
        assert match is not None, line
        sizes = {k: parse_bytes(match[k]) if match[k] else None for k in ("peak", "asked", "need", "predicted")}
        result = TrialResult(
            status=TrialStatus(match[2]),
            phase=match["phase"] or "done",
            device_bytes=sizes["peak"],
            requested_bytes=sizes["asked"],
            projected_bytes=sizes["need"],
            tokens_per_second=float(match["speed"].replace(",", "")) if match["speed"] else None,
        )
        candidate = Candidate(micro_batch_size=int(match[3]), **wide)
        terminal = Terminal()
        terminal.console = Console(file=io.StringIO(), highlight=False, soft_wrap=True)
        terminal.trial(
            TrialEvent(
                kind="end",
                number=int(match[1]) - 1,
                candidate=candidate,
                reason="",
                predicted_bytes=sizes["predicted"],
                result=result,
            )
        )
        assert terminal.console.file.getvalue().rstrip("\n") == line


@pytest.mark.parametrize("picture", section(PLAN_HEADING).split("```text\n$ ")[1:], ids=lambda p: p.splitlines()[0])
def test_the_pictures_of_plans_are_what_is_estimated(picture):
    """The first line of each table, estimated again: near enough, since a plan derives what this traces."""
    model, gpu_mem = re.match(r"autofit plan --model (\S+) --gpu-mem (\S+)\n", picture).groups()
    device, _ = target_device(gpu_mem, DeviceFacts(type="cpu", name="CPU", total_bytes=10**9))
    table = picture.partition("micro-batch ")[2].splitlines()[1]
    cells = re.split(r" {2,}", table)
    number, length = (int(part.replace(",", "")) for part in cells[0].split(" × "))
    candidate = Candidate(
        micro_batch_size=number,
        max_seq_length=length,
        checkpointed_layers=0 if cells[1] == "–" else int(cells[1]),
        offload_activations="none" if cells[2] == "–" else cells[2],
        optimizer=cells[3],
        quantization_bits=int(cells[4]),
        dtype="bfloat16" if device.bf16 else "float16",
        accumulates=True,
    )
    assert f"best     {candidate_words(candidate)}\n" in picture
    found = estimate(candidate, ModelSource(model=model, random_weights=True), device)
    assert parse_bytes(cells[5]) == pytest.approx(found.device_bytes, rel=0.01)
    assert float(cells[6].replace(",", "")) == pytest.approx(found.tokens_per_second, rel=0.05)


def test_a_runs_folder_is_the_one_described(sandbox, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Say it: ", "completion": "it is said"}\n' * 20)
    flags = {"data": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "run"), "max_steps": 1}
    config = load_run_config(None, flags)
    with Terminal() as terminal:
        summary = execute(config, terminal, sandbox)
        write_reports(summary)
        terminal.finished(summary)
    described = {code(path)[0].rstrip("/") for path, _ in rows(section("The run's folder"))}
    found = {re.sub(r"^checkpoint-\d+$", "checkpoint-*", path.name) for path in summary.folder.iterdir()}
    assert found == described
    assert list(summary.to_json()) == re.findall(r'"(\w+)": …', section("Exit codes"))
    assert load_run_config(str(summary.folder / "resolved.yaml"), {"output_dir": config.output_dir}) == config
    trial = yaml.safe_load((summary.folder / "trials.jsonl").read_text().splitlines()[0])
    said = next(what for path, what in rows(section("The run's folder")) if code(path) == ["trials.jsonl"])
    assert set(code(said)) | set(RUNGS.values()) <= trial.keys()
    step = yaml.safe_load((summary.folder / "metrics.jsonl").read_text().splitlines()[0])
    said = next(what for path, what in rows(section("The run's folder")) if code(path) == ["metrics.jsonl"])
    assert set(code(said)) <= step.keys()
    # The fixed words of the README's picture.
    printed = capsys.readouterr().out
    picture = README.partition("```text")[2].partition("```")[0]
    for start in (
        "reading model and data",
        "device   ",
        "model    embedded (LlamaForCausalLM), 1.1 M parameters",
        "data     ",
    ):
        assert f"\n{start}" in picture
        assert f"\n{start}" in f"\n{printed}"
    for start in ("chosen   ", "         nothing was given up", "training about ", "trained  ", "adapter  "):
        assert f"\n{start}" in picture
        assert f"\n{start}" in printed


def test_every_status_is_named():
    assert all(f"`{status.value}`" in section("The run's folder") for status in TrialStatus)


# ---- the other documents ----


def test_contributing_names_every_package():
    tree = section("Where things are", CONTRIBUTING)
    named = set(re.findall(r"^ {6}(\w+(?:/|\.py))", tree, flags=re.MULTILINE))
    package = [p for p in (ROOT / "autofit").iterdir() if not p.name.startswith("__")]
    assert named == {f"{p.name}/" if p.is_dir() else p.name for p in package}
    assert all((ROOT / name).is_dir() for name in re.findall(r"^ {4}(\w+)/", tree, flags=re.MULTILINE))


def test_contributing_has_the_import_arrows_of_the_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [layer.replace("autofit.", "") for c in contracts for layer in c.get("layers", ())]
    assert f"    {' → '.join(layers)}\n" in CONTRIBUTING


def test_contributing_and_readme_name_only_files_and_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z]+)`", README + CONTRIBUTING):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for path in re.findall(r"`((?:step|search|trial|space|report|cli|training|memory)/\w+\.py)`", CONTRIBUTING):
        assert (ROOT / "autofit" / path).is_file(), path
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path


def test_the_changelog_has_this_version():
    assert f"## [{autofit.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
