# SPDX-License-Identifier: Apache-2.0
"""One source of examples: a path, or what a Python program has in memory by a path of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxllm.config.fields import Positive, Size
from jaxllm.errors import UserError

MEMORY = "memory:"
if TYPE_CHECKING:  # what path_of accepts
    Data = Any
else:
    Data = str


@dataclass(frozen=True)
class Source:
    """One source of examples."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    path: Data
    """file, glob, directory, hub id or `tfds:NAME`; the suffix gives the format. In Python also a
    datasets.Dataset or a list of records"""
    weight: Positive | None = None
    """sampling weight relative to the other sources; without weights, sources are concatenated"""
    split: str | None = None
    """split of a dataset with several; default: train; a source of data.eval must name it"""
    columns: dict[str, str] = field(default_factory=dict)
    """{name that jaxllm expects: column in the file}, e.g. {text: content, prompt: question}"""
    max_samples: Size | None = None
    """read only the first records; default: all"""
    streaming: bool = False
    """pretraining: tokenize one file at a time during training and cache only a few"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", path_of(self.path))


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
