"""Bad input: one line with what, where and what would be valid; the right exit code; nothing written."""

import sys

import pytest

from autofit.cli.main import main
from autofit.errors import AutofitError
from autofit.training import supervisor


@pytest.fixture
def autofit(monkeypatch, capsys, tmp_path, sandbox):
    """Runs the command in this process, in an empty folder, its children in the shared sandbox."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("autofit.trial.sandbox.Sandbox", lambda preload: _Shared(sandbox))

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["autofit", "run", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


class _Shared:
    """The session's sandbox, not closed by those who use it."""

    def __init__(self, sandbox):
        self.sandbox = sandbox

    def __enter__(self):
        return self.sandbox

    def __exit__(self, *_):
        return None


def only_line(err):
    lines = [line for line in err.splitlines() if line.startswith("autofit: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--gpu-mem", "24GBB"], "24GB"),
        (["--gpu-mem", "0"], "24GB"),
        (["--gpu-mem", "0GB"], "above zero"),
        (["--gpu-mem", "rtx-4091"], "rtx-4090"),
        (["--pin", "lora_rnk=64"], "lora_rank"),
        (["--pin", "lora_rank"], "knob=value"),
        (["--pin", "lora_rank=many"], "lora_rank 'many'"),
        (["--pin", "lora_rank=0"], "lora_rank 0"),
        (["--pin", "lora_rank=8", "--min", "lora_rank=16"], "below min"),
        (["--pin", "quantization_bits=5"], "4, 8 or 16|16, 8 or 4"),
        (["--min", "speed=3"], "micro_batch_size"),
        (["--allow", "batch"], "quantization_bits"),
        (["--order", "batch,length"], "seq"),
        (["--max-steps", "0"], "max_steps"),
        (["--seed", "8589934592"], "seed"),
        (["--gpu-mem", "9" * 400 + "GB"], "no size that any device has"),
        (["--pin", "rank=²"], "lora_rank '²'"),
        (["--pin", "rank=16", "--pin", "lora_rank=8"], "given twice"),
        (["--pin", "lora_rank=99999999999999999999"], "lora_rank"),
        (["--min", "checkpointed_layers=2"], "it has no minimum"),
        (["--search", "guess"], "measure"),
        (["nowhere.yaml"], "nowhere.yaml"),
        ([".."], r"config file \.\. is a folder; a model's goes to --model"),
        ([""], "the config file's name is empty"),
        *(([flag, ""], f"{flag[2:]} is empty; give a name or a path") for flag in ("--model", "--data")),
        (["--output-dir", " "], "output_dir is empty"),
    ],
)
def test_a_wrong_request_ends_before_anything_starts(autofit, tmp_path, args, says):
    code, out, err = autofit(*args)
    assert code == 2
    import re

    assert re.search(says, only_line(err))
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gpu_mem: 24GB\nlora_rnk: 8\n", "did you mean 'lora_rank'"),
        ("gpu_mem: [1]\n", "gpu-mem"),
        ("- a\n", "key: value"),
        ("gpu_mem: {\n", "not valid YAML"),
        ("pin: 3\n", "knob: value"),
        ("global_batch_size: 0\n", "global_batch_size"),
        ("num_train_epochs: .inf\n", "num_train_epochs"),
        ("lora_rank: true\n", "lora_rank"),
    ],
)
def test_a_wrong_file_is_named(autofit, tmp_path, text, says):
    (tmp_path / "run.yaml").write_text(text)
    code, _, err = autofit("run.yaml")
    assert code == 2
    assert says in only_line(err)
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("files", "args", "exit_code", "says"),
    [
        ({}, ["--model", "./nothing"], 2, "nothing"),
        ({}, ["--model", "no-such/model"], 4, "no-such/model"),
        ({"m/readme": ""}, ["--model", "m"], 2, "m"),
        ({}, ["--data", "rows.jsonl"], 4, "rows.jsonl"),
        ({"m/config.json": '{"model_type": "llama"}'}, ["--model", "m"], 2, "no weights; --random-weights"),
        ({"d.jsonl": ""}, ["--data", "d.jsonl"], 4, "d.jsonl is empty"),
        ({"d.jsonl": '{"text": ""}\n'}, ["--data", "d.jsonl"], 4, "none of its 1 rows"),
        ({"d.jsonl": '{"a": 1}\n'}, ["--data", "d.jsonl"], 4, "messages"),
        ({"d.jsonl": '{"text": "a"}\nnope\n'}, ["--data", "d.jsonl"], 4, "d.jsonl:2"),
        ({}, ["--pin", "quantization_bits=16", "--gpu-mem", "1MB"], 2, "8 or 4 bits would fit|weights alone"),
        ({}, ["--pin", "max_seq_length=9999"], 2, "2048 positions"),
        ({}, ["--min", "lora_rank=32"], 2, "above 16, where the search starts"),
        ({}, ["--pin", "micro_batch_size=20"], 2, "raise global_batch_size"),
        ({"r.yaml": "dtype: float16\n"}, ["r.yaml"], 2, "needs a GPU"),
        ({"r.yaml": "offload_activations: all\n"}, ["r.yaml"], 2, "nowhere to offload"),
        ({"m/config.json": '{"model_type": "bert"}'}, ["--model", "m", "--random-weights"], 2, "is an encoder"),
        ({}, ["--pin", "checkpointed_layers=9"], 2, "4 layers"),
        ({"out/x": ""}, ["--output-dir", "out"], 2, "not empty"),
        ({"out": ""}, ["--output-dir", "out"], 2, "is a file"),
    ],
)
def test_what_is_found_out_while_preparing_leaves_nothing_behind(autofit, tmp_path, files, args, exit_code, says):
    import re

    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    code, _, err = autofit(*args)
    assert code == exit_code, err
    assert re.search(says, only_line(err))
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_nothing_fits_is_exit_code_3_with_the_nearest_miss(autofit, tmp_path, tiny_model):
    (tmp_path / "d.jsonl").write_text('{"text": "some words to train on, more than eight"}\n' * 20)
    code, _, err = autofit("--model", tiny_model, "--data", "d.jsonl", "--gpu-mem", "900kB", "--output-dir", "out")
    assert code == 3
    line = only_line(err)
    assert "nearest miss" in line
    assert "--gpu-mem" in line
    assert (tmp_path / "out" / "trials.jsonl").is_file()
    assert not (tmp_path / "out" / "adapter").exists()


def test_an_error_of_the_program_itself_is_one_line_too(autofit, monkeypatch):
    def broken(*_):
        raise AutofitError("the reason")

    monkeypatch.setattr(supervisor, "execute", broken)
    code, _, err = autofit("--gpu-mem", "24GB")
    assert code == 1
    assert only_line(err) == "autofit: the reason"
