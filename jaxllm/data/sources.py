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
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash
from datasets.exceptions import DatasetGenerationError

from jaxllm.config import Source
from jaxllm.tokenizer import hub_id

FORMATS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".array_record": "array_record",
}
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Columns of a spooled table: a record as JSON, and the FILE:LINE it came from.
_RECORD, _AT = "__record__", "__at__"
# JSON's way to write half of a character; two such halves make one, a lone one is no text.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Located:
    """What a source's path turned out to be."""

    format: str
    """a value of FORMATS, or dataset (opened already) or tfds"""
    files: tuple[Path, ...]
    """every file whose bytes are read, in order"""
    opened: Any = None
    """datasets.Dataset, or the tfds data source"""
    split: str | None = None
    """the one taken; None where there are no splits"""


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
            raise FileNotFoundError(f"{source.path}: no file matches")
        return _of_files(found, source.path)
    if not hub_id(path.partition(":")[0]) or Path(path).suffix in FORMATS:
        raise FileNotFoundError(
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
    unknown = [f for f in files if f.suffix not in FORMATS]
    if unknown:
        raise ValueError(
            f"{unknown[0]}: the format of {unknown[0].suffix or 'a file without suffix'} is not "
            f"known; accepted are {', '.join(FORMATS)}"
        )
    formats = sorted({FORMATS[f.suffix] for f in files})
    if len(formats) > 1:
        raise ValueError(f"{path}: holds {' and '.join(formats)} files; name one kind by a glob")
    return Located(formats[0], tuple(files))


def _chosen(splits: Iterable[str], source: Source, held_out: bool) -> str:
    """The split that `locate` takes of these, all that there are."""
    names, wanted = list(splits), source.split
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is None and held_out:
        raise ValueError(
            f"{source.path}: has the splits {', '.join(names)}; name the held-out one: "
            f"{{path: {source.path}, split: NAME}}"
        )
    if (wanted := wanted or "train") not in names:
        raise ValueError(
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
    seen = (f.relative_to(folder) for f in sorted(folder.rglob("*")) if f.suffix in FORMATS)
    files = [folder / f for f in seen if not any(part.startswith(".") for part in f.parts)]
    if not files:
        raise ValueError(f"{folder}: no data files; accepted are {', '.join(FORMATS)}")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    unnamed = splits.pop("", [])
    if not splits:  # names say nothing of splits: all of it is what was asked for
        return _of_files(unnamed, str(folder))
    if unnamed:
        raise ValueError(
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
    try:
        loaded = datasets.load_dataset(name, subset or None, split=source.split)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{source.path}: no such file or folder, and the hub's dataset of this name "
            f"could not be loaded: {_reason(error)}"
        ) from error
    return _of_dataset(*_taken(loaded, source, held_out))


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
        raise ValueError(
            f"{source.path}: tensorflow-datasets is not installed; pip install 'jaxllm[tfds]'"
        ) from None
    name = source.path.removeprefix("tfds:")
    try:
        builder = tfds.builder(name)
        builder.download_and_prepare(file_format="array_record")
        loaded = builder.as_data_source(split=source.split)  # pyright: ignore[reportCallIssue]
    except (tfds.core.DatasetNotFoundError, OSError, ValueError) as error:
        raise ValueError(f"{source.path}: could not be loaded: {_reason(error)}") from error
    opened, split = _taken(loaded, source, held_out)
    files = sorted(f for f in Path(builder.data_dir).iterdir() if f.is_file())
    return Located("tfds", tuple(files), opened, split)


# ---- reading


def read(located: Located, folder: Path) -> Any:
    """The located data as a memory-mapped `datasets.Dataset`; `folder` takes temporary files.

    Raises ValueError `FILE:LINE: …` or `FILE: …` for what cannot be decoded.
    """
    match located.format:
        case "dataset":
            return located.opened
        case "parquet" | "arrow":
            files = [str(f) for f in located.files]
            try:
                return datasets.load_dataset(
                    located.format, data_files=files, split="train", cache_dir=str(folder)
                )
            except (DatasetGenerationError, pa.ArrowInvalid) as error:
                where = files[0] if len(files) == 1 else f"{files[0]} … {files[-1]}"
                reason = _reason(error.__cause__ or error)
                raise ValueError(f"{where}: not readable as {located.format}: {reason}") from error
        case "text":
            pairs = (pair for file in located.files for pair in _text_records(file))
        case "json":
            pairs = (pair for file in located.files for pair in _json_records(file))
        case "array_record":
            pairs = (pair for file in located.files for pair in _array_records(file))
        case _:
            pairs = _tfds_records(located.opened)
    return _spool(pairs, folder / "records.arrow")


def records(batch: Mapping[str, list], indices: list[int], path: str) -> Iterator[tuple[str, dict]]:
    """The records of a batch of `read`'s dataset, each with where it came from for messages."""
    if _RECORD not in batch:
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            yield f"{path}, row {index}", dict(zip(batch, values, strict=True))
        return
    for text, at in zip(batch[_RECORD], batch[_AT], strict=True):
        record = loads(text, at)
        if not isinstance(record, dict):
            raise ValueError(f"{at}: a record is a JSON object {{…}}; saw {short(text)}")
        yield at, record


def loads(text: str, at: str, what: str = "malformed JSON") -> Any:
    """A value of JSON. Raises ValueError for what is none, or none that can be used."""
    try:
        value = json.loads(text)
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        why = f"{error.msg} at column {error.colno}"
    except UnicodeEncodeError as error:
        why = f"{error.object[error.start]!a} is half of a character (a lone surrogate)"
    except (ValueError, RecursionError) as error:
        why = _unreadable(error)
    raise ValueError(f"{at}: {what}: {why}; saw {short(text)}")


def _unreadable(error: ValueError | RecursionError) -> str:
    """What json could not read, though it is well formed."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return f"an integer has more than {sys.get_int_max_str_digits()} digits"


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


def _text_records(file: Path) -> Iterator[tuple[str, str]]:
    """A text file is one document, exactly as it stands."""
    try:
        yield json.dumps({"text": file.read_bytes().decode()}), str(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text: {error}") from None


def _json_records(file: Path) -> Iterator[tuple[str, str]]:
    """Objects of a JSON array, or one a line (blank lines are skipped); parsed by `records`."""
    with open(file, "rb") as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        stream.seek(0)
        if file.suffix == ".json" and start.startswith(b"["):
            yield from _array_elements(file, stream.read())
            return
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}:{number}: not UTF-8: {error}") from None
            if text := text.strip(" \t\r\n"):
                yield text, f"{file}:{number}"


def _array_elements(file: Path, content: bytes) -> Iterator[tuple[str, str]]:
    """Elements of a JSON array one by one, so that each keeps its line."""
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")

    def skip(at: int) -> int:
        match = space.match(text, at)
        assert match is not None
        return match.end()

    line = 1
    try:
        text = content.decode("utf-8-sig")
        at = skip(skip(0) + 1)
        line += text.count("\n", 0, at)
        while text[at : at + 1] != "]":
            _, stop = decoder.raw_decode(text, at)
            yield text[at:stop], f"{file}:{line}"
            after = skip(stop)
            if text[after : after + 1] == ",":
                after = skip(after + 1)
            elif text[after : after + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, after)
            line += text.count("\n", at, after)
            at = after
        if (end := skip(at + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        seen = error.doc[error.pos : error.pos + 60] or "the end of the file"
        raise ValueError(
            f"{file}:{error.lineno}: malformed JSON: {error.msg} at column {error.colno}; "
            f"saw {short(seen)}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}:{line}: malformed JSON: {_unreadable(error)}") from None


def _array_records(file: Path) -> Iterator[tuple[str, str]]:
    from grain.sources import ArrayRecordDataSource

    at = str(file)
    try:
        source: Any = ArrayRecordDataSource([at])
        for index in range(len(source)):
            at = f"{file}, record {index}"
            yield source[index].decode(), at
    except UnicodeDecodeError:
        raise ValueError(f"{at}: not UTF-8; a record here is a JSON object") from None
    except RuntimeError as error:
        raise ValueError(f"{at}: not readable as array_record: {_reason(error)}") from None


def _tfds_records(source: Any) -> Iterator[tuple[str, str]]:
    def plain(value: Any) -> Any:
        return value.decode() if isinstance(value, bytes) else value.tolist()

    for index in range(len(source)):
        yield json.dumps(source[index], default=plain), f"tfds, record {index}"


def short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")


def _reason(error: BaseException) -> str:
    """What a library said, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
