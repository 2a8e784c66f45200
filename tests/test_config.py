"""A config is what the user asked for: every field changes something, flags win over the file."""

from pathlib import Path

import pytest

from autofit.config import EMBEDDED_PRESET, RunConfig, load_run_config
from autofit.errors import UsageError
from autofit.space.facts import DataFacts, DeviceFacts, ModelFacts
from autofit.space.source import ModelSource
from autofit.training.fitting import Fitting
from autofit.training.question import Prepared, preparation_request, search_space, training_schedule
from autofit.training.workspace import choose_folder

PREPARED = Prepared(
    source=ModelSource(model="m"),
    model=ModelFacts(
        architecture="A",
        num_parameters=10**9,
        weight_bytes_16bit=2 * 10**9,
        checkpointable_layers=8,
        max_positions=4096,
    ),
    data=DataFacts(num_examples=2, longest=900, lengths=(900, 10), trained_tokens=(800, 5)),
    device=DeviceFacts(type="cuda", name="c", total_bytes=24 * 10**9, compute_capability=(8, 9)),
    notes=(),
)

OTHER = {
    "model": "other",
    "data": "other.jsonl",
    "gpu_mem": "20GB",
    "output_dir": "elsewhere",
    "random_weights": True,
    "trust_remote_code": True,
    "micro_batch_size": 3,
    "tokens_per_micro_batch": 700,
    "max_seq_length": 256,
    "checkpointed_layers": 3,
    "offload_activations": "all",
    "quantization_bits": 8,
    "double_quant": False,
    "lora_rank": 5,
    "lora_alpha": 7,
    "lora_targets": ("q_proj",),
    "lora_dropout": 0.1,
    "optimizer": "adamw_8bit",
    "loss": "full",
    "dtype": "float32",
    "search": "measure",
    "order": ("bits",),
    "pin": {"lora_rank": 16},
    "min": {"lora_rank": 8},
    "allow": ("lora_rank",),
    "trial_timeout": 5.0,
    "global_batch_size": 4,
    "num_train_epochs": 2.0,
    "max_steps": 9,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "save_steps": 7,
    "eval_fraction": 0.5,
    "seed": 1,
}


def consequences(config: RunConfig, folder: Path):
    """Everything that a run hands on: to preparation, search, trials and training."""
    space, budget = search_space(config, PREPARED)
    fitting = Fitting(config=config, prepared=PREPARED, budget=budget, sandbox=None, work=folder, warn=print)
    return (
        choose_folder(config.output_dir or str(folder)),
        preparation_request(config, folder),
        space,
        budget,
        fitting.runner(),
        training_schedule(config),
    )


def test_every_field_is_tried_here():
    assert OTHER.keys() == RunConfig.model_fields.keys()


@pytest.mark.parametrize("field", sorted(OTHER.keys() - {"search"}))  # what `search` changes: tests/cli/test_run.py
def test_every_field_changes_something(field, tmp_path):
    four_bits = {"quantization_bits": 4} if field == "double_quant" else {}
    plain = consequences(RunConfig(**four_bits), tmp_path)
    assert consequences(RunConfig(**four_bits, **{field: OTHER[field]}), tmp_path) != plain


def test_flags_win_over_the_file_and_pins_set_values(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ngpu-mem: 24GB\nlora_rank: 32\npin: {max_seq_length: 512}\nallow: [bits]\n")
    config = load_run_config(str(file), {"gpu_mem": "16GB", "pin": {"rank": 8}, "seed": None})
    assert (config.gpu_mem, config.lora_rank, config.max_seq_length) == ("16GB", 8, 512)
    assert config.pin == {"max_seq_length": 512, "lora_rank": 8}
    assert config.allow == ("quantization_bits",)
    assert config.seed == 42


def test_allow_none_forbids_every_lossy_knob():
    assert load_run_config(None, {"allow": "none"}).allow == ()


def test_the_embedded_run_has_its_own_preset_and_nobody_elses(tmp_path):
    embedded = load_run_config(None, {})
    assert {name: getattr(embedded, name) for name in EMBEDDED_PRESET} == EMBEDDED_PRESET
    assert load_run_config(None, {"max_steps": 3}).max_steps == 3
    own = load_run_config(None, {"data": "mine.jsonl", "model": "m"})
    assert (own.max_steps, own.learning_rate) == (None, 2e-4)


def test_a_misspelt_key_names_the_file_and_the_nearest_key(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lora_alhpa: 3\n")
    with pytest.raises(UsageError, match=r"run.yaml: unknown key 'lora_alhpa'; did you mean 'lora_alpha'"):
        load_run_config(str(file), {})
