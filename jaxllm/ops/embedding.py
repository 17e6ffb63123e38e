# SPDX-License-Identifier: Apache-2.0
"""Lookup in a token table whose columns may be split along fsdp.

Dims: B rows, T tokens, V vocabulary, D model width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def lookup(table: jax.Array, tokens: jax.Array, width: int, dtype: Any) -> jax.Array:
    """Rows of the table [V, D] for tokens [B, T]: [B, T, D] in `dtype`.

    width: D. A device that holds fewer columns looks up the tokens of all devices of its fsdp group
    in its own, and they exchange the results: activations are sent, not the table.
    """
    if table.shape[1] == width:
        return jnp.take(table, tokens, axis=0, mode="clip").astype(dtype)
    everyone = lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
    columns = jnp.take(table, everyone, axis=0, mode="clip").astype(dtype)
    return lax.all_to_all(columns, "fsdp", 0, 2, tiled=True)
