# SPDX-License-Identifier: Apache-2.0
"""Tokenised examples -> rows -> batches whose order is a pure function of (seed, step).

Dims: A micro-batches of an update, B rows of an update, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grain
import numpy as np

from jaxllm.config import Source, TrainConfig
from jaxllm.data.batch import empty_row, make_row
from jaxllm.data.examples import (
    NO_PREFERENCE,
    NOTHING_TO_LEARN,
    TOO_LONG,
    TRUNCATED,
    Examples,
    fingerprint,
    tokenize,
)
from jaxllm.data.formats import COMPRESSED
from jaxllm.data.packing import one_per_row, pack
from jaxllm.data.preference import Judged, Pairs, Prompts, share_slots
from jaxllm.data.stream import ENDLESS, Stream
from jaxllm.errors import UserError

Row = dict[str, np.ndarray]  # fields of Batch, without the batch dim


# ---- rows


class Windows:
    """Documents joined and cut into rows of `length` tokens with a stride of `length`.

    A row reads one token past its end for its last target, so every token but the first is
    predicted once. What is left over at the end fills no row and is lost, unless `tail` asks for
    it as a padded row. With `segment`, attention and positions restart at each document and no
    document's first token is a target; without, a row is one segment and all of it is learned.
    """

    def __init__(
        self, examples: Examples, chosen: np.ndarray, length: int, *, segment: bool, tail: bool
    ) -> None:
        self._examples, self._chosen = examples, chosen
        self.length, self._segment = length, segment
        self._starts = np.concatenate([[0], np.cumsum(examples.lengths[chosen])])
        targets = max(int(self._starts[-1]) - 1, 0)
        self._count = -(-targets // length) if tail else targets // length

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Row:
        starts = self._starts
        begin = row * self.length
        end = min(begin + self.length + 1, int(starts[-1]))
        first = int(np.searchsorted(starts, begin, "right")) - 1
        last = int(np.searchsorted(starts, end, "left"))
        tokens, document, positions = np.empty((3, end - begin), np.int32)
        for index in range(first, last):
            start = int(starts[index])
            lo, hi = max(start, begin), min(int(starts[index + 1]), end)
            at = slice(lo - begin, hi - begin)
            tokens[at] = self._examples.tokens(self._chosen[index])[lo - start : hi - start]
            document[at] = index - first + 1
            positions[at] = np.arange(hi - lo)
        if not self._segment:
            document[:] = 1
            positions[:] = np.arange(end - begin)
        out = empty_row(self.length)
        n = end - begin - 1
        out["tokens"][:n] = tokens[:-1]
        out["targets"][:n] = tokens[1:]
        out["weights"][:n] = document[1:] == document[:-1]
        out["segment_ids"][:n] = document[:-1]
        out["positions"][:n] = positions[:-1]
        return out


class Conversations:
    """Whole conversations in rows of `length` tokens: several a row when packed, or one."""

    def __init__(
        self, examples: Examples, chosen: np.ndarray, length: int, *, packing: bool
    ) -> None:
        self._examples, self._chosen, self.length = examples, chosen, length
        self._plan = pack(examples.lengths[chosen], length) if packing else one_per_row(len(chosen))

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, row: int) -> Row:
        indices = self._chosen[self._plan[row]]
        segments = [(self._examples.tokens(i), self._examples.learn(i)) for i in indices]
        return make_row(segments, self.length)


@dataclass(frozen=True)
class Rows:
    """Rows of one or more sources.

    Without `weights` the sources are joined and an epoch is one pass over all of them. With
    weights each source keeps its share of every stretch of rows, small sources come round more
    often, and an epoch is one pass over the largest.
    """

    parts: tuple[Any, ...]
    weights: tuple[float, ...] | None
    length: int
    """tokens in a row"""

    def __len__(self) -> int:
        """Rows in an epoch, none of which leaves out a row of the source that it passes."""
        largest, counts = self.largest, self.counts
        return -(-len(self.parts[largest]) * sum(counts) // counts[largest])

    @property
    def largest(self) -> int:
        """The source with the most rows."""
        return int(np.argmax([len(part) for part in self.parts]))

    @property
    def counts(self) -> list[int]:
        """Each source's share in whole numbers, in hundredths of the least weight as grain does."""
        if self.weights is None:
            return [len(part) for part in self.parts]
        return [round(100 * weight / min(self.weights)) for weight in self.weights]

    @property
    def shares(self) -> list[float]:
        """Each source's share of the rows; they sum to 1."""
        return [count / sum(self.counts) for count in self.counts]


# ---- batches


def ordered(rows: Rows, seed: int) -> grain.MapDataset:
    """The endless run of rows, random access; each epoch of a source is reshuffled."""

    def endless(part: grain.MapDataset, index: int) -> grain.MapDataset:
        if len(part) == ENDLESS:
            return part  # has an order of its own
        own_seed = np.random.SeedSequence((seed, index)).generate_state(1)[0]
        # Grain cannot slice an endless run in batches of 1; this one is as good as endless.
        return part.shuffle(seed=int(own_seed)).repeat(2**60 // len(part))

    parts = [_passes(part) for part in rows.parts]
    if rows.weights is None:
        return endless(grain.MapDataset.concatenate(parts) if len(parts) > 1 else parts[0], 0)
    mixed = [endless(part, index) for index, part in enumerate(parts)]
    # Grain rounds the first source's count up: so an epoch has every row of the largest.
    first = rows.largest
    order = [first, *(i for i in range(len(parts)) if i != first)]
    return grain.MapDataset.mix([mixed[i] for i in order], [rows.counts[i] for i in order])


def _passes(part: Any) -> grain.MapDataset:
    """The rows of a source, one pass after another where they change from pass to pass."""
    if not isinstance(part, Judged):
        return grain.MapDataset.source(part)
    count = len(part)
    return grain.MapDataset.range(count).map_with_index(
        lambda index, row: part.row(row, index // count)
    )


def _stacked(batch: Sequence[Row], micro_batches: int) -> Row:
    """The fields of some rows, each [A, rows / A, …]."""
    fields = {f: np.stack([row[f] for row in batch]) for f in batch[0]}
    return {f: v.reshape(micro_batches, -1, *v.shape[1:]) for f, v in fields.items()}


def _batches(rows: Rows, seed: int, batch_size: int, micro_batches: int) -> grain.MapDataset:
    """The endless run of batches, random access by step."""
    stack = partial(_stacked, micro_batches=micro_batches)
    return ordered(rows, seed).batch(batch_size, batch_fn=stack)


def batch_at(rows: Rows, seed: int, step: int, batch_size: int) -> Row:
    """The fields of Batch [B, T] of update `step` (from 0): the same on every host and mesh."""
    batch = _batches(rows, seed, batch_size, 1)[step]
    assert batch is not None  # grain's mark of a filtered element; nothing filters here
    return {name: value[0] for name, value in batch.items()}


def make_loader(
    rows: Rows,
    *,
    batch_size: int,
    micro_batches: int = 1,
    seed: int = 0,
    start_step: int = 0,
    prefetch: int = 2,
) -> Iterator[Row]:
    """Batches [A, B/A, T] of updates start_step, start_step + 1, …, without end.

    `prefetch` batches are made ahead of need, each in a thread of its own.
    """
    if batch_size % micro_batches:
        raise UserError(f"{batch_size} rows do not divide into {micro_batches} micro-batches")
    batches = _batches(rows, seed, batch_size, micro_batches)[start_step:]
    options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
    return iter(batches.to_iter_dataset(options))


def eval_batches(rows: Rows, batch_size: int) -> Iterator[Row]:
    """Every row once, in order, as batches [B, T]; the last one is filled with padding rows."""
    batch: list[Row] = []
    for part in rows.parts:
        for index in range(len(part)):
            batch.append(part[index])
            if len(batch) == batch_size:
                yield {f: v[0] for f, v in _stacked(batch, 1).items()}
                batch = []
    if batch:
        padding = {f: np.zeros_like(v) for f, v in batch[0].items()}
        batch += [padding] * (batch_size - len(batch))
        yield {f: v[0] for f, v in _stacked(batch, 1).items()}


# ---- from a config


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    train: Rows | None
    """None when the config names no training sources"""
    evals: dict[str, Rows]
    manifest: dict[str, Any]
    """what data.json holds: for each source its counts and hashes, for each set its rows"""


def load_data(cfg: TrainConfig, tokenizer: Any) -> Data:
    """Reads, tokenises (or finds in the cache) and lays out all of `cfg.data`.

    Raises ValueError when a source is empty, when all of its examples are dropped, when it gives
    no row, when a held-out set is empty or when one has several splits and names none.
    """
    data = cfg.data
    if not data.train and not data.eval:
        raise UserError("data.train names no source; give a file, folder or dataset")
    fraction = 0.0 if data.eval else data.eval_fraction
    tokenizer_hash = fingerprint(tokenizer)
    train, held_out = [], []
    for index, source in enumerate(data.train):
        if source.streaming and cfg.verb.data == "text":
            chosen = partial(_whole_file, length=data.max_length, segment=data.segment)
            stream = Stream(source, cfg, tokenizer, tokenizer_hash, chosen, (cfg.seed, index))
            train.append(stream)
            continue
        examples = tokenize(source, cfg, tokenizer, tokenizer_hash)
        kept, held = _split(examples, fraction, np.random.default_rng((cfg.seed, index)))
        train.append(_Part(source, examples, kept))
        held_out.append(_Part(source, examples, held))
    evals: dict[str, list[_Part]] = {"eval": held_out} if fraction else {}
    for source in data.eval:
        examples = tokenize(source, cfg, tokenizer, tokenizer_hash, held_out=True)
        part = _Part(source, examples, np.flatnonzero(examples.lengths))
        evals[_free_name(_stem(source.path), evals)] = [part]

    rows = {name: _lay_out(parts, cfg, held_out=True) for name, parts in evals.items()}
    train_rows = _lay_out(train, cfg, held_out=False) if train else None
    manifest = {
        "objective": cfg.objective,
        "max_length": data.max_length,
        "seed": cfg.seed,
        "tokenizer": tokenizer_hash,
        "train": _entry(train, train_rows),
        "eval": {name: _entry(parts, rows[name]) for name, parts in evals.items()},
    }
    return Data(train_rows, rows, manifest)


def summarize(manifest: dict[str, Any]) -> list[str]:
    """A manifest as lines for the terminal, a source each, with what was dropped and cut, and what
    there is to tell of its examples."""
    lines, told = [], set()
    for name, entry in [("train", manifest["train"]), *manifest["eval"].items()]:
        for source in entry["sources"]:
            if "files" in source:
                lines.append(f"{name}: {source['path']}: {source['files']:,} files, streamed")
                continue
            counts = {
                "dropped as too long": source["dropped_too_long"],
                "dropped with nothing to learn": source["dropped_nothing_to_learn"],
                "dropped as empty or equal pairs": source["dropped_no_preference"],
                "truncated": source["truncated"],
            }
            first = "the first " * (source["max_samples"] == source["read"])
            lost = "".join(f", {count:,} {what}" for what, count in counts.items() if count)
            lines.append(
                f"{name}: {source['path']}: {source['examples']:,} of {first}{source['read']:,} "
                f"examples, "
                f"{source['tokens']:,} tokens ({source['learned_tokens']:,} learned) in "
                f"{source['rows']:,} rows{lost}"
            )
            notes = {f"{source['path']}: {what} ({n:,})" for what, n in source["notes"].items()}
            lines += sorted(notes - told)  # a source that is divided tells them once
            told |= notes
    return lines


@dataclass(frozen=True)
class _Part:
    """The examples of a source that belong to one set."""

    source: Source
    examples: Examples
    chosen: np.ndarray  # int64, ascending; none of them dropped


def _split(
    examples: Examples, fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Examples to train on, and those of the last `fraction` of the shuffled records, held out;
    both ascending. No record has examples in both."""
    usable = np.flatnonzero(examples.lengths)
    if not fraction:
        return usable, usable[:0]
    records = examples.source_record[usable]
    shuffled = rng.permutation(np.unique(records))
    count = round(fraction * len(shuffled))
    if not 0 < count < len(shuffled):
        raise UserError(
            f"{examples.name}: eval_fraction {fraction} holds out {count} of {len(shuffled)} "
            "records; change it, or name a held-out set in data.eval"
        )
    held = np.isin(records, shuffled[-count:])
    return usable[~held], usable[held]


def _stem(path: str) -> str:
    """A file's name without its suffixes of format and compression."""
    name = Path(path)
    return Path(name.stem).stem if name.suffix.lower() in COMPRESSED else name.stem


def _free_name(stem: str, taken: dict[str, Any]) -> str:
    names = (stem if n == 1 else f"{stem}-{n}" for n in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)


def _rows_of(part: _Part, cfg: TrainConfig, held_out: bool, index: int) -> Any:
    data, args = cfg.data, (part.examples, part.chosen, cfg.data.max_length)
    if cfg.verb.data == "text":
        return Windows(*args, segment=data.segment, tail=held_out)
    if cfg.verb.online:
        return Prompts(*args)
    if cfg.verb.data == "judged":  # evaluations keep one draw, so that they compare
        seed = (0 if held_out else cfg.seed, index)
        return Judged(*args, packing=data.packing, seed=seed)
    return (Conversations if cfg.verb.data == "chat" else Pairs)(*args, packing=data.packing)


def _whole_file(examples: Examples, length: int, segment: bool) -> Windows:
    """The rows of a file that is streamed; its tail is lost."""
    chosen = np.flatnonzero(examples.lengths)
    return Windows(examples, chosen, length, segment=segment, tail=False)


def _lay_out(parts: list[Any], cfg: TrainConfig, *, held_out: bool) -> Rows:
    data, laid_out = cfg.data, []
    for index, part in enumerate(parts):
        if isinstance(part, Stream):
            laid_out.append(part)
            continue
        if not len(part.chosen):
            raise UserError(_why_empty(part.examples, cfg))
        rows = _rows_of(part, cfg, held_out, index)
        if not len(rows):
            raise UserError(
                f"{part.source.path}: {part.examples.lengths[part.chosen].sum()} tokens fill no "
                f"row of max_length + 1 = {data.max_length + 1}; give more text or a smaller "
                "data.max_length"
            )
        laid_out.append(rows)
    if isinstance(laid_out[0], Pairs | Judged):
        laid_out = share_slots(laid_out)
    weights = tuple(p.source.weight for p in parts if p.source.weight is not None)
    if held_out or not weights:
        return Rows(tuple(laid_out), None, laid_out[0].length)
    if len(weights) < len(parts):
        raise UserError("data.train: some sources have a weight and some do not; give all or none")
    return Rows(tuple(laid_out), weights, laid_out[0].length)


def _why_empty(examples: Examples, cfg: TrainConfig) -> str:
    if cfg.verb.data == "text":
        return f"{examples.name}: all {len(examples)} documents are empty"
    fates = (TOO_LONG, NOTHING_TO_LEARN, NO_PREFERENCE)
    long, nothing, untold = (int((examples.fate == f).sum()) for f in fates)
    return (
        f"{examples.name}: all {len(examples)} examples were dropped: {long} too long for "
        f"data.max_length {cfg.data.max_length}, {nothing} with nothing to learn (no assistant "
        f"turn, or weights of 0), {untold} pairs with an empty side or two equal ones"
    )


def _entry(parts: list[Any], rows: Rows | None) -> dict[str, Any]:
    """A set's entry in the manifest: its sources, their sum, and how full the rows are."""
    if rows is None:
        return {"sources": [], "examples": 0, "tokens": 0, "rows": 0}
    sources: list[dict[str, Any]] = []
    for part, laid_out, share in zip(parts, rows.parts, rows.shares, strict=True):
        if isinstance(part, Stream):
            known = {"path": part.source.path, "split": part.split, "content": part.content}
            known |= {"cache": part.fingerprint, "files": len(part.files), "share": share}
            # Nobody knows before they were read.
            sources.append(known | dict.fromkeys(("examples", "tokens", "learned_tokens", "rows")))
            continue
        fate, examples = part.examples.fate, part.examples
        sources.append(
            {
                "path": part.source.path,
                "split": examples.split,
                "content": examples.content,
                "cache": examples.fingerprint,
                "max_samples": part.source.max_samples,
                "records": len(np.unique(examples.source_record)),
                "read": len(examples),
                "dropped_too_long": int((fate == TOO_LONG).sum()),
                "dropped_nothing_to_learn": int((fate == NOTHING_TO_LEARN).sum()),
                "dropped_no_preference": int((fate == NO_PREFERENCE).sum()),
                "truncated": int((fate == TRUNCATED).sum()),
                "examples": len(part.chosen),
                "notes": examples.notes,
                "tokens": int(examples.lengths[part.chosen].sum()),
                "learned_tokens": int(examples.learned[part.chosen].sum()),
                "rows": len(laid_out),
                "share": share,
                "passes_per_epoch": share * len(rows) / len(laid_out),
            }
        )
    if any(isinstance(part, Stream) for part in parts):
        return {"sources": sources} | dict.fromkeys(("examples", "tokens", "rows"))
    totals = {
        name: sum(s[name] for s in sources) for name in ("examples", "tokens", "learned_tokens")
    }
    stored = sum(len(laid_out) for laid_out in rows.parts)
    return {
        "sources": sources,
        **totals,
        "rows": stored,
        "rows_per_epoch": len(rows),
        "fill": min(totals["tokens"] / (stored * rows.length), 1.0),
    }
