# SPDX-License-Identifier: Apache-2.0
"""Tokenized examples of a source, cached as memory-mapped Arrow files.

The cache's key is a hash of the source's bytes, the tokenizer, the settings that change tokens, our
code that applies them, and the versions of the packages that render and tokenize.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date as Date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import xxhash

from jaxllm import dist
from jaxllm.config import Source, TrainConfig
from jaxllm.data.sources import Located, content_hash, locate, read, records
from jaxllm.data.template import template_source, with_settings
from jaxllm.data.tokenization import ENCODERS
from jaxllm.errors import UserError
from jaxllm.paths import as_path, copy, files_in, is_bucket

# Modules and packages that determine the tokens: changing one invalidates the cache. The versions
# of Python and of the packages that read files do not change tokens.
_MODULES = ("formats", "sources", "messages", "prompts", "conversations", "template", "turns")
_MODULES += ("chat", "tokenization", "examples")
_CODE = [Path(__file__).with_name(f"{name}.py") for name in _MODULES]
_CODE.append(Path(__file__).parents[1] / "tokenizer.py")  # `special_tokens`
_PACKAGES = ("jinja2", "tokenizers", "transformers")

_LAST = "state.json"  # the file of a saved table that is written last to a bucket

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


@_progress_bars(False)
def tokenize(
    source: Source, cfg: TrainConfig, tokenizer: Any, tokenizer_hash: str, *, held_out: bool = False
) -> Examples:
    """Tokenize `source` as the verb's kind of data, or load it from the cache.

    `tokenizer_hash` is the tokenizer's `fingerprint`. A `held_out` source with several splits must
    name one. Raises UserError for an empty source and for records that cannot be parsed.
    """
    if source.streaming:
        raise UserError(
            f"{source.path}: streaming is supported only in data.train of pretrain; remove "
            "streaming from this source"
        )
    tokenizer = with_settings(tokenizer, cfg.data)
    # All sources and workers use one date.
    cfg = replace(cfg, data=replace(cfg.data, date=cfg.data.date or str(Date.today())))
    located = locate(source, held_out=held_out)
    content = content_hash(located.files)
    settings = _settings(cfg, tokenizer) | {
        "content": content,
        "format": located.format,
        "split": located.split,
        "columns": source.columns,
        "max_samples": source.max_samples,
        "tokenizer": tokenizer_hash,
    }
    key, root = cache_key(settings), cache_root(cfg)
    if not (root / key).is_dir():
        with tempfile.TemporaryDirectory(dir=root, prefix="making-") as folder:
            made, shared = Path(folder) / "examples", shared_cache(cfg)
            if not (shared and (shared / key / _LAST).exists() and _download(shared / key, made)):
                table = tokenize_table(source, cfg, tokenizer, located, Path(folder))
                table.save_to_disk(str(made))
                _upload(made, shared / key if shared else None)
            try:
                os.rename(Path(folder) / "examples", root / key)
            except OSError:
                if not (root / key).is_dir():  # another process may have created it
                    raise
    table: Any = datasets.load_from_disk(str(root / key))
    return Examples(table, source, located.split, content, key)


@_progress_bars(False)
def tokenize_table(
    source: Source, cfg: TrainConfig, tokenizer: Any, located: Located, folder: Path
) -> Any:
    """Tokenize located data as a `datasets.Dataset` of FEATURES, in a file of `folder`."""
    raw = read(located, folder, source.max_samples)
    return _map(source, cfg, tokenizer, raw, folder / "tokens.arrow")


def shared_cache(cfg: TrainConfig) -> Path | None:
    """data.cache_dir if it is in a bucket. What is made in `cache_root` is copied to it, and from
    it to machines that lack it, since Arrow tables are memory-mapped."""
    return as_path(cfg.data.cache_dir) if is_bucket(cfg.data.cache_dir) else None


def cached_file(cfg: TrainConfig, name: str) -> Path:
    """A file in `cache_root`, which is copied from the shared cache if it is there alone."""
    file, shared = cache_root(cfg) / name, shared_cache(cfg)
    if shared and not file.is_file() and (shared / name).is_file():
        copy(shared / name, file)
    return file


def share(cfg: TrainConfig, file: Path) -> None:
    """Copies a file in `cache_root` to the shared cache, if there is one."""
    if (shared := shared_cache(cfg)) and dist.is_main():
        copy(file, shared / file.name)


def _upload(folder: Path, target: Path | None) -> None:
    """Copies a table to a bucket; _LAST marks it as complete."""
    files = files_in(folder) if target and dist.is_main() else ()
    for file in sorted(files, key=lambda file: file.name == _LAST):
        copy(file, target / file.name)


def _download(source: Path, folder: Path) -> Path:
    """Copies a table from a bucket."""
    folder.mkdir()
    for file in files_in(source):
        copy(file, folder / file.name)
    return folder


def cache_root(cfg: TrainConfig) -> Path:
    """The local folder of tokenized data, which is created if missing."""
    local = None if shared_cache(cfg) else cfg.data.cache_dir
    try:
        root = Path(local or "~/.cache/jaxllm").expanduser()
    except RuntimeError:
        raise UserError(
            "there is no home directory for tokenized data; set data.cache_dir"
        ) from None
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"data.cache_dir: {root} is a file, or is inside one") from None
    return root


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
    names = ("user_template", "reasoning", "roles", "drop_columns", "max_length", "too_long")
    settings = {name: getattr(cfg.data, name) for name in (*names, "learn", "train_on_prompt")}
    settings |= {"data": cfg.verb.data, "templates": templates}
    return settings | {"date": cfg.data.date if asks_date else None}


def _map(source: Source, cfg: TrainConfig, tokenizer: Any, raw: Any, file: Path) -> Any:
    """Tokenize `raw` to a dataset of FEATURES with `data.workers` processes.

    0 means one per core, with at least 2,000 records per process: starting one takes a while.
    """
    if not len(raw):
        raise UserError(f"{source.path}: has no records")
    encode = ENCODERS[cfg.verb.data]
    workers = min(cfg.data.workers or min(_cores(), len(raw) // 2000), len(raw))
    with warnings.catch_warnings(), _progress_bars(cfg.log.progress):
        # JAX warns about forks, but the child processes do not use JAX.
        warnings.filterwarnings("ignore", message=".*fork", category=RuntimeWarning)
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        return raw.map(
            partial(_encode_batch, encode, source, cfg, tokenizer),
            batched=True,
            batch_size=100,
            with_indices=True,
            remove_columns=raw.column_names,
            features=FEATURES,
            num_proc=workers if workers > 1 else None,
            cache_file_name=str(file),
            load_from_cache_file=False,
            new_fingerprint="unused",  # unused, and hashing a tokenizer is slow
            desc=f"tokenize {Path(source.path).name}",
        )


def _cores() -> int:
    """Cores that this process may use; all cores where this is unknown (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _encode_batch(encode, source, cfg, tokenizer, batch, indices) -> dict[str, list]:
    rows = list(encode(records(batch, indices, source.path), source, cfg, tokenizer))
    return {name: [row[i] for row in rows] for i, name in enumerate(FEATURES)}
