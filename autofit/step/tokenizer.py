"""The tokenizer: a model's own, made fit for training, or the byte-level one that comes with the package."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from autofit.errors import UsageError
from autofit.step.configs import is_bare_name
from autofit.step.data_access import did_you_mean, first_line, hub_error, is_hub_id

# "User: …", "Assistant: …" on lines of their own, the end token after each answer. The prompt for an answer ends
# before the space, which belongs to the answer's first token in most vocabularies.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
)
PAD, EOS = "<|pad|>", "<|eos|>"
BYTE_VOCAB_SIZE = 258

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
# Tokens that never stand for text, best first.
_PAD_NAMES = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|pad_token|>")
_SPARE_NAME = re.compile(r"reserved|unused|extra_|placeholder|dummy|_pad\b", re.IGNORECASE)


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer fit for training, and what the user should know about it."""

    tokenizer: PreTrainedTokenizerBase
    notes: list[str]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose token i is byte i (0…255), then `<|pad|>` and `<|eos|>`: any UTF-8 text, without loss."""
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_alphabet())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        chat_template=PLAIN_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def load_tokenizer(model: str, trust_remote_code: bool = False, allow_byte_tokenizer: bool = False) -> LoadedTokenizer:
    """The tokenizer of a model folder or hub id, padding with anything but its end token.

    With `allow_byte_tokenizer` (random weights), a folder that has none, or the bare name of a shipped config, gets the
    byte-level one.

    Raises:
        UsageError: no such folder, no tokenizer in it, one that transformers rejects or that has no end token.
        AccessError: the hub's model is gated, missing or out of reach.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return _byte_tokenizer_for(folder, allow_byte_tokenizer)
    elif is_bare_name(model) and allow_byte_tokenizer:
        return LoadedTokenizer(byte_tokenizer(), [f"{model} is known by its shapes alone: text is cut into bytes"])
    elif folder.exists() or not is_hub_id(model):
        what = "is a file, not a folder" if folder.exists() else f"does not exist{did_you_mean(folder)}"
        raise UsageError(f"model folder {folder} {what}")
    tokenizer = _from_pretrained(str(folder) if folder.is_dir() else model, folder.is_dir(), trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer of {model} has no end token; set eos_token in its tokenizer_config.json")
    return LoadedTokenizer(tokenizer, _fix_padding(tokenizer))


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with, never the end token's: the pad token's, or where there is none the first other one's.

    Labels are masked by position, so a token that also stands for text does no harm.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer.pad_token_id
    return 1 if tokenizer.eos_token_id == 0 else 0


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Gives a tokenizer that has no chat template a plain one, in place, without new tokens; returns notes on it."""
    if tokenizer.chat_template:
        return []
    start = "{{ bos_token }}" if _adds_bos(tokenizer) else ""
    tokenizer.chat_template = start + PLAIN_CHAT_TEMPLATE
    return ['the tokenizer has no chat template: conversations are written as "User: …" and "Assistant: …" lines']


def _byte_alphabet() -> list[str]:
    """The printable character that `ByteLevel` writes for each byte, by byte (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _byte_tokenizer_for(folder: Path, allowed: bool) -> LoadedTokenizer:
    if not allowed:
        raise UsageError(f"model folder {folder} has no tokenizer; --random-weights trains it with a byte-level one")
    rows = _vocab_size(folder / "config.json")
    if rows is not None and rows < BYTE_VOCAB_SIZE:
        raise UsageError(
            f"model folder {folder} has no tokenizer, and its vocab_size {rows} is too small for the byte-level one "
            f"({BYTE_VOCAB_SIZE} tokens)"
        )
    return LoadedTokenizer(byte_tokenizer(), [f"{folder} has no tokenizer: text is cut into bytes"])


def _vocab_size(config_file: Path) -> int | None:
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        return config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{config_file} is not a model's config: {first_line(error)}") from error


def _from_pretrained(model: str, is_folder: bool, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception
        access = None if is_folder else hub_error("model", model, error)
        if access is not None:
            raise access from error
        raise UsageError(f"model {model}: transformers rejects its tokenizer: {first_line(error)}") from error


def _fix_padding(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Replaces a missing pad token, or one that is the end token, in place; returns notes on it."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return []
    why = "has no pad token" if tokenizer.pad_token_id is None else "pads with its end token"
    spare = _spare_token(tokenizer)
    # Where nothing is spare, a token of the text would have to be declared special, which changes how text with it is
    # cut: the tokenizer is left without a pad token, and `pad_token_id` names one for the batches.
    tokenizer.pad_token = spare
    shown = repr(spare) if spare else f"token {pad_token_id(tokenizer)}, which the loss ignores by position"
    return [f"the tokenizer {why}: padding with {shown}"]


def _spare_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A token in the vocabulary that never stands for text and neither starts nor ends one."""
    vocabulary = tokenizer.get_vocab()
    added = sorted(tokenizer.get_added_vocab(), key=vocabulary.__getitem__)
    names = [*_PAD_NAMES, *filter(_SPARE_NAME.search, added), tokenizer.unk_token, "<unk>", "[UNK]"]
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    return next((name for name in names if name in vocabulary and vocabulary[name] not in taken), None)


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
