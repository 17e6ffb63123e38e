# SPDX-License-Identifier: Apache-2.0
"""Keys and values of past tokens, stacked over layers.

Dims: L layers, B rows, S slots, N key/value heads, K head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.mesh import constrain
from jaxllm.model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """All rows write the same slots; a row whose text is shorter marks its slots as padding."""

    k: Any  # [L, B, N, K, S], or of each layer [B, N, K, S] where the model's layers are `apart`
    v: Any  # the same but [..., S, K]: each as the product that reads it is fastest on a CPU
    segments: Any  # int32 [B, S]; 0 = empty or padding
    length: Any  # slots written so far: an int where it is known to the program, else int32 scalar

    @staticmethod
    def empty(cfg: ModelConfig, rows: int, slots: int, dtype: Any) -> Cache:
        shape = (cfg.num_layers, rows, cfg.num_kv_heads)
        return Cache(
            jnp.zeros((*shape, cfg.head_dim, slots), dtype),
            jnp.zeros((*shape, slots, cfg.head_dim), dtype),
            jnp.zeros((rows, slots), jnp.int32),
            0,
        ).laid()

    def laid(self) -> Cache:
        """Rows divided among the mesh's data axes, heads along tensor; nothing on one device."""

        def lay(x: jax.Array) -> jax.Array:
            axes = ("layers", "batch", "kv_heads", None, None)
            return constrain(x, *axes[-x.ndim :])

        k, v = jax.tree.map(lay, (self.k, self.v))
        return Cache(k, v, constrain(self.segments, "batch", None), self.length)


def written(kv: tuple[Any, Any], k: jax.Array, v: jax.Array, offset: Any) -> tuple[Any, Any]:
    """A layer's cache with k and v [B, N, T, K] (of all rows: [1, ...]) from slot `offset` on."""
    k, v = (jnp.broadcast_to(y, (len(kv[0]), *y.shape[1:])).astype(kv[0].dtype) for y in (k, v))
    return (
        lax.dynamic_update_slice(kv[0], k.swapaxes(2, 3), (0, 0, 0, offset)),
        lax.dynamic_update_slice(kv[1], v, (0, 0, offset, 0)),
    )
