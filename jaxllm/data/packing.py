# SPDX-License-Identifier: Apache-2.0
"""Which examples share a row: best-fit decreasing over lengths alone, in numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxllm.errors import UserError


@dataclass(frozen=True)
class Plan:
    """Rows as slices of example indices: row r holds `examples[starts[r] : starts[r + 1]]`."""

    examples: np.ndarray  # int64 [N], each index once, ascending inside a row
    starts: np.ndarray  # int64 [R + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.examples[self.starts[row] : self.starts[row + 1]]


def pack(lengths: np.ndarray, row_length: int) -> Plan:
    """Best-fit decreasing: the longest example first, each into the fullest row that takes it.

    `lengths` is int [N], each in 1..row_length (ValueError otherwise: nothing is cut or dropped
    here). The same lengths give the same plan. Rows by free space are kept in one list per space,
    and which spaces occur in the bits of one integer, so that the fullest fitting row is the
    lowest bit at or above the length: O(N · row_length / 64), in effect linear.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= row_length:
        raise UserError(
            f"lengths {lengths.min()}..{lengths.max()} do not fit rows of {row_length} tokens"
        )
    order = np.argsort(-lengths, kind="stable")
    rows_by_free: list[list[int]] = [[] for _ in range(row_length)]
    occurs = 0  # bit f: some row has exactly f tokens free
    count = 0
    row_of = np.empty(len(lengths), np.int64)
    rows = []
    for length in lengths[order].tolist():
        fitting = occurs >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                occurs ^= 1 << free
        else:
            free, row = row_length, count
            count += 1
        free -= length
        if free:
            rows_by_free[free].append(row)
            occurs |= 1 << free
        rows.append(row)
    row_of[order] = rows
    return Plan(
        examples=np.argsort(row_of, kind="stable"),
        starts=np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=count))]),
    )


def one_per_row(count: int) -> Plan:
    """The plan without packing."""
    return Plan(examples=np.arange(count), starts=np.arange(count + 1))
