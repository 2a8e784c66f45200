import csv
import json
import os
import subprocess
import sys
import textwrap

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from autofit.errors import AccessError, DataError
from autofit.step.data import load_data

PAIRS = [{"prompt": 'a\u2028b, "c"\nd', "completion": "one"}, {"prompt": "", "completion": "two"}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(path, rows):
    path.write_text(json.dumps(rows))


def write_json_data(path, rows):
    path.write_text(json.dumps({"version": 1, "data": rows}))


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_saved(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path)


def write_saved_splits(path, rows):
    other = datasets.Dataset.from_list([{"prompt": "x", "completion": "for testing"}])
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows), "test": other}).save_to_disk(path)


def write_folder(path, rows):
    path.mkdir()
    (path / "README.md").write_text("# not data")
    write_jsonl(path / "b.jsonl", rows[1:])
    write_csv(path / "a.csv", rows[:1])


KINDS = {
    "d.jsonl": write_jsonl,
    "lines.json": write_jsonl,
    "d.json": write_json,
    "data.json": write_json_data,
    "d.csv": write_csv,
    "D.PARQUET": write_parquet,
    "saved": write_saved,
    "splits": write_saved_splits,
    "folder": write_folder,
}


class TestFiles:
    @pytest.mark.parametrize("name", KINDS)
    def test_every_kind_reads_the_same(self, tmp_path, name):
        KINDS[name](tmp_path / name, PAIRS)
        raw = load_data(str(tmp_path / name))
        assert raw.dataset.to_list() == PAIRS
        assert (raw.dropped_rows, raw.notes, raw.conversational) == (0, (), False)
        assert raw.dataset.cache_files == []

    def test_test_files_beside_train_files_are_left_alone_and_named(self, tmp_path):
        for name in ("train-0", "train-1", "more", "test"):
            write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
        raw = load_data(str(tmp_path))
        assert [row["text"] for row in raw.dataset] == ["more", "train-0", "train-1"]
        assert len(raw.notes) == 1
        assert "test.jsonl" in raw.notes[0]

    def test_rows_without_text_are_counted_and_named(self, tmp_path):
        rows = [{"text": "a"}, {"text": " \n"}, {"text": None}, {"other": 1}, {"text": "b"}, {"text": float("nan")}]
        write_jsonl(tmp_path / "d.jsonl", rows)
        raw = load_data(str(tmp_path / "d.jsonl"))
        assert [row["text"] for row in raw.dataset] == ["a", "b"]
        assert raw.dropped_rows == 4
        assert raw.notes == ("4 of 6 rows have no text in text: dropped",)


DIALOGUE = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
ASKED = {"prompt": DIALOGUE[:1], "completion": DIALOGUE[1:]}


class TestColumns:
    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"text": "t", "id": 3}, {"text": "t"}),
            ({"text": 5}, {"text": "5"}),
            ({"prompt": "p", "completion": "c", "text": "t"}, {"prompt": "p", "completion": "c"}),
            ({"prompt": "p", "messages": DIALOGUE}, {"messages": DIALOGUE}),
            ({"messages": json.dumps(DIALOGUE)}, {"messages": DIALOGUE}),
            (ASKED, ASKED),
            (
                {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
                {"messages": DIALOGUE},
            ),
            (
                {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, DIALOGUE[1]]},
                {"messages": DIALOGUE},
            ),
            ({"instruction": "hi", "input": "", "output": "yes", "text": "both"}, ASKED),
            ({"instruction": "hi", "response": "yes"}, ASKED),
            ({"question": "hi", "answer": "yes"}, ASKED),
        ],
    )
    def test_are_found_by_themselves(self, tmp_path, row, expected):
        write_json(tmp_path / "d.json", [row])
        raw = load_data(str(tmp_path / "d.json"))
        assert raw.dataset.to_list() == [expected]
        assert raw.conversational == ("messages" in expected or isinstance(expected.get("prompt"), list))

    @pytest.mark.parametrize("context", ["input", "context"])
    def test_an_instructions_context_follows_it(self, tmp_path, context):
        answer = "output" if context == "input" else "response"
        write_json(tmp_path / "d.json", [{"instruction": "Sum up.", context: "Long.", answer: "Short."}])
        asked = load_data(str(tmp_path / "d.json")).dataset[0]["prompt"]
        assert asked == [{"role": "user", "content": "Sum up.\n\nLong."}]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"a": 1, "b": 2}], r"columns a, b; valid are: messages; .*prompt \+ completion.*; text$"),
            ([{"prompt": "p"}], "columns prompt; valid are"),
            ([{"text": "ok"}, {"text": ["x"]}], r"row 2: column 'text' holds a list, not text"),
            ([{"text": True}], "holds a bool, not text"),
            ([{"text": "\ud800"}], "row 1: column 'text' is not valid Unicode"),
            ([{"messages": "hello"}], "column 'messages' is text, not a list"),
            ([{"messages": 4}], "holds a int, not a list of messages"),
            ([{"messages": ["hello"]}], "must have role and content"),
            ([{"messages": [{"role": "robot", "content": "x"}]}], "role 'robot' is not known; valid: system,"),
            ([{"messages": [{"role": "assistant", "tool_calls": [{}]}]}], "tool calls are not supported"),
            ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "only text parts are supported"),
            ([{"prompt": "p", "completion": DIALOGUE}], "column 'completion' holds a list, not text"),
            ([{"prompt": "p", "completion": "c"}, ASKED], "row 2: text where other rows have conversations"),
            ([{"text": ""}, {"text": None}], "none of its 2 rows has text in text"),
            ([{"prompt": "only", "completion": " "}], r"none of its 1 rows has text in prompt \+ completion"),
            ([{"messages": []}], "none of its 1 rows"),
        ],
    )
    def test_that_will_not_do(self, tmp_path, rows, message):
        write_json(tmp_path / "d.json", rows)
        with pytest.raises(DataError, match=message) as caught:
            load_data(str(tmp_path / "d.json"))
        assert "\n" not in str(caught.value)
        assert "d.json" in str(caught.value)


class TestBadFiles:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("d.jsonl", b"", r"d\.jsonl is empty"),
            ("d.jsonl", b"\n \n", "has no rows"),
            ("d.json", b"[]", "has no rows"),
            ("d.csv", b"text\n", "has no rows"),
            ("d.jsonl", b'{"text": "a"}\n\n{"text": \n', r"d\.jsonl:3: not valid JSON: Expecting value at column"),
            ("d.jsonl", b'{"text": "a"}\n["b"]\n', r"d\.jsonl:2: a line must be a JSON object, this one is a list"),
            ("d.jsonl", b'{"text": "a"}\n{"text": 1, "x": 2}\n{"text": {}}', r"d\.jsonl:3: column 'text' holds a dict"),
            ("d.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"d\.jsonl:2: not UTF-8"),
            ("d.json", b'[\n{"text": "a",}\n]', r"d\.json:2: not valid JSON"),
            ("d.json", b'{"data": 3}', "must be a list of objects"),
            ("d.json", b"3", "must be a list of objects"),
            ("d.json", b'[{"text": "a"}, 3]', r"d\.json, row 2: must be a JSON object, this one is a number"),
            ("d.json", b'{"text": "a"}\n{"text"}', r"d\.json:2: not valid JSON"),
            ("d.csv", b'prompt,completion\n"a\nb",c\nd,e,f\n', r"d\.csv:4: more fields than the header has \(2\)"),
            ("d.csv", b'text\n"never closed\n', r"d\.csv:2: not valid CSV"),
            ("d.parquet", b"nonsense", "not a readable parquet file"),
            ("d.txt", b"text", r"\.txt is not known; valid: \.jsonl"),
            ("d", b"text", "no suffix is not known"),
        ],
    )
    def test_say_where_and_what(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            load_data(str(tmp_path / name))
        assert "\n" not in str(caught.value)

    def test_missing_names_the_nearest(self, tmp_path):
        (tmp_path / "train.jsonl").touch()
        with pytest.raises(DataError, match=r"trian\.jsonl does not exist; did you mean .*/train\.jsonl\?"):
            load_data(str(tmp_path / "trian.jsonl"))

    @pytest.mark.parametrize("spec", ["./none", "no/such/folder/d.jsonl", "d.jsonl", "/none/d", "a/b/c"])
    def test_missing_paths_are_not_looked_up_on_the_hub(self, spec, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DataError, match="does not exist"):
            load_data(spec)

    def test_a_folder_without_data(self, tmp_path):
        with pytest.raises(DataError, match=r"has no \.jsonl, \.json, \.csv, \.parquet file"):
            load_data(str(tmp_path))

    def test_saved_without_a_train_split(self, tmp_path):
        split = datasets.Dataset.from_list(PAIRS)
        datasets.DatasetDict({"test": split}).save_to_disk(tmp_path / "saved")
        with pytest.raises(DataError, match="no train split, only test"):
            load_data(str(tmp_path / "saved"))

    def test_saved_with_unknown_columns(self, tmp_path):
        datasets.Dataset.from_list([{"a": 1}]).save_to_disk(tmp_path / "saved")
        with pytest.raises(DataError, match="columns a; valid are"):
            load_data(str(tmp_path / "saved"))

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
    def test_unreadable(self, tmp_path):
        (tmp_path / "d.jsonl").write_text("{}")
        (tmp_path / "d.jsonl").chmod(0)
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            load_data(str(tmp_path / "d.jsonl"))


HUB = textwrap.dedent(
    """
    import http.server, json, os, threading

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            gated = "gated" in self.path
            self.send_response(403 if gated else 401)
            self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
        do_HEAD = do_GET
        def log_message(self, *args): pass

    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{hub.server_port}"
    for offline in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.pop(offline, None)

    from autofit.step.data import load_data
    from autofit.step.tokenizer import load_tokenizer

    said = []
    for load in (load_tokenizer, load_data):
        for name in ("someone/gated", "someone/missing"):
            try:
                load(name)
            except Exception as error:
                said.append([type(error).__name__, str(error)])
    print(json.dumps(said))
    """
)


class TestHub:
    def test_a_hub_that_refuses(self, tmp_path):
        environment = {**os.environ, "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", HUB], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        said = json.loads(done.stdout)
        pages = ["someone/gated", "someone/missing", "datasets/someone/gated", "datasets/someone/missing"]
        assert [name for name, _ in said] == ["AccessError"] * 4
        for (_, message), page in zip(said, pages, strict=True):
            assert f"https://huggingface.co/{page} " in message
            assert "`hf auth login`" in message
            assert "\n" not in message

    @pytest.mark.parametrize("name", ["someone/something", "something"])
    def test_offline(self, name, tmp_path, monkeypatch):
        from autofit.step.tokenizer import load_tokenizer

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        for load in (load_data, load_tokenizer):
            with pytest.raises(AccessError, match=r"offline \(HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set\)$"):
                load(name)

    def test_a_misspelt_folder_is_recognised(self, tmp_path, monkeypatch):
        (tmp_path / "my-data").mkdir()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(AccessError, match=r"did you mean the path my-data\?"):
            load_data("my-dta")
