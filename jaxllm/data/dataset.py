# SPDX-License-Identifier: Apache-2.0
"""Load the training and evaluation rows of a config, with the manifest of its sources."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import Source, TrainConfig
from jaxllm.data.examples import Examples, fingerprint, tokenize
from jaxllm.data.formats import COMPRESSED
from jaxllm.data.preference import Judged, Pairs, Prompts, equalize_slots
from jaxllm.data.rows import Conversations, Rows, Windows
from jaxllm.data.stream import Stream
from jaxllm.data.tokenization import NO_PREFERENCE, NOTHING_TO_LEARN, TOO_LONG, TRUNCATED
from jaxllm.errors import UserError

# Key of the manifest -> (outcome that it counts, how `summarize` calls it).
_COUNTED = {
    "dropped_too_long": (TOO_LONG, "dropped as too long"),
    "dropped_nothing_to_learn": (NOTHING_TO_LEARN, "dropped with nothing to learn"),
    "dropped_no_preference": (NO_PREFERENCE, "dropped as empty or equal pairs"),
    "truncated": (TRUNCATED, "truncated"),
}


@dataclass(frozen=True)
class Data:
    """The rows of a run."""

    train: Rows | None
    """None if the config has no training sources"""
    evals: dict[str, Rows]
    manifest: dict[str, Any]
    """the content of data.json: counts and hashes per source, and rows per set"""


def load_data(cfg: TrainConfig, tokenizer: Any) -> Data:
    """Tokenize the sources of `cfg.data`, or load them from the cache, and divide them into rows.

    Raises UserError if a source is empty, has no usable example or fills no row, if an evaluation
    set is empty, or if an evaluation source has several splits and names none.
    """
    data = cfg.data
    if not data.train and not data.eval:
        raise UserError("data.train has no source; give a file, folder or dataset")
    fraction = 0.0 if data.eval else data.eval_fraction
    tokenizer_hash = fingerprint(tokenizer)
    train, held_out = [], []
    for index, source in enumerate(data.train):
        if source.streaming and cfg.verb.data == "text":
            make_rows = partial(_file_rows, length=data.max_length, segment=data.segment)
            stream = Stream(source, cfg, tokenizer, tokenizer_hash, make_rows, (cfg.seed, index))
            train.append(stream)
            continue
        examples = tokenize(source, cfg, tokenizer, tokenizer_hash)
        rng = np.random.default_rng((cfg.seed, index))
        train_indices, eval_indices = _split(examples, fraction, rng)
        train.append(_Subset(source, examples, train_indices))
        held_out.append(_Subset(source, examples, eval_indices))
    evals: dict[str, list[_Subset]] = {"eval": held_out} if fraction else {}
    for source in data.eval:
        examples = tokenize(source, cfg, tokenizer, tokenizer_hash, held_out=True)
        subset = _Subset(source, examples, np.flatnonzero(examples.lengths))
        evals[_set_name(source.path, evals)] = [subset]

    rows = {name: _make_rows(subsets, cfg, held_out=True) for name, subsets in evals.items()}
    train_rows = _make_rows(train, cfg, held_out=False) if train else None
    manifest = {
        "objective": cfg.objective,
        "max_length": data.max_length,
        "seed": cfg.seed,
        "tokenizer": tokenizer_hash,
        "train": _manifest_entry(train, train_rows),
        "eval": {name: _manifest_entry(subsets, rows[name]) for name, subsets in evals.items()},
    }
    return Data(train_rows, rows, manifest)


def summarize(manifest: dict[str, Any]) -> list[str]:
    """A manifest as lines for the terminal: the counts of each source, and its notes."""
    lines, reported = [], set()
    for name, entry in [("train", manifest["train"]), *manifest["eval"].items()]:
        for source in entry["sources"]:
            if "files" in source:
                lines.append(f"{name}: {source['path']}: {source['files']:,} files, streamed")
                continue
            first = "the first " * (source["max_samples"] == source["read"])
            counts = ((source[key], words) for key, (_, words) in _COUNTED.items())
            dropped = "".join(f", {n:,} {words}" for n, words in counts if n)
            lines.append(
                f"{name}: {source['path']}: {source['examples']:,} of {first}{source['read']:,} "
                f"examples, {source['tokens']:,} tokens ({source['learned_tokens']:,} learned) in "
                f"{source['rows']:,} rows{dropped}"
            )
            notes = {f"{source['path']}: {note} ({n:,})" for note, n in source["notes"].items()}
            lines += sorted(notes - reported)  # a divided source reports them once
            reported |= notes
    return lines


@dataclass(frozen=True)
class _Subset:
    """The examples of a source that belong to the same set."""

    source: Source
    examples: Examples
    indices: np.ndarray  # int64, ascending, without dropped examples


def _split(
    examples: Examples, fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(indices of the training examples, indices of the held-out ones), both ascending.

    `fraction` of the records is held out. All examples of a record are in the same set.
    """
    usable = np.flatnonzero(examples.lengths)
    if not fraction:
        return usable, usable[:0]
    records = examples.source_record[usable]
    shuffled = rng.permutation(np.unique(records))
    size = round(fraction * len(shuffled))
    if not 0 < size < len(shuffled):
        raise UserError(
            f"{examples.name}: eval_fraction {fraction} holds out {size} of {len(shuffled)} "
            "records; change it, or set data.eval to other data"
        )
    is_held_out = np.isin(records, shuffled[-size:])
    return usable[~is_held_out], usable[is_held_out]


def _set_name(path: str, taken: dict[str, Any]) -> str:
    """A file's name without the suffixes of format and compression, numbered if it is taken."""
    file = Path(path)
    name = Path(file.stem).stem if file.suffix.lower() in COMPRESSED else file.stem
    return next(n for n in chain([name], (f"{name}-{i}" for i in count(2))) if n not in taken)


def _subset_rows(subset: _Subset, cfg: TrainConfig, held_out: bool, index: int) -> Any:
    data, args = cfg.data, (subset.examples, subset.indices, cfg.data.max_length)
    match cfg.verb.data:
        case "text":
            return Windows(*args, segment=data.segment, tail=held_out)
        case "chat":
            return Conversations(*args, packing=data.packing)
        case "pairs":
            return Pairs(*args, packing=data.packing)
        case "judged":  # a fixed seed makes evaluations comparable between runs
            seed = (0 if held_out else cfg.seed, index)
            return Judged(*args, packing=data.packing, seed=seed)
        case "prompts":
            return Prompts(*args)


def _file_rows(examples: Examples, length: int, segment: bool) -> Windows:
    """The rows of a streamed file, without its tail."""
    indices = np.flatnonzero(examples.lengths)
    return Windows(examples, indices, length, segment=segment, tail=False)


def _make_rows(subsets: list[Any], cfg: TrainConfig, *, held_out: bool) -> Rows:
    data, parts = cfg.data, []
    for index, subset in enumerate(subsets):
        if isinstance(subset, Stream):
            parts.append(subset)
            continue
        if not len(subset.indices):
            raise UserError(_empty_reason(subset.examples, cfg))
        rows = _subset_rows(subset, cfg, held_out, index)
        if not len(rows):
            raise UserError(
                f"{subset.source.path}: {subset.examples.lengths[subset.indices].sum()} tokens "
                f"fill no row of max_length + 1 = {data.max_length + 1}; give more text or a "
                "smaller data.max_length"
            )
        parts.append(rows)
    if cfg.verb.data in ("pairs", "judged"):
        parts = equalize_slots(parts)
    weights = tuple(p.source.weight for p in subsets if p.source.weight is not None)
    if held_out or not weights:
        return Rows(tuple(parts), None, parts[0].length)
    if len(weights) < len(subsets):
        raise UserError(
            "data.train: some sources have a weight and others do not; set it for all or none"
        )
    return Rows(tuple(parts), weights, parts[0].length)


def _counts(examples: Examples) -> dict[str, int]:
    return {key: int((examples.outcome == kind).sum()) for key, (kind, _) in _COUNTED.items()}


def _empty_reason(examples: Examples, cfg: TrainConfig) -> str:
    if cfg.verb.data == "text":
        return f"{examples.name}: all {len(examples)} documents are empty"
    long, nothing, no_preference, _ = _counts(examples).values()
    return (
        f"{examples.name}: all {len(examples)} examples were dropped: {long} too long for "
        f"data.max_length {cfg.data.max_length}, {nothing} with nothing to learn (no assistant "
        f"turn, or weights of 0), {no_preference} pairs with an empty answer or equal answers"
    )


def _manifest_entry(subsets: list[Any], rows: Rows | None) -> dict[str, Any]:
    """A set's entry in the manifest: its sources, their totals, and the fill of its rows."""
    if rows is None:
        return {"sources": [], "examples": 0, "tokens": 0, "rows": 0}
    sources: list[dict[str, Any]] = []
    for subset, part, share in zip(subsets, rows.parts, rows.fractions, strict=True):
        if isinstance(subset, Stream):
            entry = {"path": subset.source.path, "split": subset.split, "content": subset.content}
            entry |= {"cache": subset.fingerprint, "files": len(subset.files), "share": share}
            # Unknown before the files are tokenized.
            sources.append(entry | dict.fromkeys(("examples", "tokens", "learned_tokens", "rows")))
            continue
        examples = subset.examples
        sources.append(
            {
                "path": subset.source.path,
                "split": examples.split,
                "content": examples.content,
                "cache": examples.fingerprint,
                "max_samples": subset.source.max_samples,
                "records": len(np.unique(examples.source_record)),
                "read": len(examples),
                **_counts(examples),
                "examples": len(subset.indices),
                "notes": examples.notes,
                "tokens": int(examples.lengths[subset.indices].sum()),
                "learned_tokens": int(examples.learned[subset.indices].sum()),
                "rows": len(part),
                "share": share,
                "passes_per_epoch": share * len(rows) / len(part),
            }
        )
    if any(isinstance(subset, Stream) for subset in subsets):
        return {"sources": sources} | dict.fromkeys(("examples", "tokens", "rows"))
    totals = {
        name: sum(s[name] for s in sources) for name in ("examples", "tokens", "learned_tokens")
    }
    stored = sum(map(len, rows.parts))
    return {
        "sources": sources,
        **totals,
        "rows": stored,
        "rows_per_epoch": len(rows),
        "fill": min(totals["tokens"] / (stored * rows.length), 1.0),
    }
