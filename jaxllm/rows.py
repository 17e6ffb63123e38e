# SPDX-License-Identifier: Apache-2.0
"""The rows of a run's steps: their hashes, recorded in the run folder, and where they come from.

rows.bin has a record of little-endian uint64 for each step: the step, then the hash of each row of
its batch (online: the step of a rollout's first update, then the hash of each of its prompts). A
resumed run writes the records of the steps after its checkpoint again.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grain
import numpy as np
import xxhash

from jaxllm import dist
from jaxllm.config import TrainConfig, from_dict
from jaxllm.data.chat import run_tokenizer
from jaxllm.data.dataset import load_data
from jaxllm.data.examples import Examples
from jaxllm.data.formats import READERS
from jaxllm.data.loader import ordered, places
from jaxllm.data.rows import Origin, Row, Rows
from jaxllm.data.sources import locate
from jaxllm.errors import UserError
from jaxllm.files import read_json
from jaxllm.paths import as_path, is_bucket, naming
from jaxllm.reference import RowsWithLogps
from jaxllm.rl.online import prompts_per_rollout
from jaxllm.run_folder import is_run_config

FILE = "rows.bin"
# The fields of `Batch` that come from the data; positions follow from segment_ids.
HASHED = ("tokens", "targets", "weights", "segment_ids", "chosen_segment", "rejected_segment")
HASHED += ("margin", "unpaired_segment")


def row_hash(row: Row) -> int:
    """64-bit xxh3 of a row's fields HASHED."""
    hasher = xxhash.xxh3_64()
    for name in HASHED:
        if name in row:
            hasher.update(row[name].data)
    return hasher.intdigest()


def record_shape(cfg: TrainConfig) -> tuple[int, int]:
    """(steps from one record to the next, hashes in a record)."""
    if cfg.verb.online:
        return cfg.rl.updates, prompts_per_rollout(cfg)
    return 1, cfg.batch_size


class RowLog:
    """Records the hashes of the rows of each step; each process writes those of its own rows.

    folder: the run folder, or the local one of `monitor.metrics.Spool` that the main process has of
    a run in a bucket, where the others send it theirs (`flush`). start: the step that the run
    resumes from. A new run (0) empties the file.
    """

    def __init__(self, cfg: TrainConfig, folder: Path, start: int):
        self.stride, self.width = record_shape(cfg)
        self.in_bucket = is_bucket(cfg.output_dir)
        if dist.is_main():
            with (folder / FILE).open("ab") as file:
                file.truncate(None if start else 0)
        dist.barrier("rows")
        writes = dist.is_main() or not self.in_bucket
        self.file = (folder / FILE).open("r+b", buffering=0) if writes else None
        self._unsent: list[tuple[int, str]] = []  # (offset, bytes as hex)

    def __call__(self, step: int, rows: Iterable[Row], places: Sequence[int] | None = None) -> None:
        """Records rows of `step`, NumPy arrays on the host.

        places: the index of each row in the batch, ascending; None: they are the whole batch, which
        every process has, and the main process writes.
        """
        if places is None and not dist.is_main():
            return
        hashes = np.fromiter(map(row_hash, rows), "<u8")
        places = range(len(hashes)) if places is None else places
        offset = (step - 1) // self.stride * (1 + self.width)
        ends = np.flatnonzero(np.diff(places) != 1) + 1  # of the ranges of rows that are adjacent
        parts = zip(np.split(np.asarray(places), ends), np.split(hashes, ends), strict=True)
        for place, values in ((-1, np.array([step], "<u8")), *((p[0], v) for p, v in parts)):
            self._write(8 * int(offset + 1 + place), values.tobytes())

    def _write(self, offset: int, data: bytes) -> None:
        if self.file is None:
            self._unsent.append((offset, data.hex()))
        else:
            with naming(Path(self.file.name)):
                os.pwrite(self.file.fileno(), data, offset)

    def flush(self) -> None:
        """Sends the records to the main process of a run in a bucket. All processes call it."""
        if self.in_bucket:
            for offset, data in itertools.chain(*dist.everyone(self._unsent, "rows", to=0)):
                self._write(offset, bytes.fromhex(data))
            self._unsent = []

    def __enter__(self) -> RowLog:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.file is not None:
            self.file.close()


def _records(folder: Path, cfg: TrainConfig) -> np.ndarray:
    """uint64 [records, 1 + rows]: the records of rows.bin; an incomplete one has zeros."""
    if not (folder / FILE).is_file():
        raise UserError(f"{folder} has no {FILE}: the run did not record its rows")
    data, width = (folder / FILE).read_bytes(), 1 + record_shape(cfg)[1]
    values = np.frombuffer(data[: len(data) // 8 * 8], "<u8")
    return np.pad(values, (0, -len(values) % width)).reshape(-1, width)


# ---- the rows again, from the config and the data


def _load(run: str) -> tuple[Path, TrainConfig, Any, Rows]:
    """(folder, config, tokenizer, training rows) of a run. No device is used."""
    folder = as_path(run)
    file = folder / "config.json"
    values = read_json(file) if file.is_file() else {}
    if not is_run_config(values):
        raise UserError(f"{run} is not a run folder")
    cfg = from_dict(values)
    tokenizer = run_tokenizer(cfg)
    rows = load_data(replace(cfg, data=replace(cfg.data, eval=())), tokenizer).train
    assert rows is not None
    return folder, cfg, tokenizer, as_trained(cfg, rows)


def as_trained(cfg: TrainConfig, rows: Rows) -> Rows:
    """The rows in each pass over the data, without precomputed log-probabilities."""
    if cfg.align.reference == "precomputed":  # such a run reads the rows of pass 0 in each pass
        rows = replace(rows, parts=tuple(RowsWithLogps(part, {}) for part in rows.parts))
    return rows


def indices_of(cfg: TrainConfig, step: int) -> range:
    """The places in the run's sequence of the rows of a step, from 1; online: of the prompts of
    the rollout that the step learns from."""
    stride, width = record_shape(cfg)
    number = (step - 1) // stride
    return range(number * width, (number + 1) * width)


def records_of(examples: Examples, indices: set[int]) -> dict[int, tuple[str, str]]:
    """{index: (record as JSON, FILE:LINE)} of some records of a source; empty if it is a table.
    Reads the source up to the last of them."""
    if "://" in examples.name and not is_bucket(examples.name):  # a streamed file of the hub
        return {}
    source = examples.source
    located = locate(replace(source, split=examples.split or source.split))
    readers = [READERS[located.format]] if located.format in READERS else []
    if located.format == "array_record" and is_bucket(examples.name):  # needs a local copy
        readers = []
    pairs = (pair for read in readers for file in located.files for pair in read(file))
    some = itertools.islice(enumerate(pairs), max(indices) + 1)
    return {i: pair for i, pair in some if i in indices}


def sources_of(origins: list[Origin]) -> list[dict[str, Any]]:
    """{path, record (from 0), location} of each example. A location is FILE:LINE, or the row of a
    table; finding the line reads the source up to it."""
    found = [(examples, int(examples.source_record[index])) for examples, index in origins]
    wanted = {id(examples): (examples, set()) for examples, _ in found}
    for examples, record in found:
        wanted[id(examples)][1].add(record)
    known = {key: records_of(examples, indices) for key, (examples, indices) in wanted.items()}
    return [
        {
            "path": examples.name,
            "record": record,
            "location": known[id(examples)].get(record, ("", f"{examples.name}, row {record}"))[1],
        }
        for examples, record in found
    ]


def origins_of(cfg: TrainConfig, rows: Rows, indices: Iterable[int]) -> list[list[list[dict]]]:
    """The sources {path, record, location} of each segment of some rows of the run's sequence."""
    sequence: Any = places(rows, cfg.seed)
    found = [rows.parts[p.part].origins(p.row, p.epoch) for p in map(sequence.__getitem__, indices)]
    sources = iter(sources_of([origin for row in found for segment in row for origin in segment]))
    return [[[next(sources) for _ in segment] for segment in row] for row in found]


# ---- jaxllm rows


def rows_of_step(run: str, step: int) -> dict[str, Any]:
    """The rows of a step of a run, made again from its config and data, for JSON.

    {"step", "rows": [{"row", "hash", "recorded", "tokens", "learned", "weight", "segments"}]}: the
    hash now and as recorded (null if it is not), the numbers of tokens and of learned tokens, and
    the sum of the loss weights. A segment has the last three too, its "sources" with "path",
    "record" (from 0) and "location", and its "text" as a list of [text, learned]. Online: the
    prompts of the rollout that the step learns from.
    """
    folder, cfg, tokenizer, rows = _load(run)
    indices = indices_of(cfg, step)
    recorded: Any = [None] * len(indices)
    if (folder / FILE).is_file():
        records, number = _records(folder, cfg), indices.start // len(indices)
        if number < len(records):
            recorded = [f"{h:016x}" if h else None for h in records[number, 1:].tolist()]
    sequence: Any = ordered(rows, cfg.seed)
    found = []
    for i, origins in enumerate(origins_of(cfg, rows, indices)):
        row = sequence[indices[i]]
        segments: list[dict[str, Any]] = [
            {"sources": sources} | _segment(tokenizer, *segment)
            for sources, segment in zip(origins, segments_of(row), strict=False)
        ]
        totals = {name: sum(s[name] for s in segments) for name in ("tokens", "learned", "weight")}
        hashes = {"hash": f"{row_hash(row):016x}", "recorded": recorded[i]}
        found.append({"row": i} | hashes | totals | {"segments": segments})
    return {"step": step, "rows": found}


def segments_of(row: Row) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(length, token ids, loss weight of each) of each segment of a row.

    The last target of a row of documents follows the row's tokens; it is among the ids.
    """
    if "segment_ids" not in row:  # a prompt
        yield len(row["tokens"]), row["tokens"], np.zeros(len(row["tokens"]))
        return
    for segment in range(1, row["segment_ids"].max() + 1):
        (here,) = np.nonzero(row["segment_ids"] == segment)
        ids = np.append(row["tokens"][here[0]], row["targets"][here])
        weights = np.append(0, row["weights"][here])
        count = len(here) + bool(weights[-1])
        yield len(here), ids[:count], weights[:count]


def _segment(tokenizer: Any, length: int, ids: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """The text of a segment, in pieces that are learned or not, and its counts."""
    learned = weights > 0
    changes = [*(np.flatnonzero(learned[1:] != learned[:-1]) + 1).tolist(), len(ids)]
    pieces, before = [], ""
    for end in changes:  # a tokenizer may decode a token by those before it
        text = tokenizer.decode(ids[:end].tolist(), clean_up_tokenization_spaces=False)
        pieces.append([text[len(before) :], bool(learned[end - 1])])
        before = text
    counts = {"learned": int(learned.sum()), "weight": float(weights.sum())}
    return {"tokens": length} | counts | {"text": pieces}


def describe(found: dict[str, Any], *, colour: bool) -> str:
    """What `rows_of_step` returns, as lines; learned text is in [[ ]], or in colour."""

    def counts(one: dict[str, Any]) -> str:
        return f"{one['tokens']} tokens, {one['learned']} learned, weight {one['weight']:g}"

    lines = []
    for row in found["rows"]:
        now, recorded = row["hash"], row["recorded"] or "not"
        hashes = now if now == recorded else f"{now} ({recorded} recorded)"
        lines.append(f"step {found['step']}, row {row['row']}: {counts(row)}, hash {hashes}")
        for segment in row["segments"]:
            where = ", ".join(f"{s['location']} (record {s['record']})" for s in segment["sources"])
            lines.append(f"  {where}: {counts(segment)}")
            lines += [f"    {line}" for line in _marked(segment["text"], colour)]
    return "\n".join(lines)


def _marked(pieces: list[list[Any]], colour: bool) -> list[str]:
    """The lines of pieces [text, learned]; learned text is in [[ ]], or in colour."""
    opening, closing = ("\x1b[32m", "\x1b[0m") if colour else ("[[", "]]")
    shown = ((printable(text), learned) for text, learned in pieces)
    text = "".join(f"{opening}{t}{closing}" if learned else t for t, learned in shown)
    return text.removesuffix("\n").split("\n")


def printable(text: str) -> str:
    """The text with control characters escaped, so that it cannot change the terminal."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda m: repr(m[0])[1:-1], text)


# ---- the first example of a run

PIECES, CHARACTERS = 6, 240  # of an example that are shown: pieces, and characters of a long one
# Fields of a row, and the labels of the segments that they name.
_ANSWERS = {
    "pairs": (("chosen_segment", "chosen"), ("rejected_segment", "rejected")),
    "judged": (("chosen_segment", "good answer"), ("rejected_segment", "bad answer")),
}


def first_example(
    cfg: TrainConfig, rows: Rows, tokenizer: Any, start: int, *, colour: bool
) -> list[str]:
    """The first example after step `start` as lines for the terminal, cut to a readable length.

    Learned text is in [[ ]], or in colour. A pair is shown with both answers; an online run has
    prompts, of which nothing is learned. Processes other than the main one get no line.
    """
    if not dist.is_main():
        return []
    sequence: Any = ordered(rows, cfg.seed)
    row = sequence[indices_of(cfg, start + 1).start]
    segments = list(segments_of(row))
    labels = [
        (int(row[key][0]), label) for key, label in _ANSWERS.get(cfg.verb.data, ()) if row[key][0]
    ]
    mark = "in colour" if colour else "in [[ ]]"
    title = "first prompt" if cfg.verb.online else f"first example, learned text {mark}"
    lines = [f"{title}:"]
    for number, label in labels or [(1, "")]:
        pieces = _segment(tokenizer, *segments[number - 1])["text"]
        lines += [f"  {label}:"] if label else []
        lines += [f"    {line}" for line in _marked(_shortened(pieces), colour)]
    return lines


def _shortened(pieces: list[list[Any]]) -> list[list[Any]]:
    """The pieces [text, learned] of an example without the middle of long texts, and without the
    pieces between the first and the last ones."""

    def short(text: str) -> str:
        keep, cut = CHARACTERS // 2, len(text) - CHARACTERS
        return text if cut <= keep else f"{text[:keep]} … {cut:,} characters … {text[-keep:]}"

    half, cut = PIECES // 2, len(pieces) - PIECES
    if cut > 0:
        pieces = [*pieces[:half], [f" … {cut} more parts … ", False], *pieces[-half:]]
    return [[short(text), learned] for text, learned in pieces]


# ---- jaxllm verify


def verify(run: str) -> str:
    """Computes the hashes of all recorded steps again from the run's config and data.

    Returns a line that says how many are equal. Raises UserError if a step before the last one or
    a checkpoint is missing, and for the first step whose hashes differ. The last records of a run
    that was killed may be incomplete; they do not count.
    """
    folder, cfg, _, rows = _load(run)
    stride, width = record_shape(cfg)
    records = _records(folder, cfg)
    sequence = ordered(rows, cfg.seed).map(row_hash).batch(width, batch_fn=list)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    hashes = iter(sequence.to_iter_dataset(options))
    complete = records.all(1) & (records[:, 0] == 1 + stride * np.arange(len(records)))
    saved = [int(p.name) for p in (folder / "checkpoints").glob("[0-9]*") if p.name.isdigit()]
    needed = max(saved, default=0) // stride
    written = int(np.flatnonzero(records.all(1)).max(initial=-1)) + 1
    missing = np.flatnonzero(~complete[:written])
    count = int(missing[0]) if len(missing) else written
    if count < max(needed, written):
        raise UserError(f"{run}: {FILE} does not have step {count * stride + 1}")
    for number, recorded in enumerate(records[:count, 1:].tolist()):
        for row, (before, after) in enumerate(zip(recorded, next(hashes), strict=True)):
            if before != after:
                (origins,) = origins_of(cfg, rows, [number * width + row])
                where = ", ".join(s["location"] for segment in origins[:3] for s in segment[:3])
                raise UserError(
                    f"{run}: step {number * stride + 1}, row {row}: the run recorded hash "
                    f"{before:016x}, but its config and data now give {after:016x} ({where})"
                )
    return f"{run}: all {count} steps of {width} rows are as recorded"
