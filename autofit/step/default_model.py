"""The embedded default: a small Llama that two cores can train, with seeded random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


def default_config(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """About 1.1 M parameters; positions for the longest embedded pair."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
        # 1/√hidden: with transformers' 0.02 a frozen random head could never give a confident logit.
        initializer_range=0.09,
    )


def save_default_model(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Writes the untrained base and its tokenizer, as `from_pretrained` reads them. Same seed, same weights."""
    torch.manual_seed(seed)
    LlamaForCausalLM(default_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
