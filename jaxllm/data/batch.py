# SPDX-License-Identifier: Apache-2.0
"""The one shape of training data: rows of tokens with segments, positions and loss weights.

Dims: B rows, T tokens, P pairs of answers in a row at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxllm.errors import UserError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of one batch (or, with a leading dim, of its micro-batches).

    `weights` is the loss weight of predicting `targets[t]` from `tokens[:t + 1]`. Length, padding
    and end of text are read from `segment_ids`; no token id has a meaning here.
    """

    tokens: Any  # int32 [B, T]
    targets: Any  # int32 [B, T]
    weights: Any  # float32 [B, T]; 0 = not learned
    segment_ids: Any  # int32 [B, T]; 0 = padding, 1.. = the row's documents or conversations
    positions: Any  # int32 [B, T]; restart at 0 in each segment
    # Preferences: which segments are a pair's two answers. A judged answer is half of a pair.
    chosen_segment: Any = None  # int32 [B, P]; 0 = none
    rejected_segment: Any = None  # int32 [B, P]; 0 = none
    margin: Any = None  # float32 [B, P]: by how much the chosen one is better
    unpaired_segment: Any = None  # int32 [B, P]: the prompt with another one's answer; 0 = none
    chosen_logps: Any = None  # float32 [B, P]: log-probability under the reference, if known
    rejected_logps: Any = None  # float32 [B, P]
    unpaired_logps: Any = None  # float32 [B, P]
    baseline: Any = None  # float32 [B, 1]: a mean over the update's rows, the same in each

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tokens.shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Experience(Batch):
    """Completions, one a row after its prompt, and what an online run learns from them.

    Each is float32 [B, T], at t for the token `targets[t]` that was drawn after `tokens[: t + 1]`;
    `weights` is 1 for those that are learned.
    """

    old_logps: Any = None  # log-probability under the policy before the update
    reference_logps: Any = None  # under the reference
    advantages: Any = None  # how much better than expected the token turned out
    old_values: Any = None  # PPO: the value before the update
    returns: Any = None  # PPO: what the value is to become


TEXT = ("tokens", "targets", "weights", "segment_ids", "positions")  # the fields of every row


def empty_row(length: int) -> dict[str, np.ndarray]:
    """A row of padding: the fields TEXT of `Batch` without the batch dim, all zero."""
    dtypes = {f: np.float32 if f == "weights" else np.int32 for f in TEXT}
    return {name: np.zeros(length, dtype) for name, dtype in dtypes.items()}


def make_row(
    segments: list[tuple[np.ndarray, np.ndarray]], length: int, *, restart: bool = True
) -> dict[str, np.ndarray]:
    """Lays segments of (tokens [n], learn [n]) one after another into a row of `length`.

    `learn[j]` is the loss weight of *predicting* token j from those before it, so a segment of n
    tokens gives n inputs and n - 1 targets; `learn[0]` is never used. With `restart` false the
    whole row is one segment. Returns the fields of `Batch` without the batch dim. Raises
    ValueError when the segments do not fit.
    """
    total = sum(len(tokens) for tokens, _ in segments)
    if total > length:
        raise UserError(f"segments of {total} tokens do not fit a row of {length}")
    row = empty_row(length)
    start = 0
    for index, (tokens, learn) in enumerate(segments, 1):
        n = len(tokens)
        stop = start + n
        row["tokens"][start:stop] = tokens
        row["targets"][start : stop - 1] = tokens[1:]
        row["weights"][start : stop - 1] = learn[1:]
        row["segment_ids"][start:stop] = index if restart else 1
        row["positions"][start:stop] = np.arange(n) if restart else np.arange(start, stop)
        start = stop
    return row
