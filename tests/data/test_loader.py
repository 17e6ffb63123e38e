# SPDX-License-Identifier: Apache-2.0
import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import batch_at

from jaxllm.config import DataSection, LogSection, Source, TrainConfig
from jaxllm.data.batch import TEXT
from jaxllm.data.dataset import load_data, summarize
from jaxllm.data.loader import eval_batches, make_loader
from jaxllm.data.rows import Conversations, Rows, Windows


class Documents:
    """Stands for Examples: documents of the given lengths, each token another number."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, np.int64)
        self.stream = np.arange(100, 100 + self.lengths.sum(), dtype=np.int32)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])

    def tokens(self, index: int) -> np.ndarray:
        return self.stream[self.starts[index] : self.starts[index + 1]]

    def learn(self, index: int) -> np.ndarray:
        return np.ones(self.lengths[index], np.float32)


def windows(lengths: list[int], length: int, *, segment: bool = True, tail: bool = False):
    documents = Documents(lengths)
    rows = Windows(documents, np.arange(len(lengths)), length, segment=segment, tail=tail)
    return documents.stream, [rows[i] for i in range(len(rows))]


def config(tmp_path: Path, *train: str | Source, objective: str = "pretrain", **data):
    sources = tuple(Source(s) if isinstance(s, str) else s for s in train)
    section = DataSection(train=sources, cache_dir=str(tmp_path / "cache"), workers=1, **data)
    return TrainConfig(objective=objective, data=section, log=LogSection(progress=False))


def texts(tmp_path: Path, name: str, contents: list[str]) -> str:
    file = tmp_path / name
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in contents))
    return str(file)


def chats(tmp_path: Path, name: str, pairs: list[tuple[str, str]]) -> str:
    file = tmp_path / name
    file.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in pairs))
    return str(file)


def same(one: dict, two: dict) -> bool:
    return all(np.array_equal(one[name], two[name]) for name in TEXT)


# ---- windows of documents

LENGTHS = st.lists(st.integers(2, 12), min_size=1, max_size=20)


@given(LENGTHS, st.integers(1, 9))
def test_windows_lose_nothing_but_one_tail(lengths, length):
    stream, rows = windows(lengths, length)
    assert len(rows) == (len(stream) - 1) // length
    end = len(rows) * length
    joined = np.concatenate([row["tokens"] for row in rows] or [[]])
    targets = np.concatenate([row["targets"] for row in rows] or [[]])
    np.testing.assert_array_equal(joined, stream[:end])
    np.testing.assert_array_equal(targets, stream[1 : end + 1])
    assert len(stream) - 1 - end < length


@given(LENGTHS, st.integers(1, 9))
def test_segments_and_positions_restart_at_documents(lengths, length):
    documents = Documents(lengths)
    _, rows = windows(lengths, length)
    for number, row in enumerate(rows):
        at = number * length + np.arange(length)
        document = np.searchsorted(documents.starts, at, "right") - 1
        np.testing.assert_array_equal(row["segment_ids"], document - document[0] + 1)
        begin = np.maximum(documents.starts[document], at[0])
        np.testing.assert_array_equal(row["positions"], at - begin)
        crosses = np.isin(at + 1, documents.starts)
        np.testing.assert_array_equal(row["weights"], np.where(crosses, 0, 1))


def test_without_segments_a_row_is_one_piece_and_all_of_it_is_learned():
    _, rows = windows([3, 4, 6], 4, segment=False)
    for row in rows:
        assert row["weights"].tolist() == row["segment_ids"].tolist() == [1, 1, 1, 1]
        assert row["positions"].tolist() == [0, 1, 2, 3]


@given(LENGTHS, st.integers(1, 9), st.booleans())
def test_held_out_windows_keep_the_tail_as_a_padded_row(lengths, length, segment):
    stream, rows = windows(lengths, length, segment=segment, tail=True)
    real = [row["segment_ids"] > 0 for row in rows]
    targets = np.concatenate([row["targets"][r] for row, r in zip(rows, real, strict=True)])
    np.testing.assert_array_equal(targets, stream[1:])
    learned = sum(row["weights"].sum() for row in rows)
    assert learned == len(stream) - (len(lengths) if segment else 1)
    for row, r in zip(rows, real, strict=True):
        assert all((row[name][~r] == 0).all() for name in TEXT)


def test_row_fields_have_the_types_of_batch():
    _, (row,) = windows([5], 4)
    assert {name: str(value.dtype) for name, value in row.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "weights": "float32",
        "segment_ids": "int32",
        "positions": "int32",
    }


# ---- rows of conversations


def test_packed_and_unpacked_rows_hold_the_same_conversations():
    documents = Documents([5, 3, 8, 2, 4])
    got = []
    for packing in (True, False):
        rows = Conversations(documents, np.array([0, 2, 3, 4]), 8, packing=packing)
        segments = Counter()
        for row in (rows[i] for i in range(len(rows))):
            for segment in range(1, row["segment_ids"].max() + 1):
                at = row["segment_ids"] == segment
                segments[tuple(np.stack([row[f][at] for f in ("tokens", "weights")]).ravel())] += 1
                assert row["positions"][at].tolist() == list(range(at.sum()))
        got.append((len(rows), segments))
    assert got[0][0] == 3 and got[1][0] == 4
    assert got[0][1] == got[1][1]


# ---- order


@pytest.fixture
def rows() -> Rows:
    parts = [Windows(Documents([n]), np.arange(1), 4, segment=True, tail=False) for n in (29, 17)]
    return Rows(tuple(parts), None, 4)


def test_loader_gives_the_batches_of_batch_at_from_any_step(rows):
    for start, prefetch in ((0, 1), (3, 2), (7, 4)):
        loader = make_loader(
            rows, batch_size=4, micro_batches=2, seed=5, start_step=start, prefetch=prefetch
        )
        for step, batch in enumerate(islice(loader, 4), start):
            assert batch["tokens"].shape == (2, 2, 4)
            flat = {name: value.reshape(4, 4) for name, value in batch.items()}
            assert same(flat, batch_at(rows, 5, step, 4))


def test_rows_of_the_run_do_not_depend_on_the_batch_size(rows):
    small = [batch_at(rows, 0, step, 2)["tokens"] for step in range(6)]
    large = [batch_at(rows, 0, step, 4)["tokens"] for step in range(3)]
    np.testing.assert_array_equal(np.concatenate(small), np.concatenate(large))


def test_each_epoch_has_each_row_once_in_a_new_order(rows):
    assert len(rows) == 7 + 4
    order = [batch_at(rows, 3, step, 1)["tokens"][0].tolist() for step in range(3 * len(rows))]
    epochs = [order[i : i + len(rows)] for i in range(0, len(order), len(rows))]
    stored = [part[i]["tokens"].tolist() for part in rows.parts for i in range(len(part))]
    for epoch in epochs:
        assert sorted(epoch) == sorted(stored)
    assert all(one != two for one, two in pairwise([stored, *epochs]))


def test_another_seed_gives_another_order(rows):
    one, two = (np.concatenate([batch_at(rows, s, 0, 11)["tokens"]]) for s in (0, 1))
    assert not np.array_equal(one, two)


def test_micro_batches_must_divide_the_batch(rows):
    with pytest.raises(ValueError, match="4 rows cannot be divided into 3 micro-batches"):
        make_loader(rows, batch_size=4, micro_batches=3)


# ---- mixtures


def test_weighted_sources_keep_their_shares_and_an_epoch_passes_the_largest(rows):
    # Tokens of the second source's rows are marked apart.
    first, second = rows.parts
    second.examples.stream += 1000
    mixed = Rows((first, second), (3.0, 1.0), 4)
    assert len(mixed) == 10  # 7 / 0.75, rounded up
    tokens = np.concatenate([batch_at(mixed, 0, step, 4)["tokens"] for step in range(25)])
    assert (tokens[:, 0] >= 1000).sum() == 25
    for stretch in tokens[:, 0].reshape(25, 4):
        assert (stretch >= 1000).sum() == 1


@pytest.mark.parametrize("weights", [(1, 5, 3), (2.5, 0.3, 1), (7, 1.004, 2)])
@pytest.mark.parametrize("sizes", [(7, 4, 1), (3, 2, 9), (2, 40, 3)])
def test_an_epoch_of_a_mixture_has_every_row_of_the_largest(weights, sizes):
    documents = [Documents([4 * n + 1]) for n in sizes]
    for i, document in enumerate(documents):
        document.stream += 1000 * i
    parts = [Windows(d, np.arange(1), 4, segment=True, tail=False) for d in documents]
    rows, largest = Rows(tuple(parts), weights, 4), int(np.argmax(sizes))
    firsts = batch_at(rows, 0, 0, 3 * len(rows))["tokens"][:, 0].reshape(3, -1)
    stored = sorted(parts[largest][i]["tokens"][0] for i in range(len(parts[largest])))
    for epochs in (1, 2, 3):
        seen = firsts[:epochs].ravel()
        counts = Counter(seen[seen // 1000 == largest].tolist())
        assert sorted(counts) == stored and min(counts.values()) >= epochs
    assert sum(rows.fractions) == pytest.approx(1)
    shares = np.bincount(firsts.ravel() // 1000) / firsts.size
    np.testing.assert_allclose(shares, rows.fractions, atol=3 / firsts.size)


def test_no_source_of_a_mixture_is_dropped(tmp_path, tokenizer):
    long = texts(tmp_path, "long.jsonl", ["ab" * 20])
    short = texts(tmp_path, "short.jsonl", ["a"])
    with pytest.raises(
        ValueError, match=r"short\.jsonl: 2 tokens fill no row of max_length \+ 1 = 9"
    ):
        load_data(config(tmp_path, long, short, max_length=8), tokenizer)


# ---- evaluation


@pytest.mark.parametrize("batch_size", [1, 4, 11, 20])
def test_eval_batches_have_each_row_once_and_fill_the_last_with_padding(rows, batch_size):
    batches = list(eval_batches(rows, batch_size))
    assert {batch["tokens"].shape for batch in batches} == {(batch_size, 4)}
    joined = {name: np.concatenate([b[name] for b in batches]) for name in TEXT}
    stored = [part[i] for part in rows.parts for i in range(len(part))]
    for index, row in enumerate(stored):
        assert same({name: value[index] for name, value in joined.items()}, row)
    for name in TEXT:
        assert not joined[name][len(stored) :].any()


# ---- load_data


def test_held_out_examples_are_chosen_by_seed_and_are_not_trained_on(tmp_path, tokenizer):
    file = texts(tmp_path, "a.jsonl", [f"document {i:02}" for i in range(20)])

    def held_out(length: int, seed: int) -> tuple[set[int], set[int]]:
        """Documents (by their last two bytes) to train on and held out."""
        cfg = config(tmp_path, file, eval_fraction=0.25, max_length=length)
        data = load_data(TrainConfig(seed=seed, data=cfg.data, log=cfg.log), tokenizer)
        train, evals = (rows.parts[0].indices for rows in (data.train, data.evals["eval"]))
        return set(train.tolist()), set(evals.tolist())

    train, evals = held_out(8, seed=0)
    assert len(evals) == 5 and train | evals == set(range(20)) and not train & evals
    assert held_out(16, seed=0) == (train, evals)
    assert held_out(8, seed=1) != (train, evals)


def test_eval_sources_are_named_by_file_and_kept_whole(tmp_path, tokenizer):
    (tmp_path / "x").mkdir()
    train = texts(tmp_path, "a.jsonl", ["ab" * 20])
    one, two = (texts(tmp_path, name, ["abc", "d"]) for name in ("dev.jsonl", "x/dev.jsonl"))
    held_out = (Source(one), Source(two))
    cfg = config(tmp_path, train, eval=held_out, eval_fraction=0.5, max_length=16)
    data = load_data(cfg, tokenizer)
    assert list(data.evals) == ["dev", "dev-2"]
    (batch,) = eval_batches(data.evals["dev"], 2)
    assert batch["weights"].sum() == 3 + 1
    alone = load_data(config(tmp_path, eval=held_out, max_length=16), tokenizer)
    assert alone.train is None and list(alone.evals) == ["dev", "dev-2"]


def test_an_evaluation_does_not_guess_the_split(tmp_path, tokenizer):
    (tmp_path / "d").mkdir()
    train = texts(tmp_path, "d/train.jsonl", ["abcdef"])
    texts(tmp_path, "d/test.jsonl", ["xy"])
    folder = str(tmp_path / "d")
    with pytest.raises(
        ValueError, match="d: has the splits test, train; name the one to evaluate on"
    ):
        load_data(config(tmp_path, train, eval=(Source(folder),), max_length=4), tokenizer)
    held_out = (Source(folder, split="test"),)
    data = load_data(config(tmp_path, folder, eval=held_out, max_length=4), tokenizer)
    sources = [part["sources"][0] for part in (data.manifest["train"], data.manifest["eval"]["d"])]
    assert [source["split"] for source in sources] == ["train", "test"]
    assert [source["tokens"] for source in sources] == [7, 3]


def test_manifest_counts_what_was_read_cut_dropped_and_laid_out(tmp_path, tokenizer):
    pairs = [("q", "a"), ("q", "a" * 100), ("q" * 100, "a")]
    file = chats(tmp_path, "a.jsonl", pairs)
    data = load_data(config(tmp_path, file, objective="sft", max_length=64), tokenizer)
    manifest = json.loads(json.dumps(data.manifest))
    (source,) = manifest["train"]["sources"]
    assert source["path"] == file and len(source["content"]) == 32
    assert (source["read"], source["examples"], source["truncated"]) == (3, 2, 1)
    assert (source["dropped_too_long"], source["dropped_nothing_to_learn"]) == (1, 0)
    batch = batch_at(data.train, 0, 0, len(data.train))
    assert source["tokens"] == (batch["segment_ids"] > 0).sum()
    assert source["learned_tokens"] == (batch["weights"] > 0).sum()
    assert manifest["train"]["rows"] == len(data.train)
    (line,) = summarize(manifest)
    assert line.startswith(f"train: {file}: 2 of 3 examples, ")
    assert line.endswith(" rows, 1 dropped as too long, 1 truncated")
    assert manifest["train"]["fill"] == source["tokens"] / (64 * len(data.train))


def test_a_divided_source_counts_the_truncated_examples_of_each_part(tmp_path, tokenizer):
    file = chats(tmp_path, "a.jsonl", [("q", "a" * 100)] * 4)
    cfg = config(tmp_path, file, objective="sft", max_length=64, eval_fraction=0.25)
    manifest = load_data(cfg, tokenizer).manifest
    parts = [manifest["train"]["sources"][0], manifest["eval"]["eval"]["sources"][0]]
    assert [part["truncated"] for part in parts] == [3, 1]


def test_no_record_has_examples_on_both_sides_of_a_split(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    turns = [{"role": r, "content": "x"} for r in ("user", "assistant") * 2]
    file.write_text((json.dumps({"messages": turns}) + "\n") * 20)
    cfg = config(
        tmp_path, str(file), objective="sft", learn="each", eval_fraction=0.3, max_length=64
    )
    data = load_data(cfg, tokenizer)
    train, held = data.manifest["train"], data.manifest["eval"]["eval"]
    assert (train["examples"], held["examples"]) == (28, 12)
    (source,) = train["sources"]
    assert (source["records"], source["read"]) == (20, 40)
    train_rows, held_rows = (rows.parts[0].indices for rows in (data.train, data.evals["eval"]))
    records = train_rows // 2, held_rows // 2
    assert not set(records[0]) & set(records[1])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "data.train has no source"),
        ({"eval_fraction": 0.1}, r"holds out 0 of 2 records"),
        ({"max_length": 3}, r"chat\.jsonl: all 2 examples were dropped: 2 too long for "),
        ({"max_length": 64, "eval": ("mute.jsonl",)}, "1 with nothing to learn"),
        ({"max_length": 64, "eval": ("empty.jsonl",)}, r"empty\.jsonl: has no records"),
    ],
)
def test_data_that_gives_nothing_to_learn_is_refused(data, message, tmp_path, tokenizer):
    chat = chats(tmp_path, "chat.jsonl", [("q", "a"), ("q", "b")])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "mute.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}]}')
    train = [chat] if data else []
    held_out = tuple(Source(str(tmp_path / name)) for name in data.get("eval", ()))
    cfg = config(tmp_path, *train, objective="sft", **(data | {"eval": held_out}))
    with pytest.raises(ValueError, match=message):
        load_data(cfg, tokenizer)
