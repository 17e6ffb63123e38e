# SPDX-License-Identifier: Apache-2.0
"""Assign examples to rows by best-fit decreasing over their lengths, in numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxllm.errors import UserError


@dataclass(frozen=True)
class Packing:
    """Rows as slices of example indices: row r holds `examples[starts[r] : starts[r + 1]]`."""

    examples: np.ndarray  # int64 [N], each index once, ascending in a row
    starts: np.ndarray  # int64 [R + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.examples[self.starts[row] : self.starts[row + 1]]


def pack(lengths: np.ndarray, row_length: int) -> Packing:
    """Best-fit decreasing: place the longest example first, each in the fullest row that fits it.

    `lengths` is int [N], each in 1..row_length, else UserError. The result depends on the lengths
    only. There is a list of rows for each amount of free space, and an integer whose bits tell
    which lists are not empty. So the fullest row that fits is the lowest set bit at or above the
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
    count = 0
    row_of = np.empty(len(lengths), np.int64)
    rows = []
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
    row_of[order] = rows
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=count))])
    return Packing(np.argsort(row_of, kind="stable"), starts)


def one_per_row(count: int) -> Packing:
    """Rows of one example each."""
    return Packing(np.arange(count), np.arange(count + 1))
