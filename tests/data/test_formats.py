# SPDX-License-Identifier: Apache-2.0
"""Text, JSON and CSV as people save them: with byte order marks, wrapped, compressed, broken."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxllm.config import DataSection, LogSection, Source, TrainConfig
from jaxllm.data.dataset import load_data, summarize
from jaxllm.data.formats import format_of
from jaxllm.data.sources import locate, read, records
from jaxllm.data.tokenizer_training import _texts

BOM = b"\xef\xbb\xbf"


def read_all(path, folder, first=None):
    """[(line, record)] of a path."""
    table = read(locate(Source(str(path))), folder, first)
    batch = table[:] if len(table) else {}
    return [
        (at.removeprefix(f"{path}:"), record)
        for at, record in records(batch, list(range(len(table))), str(path))
    ]


def write(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def compressed(file: Path, suffix: str) -> Path:
    """The file under its name with `suffix` behind it, in two members, as parallel tools write."""
    content, out = file.read_bytes(), file.with_name(file.name + suffix)
    half = len(content) // 2
    parts = (content[:half], content[half:])
    if suffix == ".gz":
        return write(out, b"".join(map(gzip.compress, parts)))
    with open(out, "wb") as sink:
        for part in parts:
            buffer = pa.BufferOutputStream()
            with pa.CompressedOutputStream(buffer, "zstd") as stream:
                stream.write(part)
            sink.write(buffer.getvalue().to_pybytes())
    return out


CONTENTS = {
    "a.txt": "one\r\n\ntwo é\n",
    "a.jsonl": '{"text": "one"}\r\n{"text": "two é"}\r\n',
    "lines.json": '{"text": "one"}\n{"text": "two é"}\n',
    "array.json": '[\n {"text": "one"},\n {"text": "two é"}\n]\n',
    "a.csv": 'text,n\r\none,1\r\n"two ""é"",\nthree",2\r\n',
    "a.tsv": 'text\tn\none, two\t1\n"é\t"\t2\n',
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_byte_order_mark_and_compression_change_no_record(name, suffix, tmp_path):
    plain = read_all(write(tmp_path / name, CONTENTS[name]), tmp_path)
    marked = write(tmp_path / name, BOM + CONTENTS[name].encode())
    packed = compressed(marked, suffix) if suffix else marked
    found = read_all(packed, tmp_path)
    assert [record for _, record in found] == [record for _, record in plain]
    assert len(plain) == (1 if name == "a.txt" else 2)
    if name != "a.txt":
        assert [at for at, _ in found] == [at for at, _ in plain]
    if name == "a.txt":
        assert found[0][1] == {"text": CONTENTS[name]}
        assert "".join(_texts([packed])) == CONTENTS[name]


def test_cells_are_strings_and_rows_keep_their_line(tmp_path):
    file = write(tmp_path / "a.csv", 'text,,id\n"a\r\nb",0,007\n\nc,"","{""x"": 1}"\n')
    assert read_all(file, tmp_path) == [
        ("2", {"text": "a\r\nb", "": "0", "id": "007"}),
        ("5", {"text": "c", "": "", "id": '{"x": 1}'}),
    ]
    long = "x" * 200_000
    assert read_all(write(tmp_path / "b.tsv", f"text\n{long}\n"), tmp_path) == [
        ("2", {"text": long})
    ]


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"data": [{"text": "a"}, {"text": "b"}]}, [{"text": "a"}, {"text": "b"}]),
        ({"train": [{"messages": TURNS}]}, [{"messages": TURNS}]),
        ({'a "key"': [{"x": {}}] * 3}, [{"x": {}}] * 3),
        ({"data": []}, []),
        ({"messages": TURNS}, [{"messages": TURNS}]),
        ({"conversations": [{"from": "human", "value": "q"}]},) * 2,
        ({"text": "a", "meta": {"n": [1]}},) * 2,
        ({"chosen": TURNS, "rejected": TURNS},) * 2,
        ({"text": "a"},) * 2,
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_is_one_record_or_holds_their_list(value, found, indent, tmp_path):
    found = found if isinstance(found, list) else [found]
    file = write(tmp_path / "a.json", json.dumps(value, indent=indent))
    assert [record for _, record in read_all(file, tmp_path)] == found


def test_objects_over_several_lines_keep_their_lines(tmp_path):
    wrapped = write(tmp_path / "a.json", '{\n"data": [\n{"a":\n1},\n\n{"a": 2}]\n}\n')
    assert read_all(wrapped, tmp_path) == [("3", {"a": 1}), ("6", {"a": 2})]
    several = write(tmp_path / "b.json", '\n{"a":\n1}\n{"a": 2}\n{\n"a": 3}')
    assert read_all(several, tmp_path) == [("2", {"a": 1}), ("4", {"a": 2}), ("5", {"a": 3})]


GZIP = gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            '{"train": [{"a": 1}], "test": [{"a": 1}]}',
            r"json: found one object with the keys train, test",
        ),
        (
            "a.json",
            '{"text": ["a", "b"]}',
            r"a\.json: found one object with the keys text, all of them lists",
        ),
        ("a.json", '{"0": {"a": 1}, "1": {}}', r"is not a record; write the records as a list"),
        ("a.json", '{"data": [{"a": 1},\n{"a" 2}]}', r"a\.json:2: malformed JSON: Expecting ':'"),
        ("a.json", '{"data": [{"a": 1}]}\n}', r"a\.json:2: malformed JSON"),
        ("a.json", '{\n"a": 1\n}\n{"a":\n', r"a\.json:5: malformed JSON.*the end of the file"),
        ("a.json", '{"a": 1}\n{"a" 1}', r"a\.json:2: malformed JSON"),
        ("a.jsonl", '{\n"a": 1}', r"a\.jsonl:1: malformed JSON.*saw '\{'"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), r"a\.jsonl:1: not UTF-8: it is UTF-16; save it"),
        ("a.csv", "text\nab\xff\n".encode("latin-1"), r"a\.csv:2: not UTF-8"),
        ("a.csv", 'a,b\n1,2\n\n"3\n4"\n', r"a\.csv:4: 1 cells, but the header has 2"),
        ("a.csv", "a,b\n1,2,3\n", r"a\.csv:2: 3 cells, but the header has 2"),
        ("a.csv", 'a\n"b\nc\n', r"a\.csv:2: malformed CSV: unexpected end of data"),
        ("a.tsv", 'a\n1\n"b" c\n', r"a\.tsv:3: malformed TSV"),
        ("a.csv", "a,b,a\n1,2,3\n", r"a\.csv:1: the header has 'a' twice"),
        ("a.jsonl.gz", b"{}\n", r"a\.jsonl\.gz: not readable as gzip"),
        ("a.jsonl.gz", GZIP[:-9], r"a\.jsonl\.gz: not readable as gzip: Truncated"),
        ("a.csv.zst", GZIP, r"a\.csv\.zst: not readable as zstd"),
        ("a.parquet.gz", b"", r"format of \.parquet\.gz is unknown; accepted formats: .*\.zst"),
        ("a.gz", b"", r"the format of \.gz is unknown; accepted formats: \.txt, .*\.gz, \.zst"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_by_file_and_line(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_all(write(tmp_path / name, content), tmp_path)


def test_the_same_file_packed_and_unpacked_is_not_read_twice(tmp_path):
    (tmp_path / "d").mkdir()
    compressed(write(tmp_path / "d" / "a.jsonl", '{"text": "a"}\n'), ".gz")
    with pytest.raises(ValueError, match=r"has both a\.jsonl\.gz and a\.jsonl, the same records"):
        locate(Source(str(tmp_path / "d")))
    write(tmp_path / "d" / "a.jsonl", "").unlink()
    assert read_all(tmp_path / "d", tmp_path)[0][1] == {"text": "a"}


@pytest.mark.parametrize("name", ["a.JSONL", "a.b.Json", "A.CSV.GZ", "a.txt.zst"])
def test_suffixes_are_read_in_either_case(name):
    assert format_of(name) in ("json", "csv", "text")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_max_samples_reads_the_first_records_and_counts_them(suffix, tmp_path, tokenizer):
    table = pa.table({"text": [f"text {n}" for n in range(9)]})
    file = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pa.parquet.write_table(table, file)
    else:
        write(file, "".join(json.dumps(r) + "\n" for r in table.to_pylist()) + "broken\n")
    assert [record["text"] for _, record in read_all(file, tmp_path, 2)] == ["text 0", "text 1"]
    for count in (3, 4):
        train = (Source(str(file), max_samples=count),)
        section = DataSection(train=train, max_length=4, cache_dir=str(tmp_path), workers=1)
        data = load_data(TrainConfig(data=section, log=LogSection(progress=False)), tokenizer)
        (entry,) = data.manifest["train"]["sources"]
        assert (entry["read"], entry["max_samples"]) == (count, count)
        assert entry["tokens"] == 7 * count
        assert f"{count} of the first {count} examples" in summarize(data.manifest)[0]
