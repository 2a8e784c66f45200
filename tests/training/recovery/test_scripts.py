"""Scripts as people write them run unchanged but for the class: bit for bit undisturbed, and with an out-of-memory."""

import copy

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.training_args import OptimizerNames
from trl import SFTConfig, SFTTrainer

from autofit.step.tokenizer import byte_tokenizer
from autofit.training.recovery.redoing import Thrift
from autofit.training.recovery.trainers import AutoFitSFTTrainer, AutoFitTrainer
from tests.training.recovery.conftest import ARGUMENTS, FailingAllocations, examples, farthest, pad, same, weights

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|eos|>' }}{% endgeneration %}"
    "{% else %}{{ m['role'] + ': ' + m['content'] }}{% endif %}{% endfor %}"
)
TEXTS = [{"text": word * n} for word, n in zip(("tin ", "oak ", "rye ", "elm "), (5, 9, 3, 7), strict=True)] * 4
CHATS = [
    {"messages": [{"role": "user", "content": "hi " * n}, {"role": "assistant", "content": "yes " * (n % 3 + 1)}]}
    for n in range(1, 17)
]


def arguments(folder, kind=TrainingArguments, **more):
    return kind(output_dir=str(folder), **{**ARGUMENTS, "bf16": False, **more})


def of_llama(data=None, **more):
    def script(cls, llama, folder, model_folder):
        return cls(
            model=copy.deepcopy(llama),
            args=arguments(folder, **more),
            train_dataset=data or examples(),
            data_collator=pad,
        )

    return script


def masked_language_model(cls, llama, folder, model_folder):
    set_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = BertConfig(vocab_size=258, **sizes)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<|pad|>"})
    data = [{"input_ids": tokenizer(row["text"])["input_ids"]} for row in TEXTS]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    return cls(model=BertForMaskedLM(config), args=arguments(folder), train_dataset=data, data_collator=collator)


def image_classification(cls, llama, folder, model_folder):
    set_seed(3)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    draw = torch.Generator().manual_seed(0)
    data = [{"pixel_values": torch.randn(3, 8, 8, generator=draw), "labels": i % 2} for i in range(16)]
    return cls(model=ViTForImageClassification(config), args=arguments(folder), train_dataset=data)


def own_compute_loss(cls, llama, folder, model_folder):
    class Own(cls):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            logits = outputs.logits[:, :-1].transpose(1, 2)
            loss = nn.functional.cross_entropy(logits, labels[:, 1:], reduction="sum") / num_items_in_batch
            return (loss, outputs) if return_outputs else loss

    return Own(model=copy.deepcopy(llama), args=arguments(folder), train_dataset=examples(), data_collator=pad)


def notebook_in_four_bits(cls, llama, folder, model_folder):
    set_seed(3)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, quantization_config=settings, device_map="auto", dtype=torch.float32
    )
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return cls(model=model, args=arguments(folder, max_steps=1), train_dataset=examples(), data_collator=pad)


def sft(data=TEXTS, **more):
    def script(cls, llama, folder, model_folder):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = TEMPLATE
        return cls(
            model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
            args=arguments(folder, SFTConfig, **{"max_length": 48, **more}),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )

    return script


def streamed():
    yield from examples()


PLAIN = {
    "masked language model": masked_language_model,
    "image classification": image_classification,
    "own compute_loss": own_compute_loss,
    "streaming": of_llama(IterableDataset.from_generator(streamed)),
    "grouped by length": of_llama(train_sampling_strategy="group_by_length"),
    "NEFTune": of_llama(neftune_noise_alpha=5.0),
    "loader workers": of_llama(dataloader_num_workers=1),
    "checkpointed": of_llama(activation_checkpointing=True),
    "4 bits": notebook_in_four_bits,
}
OF_TRL = {
    "SFT": sft(),
    "SFT, packing": sft(packing=True),
    "SFT, packing, wrapped": sft(packing=True, packing_strategy="wrapped"),
    "SFT, padding-free": sft(padding_free=True, max_length=None),
    "SFT, assistant only": sft(CHATS, assistant_only_loss=True),
    "SFT, completion only": sft([{"prompt": "ab" * n, "completion": " cd" * (n % 4 + 1)} for n in range(1, 17)]),
}
SCRIPTS = {**{k: (Trainer, AutoFitTrainer, v) for k, v in PLAIN.items()}} | {
    k: (SFTTrainer, AutoFitSFTTrainer, v) for k, v in OF_TRL.items()
}


def run(trainer, mode=None):
    if mode is None:
        trainer.train()
    else:
        with mode:
            trainer.train()
    figures = [{k: v for k, v in line.items() if "loss" in line} for line in trainer.state.log_history]
    return weights(trainer), [line for line in figures if "train_runtime" not in line]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_gives_the_same_with_the_other_class(name, tiny_llama, tiny_model, tmp_path):
    stock, ours, script = SCRIPTS[name]
    expected, figures = run(script(stock, tiny_llama, tmp_path, tiny_model))
    counter = FailingAllocations()
    undisturbed = script(ours, tiny_llama, tmp_path, tiny_model)
    found, logged = run(undisturbed, counter)
    assert same(found, expected)
    assert logged == figures != []
    assert undisturbed.recovery.events == []
    for share in (0.3, 0.7):
        disturbed = script(ours, tiny_llama, tmp_path, tiny_model)
        found, logged = run(disturbed, FailingAllocations({int(share * counter.count)}))
        assert same(found, expected), share
        assert logged == figures
        assert [event["event"] for event in disturbed.recovery.events] == ["oom"]


@pytest.mark.parametrize("name", sorted(SCRIPTS.keys() - {"NEFTune"}))
def test_a_script_gives_the_same_in_smaller_pieces(name, tiny_llama, tiny_model, tmp_path):
    stock, ours, script = SCRIPTS[name]

    def without_noise(cls):
        trainer = script(cls, tiny_llama, tmp_path, tiny_model)
        # Adam would make much of what rounding does to a gradient of almost nothing.
        trainer.args.optim = OptimizerNames.SGD
        for module in trainer.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return trainer

    expected = without_noise(stock)
    start = weights(expected)
    expected.train()
    found = without_noise(ours)
    found._plan(2 if name == "image classification" else 60, Thrift.NONE)  # an image is one token
    pieces = []
    run_piece = found._run_piece
    found._run_piece = lambda model, piece, items: pieces.append(piece) or run_piece(model, piece, items)
    found.train()
    assert len(pieces) > found.state.max_steps * found.args.gradient_accumulation_steps
    assert farthest(weights(expected), weights(found), start) < 1e-5


def test_neftune_s_noise_is_as_strong_in_smaller_pieces(tiny_llama, tmp_path):
    """It is the weaker the wider a batch is."""
    widths = []
    for cls in (Trainer, AutoFitTrainer):
        trainer = of_llama(neftune_noise_alpha=5.0)(cls, tiny_llama, tmp_path, None)
        if cls is AutoFitTrainer:
            trainer._plan(60, Thrift.NONE)
        seen = []
        trainer.model.model.layers[0].register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].shape) if args[0].requires_grad else None
        )
        trainer.train()
        widths.append({shape[1] for shape in seen})
        rows = {shape[0] for shape in seen}
    assert widths[0] == widths[1]
    assert max(rows) < 4
