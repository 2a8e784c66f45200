"""Fine-tunes a causal language model on a text file, a line an example: transformers' Trainer, but for one import.

python examples/trainer.py MODEL TEXT_FILE OUTPUT_DIR
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

from autofit import AutoFitTrainer as Trainer

model_name, text_file, output_dir = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name)
data = load_dataset("text", data_files=text_file, split="train")
data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns="text")

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=1e-4,
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=data,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
trainer.save_model()
