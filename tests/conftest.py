"""What tests share: no network, a tiny pretrained model on disk, one preloaded sandbox."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers with two spinning threads each on two cores wait for each other most of the time.
    os.environ["OMP_NUM_THREADS"] = "1"

import signal
from pathlib import Path

import pytest

from autofit.space.facts import DeviceFacts
from autofit.space.source import ModelSource


@pytest.fixture(autouse=True)
def signals_stay():
    """The command's handlers, which stay for a process's life, end with a test that calls it in this one."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


CPU = DeviceFacts(type="cpu", name="cpu", total_bytes=8 * 2**30)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A Llama of 4 layers with seeded random weights and the byte tokenizer, as `from_pretrained` reads it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from autofit.step.tokenizer import byte_tokenizer

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_source(tiny_model) -> ModelSource:
    return ModelSource(model=str(tiny_model))


@pytest.fixture(scope="session")
def sandbox():
    """One fork server with the heavy stack, for all tests that run real children."""
    from autofit.training.supervisor import PRELOAD
    from autofit.trial.sandbox import Sandbox

    with Sandbox(preload=PRELOAD) as shared:
        yield shared
