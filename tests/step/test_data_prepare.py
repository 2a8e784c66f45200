import json

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofit.errors import DataError
from autofit.space.facts import DataFacts
from autofit.step.data import RawData, data_facts, drop_untrained, load_data, prepare, split_eval, truncate
from autofit.step.tokenizer import byte_tokenizer


def raw(rows, dropped_rows=0) -> RawData:
    return RawData(datasets.Dataset.from_list(rows), dropped_rows, ())


def tokens(rows: list[tuple[list[int], list[int]]]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]})


def brute_trained(dataset: datasets.Dataset) -> list[int]:
    return [sum(label != -100 for label in row["labels"][1:]) for row in dataset]


sequences = st.lists(
    st.lists(st.tuples(st.integers(0, 257), st.booleans()), min_size=1, max_size=12).map(
        lambda pairs: ([token for token, _ in pairs], [token if on else -100 for token, on in pairs])
    ),
    min_size=1,
    max_size=8,
)


class TestPrepare:
    def test_only_the_completion_is_trained(self):
        prepared = prepare(raw([{"prompt": "ab", "completion": "cd"}]), byte_tokenizer())
        assert prepared.dataset.to_list() == [
            {"input_ids": [97, 98, 99, 100, 257], "labels": [-100, -100, 99, 100, 257]}
        ]
        assert prepared.facts.lengths == (5,)
        assert prepared.facts.trained_tokens == (3,)

    def test_all_text_but_its_first_token_is_trained(self):
        facts = prepare(raw([{"text": "abc"}, {"text": "é"}]), byte_tokenizer()).facts
        assert (facts.num_examples, facts.longest, facts.lengths, facts.trained_tokens) == (2, 4, (4, 3), (3, 2))

    def test_what_trains_nothing_is_dropped_and_counted(self):
        rows = [{"prompt": "p" * 20, "completion": "c"}, {"prompt": "p", "completion": "c" * 20}]
        prepared = prepare(raw(rows, dropped_rows=3), byte_tokenizer(), max_seq_length=8)
        assert prepared.facts.num_examples == len(prepared.dataset) == 1
        assert prepared.facts.longest == 8
        assert prepared.facts.dropped_examples == 4
        assert prepared.notes == ("1 of 2 sequences have nothing to train on in their first 8 tokens: dropped",)

    def test_nothing_left(self):
        with pytest.raises(DataError, match="no sequence has a token to train on in its first 4 tokens"):
            prepare(raw([{"prompt": "long enough", "completion": "c"}]), byte_tokenizer(), max_seq_length=4)

    def test_a_missing_chat_template_is_announced(self):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = None
        dialogue = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
        prepared = prepare(raw([{"messages": dialogue}]), tokenizer)
        assert tokenizer.decode(prepared.dataset[0]["input_ids"]) == "User: hi\nAssistant: yes<|eos|>"
        assert len(prepared.notes) == 1
        assert "no chat template" in prepared.notes[0]

    def test_text_needs_no_chat_template(self):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = None
        assert prepare(raw([{"text": "hi"}]), tokenizer).notes == ()
        assert tokenizer.chat_template is None

    def test_a_template_that_refuses(self):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{{ raise_exception('no system role\nhere') }}"
        with pytest.raises(DataError, match=r"rejects a conversation: no system role$"):
            prepare(raw([{"messages": [{"role": "system", "content": "x"}]}]), tokenizer)

    def test_the_embedded_set_with_nothing_dropped_or_cached(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
        prepared = prepare(load_data(None), byte_tokenizer())
        assert prepared.dataset.cache_files == []
        assert list(tmp_path.iterdir()) == []
        assert prepared.facts.longest <= 1600
        assert prepared.facts.num_examples >= 1500
        assert prepared.facts.dropped_examples == 0
        assert prepared.notes == ()
        assert brute_trained(prepared.dataset) == list(prepared.facts.trained_tokens)

    def test_facts_survive_json(self):
        facts = prepare(raw([{"text": "abc"}, {"text": "é"}]), byte_tokenizer()).facts
        assert DataFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts


class TestFacts:
    @given(sequences)
    @settings(max_examples=40, deadline=None)
    def test_agree_with_a_count_by_hand(self, rows):
        dataset = tokens(rows)
        facts = data_facts(dataset)
        assert list(facts.lengths) == [len(ids) for ids, _ in rows]
        assert facts.longest == max(facts.lengths)
        assert list(facts.trained_tokens) == brute_trained(dataset)

    def test_hold_across_batches(self):
        dataset = tokens([([1] * (1 + i % 7), [-100] + [1] * (i % 7)) for i in range(2500)])
        assert list(data_facts(dataset).trained_tokens) == [i % 7 for i in range(2500)]
        assert len(drop_untrained(dataset)) == sum(i % 7 > 0 for i in range(2500))

    def test_the_fingerprint_is_of_tokens_and_labels_alone(self, tmp_path):
        rows = [([1, 2, 3], [-100, 2, 3]), ([4, 5], [4, 5]), ([6, 7], [-100, 7])]
        dataset = tokens(rows)
        fingerprint = data_facts(dataset).fingerprint
        dataset.save_to_disk(tmp_path / "saved")
        same = [
            datasets.load_from_disk(tmp_path / "saved"),
            dataset.cast_column("labels", datasets.List(datasets.Value("int32"))),
            datasets.concatenate_datasets([dataset.select([0]), dataset.select([1, 2])]),
            tokens(rows[::-1]).select([2, 1, 0]),
        ]
        assert {data_facts(other).fingerprint for other in same} == {fingerprint}
        others = [
            rows[::-1],
            rows[:2],
            [([1, 2, 3], [-100, -100, 3]), *rows[1:]],
            [([1, 2, 9], [-100, 2, 3]), *rows[1:]],
            # The same tokens and labels end to end, cut in other places.
            [([1, 2], [-100, 2]), ([3, 4, 5], [3, 4, 5]), rows[2]],
        ]
        assert fingerprint not in {data_facts(tokens(other)).fingerprint for other in others}


class TestTruncation:
    @given(
        st.lists(st.tuples(st.text("ab", max_size=15), st.text("cd", min_size=1, max_size=15)), min_size=1, max_size=6),
        st.integers(2, 35),
    )
    @settings(max_examples=25, deadline=None)
    def test_the_cost_is_what_truncating_does(self, pairs, length):
        whole = prepare(raw([{"prompt": p, "completion": c} for p, c in pairs]), byte_tokenizer())
        before = sum(brute_trained(whole.dataset))
        try:
            after = sum(brute_trained(truncate(whole.dataset, length)))
        except DataError:
            after = 0
        cut, share = whole.facts.truncation_cost(length)
        assert cut == sum(len(row["input_ids"]) > length for row in whole.dataset)
        assert share == pytest.approx((before - after) / before)

    @given(sequences, st.integers(1, 13))
    @settings(max_examples=40, deadline=None)
    def test_keeps_the_start_and_what_trains(self, rows, length):
        cut = [(ids[:length], labels[:length]) for ids, labels in rows]
        expected = [row for row in cut if any(label != -100 for label in row[1][1:])]
        if not expected:
            with pytest.raises(DataError, match=f"first {length} tokens"):
                truncate(tokens(rows), length)
            return
        got = truncate(tokens(rows), length)
        assert [(row["input_ids"], row["labels"]) for row in got] == expected

    def test_afterwards_is_the_same_as_in_preparation(self):
        rows = [{"prompt": "p" * n, "completion": "c" * (30 - n)} for n in range(0, 30, 3)]
        late = truncate(prepare(raw(rows), byte_tokenizer()).dataset, 12)
        assert late.to_list() == prepare(raw(rows), byte_tokenizer(), 12).dataset.to_list()


class TestSplit:
    DATA = tokens([([i, i], [i, i]) for i in range(100)])

    @pytest.mark.parametrize(("fraction", "count"), [(0.1, 10), (0.001, 1), (0.999, 99)])
    def test_every_example_is_on_one_side(self, fraction, count):
        train, evaluation = split_eval(self.DATA, fraction, seed=3)
        firsts = [[row["input_ids"][0] for row in side] for side in (train, evaluation)]
        assert len(firsts[1]) == count
        assert sorted(firsts[0] + firsts[1]) == list(range(100))
        assert firsts == [sorted(side) for side in firsts]

    def test_is_a_function_of_the_seed(self):
        chosen = [split_eval(self.DATA, 0.2, seed)[1].to_list() for seed in (1, 1, 2)]
        assert chosen[0] == chosen[1] != chosen[2]

    def test_none(self):
        assert split_eval(self.DATA, 0.0, 1) == (self.DATA, None)

    def test_too_few(self):
        with pytest.raises(DataError, match="1 example cannot be split"):
            split_eval(self.DATA.select([0]), 0.5, 1)
