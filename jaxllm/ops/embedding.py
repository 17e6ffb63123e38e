# SPDX-License-Identifier: Apache-2.0
"""Lookup in a token table that is split over devices.

Dims: B rows, T tokens, V vocabulary, D model width.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxllm.mesh import automatic_axes, manual_rows, spec, stream_specs

# Tokens of all devices that are looked up at one time: a TPU stores the few columns of each in 128
# lanes, 128 MiB in bfloat16.
MOST_TOKENS = 2**19
TABLE_AXES: Any = ("vocab", "embed")  # logical axes of a token table [V, D]


def lookup(table: jax.Array, tokens: jax.Array, width: int, dtype: Any) -> jax.Array:
    """Rows of the table [V, D] for tokens [B, T]: [B, T, D] in `dtype`.

    width: D. A device that holds fewer columns looks up the tokens of all devices of its fsdp group
    in its own, and they exchange the results: activations are sent, not the table. A device that
    holds fewer rows, of a tensor axis, adds 0 for the others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = automatic_axes() if manual_rows() else set()

    def columns(table: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.take(table, tokens, axis=0, mode="clip").astype(dtype)

    def exchanged(table: jax.Array, tokens: jax.Array) -> jax.Array:
        if table.shape[1] == width:
            return columns(table, tokens)

        def exchange(tokens: jax.Array) -> jax.Array:
            everyone = lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
            return lax.all_to_all(columns(table, everyone), "fsdp", 0, 2, tiled=True)

        rows, length = tokens.shape
        least = math.ceil(tokens.size * lax.axis_size("fsdp") / MOST_TOKENS)
        count = next((n for n in range(least, 4 * least) if length % n == 0), 1)
        if count == 1:
            return exchange(tokens)
        x = lax.map(exchange, jnp.moveaxis(tokens.reshape(rows, count, -1), 1, 0))
        return jnp.moveaxis(x, 0, 1).reshape(rows, length, width)

    if not axes:
        return exchanged(table, tokens)
    split = spec(TABLE_AXES, table.shape, mesh)
    stream, length = stream_specs((*tokens.shape, width))

    def of_rows_of_table(table: jax.Array, tokens: jax.Array) -> jax.Array:
        local = tokens - lax.axis_index("tensor") * len(table)
        here = (local >= 0) & (local < len(table))
        x = exchanged(table, jnp.clip(local, 0, len(table) - 1)) * here[..., None].astype(dtype)
        if stream == length:
            return lax.psum(x, "tensor")
        return lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True)

    rows_are_split = split[0] is not None
    run = jax.shard_map(
        of_rows_of_table if rows_are_split else exchanged,
        in_specs=(split, P(*(length if rows_are_split else stream)[:2])),
        out_specs=stream,
        axis_names=axes,
        check_vma=False,
    )
    return run(table, tokens)
