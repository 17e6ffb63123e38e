# SPDX-License-Identifier: Apache-2.0
"""The columns of a run's metrics, reduced to what a screen can show."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np

NOT_METRICS = {"kind", "step", "time", "name"}


def parsed(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines; a damaged line, as of a run that was killed, is skipped."""
    for line in lines:
        try:
            text = line.decode(errors="replace")  # faster than of bytes
            value = json.loads(text, parse_constant=lambda _: None)  # NaN, which is no JSON
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def number(value: Any) -> float | None:
    """A number of metrics.jsonl; None for null, text and what else is not a number, and for an
    integer beyond the largest float."""
    with suppress(OverflowError):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


class Columns:
    """Lines with a step and metrics, by column: of two lines of a step the later one counts.

    A metric that a line does not have, or has as null, is NaN, as is one that is not finite.
    """

    BLOCK = 4096  # lines that are kept as Python's values

    def __init__(self) -> None:
        self.broken: dict[str, int] = {}
        """{metric: how many of its values are not finite}, once `arrays` was called"""
        self._count = 0
        # {names of a line's values: ([places], [values])}, as most lines have the same names
        self._waiting: dict[tuple[str, ...], tuple[list[int], list[Any]]] = {}
        self._parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def add(self, line: dict[str, Any]) -> None:
        """Adds a line, unless it has no step."""
        step = number(line.get("step"))
        if step is None or not math.isfinite(step):
            return
        places, values = self._waiting.setdefault(tuple(line), ([], []))
        places.append(self._count)
        values.append(line.values())
        self._count += 1
        if self._count % self.BLOCK == 0:
            self._convert()

    def __len__(self) -> int:
        return self._count

    def _convert(self) -> None:
        for names, (places, rows) in self._waiting.items():
            at = np.array(places)
            for name, values in zip(names, zip(*rows, strict=True), strict=True):
                try:  # null becomes NaN, and so does "NaN"
                    column = np.array(values, dtype=float)
                except OverflowError:  # an integer beyond the largest float
                    column = np.array([number(value) for value in values], dtype=float)
                except (TypeError, ValueError):
                    continue  # text, or a list
                if column.ndim != 1 or name in NOT_METRICS - {"step", "time"}:
                    continue
                broken = int((~np.isfinite(column)).sum()) - values.count(None)
                if broken:
                    self.broken[name] = self.broken.get(name, 0) + broken
                column[~np.isfinite(column)] = math.nan
                self._parts.setdefault(name, []).append((at, column))
        self._waiting = {}

    def arrays(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """(steps, ascending; times; {metric: values})."""
        self._convert()
        filled = {}
        for name, parts in {"step": [], "time": [], **self._parts}.items():
            filled[name] = np.full(self._count, math.nan)
            for at, column in parts:
                filled[name][at] = column
        steps, times = filled.pop("step"), filled.pop("time")
        # np.unique gives the first of equal values: from the end, the last.
        order = len(steps) - 1 - np.unique(steps[::-1], return_index=True)[1]
        return steps[order], times[order], {name: v[order] for name, v in filled.items()}


def reduced(columns: Columns, began: float, points: int) -> dict[str, Any]:
    """The columns for the page, of at most `points` points each.

    {"rows", "step", "tokens", "time", "mean": {metric: values}, "low", "high", "about", "broken"}:
    where there are more rows than points, a point is the mean of adjacent rows, and low and high
    are their extremes; else there are no low and high. time: seconds since `began`. about: {metric:
    [first, last, lowest, its step, highest, its step]}, of all rows. broken: as of Columns.
    """
    steps, times, metrics = columns.arrays()
    tokens = metrics.pop("tokens_seen", np.full(len(steps), math.nan))
    metrics = {name: v for name, v in metrics.items() if name in columns.broken or _any(v)}
    about = {name: _about(steps, values) for name, values in metrics.items()}
    middle = np.arange(len(steps))
    found: dict[str, Any] = {"rows": len(steps), "about": about, "broken": columns.broken}
    if len(steps) > points:
        starts = np.linspace(0, len(steps), points, endpoint=False).astype(int)
        ends = np.append(starts[1:], len(steps))
        middle = (starts + ends - 1) // 2
        for key, extreme in (("low", np.fmin), ("high", np.fmax)):
            found[key] = {name: short(extreme.reduceat(v, starts)) for name, v in metrics.items()}
        metrics = {name: _means(v, starts) for name, v in metrics.items()}
    return found | {
        "step": short(steps[middle], 15),
        "tokens": short(tokens[middle], 15),
        "time": short(np.round(times[middle] - began, 1), 9),
        "mean": {name: short(values) for name, values in metrics.items()},
    }


def _any(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).any())


def _means(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    counts = np.add.reduceat(known.astype(float), starts)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts)
    return np.where(counts > 0, sums / np.maximum(counts, 1.0), math.nan)


def _about(steps: np.ndarray, values: np.ndarray) -> list[Any]:
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return [None] * 6
    low, high = (known[pick(values[known])] for pick in (np.argmin, np.argmax))
    first, last, least, most = short(values[[known[0], known[-1], low, high]], 7)
    return [first, last, least, int(steps[low]), most, int(steps[high])]


def short(values: np.ndarray, digits: int = 5) -> list[float | int | None]:
    """The values with so many significant digits; None for NaN."""
    made: list[float | int | None] = []
    for value in values.tolist():
        text = f"{value:.{digits}g}"
        as_float = float(text) if math.isfinite(value) else None
        is_whole = as_float is not None and abs(as_float) < 1e15 and as_float == int(as_float)
        made.append(int(as_float) if as_float is not None and is_whole else as_float)
    return made


def histogram(values: np.ndarray, bins: int = 40) -> dict[str, Any] | None:
    """{"edges", "counts", "above"} of numbers; above: how many are past the last edge, as single
    long steps would else leave one bar for all others. None if there is no number."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = values.min(), np.quantile(values, 0.99)
    if high <= low:
        high = low + max(abs(low), 1e-9) * 0.1
    counts, edges = np.histogram(values, bins, (low, high))
    above = int((values > edges[-1]).sum())
    return {"edges": short(edges, 4), "counts": counts.tolist(), "above": above}
