# SPDX-License-Identifier: Apache-2.0
"""Streamed sources: order is of (seed, step) alone, and the disk holds few files."""

import json
from itertools import groupby, islice
from pathlib import Path
from types import SimpleNamespace

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from runs import batch_at

from jaxllm.config import DataSection, LogSection, ModelSection, Source, TrainConfig
from jaxllm.config.checks import check
from jaxllm.data import stream
from jaxllm.data.dataset import load_data, summarize
from jaxllm.data.loader import make_loader
from jaxllm.data.stream import Stream
from jaxllm.paths import read_checked, write_checked

FILES, LENGTH = 6, 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Files of 9 to 17 rows each; each row says which file and document it is from."""
    folder = tmp_path_factory.mktemp("shards")
    for n in range(FILES):
        texts = [f"{chr(65 + n)}{i:03}" * 3 for i in range(6 + n)]
        pa.parquet.write_table(pa.table({"text": texts}), folder / f"{n}.parquet")
    return folder


def config(folder, *train, **keys):
    section = DataSection(train=train, max_length=LENGTH, cache_dir=str(folder / "cache"))
    section = DataSection(**{**vars(section), **keys.pop("data", {})})
    return TrainConfig(**{"steps": 5} | keys, data=section, log=LogSection(progress=False))


@pytest.fixture
def made(monkeypatch):
    """Names of the files that were tokenised, in order."""
    names = []

    def tokenized(source, *rest):
        names.append(Path(source.path).name)
        return real(source, *rest)

    real = stream.tokenize_table
    monkeypatch.setattr(stream, "tokenize_table", tokenized)
    return names


def tokens(data, steps, size=4):
    return [batch_at(data.train, 0, step, size)["tokens"] for step in steps]


def load(folder, shards, tokenizer, seed=0, **source):
    return load_data(config(folder, Source(str(shards), streaming=True), seed=seed), tokenizer)


def test_each_pass_has_each_row_once_in_an_order_of_its_own(tmp_path, shards, tokenizer):
    part = load(tmp_path, shards, tokenizer).train.parts[0]
    files = sorted(shards.iterdir())
    whole = load_data(config(tmp_path, *(Source(str(f)) for f in files)), tokenizer).train.parts
    stored = {p[i]["tokens"].tobytes(): (n, i) for n, p in enumerate(whole) for i in range(len(p))}
    count = len(stored)
    assert count == sum(map(len, whole))
    passes = [
        [stored[part[epoch * count + i]["tokens"].tobytes()] for i in range(count)]
        for epoch in range(3)
    ]
    orders = []
    for rows in passes:
        assert sorted(rows) == sorted(stored.values())
        order = [file for file, _ in groupby(rows, key=lambda row: row[0])]
        assert sorted(order) == list(range(FILES))  # a file at a time
        orders.append(order)
    assert len(set(map(tuple, orders))) == 3
    inside = [[i for file, i in rows if file == 5] for rows in passes]
    assert len(set(map(tuple, [*inside, sorted(inside[0])]))) == 4
    other = load(tmp_path, shards, tokenizer, seed=1).train.parts[0]
    assert stored[other[0]["tokens"].tobytes()] != passes[0][0]


def test_a_resumed_run_goes_on_exactly_and_skips_whole_files(tmp_path, shards, tokenizer, made):
    straight = tokens(load(tmp_path, shards, tokenizer), range(40))
    assert len(made) > FILES  # a second pass began
    for start in (17, 38):
        made.clear()
        resumed = load(tmp_path, shards, tokenizer)
        assert made == []
        np.testing.assert_array_equal(tokens(resumed, [start]), straight[start : start + 1])
        assert 1 <= len(made) <= 2
    # Without the cache the numbers of rows are found again, with the same result.
    fresh = load(tmp_path / "other", shards, tokenizer)
    np.testing.assert_array_equal(tokens(fresh, [38]), straight[38:39])
    assert resumed.manifest == fresh.manifest


@pytest.mark.parametrize("prefetch", [1, 4])
def test_threads_do_not_change_the_order(prefetch, tmp_path, shards, tokenizer):
    data = load(tmp_path, shards, tokenizer)
    loader = make_loader(data.train, batch_size=4, seed=0, start_step=3, prefetch=prefetch)
    got = [batch["tokens"][0] for batch in islice(loader, 20)]
    np.testing.assert_array_equal(got, tokens(load(tmp_path, shards, tokenizer), range(3, 23)))


def mapped():
    """Files of tokens that this process maps and that have no name any more."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "tokens.arrow" in line and "deleted" in line}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
def test_the_disk_holds_few_files_and_nothing_stays(tmp_path, shards, tokenizer, made):
    before, most = mapped(), 0
    data = load(tmp_path, shards, tokenizer)
    for step in range(40):
        tokens(data, [step])
        most = max(most, len(mapped() - before))
        (left,) = (tmp_path / "cache").iterdir()
        assert left.name.startswith("rows-") and len(read_checked(left)) <= FILES
    assert len(made) > FILES and 1 <= most <= Stream.CACHED


def test_a_streamed_source_keeps_its_share_of_a_mixture(tmp_path, shards, tokenizer):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "zzzzzzzz" * 9}) + "\n")
    sources = (Source(str(shards), streaming=True, weight=1), Source(str(other), weight=3))
    for order in (sources, sources[::-1]):
        data = load_data(config(tmp_path, *order), tokenizer)
        letters = [
            tokenizer.decode(row[0]) for step in tokens(data, range(10)) for row in step[:, None]
        ]
        assert sum("z" in text for text in letters) == 30
    lines = summarize(data.manifest)
    assert f"train: {shards}: 6 files, streamed" in lines
    assert len(data.train) > 2**40  # stands for an unknown length
    json.dumps(data.manifest)


def test_a_data_set_of_the_hub_is_read_by_its_files(tmp_path, shards, tokenizer, monkeypatch):
    memory = fsspec.filesystem("memory")
    for file in shards.iterdir():
        memory.pipe(f"/hub/{file.name}", file.read_bytes())
    urls = {datasets.Split.TEST: ["memory://hub/none.parquet"]}
    urls |= {datasets.Split.TRAIN: [f"memory://hub/{n}.parquet" for n in range(FILES)]}
    builder = SimpleNamespace(config=SimpleNamespace(data_files=urls))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: builder)
    remote = load_data(config(tmp_path, Source("someone/web:en", streaming=True)), tokenizer)
    np.testing.assert_array_equal(
        tokens(remote, range(20)), tokens(load(tmp_path, shards, tokenizer), range(20))
    )
    assert remote.manifest["train"]["sources"][0]["split"] == "train"
    json.dumps(remote.manifest)
    assert all(f.name.startswith("rows-") for f in (tmp_path / "cache").iterdir())
    with pytest.raises(ValueError, match="has no split 'dev'; set split to one of test, train"):
        load_data(config(tmp_path, Source("someone/web", streaming=True, split="dev")), tokenizer)


def test_a_bad_record_is_named_when_its_file_is_read(tmp_path, tokenizer):
    for n in range(3):
        (tmp_path / f"{n}.jsonl").write_text('{"text": "abcdefghijkl"}\n{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"\d\.jsonl:2: found the columns body; pretraining needs"):
        load(tmp_path, tmp_path / "*.jsonl", tokenizer)
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("abc")
    with pytest.raises(ValueError, match="short: no file has the 9 tokens of a row"):
        load(tmp_path, tmp_path / "short", tokenizer)
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="saved: streaming needs files"):
        load(tmp_path, tmp_path / "saved", tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "a streamed source has no known length; set steps"),
        ({"data": {"eval_fraction": 0.5}}, "eval_fraction cannot split a streamed source"),
        ({"max_samples": 3}, "max_samples is not supported with streaming"),
        ({"more": Source("b")}, "streamed with other sources; give each source a weight"),
        ({"objective": "sft"}, "streaming is supported only in data.train of pretrain"),
        (
            {"data": {"eval": (Source("e", streaming=True),)}},
            "streaming is supported only in data.train of",
        ),
    ],
)
def test_what_streaming_does_not_go_with_is_refused(change, message, tmp_path, shards, tokenizer):
    source = Source(str(shards), streaming=True, max_samples=change.pop("max_samples", None))
    train = [source, *([change.pop("more")] if "more" in change else [])]
    cfg = config(tmp_path, *train, **({"steps": 5} | change), model=ModelSection(path="m"))
    with pytest.raises(ValueError, match=message):
        check(cfg)
        load_data(cfg, tokenizer)


def test_rows_that_are_not_those_that_were_counted_are_refused(tmp_path, shards, tokenizer):
    tokens(load(tmp_path, shards, tokenizer), range(2))
    (index,) = (tmp_path / "cache").glob("rows-*.json")
    write_checked(index, {name: count - 1 for name, count in read_checked(index).items()})
    with pytest.raises(ValueError, match=r"rows, but .*rows-.*another number.*delete that file"):
        tokens(load(tmp_path, shards, tokenizer), range(2))


def test_a_damaged_count_of_rows_is_made_again(tmp_path, shards, tokenizer, capsys):
    before = tokens(load(tmp_path, shards, tokenizer), range(4))
    (index,) = (tmp_path / "cache").glob("rows-*.json")
    counts, text = read_checked(index), index.read_text()
    digit = text.index(": ", text.index("value")) + 1
    for damaged in ("", text[:-9], text[:digit] + "[]}", text.replace(": 1", ": 2")):
        assert damaged != text
        index.write_text(damaged)
        np.testing.assert_array_equal(tokens(load(tmp_path, shards, tokenizer), range(4)), before)
        assert f"{index.name} is damaged; the rows are counted again" in capsys.readouterr().err
        assert read_checked(index).items() <= counts.items()
