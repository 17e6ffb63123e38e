# SPDX-License-Identifier: Apache-2.0
"""Rows that are split along the mesh axis `context`: own queries attend to the keys of all devices.

Keys and values are all-gathered, so their gradients leave as a reduce-scatter. The end of a row
sees more keys than its beginning. So that all devices have the same work, they exchange queries
before and results after: of 2c equal parts of a row, device r of c computes parts r and 2c - 1 - r,
not 2r and 2r + 1, which it holds ("zigzag").

Dims: B rows, T queries of a device, S keys of a row, H query heads, N key/value heads, K head_dim;
c devices along `context`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.ops.attention_blocks import block_size

AXIS = "context"


def first_indices(length: int, shards: int, before: int) -> np.ndarray:
    """Index among the keys of the first query of each part of a device's work, int32 [c, parts].

    length: of the row. before: number of keys in front of it. It is one part, the device's own, if
    two would not be multiples of a block.
    """
    half, rest = divmod(length, 2 * shards)
    if rest or half % block_size(half):
        return before + np.arange(0, length, length // shards, dtype=np.int32)[:, None]
    table = np.zeros((shards, 2), np.int32)
    for part, device in enumerate(_computes(shards).ravel()):
        table[device, part % 2] = before + part * half
    return table


def _computes(shards: int) -> np.ndarray:
    """[c, 2]: the device that computes each of the two parts that a device holds."""
    parts = np.arange(2 * shards).reshape(-1, 2)
    return np.minimum(parts, 2 * shards - 1 - parts)


def _exchanged(x: jax.Array, back: bool) -> jax.Array:
    """x [B, T, ...] of the parts that a device computes, from the parts that it holds; or `back`.

    First parts always go to other devices than second parts do, so each is one permutation.
    """
    moved = []
    for half, devices in zip(jnp.split(x, 2, 1), _computes(lax.axis_size(AXIS)).T, strict=True):
        pairs = [(int(a), int(b)) for a, b in enumerate(devices)]
        moved.append(lax.ppermute(half, AXIS, [pair[::-1] for pair in pairs] if back else pairs))
    return jnp.concatenate(moved, 1)


def pieces(x: jax.Array, before: int, axis: int) -> list[jax.Array]:
    """What precedes the row, if anything, and the row."""
    return jnp.split(x, [before], axis) if before else [x]


def _all_keys(pieces: list[jax.Array], axis: int) -> jax.Array:
    """What precedes the row, if anything, and the row, of which each device has a part."""
    *front, own = pieces
    return jnp.concatenate([*front, lax.all_gather(own, AXIS, axis=axis, tiled=True)], axis)


def attend_split(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`attend` on one device: (q, k, v, q_segments, k_segments, q_positions, first) -> out.

    q [B, T, H, K], q_segments and q_positions [B, T] are the device's own; k, v and k_segments are
    the `pieces` of [B, N, S, .] and [B, S], of which the row is the device's own. first: the
    device's [1, parts] of `first_indices`.
    """

    def local(q, k, v, q_segments, k_segments, q_positions, first, *, window) -> Any:
        k, v, k_segments = _all_keys(k, 2), _all_keys(v, 2), _all_keys(k_segments, 1)
        queries, zigzag = (q, q_segments, q_positions), first.size == 2
        if zigzag:
            queries = [_exchanged(x, back=False) for x in queries]
        q, q_segments, q_positions = queries
        out = attend(q, k, v, q_segments, k_segments, q_positions, offset=first[0], window=window)
        return _exchanged(out, back=True) if zigzag else out

    return local
