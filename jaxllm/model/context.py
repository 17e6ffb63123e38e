# SPDX-License-Identifier: Apache-2.0
"""The inputs of a layer besides the residual stream x_BTD.

Dims: B rows, T tokens, D model width, S keys (cached or virtual ones, then the T tokens), R rotated
features.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What a layer reads besides x_BTD.

    The embedding and the head get one with `layer` 0, in which only `rng` and `adapter_weights` are
    set. PEFT branches read `layer`, `rng` and `adapter_weights`.
    """

    layer: Any = 0  # its index in its stack: an int, or int32 scalar under a scan
    rng: Any = None  # typed keys [B], one per row: dropout; None = no dropout
    adapter_weights: Any = None  # float32 [B or 1, adapters]; None = every adapter has weight 1
    segment_ids: Any = None  # int32 [B, T]
    positions: Any = None  # int32 [B, T]
    key_segment_ids: Any = None  # int32 [B, S]; None = the keys are those of the T tokens alone
    offset: Any = 0  # index of the first token among the keys; a Python int where it is static
    # {head_dim: (cos, sin)}, each float32 [tables, B, T, 1, R/2]; where queries are scaled by their
    # position, also the scales [tables, B, T, 1, 1]
    rope_tables: Any = field(default_factory=dict)
    rope: Any = 0  # index of the layer's table; an int, or int32 scalar where layers differ
    window: Any = None  # of the layer: an int or int32 scalar; None = all keys
    selected: Any = None  # bool [B, T, S], the keys that an indexer chose; None = all
    embeds: Any = None  # [L, B, T, E], of every layer; in a layer its own, [B, T, E]
    # {LayerKind.keeps: keys and values [B, S, N, K]} of earlier layers
    kept: Any = field(default_factory=dict)
    kernel: str = field(default="auto", metadata={"static": True})  # of ops.attention
    next_BTD: Any = None  # embeddings of the tokens that come next, for multi-token prediction
    mlp_blocks: int = field(default=1, metadata={"static": True})  # of MLP.in_blocks; 1 = whole

    def at_layer(
        self, layer: Any, rope: Any = 0, window: Any = None, embeds: Any = None
    ) -> Context:
        """The context of one layer, whose dropout keys have the layer folded in per row."""
        rng = self.rng
        if rng is not None:
            rng = jax.vmap(jax.random.fold_in, (0, None))(rng, layer)
        return replace(self, layer=layer, rng=rng, rope=rope, window=window, embeds=embeds)
