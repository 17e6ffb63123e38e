# SPDX-License-Identifier: Apache-2.0
"""Rows that are split along the mesh axis `context`: own queries attend to the keys of all devices.

Keys and values are all-gathered, so their gradients leave as a reduce-scatter. The end of a row
sees more keys than its beginning. So that all devices have the same work, they exchange queries
before and results after: of 2c equal parts of a row, device r of c computes parts r and 2c - 1 - r,
not 2r and 2r + 1, which it holds ("zigzag").

Dims: B rows, T tokens of a device, S keys of a row, H query heads, N key/value heads, K head_dim;
c devices along `context`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

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


def _all_keys(x: jax.Array, before: int, axis: int) -> jax.Array:
    """What precedes a row, which all devices have, and the row, of which each has a part."""
    front, own = jnp.split(x, [before], axis)
    return jnp.concatenate([front, lax.all_gather(own, AXIS, axis=axis, tiled=True)], axis)


def arrays_of(given: dict[str, Any]) -> dict[str, jax.Array]:
    """Those that are arrays, which a nested shard_map does not capture."""
    return {name: x for name, x in given.items() if isinstance(x, jax.Array)}


def split(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`attend` in a shard_map over the axis: a device has a part of the queries, and of the keys
    after the first `offset` ones, which all devices have. The offset is static."""

    def run(q, k, v, q_segments, k_segments, q_positions, *, offset: int, **given: Any) -> Any:
        dims = (2, 2, 1)
        pairs = [jnp.split(x, [offset], d) for x, d in zip((k, v, k_segments), dims, strict=True)]
        before, own = zip(*pairs, strict=True)

        def local(queries: Any, keys: Any, segments: Any, before: Any, arrays: Any) -> Any:
            own = (*keys, segments)
            joined = [jnp.concatenate(x, d) for *x, d in zip(before, own, dims, strict=True)]
            k, v, k_segments = joined
            q, *tokens = queries
            tokens = tokens[0], k_segments, tokens[1]
            return attend(q, k, v, *tokens, offset=offset, **given | arrays)

        length = P(None, AXIS)
        mapped = jax.shard_map(
            local,
            in_specs=(length, P(None, None, AXIS), length, P(), P()),
            out_specs=length,
            axis_names={AXIS},
            check_vma=False,
        )
        queries = (q, q_segments, q_positions)
        return mapped(queries, own[:2], own[2], before, arrays_of(given))

    return run


def attend_split(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`attend` for rows that are split along the axis, which is manual; see `split`."""

    def local(q, k, v, q_segments, k_segments, q_positions, *, offset: int, **given: Any) -> Any:
        k, v = (_all_keys(x, offset, 2) for x in (k, v))
        k_segments = _all_keys(k_segments, offset, 1)
        shards = lax.axis_size(AXIS)
        table = first_indices(q.shape[1] * shards, shards, offset)
        queries, zigzag = (q, q_segments, q_positions), table.shape[1] == 2
        if zigzag:
            queries = [_exchanged(x, back=False) for x in queries]
        q, q_segments, q_positions = queries
        first = jnp.asarray(table)[lax.axis_index(AXIS)]
        out = attend(q, k, v, q_segments, k_segments, q_positions, offset=first, **given)
        return _exchanged(out, back=True) if zigzag else out

    return local
