"""What each rank of `test_ranks_gpu` runs: a class, on a card that may be narrow for the second rank."""

import sys
from pathlib import Path

import torch
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, set_seed

from autofit.training.recovery.trainers import AutoFitTrainer
from tests.gpu.test_recovery import made
from tests.training.recovery.conftest import weights

SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 8192}


def main(folder, name, share):
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=8, num_key_value_heads=8)).float()
    trainer = made({"stock": Trainer, "ours": AutoFitTrainer}[name], model, folder)
    start = weights(trainer)
    rank, device = dist.get_rank(), torch.cuda.current_device()
    held = torch.cuda.memory_allocated()
    if rank == 1 and share < 1:
        peak = torch.load(folder / "stock-1")["peak"]
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((held + share * (peak - held)) / total)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    told = {
        "start": {n: w.cpu() for n, w in start.items()},
        "weights": {n: w.cpu() for n, w in weights(trainer).items()},
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "ooms": sum(e["event"] == "oom" for e in trainer.recovery.events) if name == "ours" else 0,
        "peak": torch.cuda.max_memory_reserved(),
        "seconds": trainer.state.log_history[-1]["train_runtime"],
    }
    torch.save(told, folder / f"{name}-{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
