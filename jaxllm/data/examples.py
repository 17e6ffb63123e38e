# SPDX-License-Identifier: Apache-2.0
"""Tokenized examples of a source, cached as memory-mapped Arrow files, one or more for each part.

The cache's key is a hash of the source's bytes, the tokenizer, the settings that change tokens, our
code that applies them, and the versions of the packages that render and tokenize.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date as Date
from functools import partial
from importlib import metadata
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import xxhash

from jaxllm import dist
from jaxllm.config import Source, TrainConfig
from jaxllm.data.cache import Cache
from jaxllm.data.sources import (
    Located,
    combine_hashes,
    content_hash,
    divide,
    file_hash,
    file_ids,
    locate,
    read,
    records,
)
from jaxllm.data.template import template_source, with_settings
from jaxllm.data.tokenization import ENCODERS
from jaxllm.errors import UserError
from jaxllm.paths import file_size
from jaxllm.untrusted import rust

# Modules and packages that determine the tokens: changing one invalidates the cache. The versions
# of Python and of the packages that read files do not change tokens.
_MODULES = ("formats", "sources", "messages", "prompts", "conversations", "template", "turns")
_MODULES += ("chat", "tokenization", "examples")
_CODE = [Path(__file__).with_name(f"{name}.py") for name in _MODULES]
_CODE += [Path(__file__).parents[1] / name for name in ("tokenizer.py", "untrusted.py")]
_PACKAGES = ("jinja2", "tokenizers", "transformers")

FEATURES = datasets.Features(
    {
        "tokens": datasets.LargeList(datasets.Value("int32")),  # empty when dropped
        "loss_weights": datasets.LargeList(datasets.Value("float32")),  # empty for documents
        "learned": datasets.Value("int32"),  # number of targets with a loss weight
        "outcome": datasets.Value("int8"),  # COMPLETE, TRUNCATED, … of tokenization.py
        "first": datasets.Value("int32"),  # tokens of a pair's chosen answer or a judged prompt
        "value": datasets.Value("float32"),  # a pair's margin; 1 = good answer, -1 = bad answer
        "record": datasets.Value("large_string"),  # a prompt's record for reward functions, as JSON
        "part": datasets.Value("int32"),  # index among the examples of a record
        "notes": datasets.LargeList(datasets.Value("string")),
    }
)


class Examples:
    """Tokenized examples of one source, with random access and without copies.

    lengths: int64 [N], 0 for a dropped example. learned: int64 [N], the number of targets with a
    loss weight. outcome: int8 [N], first: int32 [N] and value: float32 [N] are columns of
    FEATURES. source_record: int64 [N], ascending, the index of each example's record. notes: {note:
    number of examples}. `name` is the source's path; `split` is None if there are no splits;
    `content` is the hash of the source's bytes, and `fingerprint` the cache's key.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        source: Source,
        split: str | None = None,
        content: str = "",
        fingerprint: str = "",
    ) -> None:
        self.source, self.name = source, source.path
        self.split, self.content, self.fingerprint = split, content, fingerprint
        column = table.data.column
        self._tokens, self._loss_weights = column("tokens"), column("loss_weights")
        self._record = column("record")
        self.lengths = pc.call_function("list_value_length", [self._tokens]).to_numpy()
        self.learned = column("learned").to_numpy().astype(np.int64)
        self.outcome, self.first, self.value = (
            column(name).to_numpy() for name in ("outcome", "first", "value")
        )
        self.source_record = np.cumsum(column("part").to_numpy() == 0) - 1
        notes = pc.call_function("list_flatten", [column("notes")]).value_counts().to_pylist()
        self.notes = dict(sorted((note["values"], note["counts"]) for note in notes))

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, index: int) -> np.ndarray:
        """int32 [n]. A document ends with eos."""
        return self._tokens[index].values.to_numpy()

    def learn(self, index: int) -> np.ndarray:
        """float32 [n], the weight of predicting each token; empty for documents."""
        return self._loss_weights[index].values.to_numpy()

    def record(self, index: int) -> str:
        """A prompt's record for reward functions, as JSON."""
        return self._record[index].as_py()


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    before = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()


@dataclass(frozen=True)
class _Cached:
    """A source and its tokens in the cache, which has an entry for each part."""

    source: Source
    located: Located
    content: str
    cache: Cache
    key: str
    groups: list[tuple[Located, int]]

    def part(self, group: int, index: int) -> str:
        """The name of a part's entry."""
        return f"{self.key}/{group:05}-{index:05}-of-{self.groups[group][1]:05}"

    def load(self) -> Examples:
        """The tokens of all parts, in the order of the records."""
        parts = [self.part(g, i) for g, (_, count) in enumerate(self.groups) for i in range(count)]
        for part in parts if self.cache.shared else ():
            self.cache.check(part)  # this machine's copy
        folders = [self.cache.get(part) for part in parts]
        if None in folders:
            part = parts[folders.index(None)]
            raise UserError(
                f"{part} in data.cache_dir is damaged; start the run again to rebuild it"
            )
        tables: Any = [datasets.load_from_disk(str(folder)) for folder in folders]
        table = datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]
        if not len(table):
            raise UserError(f"{self.source.path}: has no records")
        return Examples(table, self.source, self.located.split, self.content, self.key)


def tokenize(source: Source, cfg: TrainConfig, tokenizer: Any, tokenizer_hash: str) -> Examples:
    """The examples of one source, as `tokenize_sources` gives them."""
    return tokenize_sources([source], cfg, tokenizer, tokenizer_hash)[0]


@_progress_bars(False)
def tokenize_sources(
    sources: Sequence[Source],
    cfg: TrainConfig,
    tokenizer: Any,
    tokenizer_hash: str,
    *,
    held_out: Sequence[Source] = (),
) -> list[Examples]:
    """Tokenize sources as the kind of data of the command, or load them from the cache.

    The processes that share data.cache_dir share out the files to hash and the parts to
    tokenize. A part appears in the cache when it is complete, so a run that was killed continues
    with the parts that are missing. `tokenizer_hash` is the tokenizer's `fingerprint`. The
    examples of the `held_out` sources follow those of `sources`; such a source must name one of
    several splits. Raises UserError for an empty source, for records that cannot be parsed, and if
    the processes see different files.
    """
    everything = [*sources, *held_out]
    for source in everything:
        if source.streaming:
            raise UserError(
                f"{source.path}: streaming is supported only in data.train of pretrain; remove "
                "streaming from this source"
            )
    tokenizer = with_settings(tokenizer, cfg.data)
    # All sources, workers and processes use one date.
    date = cfg.data.date or dist.agree(str(Date.today()))
    cfg = replace(cfg, data=replace(cfg.data, date=date))
    cache = Cache(cfg.data.cache_dir)
    team = cache.processes()
    located = [locate(s) for s in sources] + [locate(s, held_out=True) for s in held_out]
    contents = _contents(everything, located, team)
    settings = _settings(cfg, tokenizer)
    cached = []
    for source, found, content in zip(everything, located, contents, strict=True):
        key = cache_key(
            settings
            | {
                "content": content,
                "format": found.format,
                "split": found.split,
                "columns": source.columns,
                "max_samples": source.max_samples,
                "tokenizer": tokenizer_hash,
            }
        )
        groups = divide(found, source.max_samples)
        cached.append(_Cached(source, found, content, cache, key, groups))
    dist.check_same({f"tokens of {one.source.path}": one.key for one in cached})
    turns = cycle(team)  # one for each part of all sources
    for one in cached:
        for group, (_, count) in enumerate(one.groups):
            mine = [i for i in range(count) if next(turns) == dist.index()]
            missing = [i for i in mine if not one.cache.check(one.part(group, i))]
            if missing:
                _fill(one, group, missing, cfg, tokenizer)
    dist.barrier("tokens")
    return [one.load() for one in cached]


def _contents(sources: Sequence[Source], located: list[Located], team: list[int]) -> list[str]:
    """The hash of each source's bytes; each process of the team hashes some of the files."""
    if dist.count() > 1:  # a file that is not the same on all hosts has another size or ends
        facts = {}
        for source, one in zip(sources, located, strict=True):
            ids = json.dumps(file_ids(list(map(str, one.files))))
            digest = xxhash.xxh3_64_hexdigest(ids.encode())
            size = sum(map(file_size, one.files))
            facts[f"data {source.path}"] = f"{len(one.files)} file(s), {size:,} bytes ({digest})"
        dist.check_same(facts)
    files = [file for one in located for file in one.files]
    place = team.index(dist.index())
    found = dist.everyone([file_hash(file) for file in files[place :: len(team)]])
    by_process = [iter(hashes) for hashes in found]
    hashes = (next(by_process[process]) for process in cycle(team))
    return [one.content or combine_hashes(islice(hashes, len(one.files))) for one in located]


def _fill(cached: _Cached, group: int, parts: list[int], cfg: TrainConfig, tokenizer: Any) -> None:
    """Tokenize some parts of a group into the cache."""
    located, count = cached.groups[group]
    source, cache = cached.source, cached.cache
    if len(cached.groups) > 1:  # for messages
        first, last = located.files[0], located.files[-1]
        source = replace(source, path=str(first) if first == last else f"{first} … {last}")
    try:
        with tempfile.TemporaryDirectory(dir=cache.root, prefix="making-") as folder:
            raw = read(located, Path(folder), source.max_samples)
            for index in parts:
                place = Path(folder) / f"part-{index}"
                place.mkdir()
                start, end = (i * len(raw) // count for i in (index, index + 1))
                some = raw if count == 1 else raw.select(range(start, end))
                table = tokenize_table(source, cfg, tokenizer, some, place, start)
                table.save_to_disk(str(place / "examples"), num_shards=1)
                cache.put(place / "examples", cached.part(group, index))
                shutil.rmtree(place)
    except UserError:  # the mended data has another key
        shutil.rmtree(cache.root / cached.key, ignore_errors=True)
        raise


@_progress_bars(False)
def tokenize_table(
    source: Source, cfg: TrainConfig, tokenizer: Any, raw: Any, folder: Path, start: int = 0
) -> Any:
    """Tokenize records of `read`, the first of which has the number `start`, as a
    `datasets.Dataset` of FEATURES in a file of `folder`, with `data.workers` processes.

    0 means one per core, with at least 2,000 records per process: starting one takes a while.
    """
    if not len(raw):
        return datasets.Dataset.from_dict({name: [] for name in FEATURES}, FEATURES)
    encode = ENCODERS[cfg.verb.data]
    workers = min(cfg.data.workers or min(_cores(), len(raw) // 2000), len(raw))
    with warnings.catch_warnings(), _progress_bars(cfg.log.progress and dist.is_main()):
        # JAX warns about forks, but the child processes do not use JAX.
        warnings.filterwarnings("ignore", message=".*fork", category=RuntimeWarning)
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        return raw.map(
            partial(_encode_batch, encode, source, cfg, tokenizer, start),
            batched=True,
            batch_size=100,
            with_indices=True,
            remove_columns=raw.column_names,
            features=FEATURES,
            num_proc=workers if workers > 1 else None,
            cache_file_name=str(folder / "tokens.arrow"),
            load_from_cache_file=False,
            new_fingerprint="unused",  # unused, and hashing a tokenizer is slow
            desc=f"tokenize {Path(source.path).name}",
        )


def cache_key(settings: dict[str, Any]) -> str:
    """Hash of the settings and of the code and packages that apply them."""
    versions = {name: metadata.version(name) for name in _PACKAGES}
    inputs = settings | {"code": content_hash(_CODE), "versions": versions}
    return xxhash.xxh3_128_hexdigest(json.dumps(inputs, sort_keys=True).encode())


def fingerprint(tokenizer: Any) -> str:
    """Hash of everything in a tokenizer that determines tokens, except its chat template."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("truncation", "padding"):
        del state[name]  # set by earlier calls, not by the tokenizer's files
    parts = [state, tokenizer.special_tokens_map]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


def _settings(cfg: TrainConfig, tokenizer: Any) -> dict[str, Any]:
    """The settings that change tokens."""
    if cfg.verb.data == "text":
        return {"data": "text"}
    templates = [template_source(tokenizer, tools=tools) for tools in (None, [{}])]
    asks_date = any("strftime_now" in template for template in templates)
    names = ("user_template", "reasoning", "roles", "drop_columns", "too_long")
    settings = {name: getattr(cfg.data, name) for name in (*names, "learn", "train_on_prompt")}
    settings |= {"data": cfg.verb.data, "templates": templates, "max_length": cfg.data.length}
    return settings | {"date": cfg.data.date if asks_date else None}


def _cores() -> int:
    """Cores that this process may use; all cores where this is unknown (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _encode_batch(encode, source, cfg, tokenizer, start, batch, indices) -> dict[str, list]:
    numbers = [start + index for index in indices]
    with rust(f"{source.path}: the tokenizer cannot handle a record"):
        rows = list(encode(records(batch, numbers, source.path), source, cfg, tokenizer))
    return {name: [row[i] for row in rows] for i, name in enumerate(FEATURES)}
