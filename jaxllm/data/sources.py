# SPDX-License-Identifier: Apache-2.0
"""Files and datasets of every accepted format -> records.

`locate` finds what a source names, `read` gives it as a `datasets.Dataset`, and `records` turns a
batch of that into dicts, each with where it came from. Nothing is executed from data: no pickles,
no dataset scripts.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash
from datasets.exceptions import DatasetGenerationError

from jaxllm.config import Source
from jaxllm.data.formats import ACCEPTED, COMPRESSED, READERS, format_of, loads, reason, short
from jaxllm.errors import MissingFile, UserError
from jaxllm.files import hub_id

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Columns of a spooled table: a record as JSON, and the FILE:LINE it came from.
_RECORD, _AT = "__record__", "__at__"


@dataclass(frozen=True)
class Located:
    """What a source's path turned out to be."""

    format: str
    """a value of formats.FORMATS, or dataset (opened already) or tfds"""
    files: tuple[Path, ...]
    """every file whose bytes are read, in order"""
    opened: Any = None
    """datasets.Dataset, or the tfds data source"""
    split: str | None = None
    """the one taken; None where there are no splits"""
    remote: tuple[str, ...] = ()
    """to be streamed instead of files: addresses of the hub's"""


# ---- finding


def locate(source: Source, *, held_out: bool = False) -> Located:
    """Finds what `source.path` names: files, a folder, a saved or hub dataset, or `tfds:NAME`.

    Of several splits it takes `source.split`, or train when that is None; what is `held_out` must
    name one, for an evaluation on what was trained on looks like a good one. Raises
    FileNotFoundError for a missing path, ValueError for one that cannot be read as data.
    """
    if source.path.startswith("tfds:"):
        return _locate_tfds(source, held_out)
    path = os.path.expanduser(source.path)
    if os.path.isdir(path):
        return _locate_folder(Path(path), source, held_out)
    if os.path.isfile(path):
        return _of_files([Path(path)], source.path)
    if glob.has_magic(path):
        found = sorted(Path(p) for p in glob.glob(path, recursive=True) if os.path.isfile(p))
        if not found:
            raise MissingFile(f"{source.path}: no file matches")
        return _of_files(found, source.path)
    if not hub_id(path.partition(":")[0]) or format_of(path):
        raise MissingFile(
            f"{source.path}: no such file or directory (nor a hub id like OWNER/NAME)"
        )
    return _locate_hub(source, held_out)


def content_hash(files: Iterable[Path]) -> str:
    """128-bit hash of the files' bytes, whatever their names."""
    whole = xxhash.xxh3_128()
    for file in files:
        part = xxhash.xxh3_128()
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                part.update(block)
        whole.update(part.digest())
    return whole.hexdigest()


def _of_files(files: list[Path], path: str) -> Located:
    formats = [format_of(f) for f in files]
    if None in formats:
        unknown = files[formats.index(None)]
        packed = unknown.suffix.lower() in COMPRESSED
        suffix = "".join(unknown.suffixes[-2:] if packed else unknown.suffixes[-1:])
        raise UserError(
            f"{unknown}: the format of {suffix or 'a file without suffix'} is not known; accepted "
            f"are {ACCEPTED}"
        )
    kinds = sorted({f for f in formats if f})
    if len(kinds) > 1:
        raise UserError(f"{path}: holds {' and '.join(kinds)} files; name one kind by a glob")
    for file in files:
        if file.suffix.lower() in COMPRESSED and file.with_suffix("") in files:
            raise UserError(
                f"{path}: holds {file.name} beside {file.stem}, the same records twice; name one "
                "kind by a glob"
            )
    return Located(kinds[0], tuple(files))


def _chosen(splits: Iterable[str], source: Source, held_out: bool) -> str:
    """The split that `locate` takes of these, all that there are."""
    names, wanted = list(splits), source.split
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is None and held_out:
        raise UserError(
            f"{source.path}: has the splits {', '.join(names)}; name the held-out one: "
            f"{{path: {source.path}, split: NAME}}"
        )
    if (wanted := wanted or "train") not in names:
        raise UserError(
            f"{source.path}: no split {wanted!r}; it has {', '.join(names)}: name one by split"
        )
    return wanted


def _locate_folder(folder: Path, source: Source, held_out: bool) -> Located:
    """A dataset written by `save_to_disk`, or a folder of data files (of splits by their names)."""
    split = None
    if (saved := folder / "dataset_dict.json").exists():
        split = _chosen(loads(saved.read_text(), str(saved))["splits"], source, held_out)
        folder = folder / split
    if (folder / "state.json").exists():
        return _of_dataset(datasets.load_from_disk(str(folder)), split)
    seen = (f.relative_to(folder) for f in sorted(folder.rglob("*")) if format_of(f))
    files = [folder / f for f in seen if not any(part.startswith(".") for part in f.parts)]
    if not files:
        raise UserError(f"{folder}: no data files; accepted are {ACCEPTED}")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    unnamed = splits.pop("", [])
    if not splits:  # names say nothing of splits: all of it is what was asked for
        return _of_files(unnamed, str(folder))
    if unnamed:
        raise UserError(
            f"{folder}: file names give the splits {', '.join(splits)}, but "
            f"{unnamed[0]} is in none; name the files by a glob"
        )
    split = _chosen(splits, source, held_out)
    return replace(_of_files(splits[split], str(folder)), split=split)


def _split_of(file: Path) -> str:
    """The split that a file's name or folder gives, by the words `datasets` looks for, or ""."""
    words = re.split(r"[-._ /0-9]+", file.with_suffix("").as_posix())
    given = (split for word in words for split, names in _SPLITS.items() if word in names)
    return next(given, "")


def _locate_hub(source: Source, held_out: bool) -> Located:
    """A dataset of the hub or its local cache; `ID:SUBSET` picks a configuration."""
    name, _, subset = source.path.partition(":")
    if source.streaming:
        return _locate_remote(name, subset or None, source)
    try:
        loaded = datasets.load_dataset(name, subset or None, split=source.split)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{source.path}: no such file or folder, and the hub's dataset of this name "
            f"could not be loaded: {reason(error)}"
        ) from error
    return _of_dataset(*_taken(loaded, source, held_out))


def _locate_remote(name: str, subset: str | None, source: Source) -> Located:
    """The addresses of a hub's dataset's files, of one revision each."""
    try:
        listed = datasets.load_dataset_builder(name, subset).config.data_files or {}
        files = {str(split): sorted(map(str, found)) for split, found in listed.items()}
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{source.path}: no such file or folder, and the hub's dataset of this name "
            f"could not be opened: {reason(error)}"
        ) from error
    if not files:
        raise UserError(f"{source.path}: the hub's dataset lists no files to stream")
    split = _chosen(files, source, held_out=False)
    remote = tuple(files[split])
    found = _of_files([Path(address) for address in remote], source.path)
    return Located(found.format, (), split=split, remote=remote)


def _taken(loaded: Any, source: Source, held_out: bool) -> tuple[Any, str]:
    """The split of `source` (a slice of one, perhaps), or one of all, and its name."""
    if source.split:
        return loaded, source.split
    split = _chosen(loaded, source, held_out)
    return loaded[split], split


def _of_dataset(dataset: Any, split: str | None) -> Located:
    files = tuple(Path(f["filename"]) for f in dataset.cache_files)
    return Located("dataset", files, dataset, split)


def _locate_tfds(source: Source, held_out: bool) -> Located:
    try:
        import tensorflow_datasets as tfds  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"{source.path}: tensorflow-datasets is not installed; pip install 'jaxllm[tfds]'"
        ) from None
    name = source.path.removeprefix("tfds:")
    try:
        builder = tfds.builder(name)
        builder.download_and_prepare(file_format="array_record")
        loaded = builder.as_data_source(split=source.split)  # pyright: ignore[reportCallIssue]
    except (tfds.core.DatasetNotFoundError, OSError, ValueError) as error:
        raise UserError(f"{source.path}: could not be loaded: {reason(error)}") from error
    opened, split = _taken(loaded, source, held_out)
    files = sorted(f for f in Path(builder.data_dir).iterdir() if f.is_file())
    return Located("tfds", tuple(files), opened, split)


# ---- reading


def read(located: Located, folder: Path, first: int | None = None) -> Any:
    """The located data as a memory-mapped `datasets.Dataset`; `folder` takes temporary files.

    first: so many records, instead of all. Raises ValueError `FILE:LINE: …` or `FILE: …` for what
    cannot be decoded.
    """
    match located.format:
        case "dataset":
            return _first(located.opened, first)
        case "parquet" | "arrow":
            files = [str(f) for f in located.files]
            try:
                table = datasets.load_dataset(
                    located.format, data_files=files, split="train", cache_dir=str(folder)
                )
            except (DatasetGenerationError, pa.ArrowInvalid) as error:
                where = files[0] if len(files) == 1 else f"{files[0]} … {files[-1]}"
                why = reason(error.__cause__ or error)
                raise UserError(f"{where}: not readable as {located.format}: {why}") from error
            return _first(table, first)
        case "tfds":
            pairs = _tfds_records(located.opened)
        case _:
            reader = READERS[located.format]
            pairs = (pair for file in located.files for pair in reader(file))
    return _spool(islice(pairs, first), folder / "records.arrow")


def _first(table: Any, count: int | None) -> Any:
    return table if count is None else table.select(range(min(count, len(table))))


def records(batch: Mapping[str, list], indices: list[int], path: str) -> Iterator[tuple[str, dict]]:
    """The records of a batch of `read`'s dataset, each with where it came from for messages."""
    if _RECORD not in batch:
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            yield f"{path}, row {index}", dict(zip(batch, values, strict=True))
        return
    for text, at in zip(batch[_RECORD], batch[_AT], strict=True):
        record = loads(text, at)
        if not isinstance(record, dict):
            raise UserError(f"{at}: a record is a JSON object {{…}}; saw {short(text)}")
        yield at, record


def _spool(pairs: Iterable[tuple[str, str]], file: Path) -> Any:
    """Streams (record JSON, FILE:LINE) pairs into an Arrow file, to be read memory-mapped."""
    schema = pa.schema([(_RECORD, pa.large_string()), (_AT, pa.string())])
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        chunk: list[tuple[str, str]] = []
        size = 0
        for pair in pairs:
            chunk.append(pair)
            size += len(pair[0])
            if size > 1 << 24:
                writer.write_batch(_arrow_batch(chunk, schema))
                chunk, size = [], 0
        if chunk:
            writer.write_batch(_arrow_batch(chunk, schema))
    return datasets.Dataset.from_file(str(file))


def _arrow_batch(chunk: list[tuple[str, str]], schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [
            pa.array(column, field.type)
            for column, field in zip(zip(*chunk, strict=True), schema, strict=True)
        ],
        schema=schema,
    )


def _tfds_records(source: Any) -> Iterator[tuple[str, str]]:
    def plain(value: Any) -> Any:
        return value.decode() if isinstance(value, bytes) else value.tolist()

    for index in range(len(source)):
        yield json.dumps(source[index], default=plain), f"tfds, record {index}"
