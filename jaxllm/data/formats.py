# SPDX-License-Identifier: Apache-2.0
"""Files of text, JSON, CSV and ArrayRecord -> (a record as JSON, FILE:LINE), one after another."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from jaxllm.errors import UserError

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
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}  # behind a suffix of STREAMED
STREAMED = ("text", "json", "csv")
ACCEPTED = ", ".join(FORMATS) + "; all but the last three also with .gz or .zst behind it"
# JSON's way to write half of a character; two such halves make one, a lone one is no text.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\r\n]*")
_ONLY_KEY = re.compile(r'\{[ \t\r\n]*"(?:[^"\\]|\\.)*"[ \t\r\n]*:[ \t\r\n]*')  # up to its value

Records = Iterator[tuple[str, str]]


def format_of(file: Path | str) -> str | None:
    """A value of FORMATS by a file's suffix (or the one before .gz or .zst); None where unknown."""
    file = Path(file)
    if file.suffix.lower() not in COMPRESSED:
        return FORMATS.get(file.suffix.lower())
    inner = FORMATS.get(Path(file.stem).suffix.lower())
    return inner if inner in STREAMED else None


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The bytes of a file as a stream, decompressed. Raises ValueError where they cannot be."""
    codec = COMPRESSED.get(file.suffix.lower())
    if codec is None:
        with open(file, "rb") as stream:
            yield stream
        return
    with pa.input_stream(str(file), compression=codec) as stream:
        try:
            yield io.BufferedReader(stream, 1 << 20)  # type: ignore[arg-type]
        except OSError as error:
            raise UserError(f"{file}: not readable as {codec}: {reason(error)}") from None


def text_records(file: Path) -> Records:
    """A text file is one document, exactly as it stands."""
    with opened(file) as stream:
        yield json.dumps({"text": _decoded(stream.read(), str(file), start=True)}), str(file)


def json_records(file: Path) -> Records:
    """Objects one a line (blank lines are skipped), or those of an array; `records` parses them.

    A .json file may also hold one object over several lines, some after one another, or one whose
    only key holds the list of records, as in {"data": […]}.
    """
    with opened(file) as stream:
        lines = (
            (text, f"{file}:{number}")
            for number, line in enumerate(_lines(file, stream), 1)
            if (text := line.strip(" \t\r\n"))
        )
        head = []
        if ".json" in (suffix.lower() for suffix in file.suffixes[-2:]):
            head = list(islice(lines, 2))
        if head and (len(head) == 1 or head[0][0].startswith("[") or not _complete(head[0][0])):
            yield from _whole(file)
        else:
            yield from chain(head, lines)


def csv_records(file: Path) -> Records:
    """The rows under a header, separated by commas (.csv) or tabs (.tsv); a cell is a string."""
    csv.field_size_limit(2**31 - 1)  # a cell may hold a long text; the default is 128 KiB
    tabs = ".tsv" in (suffix.lower() for suffix in file.suffixes[-2:])
    header: list[str] = []
    with opened(file) as stream:
        rows = csv.reader(_lines(file, stream), delimiter="\t" if tabs else ",", strict=True)
        while True:
            at = f"{file}:{rows.line_num + 1}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise UserError(f"{at}: malformed {'TSV' if tabs else 'CSV'}: {error}") from None
            if row is None:
                return
            if not header:
                header = row
                if twice := {name for name in header if header.count(name) > 1}:
                    raise UserError(f"{at}: the header names {min(twice)!r} twice; rename one")
            elif row:
                if len(row) != len(header):
                    raise UserError(
                        f"{at}: {len(row)} cells under a header of {len(header)}; a cell with a "
                        "separator or a line break stands in double quotes"
                    )
                yield json.dumps(dict(zip(header, row, strict=True))), at


def array_records(file: Path) -> Records:
    """The records of an ArrayRecord file, each an object of JSON."""
    from grain.sources import ArrayRecordDataSource

    at = str(file)
    try:
        source: Any = ArrayRecordDataSource([at])
        for index in range(len(source)):
            at = f"{file}, record {index}"
            yield source[index].decode(), at
    except UnicodeDecodeError:
        raise UserError(f"{at}: not UTF-8; a record here is a JSON object") from None
    except RuntimeError as error:
        raise UserError(f"{at}: not readable as array_record: {reason(error)}") from None


READERS = {
    "text": text_records,
    "json": json_records,
    "csv": csv_records,
    "array_record": array_records,
}


# ---- text and JSON


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
    raise UserError(f"{at}: {what}: {why}; saw {short(text)}")


def _unreadable(error: ValueError | RecursionError) -> str:
    """What json could not read, though it is well formed."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return f"an integer has more than {sys.get_int_max_str_digits()} digits"


def _decoded(data: bytes, at: str, *, start: bool) -> str:
    """UTF-8 as text, without the byte order mark that may stand at the start of a file."""
    try:
        return data.decode("utf-8-sig" if start else "utf-8")
    except UnicodeDecodeError as error:
        utf_16 = start and data.startswith((b"\xff\xfe", b"\xfe\xff"))
        why = "it is UTF-16" if utf_16 else str(error)
        raise UserError(f"{at}: not UTF-8: {why}; save it as UTF-8") from None


def _lines(file: Path, stream: Any) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        yield _decoded(line, f"{file}:{number}", start=number == 1)


def _complete(text: str) -> bool:
    """Whether a text is a value of JSON by itself."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        pass  # too deep or too long: `loads` says so, by line
    return True


def _whole(file: Path) -> Records:
    """The records of a JSON file that is read as a whole, each with its line."""
    with opened(file) as stream:
        text = _decoded(stream.read(), f"{file}:1", start=True)
    line, before = 1, 0
    try:
        for at, stop in _spans(file, text):
            line, before = line + text.count("\n", before, at), at
            yield text[at:stop], f"{file}:{line}"
    except json.JSONDecodeError as error:
        seen = error.doc[error.pos : error.pos + 60] or "the end of the file"
        raise UserError(
            f"{file}:{error.lineno}: malformed JSON: {error.msg} at column {error.colno}; "
            f"saw {short(seen)}"
        ) from None


def _spans(file: Path, text: str) -> Iterator[tuple[int, int]]:
    """Where each record begins and ends."""
    at, closing = _skip(text, 0), "]"
    if text[at : at + 1] != "[":
        value, stop = _decode(text, at)
        if _skip(text, stop) < len(text) or not _holds_records(value, file):
            while at < len(text):
                _, stop = _decode(text, at)
                yield at, stop
                at = _skip(text, stop)
            return
        key = _ONLY_KEY.match(text, at)
        assert key is not None
        at, closing = key.end(), "]}"
    at = _skip(text, at + 1)
    while text[at : at + 1] != "]":
        _, stop = _decode(text, at)
        yield at, stop
        at = _skip(text, stop)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    for _ in closing:
        at = _skip(text, at + 1)
    if at < len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _holds_records(value: Any, file: Path) -> bool:
    """Whether the only object of a file is no record but holds the list of them under its only
    key. Raises ValueError for one that is neither."""

    def message(value: Any) -> bool:
        first = value[0] if isinstance(value, list) and value else value
        return isinstance(first, dict) and ("role" in first or {"from", "value"} <= first.keys())

    if not isinstance(value, dict) or not value or any(map(message, value.values())):
        return False
    nested = [isinstance(v, list | dict) for v in value.values()]
    if len(value) == 1 and isinstance(inner := next(iter(value.values())), list):
        if all(isinstance(element, dict) for element in inner):
            return True
    if all(nested):
        names = ", ".join(list(value)[:5]) + (", …" if len(value) > 5 else "")
        raise UserError(
            f"{file}: one object whose keys ({names}) hold lists or objects is no record; write "
            "the records as a list [{…}, …], or one a line"
        )
    return False


def _decode(text: str, at: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise json.JSONDecodeError(_unreadable(error), text, at) from None


def _skip(text: str, at: int) -> int:
    """The place of the next character that is no space."""
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def short(text: str) -> str:
    """A text in quotes, cut to 60 characters."""
    return repr(text if len(text) <= 60 else text[:57] + "…")


def reason(error: BaseException) -> str:
    """What a library said, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
