# SPDX-License-Identifier: Apache-2.0
"""Read text, JSON, CSV and ArrayRecord files as (record as JSON, FILE:LINE) pairs."""

from __future__ import annotations

import csv
import glob
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from jaxllm.errors import MissingFile, UserError, seen
from jaxllm.paths import as_path, first_line, hub_id, is_bucket, matching
from jaxllm.untrusted import exceeded_limit

FORMATS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".array_record": "array_record",
}
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}  # after a suffix of a COMPRESSIBLE format
COMPRESSIBLE = ("text", "json", "csv")
ACCEPTED = ", ".join(FORMATS) + "; all but the last three also compressed (.gz, .zst)"
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_ONLY_KEY = re.compile(r'\{[ \t\r\n]*"(?:[^"\\]|\\.)*"[ \t\r\n]*:[ \t\r\n]*')  # up to the value

Records = Iterator[tuple[str, str]]


def split_suffix(file: Path | str) -> tuple[str, str]:
    """(suffix of the format, suffix of the compression) in lower case, as in (".csv", ".gz")."""
    file = Path(file)
    last = file.suffix.lower()
    return (Path(file.stem).suffix.lower(), last) if last in COMPRESSED else (last, "")


def format_of(file: Path | str) -> str | None:
    """The format (a value of FORMATS) of a file by its suffix, ignoring .gz and .zst, or None."""
    suffix, compression = split_suffix(file)
    name = FORMATS.get(suffix)
    return name if not compression or name in COMPRESSIBLE else None


def check_source(path: str) -> None:
    """Raises MissingFile if the path of a source names neither existing files nor, perhaps, a
    dataset of the hub. A bucket is not asked."""
    file = as_path(path)
    if path.startswith("tfds:") or is_bucket(path) or file.exists():
        return
    if glob.has_magic(str(file)):
        if not matching(str(file)):
            raise MissingFile(f"{path}: no file matches")
    elif not hub_id(path.partition(":")[0]) or format_of(path):
        raise MissingFile(f"{path}: no such file or directory, and not a hub id (OWNER/NAME)")


@contextmanager
def open_file(file: Path) -> Iterator[Any]:
    """Open a file as a stream of decompressed bytes. Raises UserError if it is corrupt."""
    import pyarrow as pa

    codec = COMPRESSED.get(file.suffix.lower())
    if codec is None:
        with file.open("rb") as stream:
            yield stream
        return
    with file.open("rb") as data, pa.input_stream(data, compression=codec) as stream:
        try:
            yield io.BufferedReader(stream, 1 << 20)  # type: ignore[arg-type]
        except OSError as error:
            raise UserError(f"{file}: not readable as {codec}: {first_line(error)}") from None


def text_records(file: Path) -> Records:
    """The file as one unchanged document."""
    with open_file(file) as stream:
        yield json.dumps({"text": _decode_utf8(stream.read(), str(file), start=True)}), str(file)


def json_records(file: Path) -> Records:
    """The objects of a JSON Lines file (blank lines are skipped) or of a JSON array, unparsed.

    A .json file may also contain one object over several lines, several such objects, or one
    object whose only key has the list of records, as in {"data": […]}.
    """
    with open_file(file) as stream:
        lines = (
            (text, f"{file}:{number}")
            for number, line in enumerate(_lines(file, stream), 1)
            if (text := line.strip(" \t\r\n"))
        )
        first = list(islice(lines, 2)) if split_suffix(file)[0] == ".json" else []
        if first and (len(first) == 1 or first[0][0].startswith("[") or not _is_json(first[0][0])):
            yield from _multiline_records(file)
        else:
            yield from chain(first, lines)


def csv_records(file: Path) -> Records:
    """The rows of a CSV (.csv) or TSV (.tsv) file with a header; each value is a string."""
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is too small for texts
    kind = split_suffix(file)[0].upper().removeprefix(".")
    delimiter = "\t" if kind == "TSV" else ","
    header: list[str] = []
    with open_file(file) as stream:
        rows = csv.reader(_lines(file, stream), delimiter=delimiter, strict=True)
        while True:
            location = f"{file}:{rows.line_num + 1}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise UserError(f"{location}: malformed {kind}: {error}") from None
            if row is None:
                return
            if not header:
                header = row
                if twice := {name for name in header if header.count(name) > 1}:
                    raise UserError(f"{location}: the header has {min(twice)!r} twice; rename one")
            elif row and len(row) != len(header):
                raise UserError(
                    f"{location}: {len(row)} cells, but the header has {len(header)}; put "
                    "cells that contain a separator or a line break in double quotes"
                )
            elif row:
                yield json.dumps(dict(zip(header, row, strict=True))), location


def array_records(file: Path) -> Records:
    """The records of an ArrayRecord file, each a JSON object."""
    from grain.sources import ArrayRecordDataSource

    location = str(file)
    try:
        source: Any = ArrayRecordDataSource([location])
        for index in range(len(source)):
            location = f"{file}, record {index}"
            yield source[index].decode(), location
    except UnicodeDecodeError:
        raise UserError(f"{location}: not UTF-8; a record must be a JSON object") from None
    except RuntimeError as error:
        raise UserError(f"{location}: not readable as array_record: {first_line(error)}") from None


READERS = {
    "text": text_records,
    "json": json_records,
    "csv": csv_records,
    "array_record": array_records,
}


# ---- text and JSON


def _decode(text: str, offset: int) -> tuple[Any, int]:
    """(the JSON value at `offset`, its end). Raises JSONDecodeError for all errors."""
    try:
        return _DECODER.raw_decode(text, offset)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise json.JSONDecodeError(exceeded_limit(error), text, offset) from None


def _decode_utf8(data: bytes, location: str, *, start: bool) -> str:
    """Decode UTF-8, without the byte order mark at the start of a file."""
    try:
        return data.decode("utf-8-sig" if start else "utf-8")
    except UnicodeDecodeError as error:
        utf_16 = start and data.startswith((b"\xff\xfe", b"\xfe\xff"))
        why = "it is UTF-16" if utf_16 else str(error)
        raise UserError(f"{location}: not UTF-8: {why}; save it as UTF-8") from None


def _lines(file: Path, stream: Any) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        yield _decode_utf8(line, f"{file}:{number}", start=number == 1)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        pass  # `parse_json` reports these with their line
    return True


def _multiline_records(file: Path) -> Records:
    """The records of a JSON file whose values span lines, each with its first line."""
    with open_file(file) as stream:
        text = _decode_utf8(stream.read(), f"{file}:1", start=True)
    line, before = 1, 0
    try:
        for offset, end in _record_spans(file, text):
            line, before = line + text.count("\n", before, offset), offset
            yield text[offset:end], f"{file}:{line}"
    except json.JSONDecodeError as error:
        shown = error.doc[error.pos : error.pos + 60] or "the end of the file"
        raise UserError(
            f"{file}:{error.lineno}: malformed JSON: {error.msg} at column {error.colno}; "
            f"saw {seen(shown)}"
        ) from None


def _record_spans(file: Path, text: str) -> Iterator[tuple[int, int]]:
    """The (start, end) of each record in the text."""
    offset, closing = _skip_space(text, 0), "]"
    if text[offset : offset + 1] != "[":
        value, end = _decode(text, offset)
        if _skip_space(text, end) < len(text) or not _wraps_records(value, file):
            while offset < len(text):
                _, end = _decode(text, offset)
                yield offset, end
                offset = _skip_space(text, end)
            return
        key = _ONLY_KEY.match(text, offset)
        assert key is not None
        offset, closing = key.end(), "]}"
    offset = _skip_space(text, offset + 1)
    while text[offset : offset + 1] != "]":
        _, end = _decode(text, offset)
        yield offset, end
        offset = _skip_space(text, end)
        if text[offset : offset + 1] == ",":
            offset = _skip_space(text, offset + 1)
        elif text[offset : offset + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, offset)
    for _ in closing:
        offset = _skip_space(text, offset + 1)
    if offset < len(text):
        raise json.JSONDecodeError("Extra data", text, offset)


def _wraps_records(value: Any, file: Path) -> bool:
    """True if a file's only object is not a record, but has the list of records as its only value.

    Raises UserError for an object that is neither.
    """

    def is_message(value: Any) -> bool:
        first = value[0] if isinstance(value, list) and value else value
        return isinstance(first, dict) and ("role" in first or {"from", "value"} <= first.keys())

    if not isinstance(value, dict) or not value or any(map(is_message, value.values())):
        return False
    inner = next(iter(value.values()))
    if len(value) == 1 and isinstance(inner, list) and all(isinstance(one, dict) for one in inner):
        return True
    if all(isinstance(v, list | dict) for v in value.values()):
        names = ", ".join(list(value)[:5]) + (", …" if len(value) > 5 else "")
        raise UserError(
            f"{file}: found one object with the keys {names}, all of them lists or objects, which "
            "is not a record; write the records as a list [{…}, …] or one per line"
        )
    return False


def _skip_space(text: str, offset: int) -> int:
    """The offset of the next character that is not a space."""
    return next(_SPACE.finditer(text, offset)).end()
