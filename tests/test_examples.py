"""The scripts of examples/ run, and differ from the stock ones by one import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from autofit.step.tokenizer import byte_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("example")
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(made / "model")
    tokenizer.save_pretrained(made / "model")
    lines = [f"line {n} of a text {'that goes on ' * (n % 5)}" for n in range(32)]
    (made / "text.txt").write_text("\n".join(lines))
    rows = [json.dumps({"prompt": "say: ", "completion": line}) for line in lines]
    (made / "rows.jsonl").write_text("\n".join(rows))
    return made


@pytest.mark.parametrize(("name", "data"), [("trainer", "text.txt"), ("sft", "rows.jsonl")])
def test_an_example_runs(folder, name, data):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(EXAMPLES / f"{name}.py"), str(folder / "model"), str(folder / data)]
    done = subprocess.run([*script, str(folder / name)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((folder / name).glob("*model.safetensors"))


@pytest.mark.parametrize(("name", "stock"), [("trainer", "Trainer"), ("sft", "SFTTrainer")])
def test_an_example_differs_from_the_stock_script_by_one_import(name, stock):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    ours = [line for line in lines if "autofit" in line.lower() and not line.startswith(('"', " "))]
    assert ours == [f"from autofit import AutoFit{stock} as {stock}"]
