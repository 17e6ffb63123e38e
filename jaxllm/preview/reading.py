# SPDX-License-Identifier: Apache-2.0
"""What a run will see, as values for JSON: the counts of its data, and the rows of an update."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers.decoders import DecodeStream

from jaxllm.config import TrainConfig, tokenizer_path
from jaxllm.config.checks import resolve
from jaxllm.data.dataset import Data
from jaxllm.data.loader import ordered, places
from jaxllm.data.rows import Row, Rows
from jaxllm.data.stream import Stream
from jaxllm.data.template import TEMPLATES, template_source
from jaxllm.errors import UserError
from jaxllm.pretokenize import prepare
from jaxllm.preview.checks import Finding, Pool, all_examples, check_examples, snippet
from jaxllm.rows import (
    as_trained,
    indices_of,
    origins_of,
    records_of,
    row_hash,
    segments_of,
    sources_of,
)
from jaxllm.timetable import Timetable

FILLED = 512  # rows of a set that are built to measure how full they are
RECORD = 4000  # characters of the record that is shown
CONTEXT, LEARNED, SPECIAL = 0, 1, 2  # marks of a token; they add up
# The fields of a row that name segments, and what these are.
LABELS = {
    "pairs": {"chosen_segment": "chosen", "rejected_segment": "rejected"},
    "judged": {
        "unpaired_segment": "answer of another prompt (for KTO's baseline)",
        "chosen_segment": "good answer",
        "rejected_segment": "bad answer",
    },
}


def read_preview(cfg: TrainConfig, step: int = 1, limit: int = 0) -> dict[str, Any]:
    """What the run of `cfg` will see, with the rows of its update `step` (from 1).

    limit: the most examples of a set that are checked for near duplicates and suspicious text; 0 =
    all. Neither weights nor an accelerator are used. Raises UserError as the run would for its
    config and data, and for a step that it does not have.
    """
    cfg, tokenizer, data = prepare(cfg)
    assert data.train is not None
    notes = []
    if not cfg.batch_size:
        sizes = (size for size in (cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.expert) if size > 0)
        devices = int(np.prod(list(sizes)))
        cfg = resolve(cfg, devices)
        shown = f"{devices} device{'s' * (devices > 1)}: {cfg.batch_size} rows"
        notes.append(f"the batch is per device and shown for {shown}; mesh.fsdp sets their number")
    timetable = Timetable(cfg, len(data.train))
    if step > timetable.steps:
        raise UserError(f"--step {step}: the run has {timetable.steps} steps")
    epoch = timetable.epoch
    return {
        "objective": cfg.objective,
        "form": cfg.verb.data,
        "output_dir": cfg.output_dir,
        "tokenizer": tokenizer_path(cfg),
        "template": _template(cfg, tokenizer),
        "max_length": cfg.data.length,
        "row_length": None if cfg.verb.online else data.train.length,
        "batch_size": cfg.batch_size,
        "steps": timetable.steps,
        "epoch_steps": None if epoch is None else float(epoch),
        "notes": notes,
        "sets": [_set(name, rows, data, cfg) for name, rows in _sets(data)],
        "findings": _findings(cfg, tokenizer, data, limit),
        "step": step,
        "rows": rows_of(cfg, tokenizer, data.train, step),
        "record": _first_record(cfg, data.train, step),
    }


def _sets(data: Data) -> Iterator[tuple[str, Rows]]:
    assert data.train is not None
    yield "train", data.train
    yield from data.evals.items()


def _template(cfg: TrainConfig, tokenizer: Any) -> dict[str, str] | None:
    """{name, source} of the chat template; None for plain text, and if no example needs one."""
    if cfg.verb.data == "text" or not tokenizer.chat_template:
        return None
    given = cfg.data.template
    name = "of the tokenizer" if given is None else given
    name = f"{given}, built in" if given in TEMPLATES else name
    return {"name": name, "source": template_source(tokenizer)}


# ---- counts


def _set(name: str, rows: Rows, data: Data, cfg: TrainConfig) -> dict[str, Any]:
    """The counts of a set and of its sources, and the lengths of its examples in tokens."""
    entry = data.manifest["train"] if name == "train" else data.manifest["eval"][name]
    parts = [part for part in rows.parts if not isinstance(part, Stream)]
    lengths = [part.examples.lengths[part.indices] for part in parts]
    found = {"name": name, "sources": entry["sources"], "rows": entry["rows"]}
    return found | {
        "fill": _fill(parts) if not cfg.verb.online else None,
        "unpacked": _unpacked(parts, rows.length, cfg),
        "lengths": _lengths(np.concatenate(lengths)) if lengths else None,
    }


def _fill(parts: Sequence[Any]) -> float | None:
    """The share of the rows that is not padding, of at most FILLED rows of each source."""
    shares, weights = [], []
    for part in parts:
        some = np.unique(np.linspace(0, len(part) - 1, FILLED).astype(int)).tolist()
        shares.append(np.mean([(part[row]["segment_ids"] > 0).mean() for row in some]))
        weights.append(len(part))
    return float(np.average(shares, weights=weights)) if parts else None


def _unpacked(parts: Sequence[Any], length: int, cfg: TrainConfig) -> float | None:
    """The fill of rows of one example each; None where examples are not packed."""
    if not cfg.data.packing or cfg.verb.data not in ("chat", "pairs"):
        return None
    examples = sum(len(part.indices) for part in parts)
    return sum(int(p.examples.lengths[p.indices].sum()) for p in parts) / (examples * length)


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    """The distribution of lengths in tokens: quantiles, and counts between edges."""
    edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, 17).round().astype(int))
    quantiles = {"median": 0.5, "p95": 0.95, "p99": 0.99}
    return {
        "edges": edges.tolist(),
        "counts": np.histogram(lengths, edges)[0].tolist(),
        "min": int(lengths.min()),
        **{name: int(np.quantile(lengths, q)) for name, q in quantiles.items()},
        "max": int(lengths.max()),
    }


# ---- checks


def _findings(cfg: TrainConfig, tokenizer: Any, data: Data, limit: int) -> list[dict[str, Any]]:
    """The findings of checks.py, whose examples have their places and a line of their text."""
    pools = {}
    for name, rows in _sets(data):
        parts = [part for part in rows.parts if not isinstance(part, Stream)]
        if parts:
            pools[name] = Pool(name, parts)
    train = pools.pop("train", None)
    if train is None and not pools:
        return []
    found = check_examples(train, list(pools.values()), tokenizer, cfg.verb.data, limit)
    origins = list(all_examples(found))
    sources = sources_of(origins)
    named = {(id(e), i): s["location"] for (e, i), s in zip(origins, sources, strict=True)}

    def shown(finding: Finding) -> list[dict[str, Any]]:
        return [
            {
                "where": named[id(one[0]), one[1]],
                "other": other and named[id(other[0]), other[1]],
                "text": text or snippet(tokenizer, one),
            }
            for one, other, text in finding.examples
        ]

    return [vars(finding) | {"examples": shown(finding)} for finding in found]


# ---- the rows of an update


def rows_of(cfg: TrainConfig, tokenizer: Any, rows: Rows, step: int) -> list[dict[str, Any]]:
    """The rows that update `step` (from 1) trains on, in their order, as tokens; online: the
    prompts of the rollout that it learns from.

    [{"row", "hash" as in rows.bin, "length", "tokens", "learned", "weight", "segments"}]. A segment
    has the last four too, "label", "sources" and its tokens as lists of the same length: "texts",
    "ids" (of each text a list, as some characters take several tokens) and "marks".
    """
    rows = as_trained(cfg, rows)
    indices = indices_of(cfg, step)
    sequence: Any = ordered(rows, cfg.seed)
    special = {*tokenizer.all_special_ids}
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = []
    for number, origins in enumerate(origins_of(cfg, rows, indices)):
        row = sequence[indices[number]]
        labels = _labels(row, cfg)
        segments = []
        pairs = zip(origins, segments_of(row), strict=False)
        for index, (sources, segment) in enumerate(pairs, 1):
            where = [source["location"] for source in sources]
            shown = {"label": labels.get(index, ""), "sources": where}
            segments.append(shown | _tokens(tokenizer, special, *segment))
        totals = {name: sum(s[name] for s in segments) for name in ("tokens", "learned", "weight")}
        length = len(row["tokens"])
        about = {"row": number, "hash": f"{row_hash(row):016x}", "length": length}
        found.append(about | totals | {"segments": segments})
    return found


def _labels(row: Row, cfg: TrainConfig) -> dict[int, str]:
    fields = LABELS.get(cfg.verb.data, {})
    return {int(n): label for field, label in fields.items() for n in row[field] if n}


def _tokens(
    tokenizer: Any, special: set[int], length: int, ids: np.ndarray, weights: np.ndarray
) -> dict[str, Any]:
    texts, groups, marks, place = [], [], [], 0
    for group, text in _pieces(tokenizer, ids.tolist()):
        learned = bool((weights[place : place + len(group)] > 0).any())
        place += len(group)
        texts.append(text)
        groups.append(group)
        marks.append(LEARNED * learned + SPECIAL * bool(special & {*group}))
    counts = {"learned": int((weights > 0).sum()), "weight": float(weights.sum())}
    return {"tokens": length} | counts | {"texts": texts, "ids": groups, "marks": marks}


def _pieces(tokenizer: Any, ids: Sequence[int]) -> Iterator[tuple[list[int], str]]:
    """The text of each token; several tokens together where only they make a character."""
    backend = tokenizer.backend_tokenizer
    stream, waiting = DecodeStream(skip_special_tokens=False), []
    for token in ids:
        waiting.append(token)
        text = stream.step(backend, token)
        if text is not None:
            yield waiting, text
            waiting = []
    if waiting:
        yield waiting, backend.decode(waiting, skip_special_tokens=False)


def _first_record(cfg: TrainConfig, rows: Rows, step: int) -> str | None:
    """The record of the first example of the update as JSON, cut; None if it is in a table."""
    rows = as_trained(cfg, rows)
    sequence: Any = places(rows, cfg.seed)
    place = sequence[indices_of(cfg, step).start]
    examples, index = rows.parts[place.part].origins(place.row, place.epoch)[0][0]
    number = int(examples.source_record[index])
    found = records_of(examples, {number}).get(number)
    if found is None:
        return None
    try:
        text = json.dumps(json.loads(found[0]), indent=2, ensure_ascii=False)
    except ValueError:
        text = found[0]
    more = len(text) - RECORD
    return text if more <= 0 else f"{text[:RECORD]}… ({more:,} more characters)"
