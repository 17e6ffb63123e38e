# SPDX-License-Identifier: Apache-2.0
"""Data that a Python program has in memory, as the path of a source."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from jaxllm.errors import UserError

MEMORY = "memory:"


class InMemory(str):
    """`memory:HASH`, a path that names records by the hash of their content, and has them.

    records: a datasets.Dataset, or a list of JSON texts, one per record. As plain text, in
    config.json for example, the path still names the records but does not have them.
    """

    records: Any

    def __deepcopy__(self, memo: Any) -> InMemory:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)  # a process that tokenizes needs the name only


def path_of(data: Any) -> str:
    """A path as it is, and the InMemory path of a datasets.Dataset or of a list of dicts.

    The records of a list are copied. Raises UserError for other data, and for a record with values
    that JSON does not have.
    """
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    datasets = sys.modules.get("datasets")  # it has been imported if `data` is a Dataset
    records: Any
    if datasets is not None and isinstance(data, datasets.Dataset):
        records, parts = data, _table_bytes(data)
    elif isinstance(data, list | tuple) and all(isinstance(one, Mapping) for one in data):
        records = [_json(record, number) for number, record in enumerate(data)]
        parts = (text.encode() + b"\n" for text in records)
    else:
        seen = f"{type(data).__module__}.{type(data).__name__}".removeprefix("builtins.")
        raise UserError(
            "a source must be a path, a datasets.Dataset (one split) or a list of records, which "
            f"are dicts: train=[RECORDS]; seen {seen}"
        )
    import xxhash

    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    path = InMemory(MEMORY + digest.hexdigest())
    path.records = records
    return path


def _json(record: Any, number: int) -> str:
    try:
        return json.dumps(record, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"record {number} (from 0) is not JSON: {error}") from None


def _table_bytes(dataset: Any) -> Iterator[Any]:
    """The rows of a Dataset as bytes that depend on their values and types alone."""
    import pyarrow as pa

    rows = dataset.with_format("arrow")
    for start in range(0, len(dataset), 1000):
        table = rows[start : start + 1000]
        # `take` copies: a slice may have other bytes, such as the values under its nulls.
        table = table.take(pa.array(range(len(table)))).replace_schema_metadata(None)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        yield sink.getvalue()
