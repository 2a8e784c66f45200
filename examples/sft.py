"""Fine-tunes a LoRA adapter on a JSON-lines file with `prompt` and `completion`: TRL's SFTTrainer, but for one import.

python examples/sft.py MODEL DATA.jsonl OUTPUT_DIR
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig

from autofit import AutoFitSFTTrainer as SFTTrainer

model_name, data_file, output_dir = sys.argv[1:4]

trainer = SFTTrainer(
    model=model_name,
    args=SFTConfig(
        output_dir=output_dir,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        max_length=1024,
        bf16=torch.cuda.is_available(),
        learning_rate=2e-4,
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=data_file, split="train"),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
