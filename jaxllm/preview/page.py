# SPDX-License-Identifier: Apache-2.0
"""A preview as one HTML page that loads nothing, with the parts of `report/`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from jaxllm.paths import as_path, write_text
from jaxllm.report.page import SHARED, assemble

PARTS = Path(__file__).parent
TOKENS = 150_000  # whose texts are in the page; rows beyond show their segments only


def write_page(found: dict[str, Any], file: str) -> Path:
    """Writes the page of a preview, as `read_preview` gives it; returns its path."""
    out = as_path(file)
    data = found | {"written": time.time(), "rows": list(_within(found["rows"], TOKENS))}
    parts = [*SHARED, PARTS / "preview.css", PARTS / "preview.js"]
    write_text(out, assemble("preview", found["objective"], data, parts))
    return out


def _within(rows: list[dict[str, Any]], limit: int) -> Iterator[dict[str, Any]]:
    """The rows with the runs of marks [[mark, tokens]] of each segment, and with the texts of the
    first rows that have at most `limit` tokens together."""
    left = limit
    for row in rows:
        left -= row["tokens"]
        whole = left >= 0 or row is rows[0]
        yield row | {"segments": [_compact(segment, whole) for segment in row["segments"]]}


def _compact(segment: dict[str, Any], whole: bool) -> dict[str, Any]:
    marks = [m for ids, m in zip(segment["ids"], segment["marks"], strict=True) for _ in ids]
    found = {k: v for k, v in segment.items() if k not in ("texts", "ids", "marks")}
    found["runs"] = [[mark, len(list(same))] for mark, same in groupby(marks)]
    texts = {key: segment[key] for key in ("texts", "ids", "marks")} if whole else {}
    return found | texts
