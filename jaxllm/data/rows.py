# SPDX-License-Identifier: Apache-2.0
"""Rows of text and conversations, and the mixture of several sources' rows.

Dims: T tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.data.batch import empty_row, make_row
from jaxllm.data.examples import Examples
from jaxllm.errors import UserError

Row = dict[str, np.ndarray]  # the fields of Batch without the batch dim
Origin = tuple[Examples, int]  # an example of a source


class Windows:
    """Documents concatenated and cut into rows of `length` tokens.

    The last target of a row is the first token of the next one, so every token but the first is
    predicted once. The tokens after the last full row are dropped, or padded to a row if `tail`.
    With `segment`, attention and positions restart at each document, and the first token of a
    document is not a target. Otherwise a row is a single segment and every token is a target.
    """

    def __init__(
        self, examples: Examples, indices: np.ndarray, length: int, *, segment: bool, tail: bool
    ) -> None:
        self.examples, self.indices = examples, indices
        self.length, self._segment = length, segment
        self._starts = np.concatenate([[0], np.cumsum(examples.lengths[indices])])
        targets = max(int(self._starts[-1]) - 1, 0)
        self._count = -(-targets // length) if tail else targets // length

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Row:
        begin, end, documents = self._span(row)
        starts = self._starts
        pieces = [
            self.examples.tokens(self.indices[i])[max(begin - starts[i], 0) : end - starts[i]]
            for i in documents
        ]
        tokens = np.concatenate(pieces)
        sizes = [len(piece) for piece in pieces] if self._segment else [len(tokens)]
        segment_ids = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        out = empty_row(self.length)
        n = len(tokens) - 1
        out["tokens"][:n] = tokens[:-1]
        out["targets"][:n] = tokens[1:]
        out["weights"][:n] = segment_ids[1:] == segment_ids[:-1]
        out["segment_ids"][:n] = segment_ids[:-1]
        out["positions"][:n] = np.concatenate([np.arange(size) for size in sizes])[:-1]
        return out

    def _span(self, row: int) -> tuple[int, int, range]:
        """(first token of a row, end of its last target, the documents in between)."""
        begin = row * self.length
        end = min(begin + self.length + 1, int(self._starts[-1]))
        first = int(np.searchsorted(self._starts, begin, "right")) - 1
        return begin, end, range(first, int(np.searchsorted(self._starts, end, "left")))

    def origins(self, row: int, epoch: int) -> list[list[Origin]]:
        """The examples in each segment of a row."""
        documents = [(self.examples, int(self.indices[i])) for i in self._span(row)[2]]
        return [[document] for document in documents] if self._segment else [documents]


class PackedRows:
    """Examples of `lengths` tokens in rows of `length` tokens: packed, or one per row."""

    def __init__(
        self, examples: Examples, indices: np.ndarray, length: int, *, packing: bool, lengths=None
    ) -> None:
        self.examples, self.indices, self.length = examples, indices, length
        lengths = examples.lengths[indices] if lengths is None else lengths
        self._packing = pack(lengths, length) if packing else one_per_row(len(indices))

    def __len__(self) -> int:
        return len(self._packing)

    def segments_of(self, index: int, epoch: int) -> list[list[int]]:
        """The segments of example `index` in pass `epoch`, each as the examples in it."""
        return [[index]]

    def origins(self, row: int, epoch: int) -> list[list[Origin]]:
        """The examples in each segment of a row, in pass `epoch` over the source."""
        segments = [s for index in self._packing[row] for s in self.segments_of(index, epoch)]
        return [[(self.examples, int(self.indices[i])) for i in segment] for segment in segments]


class Conversations(PackedRows):
    """Conversations, one segment each."""

    def __getitem__(self, row: int) -> Row:
        indices = self.indices[self._packing[row]]
        segments = [(self.examples.tokens(i), self.examples.learn(i)) for i in indices]
        return make_row(segments, self.length)


# ---- packing: best-fit decreasing over the lengths, in numpy


@dataclass(frozen=True)
class Packing:
    """Rows as slices of example indices: row r has `examples[starts[r] : starts[r + 1]]`."""

    examples: np.ndarray  # int64 [N], each index once, ascending in a row
    starts: np.ndarray  # int64 [R + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.examples[self.starts[row] : self.starts[row + 1]]


def pack(lengths: np.ndarray, row_length: int) -> Packing:
    """Best-fit decreasing: place the longest example first, each in the fullest row that fits it.

    `lengths` is int [N], each in 1..row_length, else UserError. The result depends on the lengths
    only. There is a list of rows for each amount of free space, and an integer whose bits mark the
    lists that are not empty. So the fullest row that fits is the lowest set bit at or above the
    length, and packing takes O(N · row_length / 64), in practice linear time.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= row_length:
        raise UserError(
            f"lengths {lengths.min()}..{lengths.max()} do not fit rows of {row_length} tokens"
        )
    order = np.argsort(-lengths, kind="stable")
    rows_by_free: list[list[int]] = [[] for _ in range(row_length)]
    free_bits = 0  # bit f: a row has exactly f free tokens
    count, rows = 0, []
    for length in lengths[order].tolist():
        fitting = free_bits >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                free_bits ^= 1 << free
        else:
            free, row = row_length, count
            count += 1
        free -= length
        if free:
            rows_by_free[free].append(row)
            free_bits |= 1 << free
        rows.append(row)
    row_of = np.empty(len(lengths), np.int64)
    row_of[order] = rows
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=count))])
    return Packing(np.argsort(row_of, kind="stable"), starts)


def one_per_row(count: int) -> Packing:
    """Rows of one example each."""
    return Packing(np.arange(count), np.arange(count + 1))


# ---- sources


@dataclass(frozen=True)
class Rows:
    """Rows of one or more sources.

    Without `weights` the sources are concatenated and an epoch is a pass over all of them. With
    weights the sources are interleaved in these proportions, small ones are repeated, and an epoch
    is a pass over the largest.
    """

    parts: tuple[Any, ...]
    weights: tuple[float, ...] | None
    length: int
    """tokens in a row"""

    def __len__(self) -> int:
        """Rows in an epoch, which includes each row of the largest source."""
        largest, counts = self.largest, self.counts
        return -(-len(self.parts[largest]) * sum(counts) // counts[largest])

    @property
    def largest(self) -> int:
        """The index of the source with the most rows."""
        return int(np.argmax([len(part) for part in self.parts]))

    @property
    def counts(self) -> list[int]:
        """Each source's proportion as an integer, in hundredths of the least weight as in Grain."""
        if self.weights is None:
            return [len(part) for part in self.parts]
        return [round(100 * weight / min(self.weights)) for weight in self.weights]

    @property
    def fractions(self) -> list[float]:
        """Each source's fraction of the rows; they sum to 1."""
        return [count / sum(self.counts) for count in self.counts]
