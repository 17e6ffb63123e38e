# SPDX-License-Identifier: Apache-2.0
"""The mask rule of attention: causal, inside a segment, inside a window.

Dims: B rows, T queries, S keys; of blocks of tokens: n blocks of queries, m of keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

EVERYWHERE = -1  # segment id of a prefix that precedes each text of a row
NOWHERE = -2  # segment id of what fills a row's last block
SELECTED = "an indexer chooses the keys of each query"  # why a fused kernel cannot run


def visible(
    q_segments, k_segments, q_positions, q_indices, k_indices, window, chunked=False
) -> jax.Array:
    """True where a query sees a key, bool [B, T, S].

    A query sees the keys of its own segment and of EVERYWHERE at or before its own index; with a
    window, only those fewer than `window` tokens away, or, `chunked`, those of its own chunk: of
    so many tokens, counted from the beginning of its text.

    q_segments [B, T] and k_segments [B, S] are segment ids, q_positions [B, T] positions within the
    texts, q_indices [T] and k_indices [S] indices among the keys; all are int32. window is an int,
    an int32 scalar, or None for no limit. Keys of EVERYWHERE precede each text, so their distance
    is counted from the query's position, not from its index.
    """
    everywhere = (k_segments == EVERYWHERE)[:, None, :]
    same = q_segments[:, :, None] == k_segments[:, None, :]
    if window is not None:
        window = (q_positions % window + 1)[:, :, None] if chunked else window
        same &= q_indices[:, None] - k_indices < window
        everywhere &= q_positions[:, :, None] - k_indices < window
    return (same | everywhere) & (k_indices <= q_indices[:, None])


def first_visible(segments: jax.Array, window: jax.Array | int | None) -> jax.Array:
    """Index of the first key that each query of a row sees, int32 [B, T].

    `visible` is the range from there to the query itself, where a row's queries and keys are the
    same tokens and each segment is contiguous.
    """
    indices = jnp.arange(segments.shape[1], dtype=jnp.int32)
    begins = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    first = lax.cummax(jnp.where(begins, indices, 0), axis=1)
    return first if window is None else jnp.maximum(first, indices - (window - 1))


def in_chunks(segments: jax.Array, window: jax.Array | int) -> jax.Array:
    """The ids of a row's segments, int32 [B, T], if each chunk of a text is a segment of its own:
    ascending; 0 of padding. Where `first_visible` is right, `visible` of chunks is that of these
    segments."""
    place = jnp.arange(segments.shape[1], dtype=jnp.int32) - first_visible(segments, None)
    return jnp.where(segments == 0, 0, jnp.cumsum(place % window == 0, axis=1, dtype=jnp.int32))


def visible_blocks(q_segments, k_segments, q_indices, k_indices, window) -> jax.Array:
    """True where some query of a block may see a key of another in some row, bool [n, m].

    Where segment ids are not ascending it may be true for blocks that see nothing.

    q_segments [n, B, T] and k_segments [m, B, S] are segment ids; q_indices and k_indices are the
    (lowest, highest) index of each block among the keys, int32 [n] and [m]. Keys of EVERYWHERE
    precede each text, so whether a window excludes them is not known here. window may be [n, 1]: of
    the first query of each block.
    """

    def id_range(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Lowest and highest segment id of each block and row, [n, B]; padding has the highest."""
        padding = (segments == 0) | (segments == NOWHERE)
        ids = jnp.where(padding, jnp.iinfo(jnp.int32).max, segments)
        return ids.min(-1), ids.max(-1)

    (q_low, q_high), (k_low, k_high) = id_range(q_segments), id_range(k_segments)
    seen = ((q_low[:, None] <= k_high) & (k_low <= q_high[:, None])).any(-1)
    (first_query, last_query), (first_key, last_key) = q_indices, k_indices
    seen &= last_query[:, None] >= first_key
    if window is not None:
        seen &= first_query[:, None] - last_key < window
    return seen | (k_segments == EVERYWHERE).any((1, 2))
