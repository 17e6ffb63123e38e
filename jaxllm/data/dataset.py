# SPDX-License-Identifier: Apache-2.0
"""Load the training and evaluation rows of a config, with the manifest of its sources."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import TrainConfig
from jaxllm.config.source import MEMORY
from jaxllm.data.examples import Examples, fingerprint, tokenize_sources
from jaxllm.data.formats import COMPRESSED
from jaxllm.data.preference import Judged, Pairs, Prompts
from jaxllm.data.rows import Conversations, Rows, Windows
from jaxllm.data.stream import Stream
from jaxllm.data.tokenization import NO_PREFERENCE, NOTHING_TO_LEARN, TOO_LONG, TRUNCATED
from jaxllm.errors import UserError

LENGTH_BINS = 24  # of the histogram of lengths
# Key of the manifest -> (the outcome it counts, the words for it in `summarize`).
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
    train: list[Any] = []
    evals: dict[str, list[Any]] = {"eval": []} if fraction else {}
    streamed = [source.streaming and cfg.verb.data == "text" for source in data.train]
    stored = [s for s, skipped in zip(data.train, streamed, strict=True) if not skipped]
    tokenized = iter(tokenize_sources(stored, cfg, tokenizer, tokenizer_hash, held_out=data.eval))
    for index, source in enumerate(data.train):
        seed = (cfg.seed, index)
        if streamed[index]:
            train.append(Stream(source, cfg, tokenizer, tokenizer_hash, seed))
            continue
        examples = next(tokenized)
        train_indices, eval_indices = _split(examples, fraction, np.random.default_rng(seed))
        train.append(_make_rows(examples, train_indices, cfg, seed))
        if fraction:
            evals["eval"].append(_make_rows(examples, eval_indices, cfg, (0, index), held_out=True))
    for source, examples in zip(data.eval, tokenized, strict=True):
        indices = np.flatnonzero(examples.lengths)
        # A fixed seed makes evaluations comparable between runs.
        part = _make_rows(examples, indices, cfg, (0, 0), held_out=True)
        evals[_set_name(source.path, evals)] = [part]
    weights = tuple(source.weight for source in data.train if source.weight is not None)
    if 0 < len(weights) < len(train):
        raise UserError(
            "data.train: some sources have a weight and others do not; set it for all or none"
        )
    train_rows = _concatenate(train, cfg, weights or None) if train else None
    eval_rows = {name: _concatenate(parts, cfg) for name, parts in evals.items()}
    manifest = {
        "objective": cfg.objective,
        "max_length": data.length,
        "seed": cfg.seed,
        "tokenizer": tokenizer_hash,
        "train": _manifest_entry(train_rows),
        "eval": {name: _manifest_entry(rows) for name, rows in eval_rows.items()},
    }
    return Data(train_rows, eval_rows, manifest)


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
    """A file's name without the suffixes of format and compression, or memory; numbered if it is
    taken."""
    file = Path("memory" if path.startswith(MEMORY) else path)
    name = Path(file.stem).stem if file.suffix.lower() in COMPRESSED else file.stem
    return next(n for n in chain([name], (f"{name}-{i}" for i in count(2))) if n not in taken)


def _make_rows(
    examples: Examples, indices: np.ndarray, cfg: TrainConfig, seed: Any, held_out: bool = False
) -> Any:
    """The rows of a source's examples. Mismatched answers of judged examples depend on `seed`."""
    data = cfg.data
    if not len(indices) and cfg.verb.data == "text":
        raise UserError(f"{examples.name}: all {len(examples)} documents are empty")
    if not len(indices):
        long, nothing, no_preference, _ = _counts(examples).values()
        raise UserError(
            f"{examples.name}: all {len(examples)} examples were dropped: {long} too long for "
            f"data.max_length {data.length}, {nothing} with nothing to learn (no assistant "
            f"turn, or weights of 0), {no_preference} pairs with an empty answer or equal answers"
        )
    args = (examples, indices, data.length)
    match cfg.verb.data:
        case "text":
            rows = Windows(*args, segment=data.segment, tail=held_out)
        case "chat":
            rows = Conversations(*args, packing=data.packing)
        case "pairs":
            rows = Pairs(*args, packing=data.packing)
        case "judged":
            rows = Judged(*args, packing=data.packing, seed=seed)
        case "prompts":
            rows = Prompts(*args)
    if not len(rows):
        raise UserError(
            f"{examples.name}: {examples.lengths[indices].sum()} tokens fill no row of "
            f"max_length + 1 = {data.length + 1}; give more text or a smaller data.max_length"
        )
    return rows


def _concatenate(parts: list[Any], cfg: TrainConfig, weights: Any = None) -> Rows:
    if cfg.verb.data in ("pairs", "judged"):  # rows of different sources are stacked
        slots = max(part.slots for part in parts)
        for part in parts:
            part.slots = slots
    return Rows(tuple(parts), weights, parts[0].length)


def _counts(examples: Examples) -> dict[str, int]:
    return {key: int((examples.outcome == kind).sum()) for key, (kind, _) in _COUNTED.items()}


def _histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """{"edges", "counts"}: how many examples have at least edges[i] tokens and fewer than
    edges[i + 1]; the bins widen with the length."""
    edges = np.geomspace(lengths.min(), lengths.max() + 1, LENGTH_BINS + 1).round().astype(int)
    edges = np.unique(edges)
    return {"edges": edges.tolist(), "counts": np.histogram(lengths, edges)[0].tolist()}


def _manifest_entry(rows: Rows | None) -> dict[str, Any]:
    """A set's entry in the manifest: its sources, their totals, and the fill of its rows."""
    if rows is None:
        return {"sources": [], "examples": 0, "tokens": 0, "rows": 0}
    sources: list[dict[str, Any]] = []
    for part, share in zip(rows.parts, rows.fractions, strict=True):
        if isinstance(part, Stream):
            entry = {"path": part.source.path, "split": part.split, "content": part.content}
            entry |= {"cache": part.fingerprint, "files": len(part.files), "share": share}
            # Unknown before the files are tokenized.
            sources.append(entry | dict.fromkeys(("examples", "tokens", "learned_tokens", "rows")))
            continue
        examples, indices = part.examples, part.indices
        sources.append(
            {
                "path": examples.name,
                "split": examples.split,
                "content": examples.content,
                "cache": examples.fingerprint,
                "max_samples": examples.source.max_samples,
                "records": len(np.unique(examples.source_record)),
                "read": len(examples),
                **_counts(examples),
                "truncated": int((examples.outcome[indices] == TRUNCATED).sum()),
                "examples": len(indices),
                "notes": examples.notes,
                "tokens": int(examples.lengths[indices].sum()),
                "learned_tokens": int(examples.learned[indices].sum()),
                "lengths": _histogram(examples.lengths[indices]),
                "rows": len(part),
                "share": share,
                "passes_per_epoch": share * len(rows) / len(part),
            }
        )
    if any(isinstance(part, Stream) for part in rows.parts):
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
