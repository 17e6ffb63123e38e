# SPDX-License-Identifier: Apache-2.0
"""Batches: rows of tokens with segments, positions and loss weights.

Dims: B rows, T tokens, P slots for preference pairs per row.
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
    """The rows of a batch, with a leading dim if they are split into micro-batches.

    `weights[t]` is the loss weight of predicting `targets[t]` from `tokens[:t + 1]`. Lengths and
    padding come from `segment_ids`, never from token ids.
    """

    tokens: Any  # int32 [B, T]
    targets: Any  # int32 [B, T]
    weights: Any  # float32 [B, T]; 0 = no loss
    segment_ids: Any  # int32 [B, T]; 0 = padding, 1.. = texts, -1 = a prompt that they share
    positions: Any  # int32 [B, T]; start at 0 in each segment
    # Preferences: the segments of a pair's answers. A judged answer is one half of a pair.
    chosen_segment: Any = None  # int32 [B, P]; 0 = none
    rejected_segment: Any = None  # int32 [B, P]; 0 = none
    margin: Any = None  # float32 [B, P]: least reward difference of chosen and rejected
    unpaired_segment: Any = None  # int32 [B, P]: the prompt with another prompt's answer; 0 = none
    chosen_logps: Any = None  # float32 [B, P]: reference log-probability, if precomputed
    rejected_logps: Any = None  # float32 [B, P]
    unpaired_logps: Any = None  # float32 [B, P]
    baseline: Any = None  # float32 [B, 1]: a mean over the update's rows, repeated in each

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tokens.shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Experience(Batch):
    """Sampled completions, each in a row after its prompt or with its group in one row
    (rl/shared.py), for the update of an online run.

    Each field is float32 [B, T]; index t belongs to `targets[t]`, which was sampled after
    `tokens[: t + 1]`. `weights` is 1 for the completion's tokens.
    """

    old_logps: Any = None  # log-probability under the policy that sampled
    reference_logps: Any = None  # log-probability under the reference
    advantages: Any = None  # advantage of the token
    old_values: Any = None  # PPO: the value before the update
    returns: Any = None  # PPO: the value's target


TEXT = ("tokens", "targets", "weights", "segment_ids", "positions")  # the fields that all rows have


def empty_row(length: int) -> dict[str, np.ndarray]:
    """A row of padding: zeros for the fields TEXT of `Batch`, without the batch dim."""
    return {f: np.zeros(length, np.float32 if f == "weights" else np.int32) for f in TEXT}


def make_row(
    segments: list[tuple[np.ndarray, np.ndarray]], length: int, *, restart: bool = True
) -> dict[str, np.ndarray]:
    """Concatenate segments of (tokens [n], loss_weights [n]) to a row of `length` tokens.

    `loss_weights[j]` is the weight of predicting token j from the tokens before it, so a segment of
    n tokens has n inputs and n - 1 targets, and `loss_weights[0]` is unused. If not `restart`, the
    row is a single segment. Returns the fields of `Batch` without the batch dim. Raises UserError
    if the segments do not fit.
    """
    total = sum(len(tokens) for tokens, _ in segments)
    if total > length:
        raise UserError(f"segments of {total} tokens do not fit a row of {length}")
    row = empty_row(length)
    start = 0
    for index, (tokens, loss_weights) in enumerate(segments, 1):
        n = len(tokens)
        stop = start + n
        row["tokens"][start:stop] = tokens
        row["targets"][start : stop - 1] = tokens[1:]
        row["weights"][start : stop - 1] = loss_weights[1:]
        row["segment_ids"][start:stop] = index if restart else 1
        row["positions"][start:stop] = np.arange(n) if restart else np.arange(start, stop)
        start = stop
    return row
