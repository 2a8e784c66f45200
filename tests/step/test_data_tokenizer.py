import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from autofit.errors import UsageError
from autofit.step.tokenizer import (
    BYTE_VOCAB_SIZE,
    byte_tokenizer,
    ensure_chat_template,
    load_tokenizer,
    pad_token_id,
)

BYTES = byte_tokenizer()
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
]


def words_tokenizer(extra: list[str], **special: str) -> PreTrainedTokenizerFast:
    """A vocabulary of a few words, with these tokens after them."""
    vocab = {word: index for index, word in enumerate(["hello", "world", *extra])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="hello"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(extra)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


class TestByteTokenizer:
    @given(st.text(st.characters(codec="utf-8")))
    def test_loses_nothing(self, text):
        ids = BYTES(text)["input_ids"]
        assert BYTES.decode(ids) == text

    @given(st.text(st.characters(codec="utf-8", exclude_characters="<|>")))
    def test_a_token_is_a_byte(self, text):
        assert BYTES(text)["input_ids"] == list(text.encode())

    def test_pads_with_something_else_than_it_ends_with(self):
        assert len(BYTES) == BYTE_VOCAB_SIZE <= 264
        assert {BYTES.pad_token_id, BYTES.eos_token_id} == {256, 257}

    def test_saved_beside_a_config_and_loaded_again(self, tmp_path):
        LlamaConfig(vocab_size=264).save_pretrained(tmp_path)
        BYTES.save_pretrained(tmp_path)
        for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path)).tokenizer):
            text = "naïve  <|eos|> 's , . \n\t\x00 東京"
            assert loaded(text)["input_ids"] == BYTES(text)["input_ids"]
            assert loaded.decode(loaded(text)["input_ids"]) == text
            assert (loaded.pad_token, loaded.eos_token) == (BYTES.pad_token, BYTES.eos_token)
            assert loaded.apply_chat_template(DIALOGUE, tokenize=False) == BYTES.apply_chat_template(
                DIALOGUE, tokenize=False
            )


class TestFolders:
    def test_config_alone_gets_the_byte_tokenizer_where_allowed(self, tmp_path):
        LlamaConfig().save_pretrained(tmp_path)
        loaded = load_tokenizer(str(tmp_path), allow_byte_tokenizer=True)
        assert loaded.tokenizer("é")["input_ids"] == [0xC3, 0xA9]
        assert "bytes" in loaded.notes[0]
        with pytest.raises(UsageError, match=r"has no tokenizer; --random-weights"):
            load_tokenizer(str(tmp_path))

    def test_a_vocabulary_that_is_too_small(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 200}))
        with pytest.raises(UsageError, match="vocab_size 200 is too small"):
            load_tokenizer(str(tmp_path), allow_byte_tokenizer=True)

    @pytest.mark.parametrize("config", [None, "{", "[]"])
    def test_no_config_either(self, tmp_path, config):
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        with pytest.raises(UsageError, match=r"config\.json is not a model's config"):
            load_tokenizer(str(tmp_path), allow_byte_tokenizer=True)

    def test_missing_folder_names_the_nearest(self, tmp_path):
        (tmp_path / "llama-3-8b").mkdir()
        with pytest.raises(UsageError, match=r"llama-3-8 does not exist; did you mean .*llama-3-8b\?"):
            load_tokenizer(str(tmp_path / "llama-3-8"))

    def test_a_file_is_not_a_model(self, tmp_path):
        (tmp_path / "model").touch()
        with pytest.raises(UsageError, match="is a file, not a folder"):
            load_tokenizer(str(tmp_path / "model"))

    def test_broken_tokenizer(self, tmp_path):
        LlamaConfig().save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(UsageError, match="rejects its tokenizer") as caught:
            load_tokenizer(str(tmp_path))
        assert "\n" not in str(caught.value)

    def test_no_end_token(self, tmp_path):
        words_tokenizer(["<unk>"], unk_token="<unk>").save_pretrained(tmp_path)
        with pytest.raises(UsageError, match="has no end token"):
            load_tokenizer(str(tmp_path))


class TestPadding:
    @pytest.mark.parametrize(
        ("extra", "special", "pad"),
        [
            (["<s>", "</s>", "<unk>"], {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, "<unk>"),
            (["</s>", "<unk>", "<pad>"], {"eos_token": "</s>", "unk_token": "<unk>"}, "<pad>"),
            (["<|eos|>", "<|reserved_special_token_0|>"], {"eos_token": "<|eos|>"}, "<|reserved_special_token_0|>"),
            (
                ["<|eos|>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"],
                {"eos_token": "<|eos|>", "pad_token": "<|eos|>"},
                "<|finetune_right_pad_id|>",
            ),
            # GPT-2's: one token for everything, so none is left.
            (["<|end|>"], {"eos_token": "<|end|>", "bos_token": "<|end|>", "unk_token": "<|end|>"}, None),
            (["<|end|>"], {"eos_token": "<|end|>", "pad_token": "<|end|>"}, None),
        ],
    )
    def test_is_never_the_end_token_and_adds_none(self, tmp_path, extra, special, pad):
        words_tokenizer(extra, **special).save_pretrained(tmp_path)
        before = AutoTokenizer.from_pretrained(tmp_path)
        loaded = load_tokenizer(str(tmp_path))
        tokenizer = loaded.tokenizer
        assert tokenizer.pad_token == pad
        assert pad_token_id(tokenizer) != tokenizer.eos_token_id
        assert pad_token_id(tokenizer) in tokenizer.get_vocab().values()
        assert len(tokenizer) == len(before)
        assert tokenizer("hello world hello")["input_ids"] == before("hello world hello")["input_ids"]
        assert len(loaded.notes) == 1
        assert "padding with" in loaded.notes[0]

    def test_a_pad_token_of_its_own_stays(self, tmp_path):
        words_tokenizer(["</s>", "<x>", "<unk>"], eos_token="</s>", pad_token="<x>").save_pretrained(tmp_path)
        loaded = load_tokenizer(str(tmp_path))
        assert loaded.tokenizer.pad_token == "<x>"
        assert loaded.notes == []

    def test_where_the_end_token_is_token_zero(self):
        vocab = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="a"))
        assert pad_token_id(PreTrainedTokenizerFast(tokenizer_object=vocab, eos_token="</s>")) == 1


class TestPlainTemplate:
    def test_is_announced_and_adds_no_token(self):
        tokenizer = words_tokenizer(["</s>"], eos_token="</s>")
        size = len(tokenizer)
        assert len(ensure_chat_template(tokenizer)) == 1
        assert len(tokenizer) == size
        assert ensure_chat_template(tokenizer) == []

    def test_each_answer_ends_with_the_end_token(self):
        text = BYTES.apply_chat_template(DIALOGUE, tokenize=False)
        assert text == ("System: Be brief.\nUser: Hi\nAssistant: Yes?<|eos|>\nUser: Bye\nAssistant: So long.<|eos|>")

    @pytest.mark.parametrize("turns", [2, 4])
    def test_the_prompt_starts_the_whole(self, turns):
        prompt = BYTES.apply_chat_template(DIALOGUE[:turns], tokenize=False, add_generation_prompt=True)
        assert BYTES.apply_chat_template(DIALOGUE[: turns + 1], tokenize=False).startswith(prompt)

    def test_starts_as_the_model_is_used_to(self):
        tokenizer = words_tokenizer(["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
        start = tokenizer.bos_token_id
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", start)])
        ensure_chat_template(tokenizer)
        assert tokenizer.apply_chat_template(DIALOGUE, tokenize=False).startswith("<s>System: ")
