"""What recovery does not cover is refused by name, and what to do instead is said."""

import contextlib
import copy
import functools
import inspect
import re
from types import SimpleNamespace

import pytest
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.training_args import OptimizerNames
from trl import SFTConfig, SFTTrainer

from autofit.errors import UsageError
from autofit.training.recovery import refusals
from autofit.training.recovery.refusals import _refused_of_several
from autofit.training.recovery.trainers import AutoFitSFTTrainer, AutoFitTrainer

OF_CONFIG = "is an argument of SFTConfig now: SFTConfig({}=…)"
GONE = "is no argument any more: leave it away"
STEP_IN_BACKWARD = ["lomo", "adalomo", *(name.value for name in OptimizerNames if "layerwise" in name.value)]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"auto_find_batch_size": True}, "does not cover auto_find_batch_size: leave it away"),
        *(({"optim": name}, f"does not cover optim {name}: take") for name in STEP_IN_BACKWARD),
    ],
)
def test_what_is_not_covered_is_refused_by_name(made, given, says):
    with pytest.raises(UsageError, match=says):
        made(AutoFitTrainer, **given)


def test_of_several_processes_what_talks_within_a_step_is_refused(tiny_llama):
    def trainer(model, kind="MULTI_CPU", **given):
        arguments = SimpleNamespace(**{"world_size": 2, "torch_compile": False, "save_on_each_node": False, **given})
        return SimpleNamespace(
            args=arguments, model=model, accelerator=SimpleNamespace(distributed_type=SimpleNamespace(value=kind))
        )

    def refused(*asked, **given):
        return [what for what, (found, _) in _refused_of_several(trainer(*asked, **given)).items() if found]

    assert refused(tiny_llama) == []
    assert refused(tiny_llama, "XLA") == ["XLA with 2 processes"]
    assert refused(tiny_llama, torch_compile=True) == ["torch_compile with 2 processes"]
    assert refused(nn.Sequential(nn.SyncBatchNorm(4))) == ["SyncBatchNorm with 2 processes"]
    assert refused(tiny_llama, save_on_each_node=True) == ["save_on_each_node with 2 processes"]


@pytest.mark.parametrize(
    ("name", "became"),
    [
        ("tokenizer", "has become processing_class"),
        ("max_seq_length", OF_CONFIG.format("max_length")),
        *((name, OF_CONFIG.format(name)) for name in ("dataset_text_field", "dataset_kwargs", "dataset_num_proc")),
        *((name, OF_CONFIG.format(name)) for name in ("packing", "eval_packing", "neftune_noise_alpha")),
        ("model_init_kwargs", OF_CONFIG.format("model_init_kwargs")),
        *((name, GONE) for name in ("num_of_sequences", "dataset_batch_size", "chars_per_token")),
    ],
)
def test_arguments_of_older_releases_are_told_what_became_of_them(tiny_llama, name, became):
    with pytest.raises(UsageError, match=re.escape(f"AutoFitSFTTrainer: argument {name} {became}")):
        AutoFitSFTTrainer(model=tiny_llama, **{name: None})


def test_what_is_said_of_older_arguments_is_so():
    now = inspect.signature(SFTTrainer.__init__).parameters
    fields = SFTConfig.__dataclass_fields__
    for name, became in refusals._BEFORE.items():
        assert name not in now
        place = re.search(r"SFTConfig\((\w+)=", became)
        assert (place is not None and place[1] in fields) or (became.split()[-1] in now or name not in fields)


def test_a_model_spread_over_devices_is_refused(tiny_llama, tmp_path):
    model = copy.deepcopy(tiny_llama)
    model.hf_device_map = {"model.layers.0": "cpu", "lm_head": "disk"}
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(UsageError, match="spread over cpu, disk"):
        AutoFitTrainer(model=model, args=arguments)


def test_a_model_patched_by_unsloth_is_refused(made, monkeypatch):
    def forward(self, *args, **kwargs):
        raise NotImplementedError

    forward.__module__ = "unsloth.models.llama"
    monkeypatch.setattr(LlamaAttention, "forward", forward)
    with pytest.raises(UsageError, match="patched by Unsloth: load it with transformers"):
        made(AutoFitTrainer)


def test_a_trainer_patched_by_unsloth_is_refused(made, monkeypatch):
    def of_unsloth(name, bases=(), **values):
        return type(name, bases, {"__module__": "unsloth_compiled_cache.UnslothSFTTrainer", **values})

    class Named(AutoFitTrainer, type("_UnslothTrainer", (), {})):
        pass

    stock = type("Trainer", (Trainer,), {"__module__": "transformers.trainer"})
    patched = {of_unsloth("SFTTrainer", (AutoFitTrainer,)): "SFTTrainer", Named: "_UnslothTrainer"}
    for cls, base in patched.items():
        with pytest.raises(UsageError, match=f"does not cover {base}, patched by Unsloth: import autofit without"):
            made(cls)
    made(type("Ours", (AutoFitTrainer, stock), {}))

    def training_step(self, *args, **kwargs):
        raise NotImplementedError

    training_step.__module__ = "unsloth.models._utils"
    monkeypatch.setattr(Trainer, "training_step", training_step)
    with pytest.raises(UsageError, match=r"does not cover Trainer\.training_step, patched by Unsloth"):
        made(AutoFitTrainer)


@pytest.mark.parametrize(
    ("patch", "says"),
    [
        ({"is_fsdp_enabled": True}, "FSDP: run without it"),
        ({"is_deepspeed_enabled": True}, "DeepSpeed: run without it"),
        ({"args.n_gpu": 2}, "2 GPUs in one process: show it one, by CUDA_VISIBLE_DEVICES"),
        ({"args.world_size": 2, "accelerator.parallelism_config": "tp"}, "a model split with 2 processes: give each"),
        ({"args.world_size": 2, "is_distributed_loading_by_transformers": True}, "a model split with 2 processes"),
        ({"args.world_size": 2, "accelerator.distributed_type.value": "FSDP"}, "FSDP with 2 processes: run them under"),
        ({"args.world_size": 2, "accelerator.distributed_type.value": "DEEPSPEED"}, "DEEPSPEED with 2 processes"),
        ({}, None),
    ],
)
def test_other_ways_to_share_a_training_are_refused_by_name(made, tiny_llama, patch, says):
    """Of a trainer that says it shares, for there is no second process here."""
    arguments = {"auto_find_batch_size": False, "n_gpu": 1, "optim": "sgd", "world_size": 1, "torch_compile": False}
    trainer = SimpleNamespace(
        args=SimpleNamespace(**arguments, save_on_each_node=False),
        model=tiny_llama,
        accelerator=SimpleNamespace(distributed_type=SimpleNamespace(value="MULTI_GPU"), parallelism_config=None),
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
    )
    for place, value in patch.items():
        *path, name = place.split(".")
        setattr(functools.reduce(getattr, path, trainer), name, value)
    with contextlib.nullcontext() if says is None else pytest.raises(UsageError, match=f"does not cover {says}"):
        refusals.check_trainer(trainer)
