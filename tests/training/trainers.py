"""Trainers of the one step on a tiny model, and what they leave."""

import json

import torch
from datasets import Dataset

from autofit.memory.meter import open_meter
from autofit.space.candidate import Candidate
from autofit.step.optimizer import build_optimizer
from autofit.step.policy import resolve_policy
from autofit.step.step import build_step
from autofit.training.arguments import training_arguments
from autofit.training.child import RunRecord
from autofit.training.request import Schedule
from autofit.training.trainer import StepTrainer
from autofit.trial.phases import PhaseReport
from tests.conftest import CPU

CANDIDATE = Candidate(micro_batch_size=8, max_seq_length=64, dtype="float32", checkpointed_layers=2)


def schedule(**changes):
    values = {
        "global_batch_size": 8,
        "num_train_epochs": 1,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "save_steps": 100,
        "seed": 3,
        "evaluate": False,
    }
    return Schedule(**{**values, **changes})


def dataset(count=40):
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 64, (count,), generator=draw).tolist()
    ids = [torch.randint(0, 256, (n,), generator=draw).tolist() for n in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100] * (len(i) // 3) + i[len(i) // 3 :] for i in ids]})


def trainer(source, folder, candidate=CANDIDATE, **changes):
    folder.mkdir(exist_ok=True)
    policy = resolve_policy(candidate, CPU)
    step = build_step(candidate, source, policy, lora_alpha=32, seed=3)
    plan = schedule(**changes)
    record = RunRecord(folder, PhaseReport(), open_meter("cpu", None))
    made = StepTrainer(
        step,
        candidate,
        0,
        training_arguments(plan, folder, "cpu", num_eval_examples=20),
        train_dataset=dataset(),
        eval_dataset=dataset(20) if plan.evaluate else None,
        optimizers=(build_optimizer(step.model, candidate, policy, plan.learning_rate), None),
        callbacks=[record],
    )
    return made, record


def adapters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
