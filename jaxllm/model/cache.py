# SPDX-License-Identifier: Apache-2.0
"""Keys and values of past tokens, stacked over layers.

Dims: L layers, B rows, S slots, N key/value heads, K head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.mesh import constrain
from jaxllm.model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """All rows write the same slots; a row whose text is shorter marks its slots as padding."""

    k: Any  # [L, B, N, S, K], or of each layer [B, N, S, K] where the model's layers are `apart`
    v: Any  # as k
    segments: Any  # int32 [B, S]; 0 = empty or padding
    length: Any  # int32 scalar: slots written so far

    @staticmethod
    def empty(cfg: ModelConfig, rows: int, slots: int, dtype: Any) -> Cache:
        shape = (cfg.num_layers, rows, cfg.num_kv_heads, slots, cfg.head_dim)
        return Cache(
            jnp.zeros(shape, dtype),
            jnp.zeros(shape, dtype),
            jnp.zeros((rows, slots), jnp.int32),
            jnp.zeros((), jnp.int32),
        ).laid()

    def laid(self) -> Cache:
        """Rows divided among the mesh's data axes, heads along tensor; nothing on one device."""

        def lay(x: jax.Array) -> jax.Array:
            axes = ("layers", "batch", "kv_heads", None, None)
            return constrain(x, *axes[-x.ndim :])

        k, v = jax.tree.map(lay, (self.k, self.v))
        return Cache(k, v, constrain(self.segments, "batch", None), self.length)
