# SPDX-License-Identifier: Apache-2.0
"""Batches of rows, whose order is a function of (seed, step).

Dims: A micro-batches of an update, B rows of an update, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxllm.data.preference import Judged
from jaxllm.data.rows import Row, Rows
from jaxllm.data.stream import ENDLESS
from jaxllm.errors import UserError


def ordered(rows: Rows, seed: int) -> grain.MapDataset:
    """The endless sequence of rows, with random access."""

    def read(place: Place) -> Row:
        part, row, epoch = rows.parts[place.part], place.row, place.epoch
        return part.row(row, epoch) if isinstance(part, Judged) else part[row]

    return places(rows, seed).map(read)


class Place(NamedTuple):
    """Where a row comes from: the index of its source, the row of that, and the pass over it."""

    part: int
    row: int
    epoch: int


def places(rows: Rows, seed: int) -> grain.MapDataset:
    """The place of each row of `ordered`; each epoch of a source is reshuffled."""

    def endless(part: grain.MapDataset, index: int) -> grain.MapDataset:
        if len(part) == ENDLESS:
            return part  # a stream shuffles itself
        source_seed = np.random.SeedSequence((seed, index)).generate_state(1)[0]
        # Grain cannot slice an endless dataset in batches of 1; this is endless in practice.
        return part.shuffle(seed=int(source_seed)).repeat(2**60 // len(part))

    parts = [_epochs(index, len(part)) for index, part in enumerate(rows.parts)]
    if rows.weights is None:
        return endless(_concatenated(parts), 0)
    mixed = [endless(part, index) for index, part in enumerate(parts)]
    # Grain rounds up the first source's count, so an epoch has every row of the largest.
    largest = rows.largest
    order = [largest, *(i for i in range(len(parts)) if i != largest)]
    return grain.MapDataset.mix([mixed[i] for i in order], [rows.counts[i] for i in order])


def _concatenated(parts: Sequence[grain.MapDataset]) -> grain.MapDataset:
    return grain.MapDataset.concatenate(parts) if len(parts) > 1 else parts[0]


def _epochs(part: int, count: int) -> grain.MapDataset:
    """The places of a source of `count` rows in each pass over it."""
    rows = grain.MapDataset.range(count)
    return rows.map_with_index(lambda index, row: Place(part, row, index // count))


def _stack(batch: Sequence[Row], micro_batches: int) -> Row:
    """Stack the fields of rows to [A, rows / A, …]."""
    fields = {f: np.stack([row[f] for row in batch]) for f in batch[0]}
    return {f: v.reshape(micro_batches, -1, *v.shape[1:]) for f, v in fields.items()}


def unstacked(batch: Row) -> Iterator[Row]:
    """The rows of a batch [A, B/A, …] in order, without copies."""
    fields = {f: v.reshape(-1, *v.shape[2:]) for f, v in batch.items()}
    return ({f: v[row] for f, v in fields.items()} for row in range(len(fields["tokens"])))


def make_loader(
    rows: Rows,
    *,
    batch_size: int,
    micro_batches: int = 1,
    local: Sequence[int] | None = None,
    seed: int = 0,
    start_step: int = 0,
    prefetch: int = 2,
) -> Iterator[Row]:
    """Batches [A, B/A, T] of updates start_step, start_step + 1, …, endless.

    With `local`, only these rows of each micro-batch are built: [A, len(local), T]. `prefetch`
    batches are built in advance, each in its own thread. Raises UserError if the batch size is not
    divisible by `micro_batches`.
    """
    if batch_size % micro_batches:
        raise UserError(f"{batch_size} rows cannot be divided into {micro_batches} micro-batches")
    in_order: Any = ordered(rows, seed)
    size = batch_size // micro_batches
    built = range(size) if local is None else local
    indices = [first + row for first in range(0, batch_size, size) for row in built]

    def batch(step: int) -> Row:
        return _stack([in_order[step * batch_size + i] for i in indices], micro_batches)

    options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
    batches = grain.MapDataset.range(start_step, len(in_order) // batch_size).map(batch)
    return iter(batches.to_iter_dataset(options))


def eval_batches(rows: Rows, batch_size: int, local: Sequence[int] | None = None) -> Iterator[Row]:
    """Every row once, in order, as batches [B, T]; the last one is padded with empty rows.

    With `local`, only these rows of each batch are built: [len(local), T].
    """
    in_order: Any = _concatenated([grain.MapDataset.source(part) for part in rows.parts])
    built = range(batch_size) if local is None else local
    padding = {f: np.zeros_like(v) for f, v in rows.parts[0][0].items()}
    for start in range(0, len(in_order), batch_size):
        indices = [start + row for row in built]
        batch = [in_order[i] if i < len(in_order) else padding for i in indices]
        yield {f: v[0] for f, v in _stack(batch, 1).items()}
