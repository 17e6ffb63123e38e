# SPDX-License-Identifier: Apache-2.0
import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pytest

from jaxllm.config import Source
from jaxllm.data.conversations import parse_text
from jaxllm.data.sources import content_hash, locate, read, records
from jaxllm.errors import UserError

ROWS = [{"text": "one\n"}, {"text": "zwei\u2028ü"}, {"text": "<eos> three"}]


def read_all(path: object, folder: Path, *, held_out: bool = False, **source: str) -> list[dict]:
    table = read(locate(Source(str(path), **source), held_out=held_out), folder)
    batch = table[:] if len(table) else {}
    return [record for _, record in records(batch, list(range(len(table))), str(path))]


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def in_format(suffix: str, folder: Path) -> Path:
    """ROWS in a file of the format that `suffix` names."""
    file = folder / f"data{suffix}"
    if suffix == ".jsonl":
        write(file, "\n\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS))
    elif suffix == "array.json":
        write(file, "\ufeff" + json.dumps(ROWS, indent=2))
    elif suffix == "lines.json":
        write(file, "".join(json.dumps(r) + "\r\n" for r in ROWS))
    elif suffix in (".csv", ".tsv.gz"):
        text = "text\n" + "".join('"' + r["text"] + '"\n' for r in ROWS)
        write(file, text if suffix == ".csv" else gzip.compress(text.encode()))
    elif suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(file))
    elif suffix == "stream.arrow":
        table = pa.Table.from_pylist(ROWS)
        with pa.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table)
    elif suffix == "file.arrow":
        table = pa.Table.from_pylist(ROWS)
        with pa.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table)
    elif suffix == ".array_record":
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(file), "group_size:1")
        for row in ROWS:
            writer.write(json.dumps(row).encode())
        writer.close()
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(str(file))
    return file


FORMATS = [
    ".jsonl",
    "array.json",
    "lines.json",
    ".csv",
    ".tsv.gz",
    ".parquet",
    "stream.arrow",
    "file.arrow",
    ".array_record",
    "saved",
]


# ---- finding and reading


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_records(suffix, tmp_path):
    assert read_all(in_format(suffix, tmp_path), tmp_path) == ROWS


def test_a_text_file_is_one_document_kept_exactly(tmp_path):
    text = "  first\r\n\n\nlast \n"
    assert read_all(write(tmp_path / "a.txt", text), tmp_path) == [{"text": text}]


def test_globs_and_folders_read_their_files_in_order_of_name(tmp_path):
    for name in ("b", "a", "sub/c"):
        write(tmp_path / "d" / f"{name}.txt", name)
    write(tmp_path / "d" / "README.md", "not data")
    write(tmp_path / "d" / ".cache" / "hidden.txt", "not data")
    assert [r["text"] for r in read_all(tmp_path / "d", tmp_path)] == ["a", "b", "sub/c"]
    assert [r["text"] for r in read_all(tmp_path / "d" / "?.txt", tmp_path)] == ["a", "b"]


def test_a_folder_with_splits_gives_only_the_one_asked_for(tmp_path):
    write(tmp_path / "d" / "train.jsonl", '{"text": "seen"}')
    write(tmp_path / "d" / "test" / "00-of-01.jsonl", '{"text": "held out"}')
    assert read_all(tmp_path / "d", tmp_path) == [{"text": "seen"}]
    assert read_all(tmp_path / "d", tmp_path, split="test") == [{"text": "held out"}]
    with pytest.raises(ValueError, match="has no split 'dev'; set split to one of test, train"):
        locate(Source(str(tmp_path / "d"), split="dev"))
    write(tmp_path / "d" / "more.jsonl", '{"text": "whose?"}')
    with pytest.raises(ValueError, match=r"more.jsonl belongs to none") as raised:
        locate(Source(str(tmp_path / "d")))
    assert f"to read all files, give a glob such as {tmp_path}/d/**/*.jsonl" in str(raised.value)


def test_the_file_whose_name_looks_like_a_split_is_named_and_a_glob_reads_all(tmp_path):
    for name in ("abc.py", "training.py"):
        write(tmp_path / f"{name}.txt", name)
    with pytest.raises(ValueError, match=r"training.py.txt to train.*abc.py.txt") as raised:
        locate(Source(str(tmp_path)))
    glob = str(raised.value).rpartition(" ")[2]
    assert [r["text"] for r in read_all(Path(glob), tmp_path)] == ["abc.py", "training.py"]


def splits_in(place: str, names: list[str], tmp_path: Path, monkeypatch) -> str:
    """The path of a dataset whose splits hold their own names as text."""
    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in names}
    if place == "hub":
        made = datasets.DatasetDict(splits)
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *_, split: made[split] if split else made
        )
        return "someone/something"
    if place == "tfds":
        builder = SimpleNamespace(
            data_dir=tmp_path,
            download_and_prepare=lambda **_: None,
            as_data_source=lambda split: splits[split] if split else splits,
        )
        core = SimpleNamespace(DatasetNotFoundError=LookupError)
        fake = SimpleNamespace(core=core, builder=lambda name: builder)
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
        return "tfds:something"
    folder = tmp_path / "d"
    if place == "saved":
        datasets.DatasetDict(splits).save_to_disk(str(folder))
    for name in names if place == "folder" else ():
        write(folder / f"{name}.jsonl", json.dumps({"text": name}))
    return str(folder)


PLACES = ["folder", "saved", "hub", "tfds"]


@pytest.mark.parametrize("place", PLACES)
def test_the_split_is_train_in_training_and_named_in_evaluation(place, tmp_path, monkeypatch):
    path = splits_in(place, ["train", "test"], tmp_path, monkeypatch)
    assert read_all(path, tmp_path) == [{"text": "train"}]
    assert read_all(path, tmp_path, split="test", held_out=True) == [{"text": "test"}]
    named = f"has the splits .*test.*; name the one to evaluate on: {{path: {path}, split: NAME}}"
    with pytest.raises(ValueError, match=named) as raised:
        locate(Source(path), held_out=True)
    assert str(raised.value).startswith(f"{path}: has")
    assert locate(Source(path)).split == "train"


@pytest.mark.parametrize("place", PLACES)
def test_an_only_split_is_taken_and_none_is_guessed(place, tmp_path, monkeypatch):
    path = splits_in(place, ["test"], tmp_path, monkeypatch)
    for held_out in (False, True):
        assert read_all(path, tmp_path, held_out=held_out) == [{"text": "test"}]
    path = splits_in(place, ["test", "validation"], tmp_path / "two", monkeypatch)
    with pytest.raises(
        ValueError, match="has no split 'train'; set split to one of test, validation"
    ):
        locate(Source(path))


def test_a_saved_dataset_with_splits_gives_the_one_asked_for(tmp_path):
    one, two = (datasets.Dataset.from_list([{"text": t}]) for t in ("one", "two"))
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(str(tmp_path / "d"))
    assert read_all(tmp_path / "d", tmp_path, split="test") == [{"text": "two"}]
    with pytest.raises(ValueError, match="has no split 'dev'; set split to one of train, test"):
        locate(Source(str(tmp_path / "d"), split="dev"))


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("missing.jsonl", FileNotFoundError, "no such file or directory"),
        ("dir/with/missing", FileNotFoundError, "no such file or directory"),
        ("mixed/typo", FileNotFoundError, "no such file or directory"),
        ("imdb", FileNotFoundError, "no such file or directory, and not a hub id .OWNER/NAME"),
        ("imdb:plain", FileNotFoundError, "no such file or directory"),
        ("someone/some.parquet", FileNotFoundError, "no such file or directory"),
        ("*.jsonl", FileNotFoundError, "no file matches"),
        ("model.bin", ValueError, r"format of \.bin is unknown; accepted formats: \.txt, \.json"),
        ("mixed", ValueError, "has json and text files; select one format by a glob"),
        ("empty", ValueError, "no data files"),
        ("someone/nothing", ValueError, "the hub's dataset of this name could not be loaded"),
    ],
)
def test_a_path_that_cannot_be_read_is_named(path, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("model.bin", "mixed/a.txt", "mixed/b.jsonl"):
        write(tmp_path / name, "")
    with pytest.raises(error, match=message) as raised:
        locate(Source(path))
    assert path in str(raised.value)


def test_tfds_asks_for_its_extra_only_when_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"tfds:lm1b: .* pip install 'jaxllm\[tfds\]'"):
        locate(Source("tfds:lm1b"))


def test_hash_is_of_content_and_not_of_names(tmp_path):
    one, same = write(tmp_path / "a", "x"), write(tmp_path / "b", "x")
    assert content_hash([one]) == content_hash([same])
    assert content_hash([one]) != content_hash([write(tmp_path / "c", "y")])
    assert content_hash([one, same]) != content_hash([write(tmp_path / "d", "xx")])


# ---- malformed files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"text": \n',
            r"a\.jsonl:3: malformed JSON.*saw '\{\"text\":",
        ),
        ("a.jsonl", '{"text": "a"}{"text": "b"}', r"a\.jsonl:1: malformed JSON: Extra data"),
        ("a.jsonl", '{"text": "a"}\n["text"]', r"a\.jsonl:2: a record must be a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n\xff\n', r"a\.jsonl:2: not UTF-8"),
        ("a.json", '[\n{"text": "a"},\n{"text": b}\n]', r"a\.json:3: malformed JSON"),
        ("a.json", '[{"text": "a"}\n{"text": "b"}]', r"a\.json:2: .*Expecting ',' or '\]'"),
        ("a.json", '[{"text": "a"},\n', r"a\.json:2: malformed JSON.*end of the file"),
        ("a.json", '[{"text": "a"}]\n]', r"a\.json:2: .*Extra data"),
        ("a.txt", b"\xff", r"a\.txt: not UTF-8"),
        ("a.parquet", "PAR0", r"a\.parquet: not readable as parquet"),
        ("a.arrow", "no arrow", r"a\.arrow: not readable as arrow"),
        ("a.array_record", "none", r"a\.array_record: not readable as array_record: .*64KB"),
        ("a.array_record", "none" * 50_000, r"a\.array_record: not readable as array_record"),
        *(
            (name, f"{before}{{{key}: {value}}}{after}", rf"{name}:3: malformed JSON: {message}")
            for name, before, after in (("a.jsonl", "\n\n", ""), ("a.json", "[\n\n", "]"))
            for key, value, message in (
                ('"text"', '"a \\ud83d"', r"'\\ud83d' is a lone surrogate"),
                ('"\\uDE00"', "0", r"'\\ude00' is a lone surrogate"),
                ('"text"', "1" * 5_000, "an integer has more than 4300 digits"),
                ('"text"', "[" * 100_000, "it is nested too deeply"),
            )
        ),
        ("a.jsonl", f'{{"text": {"1" * 5_000}}}', "4300 digits; saw"),  # has no column
        ("a.json", f'{{"text": {"[" * 100_000}}}\n{{"text": "b"}}', r"json:1: .*deeply; saw"),
    ],
)
def test_malformed_data_names_file_and_line(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_all(write(tmp_path / name, content), tmp_path)


def test_a_character_of_two_halves_is_one(tmp_path):
    text = r'{"text": "\ud83d\ude00 \\ud83d"}'
    assert read_all(write(tmp_path / "a.jsonl", text), tmp_path) == [{"text": "\U0001f600 \\ud83d"}]


def test_records_of_an_array_keep_their_lines(tmp_path):
    file = write(tmp_path / "a.json", '[\n\n{"a": 1}, {"b":\n2},\n{"c": 3}]')
    table = read(locate(Source(str(file))), tmp_path)
    at = [at.rsplit(":", 1)[1] for at, _ in records(table[:], [0, 1, 2], "")]
    assert at == ["3", "3", "5"]


# ---- texts


def test_text_comes_from_the_mapped_column():
    assert parse_text({"content": "a", "text": "b"}, {"text": "content"}, "f:1") == "a"
    assert parse_text({"text": None}, {}, "f:1") == ""


@pytest.mark.parametrize(
    ("record", "columns", "message"),
    [
        ({"body": "a", "id": 1}, {}, "f:1: found the columns body, id; .* a column text"),
        ({"text": 3}, {}, "f:1: text is int, not a string: 3"),
        ({"a": "b"}, {"text": "c"}, "f:1: columns maps text to c, but the record's columns are a"),
    ],
)
def test_wrong_text_columns_say_what_was_found(record, columns, message):
    with pytest.raises(ValueError, match=message):
        parse_text(record, columns, "f:1")


def test_a_table_without_columns_is_an_error_of_the_user():
    with pytest.raises(UserError, match=r"a\.parquet: the table has no columns"):
        list(records({}, [0, 1], "a.parquet"))
    assert list(records({}, [], "a.parquet")) == []
