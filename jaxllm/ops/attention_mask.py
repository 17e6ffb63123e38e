# SPDX-License-Identifier: Apache-2.0
"""The mask rule of attention: causal, inside a segment, inside a window.

Dims: B rows, T queries, S keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

EVERYWHERE = -1  # segment id of keys that every query sees: a prefix that precedes each text
NOWHERE = -2  # segment id of what fills a row's last block


def visible(q_segments, k_segments, q_positions, q_indices, k_indices, window) -> jax.Array:
    """True where a query sees a key, bool [B, T, S].

    A query sees the keys of its own segment at or before its own index, and those of EVERYWHERE;
    with a window, only those fewer than `window` tokens away.

    q_segments [B, T] and k_segments [B, S] are segment ids, q_positions [B, T] positions within the
    texts, q_indices [T] and k_indices [S] indices among the keys; all are int32. window is an int,
    an int32 scalar, or None for no limit. Keys of EVERYWHERE precede each text, so their distance
    is counted from the query's position, not from its index.
    """
    everywhere = (k_segments == EVERYWHERE)[:, None, :]
    same = (q_segments[:, :, None] == k_segments[:, None, :]) & (k_indices <= q_indices[:, None])
    if window is not None:
        same &= q_indices[:, None] - k_indices < window
        everywhere &= q_positions[:, :, None] - k_indices < window
    return same | everywhere


def first_visible(segments: jax.Array, window: jax.Array | int | None) -> jax.Array:
    """Index of the first key that each query of a row sees, int32 [B, T].

    `visible` is the range from there to the query itself, where a row's queries and keys are the
    same tokens and each segment is contiguous.
    """
    indices = jnp.arange(segments.shape[1], dtype=jnp.int32)
    begins = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    first = lax.cummax(jnp.where(begins, indices, 0), axis=1)
    return first if window is None else jnp.maximum(first, indices - (window - 1))
