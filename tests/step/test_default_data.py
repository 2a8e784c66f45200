import json
import os
import subprocess
import sys

import pytest

from autofit.step.default_data import LONGEST_PAIR, default_pairs
from autofit.step.tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, str]]:
    return default_pairs()


def test_enough_pairs_of_very_different_lengths(pairs):
    lengths = [len((pair["prompt"] + pair["completion"]).encode()) + 1 for pair in pairs]
    assert len(pairs) >= 1500
    assert max(lengths) >= 50 * min(lengths)
    assert max(lengths) <= LONGEST_PAIR == 1600
    assert all(pair["prompt"].strip() and pair["completion"].strip() for pair in pairs)


def test_a_pair_is_a_signature_and_its_docstring(pairs):
    completions = {pair["prompt"]: pair["completion"] for pair in pairs}
    assert completions["operator.add(a, b)\n"] == "Same as a + b."
    assert completions["class queue.Queue\n"].startswith("Create a queue object")
    assert completions["queue.Queue.get(self, block=True, timeout=None)\n"].startswith("Remove and return an item")


def test_cut_pairs_stay_within_their_tokens(pairs):
    tokenizer = byte_tokenizer()
    longest = max(pairs, key=lambda pair: len(pair["completion"]))
    assert len(tokenizer(longest["prompt"] + longest["completion"] + tokenizer.eos_token)["input_ids"]) <= LONGEST_PAIR


def test_same_order_in_another_process_quickly_and_nothing_imported_for_it(pairs):
    code = (
        "import json, sys, time\n"
        "from autofit.step.default_data import default_pairs\n"
        "before = set(sys.modules)\n"
        "pairs = default_pairs()\n"
        "print(json.dumps([pairs, sorted(set(sys.modules) - before), time.process_time()]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    theirs, imported, seconds = json.loads(done.stdout)
    assert theirs == pairs
    assert seconds < 3
    assert len(imported) < 10, imported
