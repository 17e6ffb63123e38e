# SPDX-License-Identifier: Apache-2.0
"""Read files and datasets of every accepted format as records.

`locate` finds the files or dataset of a source, `read` returns them as a `datasets.Dataset`, and
`records` converts a batch of it to dicts with their locations. No code of a dataset is run: no
pickles, no dataset scripts.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash
from datasets.exceptions import DatasetGenerationError

from jaxllm.config import Source
from jaxllm.config.source import MEMORY, InMemory
from jaxllm.data.formats import (
    ACCEPTED,
    READERS,
    check_source,
    format_of,
    split_suffix,
)
from jaxllm.errors import MissingFile, UserError, seen
from jaxllm.paths import (
    as_path,
    file_size,
    files_in,
    first_line,
    is_bucket,
    listed,
    local_copy,
    matching,
    read_bytes,
)
from jaxllm.untrusted import ODD, odd_values, parse_json, read_json

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# A part of a source is tokenized by one process, and is what a killed run does not repeat.
PART_BYTES, PART_RECORDS = 1 << 28, 50_000
# Columns of a spooled table: a record as JSON, and its FILE:LINE.
_RECORD, _LOCATION = "__record__", "__location__"


@dataclass(frozen=True)
class Located:
    """The files or dataset that a source's path names."""

    format: str
    """a value of formats.FORMATS, or dataset, tfds or memory"""
    files: tuple[Path, ...]
    """all files that are read, in order"""
    dataset: Any = None
    """the datasets.Dataset, tfds data source or list of JSON texts, for these three formats"""
    split: str | None = None
    """the selected split; None if there are no splits"""
    urls: tuple[str, ...] = ()
    """URLs of a hub dataset's files, to be streamed"""
    content: str = ""
    """hash of data in memory"""


# ---- finding


def locate(source: Source, *, held_out: bool = False) -> Located:
    """Find the data of `source.path`: files, a folder, a saved or hub dataset, `tfds:NAME`, or data
    in memory.

    If there are several splits, `source.split` selects one; the default is train. A `held_out`
    source must name one, so that a model is not evaluated on its training data by mistake. Raises
    FileNotFoundError for a missing path and UserError for one that is not readable as data.
    """
    if source.path.startswith(MEMORY):
        return _locate_memory(source)
    if source.path.startswith("tfds:"):
        return _locate_tfds(source, held_out)
    file = as_path(source.path)
    path = str(file)
    if file.is_dir():
        return _locate_folder(file, source, held_out)
    if file.is_file():
        return _from_files([file], source.path)
    if glob.has_magic(path):
        if not (files := matching(path)):
            raise MissingFile(f"{source.path}: no file matches")
        return _from_files(files, source.path)
    if is_bucket(path):
        raise MissingFile(f"{source.path}: no such object or folder in the bucket")
    check_source(source.path)
    return _locate_hub(source, held_out)


def divide(located: Located, max_records: int | None = None) -> list[tuple[Located, int]]:
    """Groups of consecutive files, each with the number of parts that its records make.

    Small files make a group of up to PART_BYTES; a larger file, a dataset, and data of which only
    `max_records` are read, are a group of several parts. Depends on the files' sizes only.
    """
    objects = listed([file for file in located.files if is_bucket(file)])
    sizes = [objects[str(f)]["size"] if is_bucket(f) else file_size(f) for f in located.files]
    if max_records is not None or located.format in ("dataset", "tfds", "memory"):
        parts = -(-sum(sizes) // PART_BYTES)
        if max_records is not None:
            parts = min(parts, max_records // PART_RECORDS)
        return [(located, max(parts, 1))]
    groups: list[tuple[list[Path], int]] = []
    for file, size in zip(located.files, sizes, strict=True):
        if groups and groups[-1][1] + size <= PART_BYTES:
            files, before = groups.pop()
            groups.append(([*files, file], before + size))
        else:
            groups.append(([file], size))
    return [(replace(located, files=tuple(g)), -(-size // PART_BYTES) or 1) for g, size in groups]


def file_hash(file: Path) -> str:
    """128-bit hash of a file's bytes."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def combine_hashes(hashes: Iterable[str]) -> str:
    """128-bit hash of the hashes of files, in their order."""
    return xxhash.xxh3_128_hexdigest(b"".join(map(bytes.fromhex, hashes)))


def content_hash(files: Iterable[Path]) -> str:
    """128-bit hash of the files' bytes; their names do not matter."""
    return combine_hashes(map(file_hash, files))


def file_ids(files: Sequence[str]) -> list[str]:
    """An id of each file: its URL, or its size and a hash of its first and last 64 KiB; in a bucket
    its size and the checksum (else ETag, or generation) in the listing of the folder."""
    objects = listed([as_path(file) for file in files if is_bucket(file)])

    def one(file: str) -> str:
        if info := objects.get(file):
            keys = ("crc32c", "ETag", "generation")
            return f"{info['size']}-{next(info[key] for key in keys if info.get(key))}"
        if "://" in file:
            return file
        path, ends = Path(file), xxhash.xxh3_128()
        size = file_size(path)
        for start in (0, max(size - (1 << 16), 0)) if size else ():
            ends.update(*read_bytes(path, [(start, min(start + (1 << 16), size))]))
        return f"{size}-{ends.hexdigest()}"

    return list(map(one, files))


def _from_files(files: list[Path], path: str) -> Located:
    formats = [format_of(f) for f in files]
    if None in formats:
        unknown = files[formats.index(None)]
        suffix = "".join(split_suffix(unknown)) or "a file without suffix"
        raise UserError(
            f"{unknown}: the format of {suffix} is unknown; accepted formats: {ACCEPTED}"
        )
    kinds = sorted(set(map(str, formats)))
    if len(kinds) > 1:
        raise UserError(f"{path}: has {' and '.join(kinds)} files; select one format by a glob")
    for file in files:
        if split_suffix(file)[1] and file.with_suffix("") in files:
            raise UserError(
                f"{path}: has both {file.name} and {file.stem}, the same records twice; select one "
                "of them by a glob"
            )
    return Located(kinds[0], tuple(files))


def _choose_split(splits: Iterable[str], source: Source, held_out: bool) -> str:
    """The one of all `splits` that the source selects."""
    names, wanted = list(splits), source.split
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is None and held_out:
        raise UserError(
            f"{source.path}: has the splits {', '.join(names)}; name the one to evaluate on: "
            f"{{path: {source.path}, split: NAME}}"
        )
    if (wanted := wanted or "train") not in names:
        raise UserError(
            f"{source.path}: has no split {wanted!r}; set split to one of {', '.join(names)}"
        )
    return wanted


def _locate_folder(folder: Path, source: Source, held_out: bool) -> Located:
    """A dataset written by `save_to_disk`, or a folder of data files, split by their names."""
    split = None
    if (saved := folder / "dataset_dict.json").exists():
        names: Any = read_json(saved).get("splits")
        is_list = isinstance(names, list) and names
        if not is_list or not all(isinstance(n, str) and n == Path(n).name for n in names):
            raise UserError(f"{saved}: splits is {seen(names)}; it must list folders beside it")
        split = _choose_split(names, source, held_out)
        folder = folder / split
    if (folder / "state.json").exists():
        with odd_values(f"{folder}: not a dataset that save_to_disk wrote", pa.ArrowException):
            return _from_dataset(datasets.load_from_disk(str(folder)), split)
    inside = (f.relative_to(folder) for f in files_in(folder) if format_of(f))
    files = [folder / f for f in inside if not any(part.startswith(".") for part in f.parts)]
    if not files:
        raise UserError(f"{folder}: has no data files; accepted formats: {ACCEPTED}")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    unnamed = splits.pop("", [])
    if not splits:  # no file name contains the name of a split
        return _from_files(unnamed, str(folder))
    if unnamed:
        some = [f"{own[0].relative_to(folder)} to {name}" for name, own in splits.items()]
        wild = "*" if all(file.parent == folder for file in files) else "**/*"
        raise UserError(
            f"{folder}: file names give splits ({', '.join(some)}), but {unnamed[0].name} belongs "
            f"to none; to read all files, give a glob such as {folder}/{wild}{unnamed[0].suffix}"
        )
    split = _choose_split(splits, source, held_out)
    return replace(_from_files(splits[split], str(folder)), split=split)


def _split_of(file: Path) -> str:
    """The split in a file's name or folder, by the words `datasets` looks for, or ""."""
    words = re.split(r"[-._ /0-9]+", file.with_suffix("").as_posix())
    given = (split for word in words for split, names in _SPLITS.items() if word in names)
    return next(given, "")


def _locate_hub(source: Source, held_out: bool) -> Located:
    """A dataset of the hub or its local cache; `ID:SUBSET` selects a configuration.

    To stream it, the URLs of its files are listed, pinned to one revision.
    """
    name, _, subset = source.path.partition(":")
    try:
        if not source.streaming:
            loaded = datasets.load_dataset(name, subset or None, split=source.split)
            return _from_dataset(*_select_split(loaded, source, held_out))
        listed = datasets.load_dataset_builder(name, subset or None).config.data_files or {}
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{source.path}: no such file or folder, and the hub's dataset of this name "
            f"could not be loaded: {first_line(error)}"
        ) from error
    files = {str(split): sorted(map(str, urls)) for split, urls in listed.items()}
    if not files:
        raise UserError(f"{source.path}: the hub's dataset lists no files to stream")
    split = _choose_split(files, source, held_out=False)
    urls = tuple(files[split])
    located = _from_files([Path(url) for url in urls], source.path)
    return replace(located, files=(), split=split, urls=urls)


def _select_split(loaded: Any, source: Source, held_out: bool) -> tuple[Any, str]:
    """(the split of `source`, which may be a slice, or the default one; its name)."""
    if source.split:
        return loaded, source.split
    split = _choose_split(loaded, source, held_out)
    return loaded[split], split


def _from_dataset(dataset: Any, split: str | None) -> Located:
    files = tuple(Path(f["filename"]) for f in dataset.cache_files)
    return Located("dataset", files, dataset, split)


def _locate_memory(source: Source) -> Located:
    if not isinstance(source.path, InMemory):
        raise UserError(
            f"{source.path}: these records were in the memory of the Python program that started "
            "the run; run that program again (jaxllm.train with the same records in data.train)"
        )
    if source.split or source.streaming:
        raise UserError(f"{source.path}: data in memory has neither split nor streaming; remove it")
    records = source.path.records
    kind = "memory" if isinstance(records, list) else "dataset"
    return Located(kind, (), records, content=source.path.removeprefix(MEMORY))


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
        raise UserError(f"{source.path}: could not be loaded: {first_line(error)}") from error
    dataset, split = _select_split(loaded, source, held_out)
    files = sorted(f for f in Path(builder.data_dir).iterdir() if f.is_file())
    return Located("tfds", tuple(files), dataset, split)


# ---- reading


def read(located: Located, folder: Path, max_records: int | None = None) -> Any:
    """The located data as a memory-mapped `datasets.Dataset`; temporary files go to `folder`.

    At most `max_records` records are read. Raises UserError (`FILE:LINE: …` or `FILE: …`) for data
    that cannot be decoded.
    """
    match located.format:
        case "dataset":
            return _head(located.dataset, max_records)
        case "parquet" | "arrow":
            files = [str(local_copy(f, _numbered(folder, i))) for i, f in enumerate(located.files)]
            for file in files if located.format == "arrow" else ():
                _check_arrow(Path(file))
            try:
                table = datasets.load_dataset(
                    located.format, data_files=files, split="train", cache_dir=str(folder)
                )
            except (DatasetGenerationError, pa.ArrowException, OSError, *ODD) as error:
                where = files[0] if len(files) == 1 else f"{files[0]} … {files[-1]}"
                why = first_line(error.__cause__ or error)
                raise UserError(f"{where}: not readable as {located.format}: {why}") from error
            return _head(table, max_records)
        case "tfds":
            pairs = _tfds_records(located.dataset)
        case "memory":
            texts = located.dataset
            pairs = ((text, f"data in memory, record {i}") for i, text in enumerate(texts))
        case _:
            reader = READERS[located.format]
            files = located.files
            if located.format == "array_record":
                files = [local_copy(f, _numbered(folder, i)) for i, f in enumerate(files)]
            pairs = (pair for file in files for pair in reader(file))
    return _spool(islice(pairs, max_records), folder / "records.arrow")


def _check_arrow(file: Path) -> None:
    """Raises UserError for a file that is not Arrow. pyarrow would allocate the size that its first
    bytes state."""
    (head,) = read_bytes(file, [(0, 8)])
    length = int.from_bytes(head[4:], "little")  # of a stream's schema
    is_stream = head.startswith(b"\xff\xff\xff\xff") and length <= file_size(file)
    if not is_stream and not head.startswith(b"ARROW1"):
        raise UserError(f"{file}: not readable as arrow: it starts with {head!r}")


def _numbered(folder: Path, index: int) -> Path:
    """A subdirectory for the local copy of a file: two files may have the same name."""
    path = folder / str(index)
    path.mkdir(exist_ok=True)
    return path


def _head(table: Any, count: int | None) -> Any:
    return table if count is None else table.select(range(min(count, len(table))))


def records(
    batch: Mapping[str, list], indices: Sequence[int], path: str
) -> Iterator[tuple[str, dict]]:
    """The (location, record) pairs of a batch of `read`'s dataset."""
    if indices and not batch:
        raise UserError(f"{path}: the table has no columns")
    if _RECORD not in batch:
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            yield f"{path}, row {index}", dict(zip(batch, values, strict=True))
        return
    for text, location in zip(batch[_RECORD], batch[_LOCATION], strict=True):
        record = parse_json(text, location)
        if not isinstance(record, dict):
            raise UserError(f"{location}: a record must be a JSON object {{…}}; saw {seen(text)}")
        yield location, record


def _spool(pairs: Iterable[tuple[str, str]], file: Path) -> Any:
    """Write (record JSON, FILE:LINE) pairs to an Arrow file, which is then memory-mapped."""
    schema = pa.schema([(_RECORD, pa.large_string()), (_LOCATION, pa.string())])
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        chunk, size = [], 0
        for pair in pairs:
            chunk.append(dict(zip(schema.names, pair, strict=True)))
            size += len(pair[0])
            if size > 1 << 24:
                writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema))
                chunk, size = [], 0
        if chunk:
            writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema))
    return datasets.Dataset.from_file(str(file))


def _tfds_records(source: Any) -> Iterator[tuple[str, str]]:
    def plain(value: Any) -> Any:
        return value.decode() if isinstance(value, bytes) else value.tolist()

    for index in range(len(source)):
        yield json.dumps(source[index], default=plain), f"tfds, record {index}"
