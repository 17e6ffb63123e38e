# SPDX-License-Identifier: Apache-2.0
"""An embedding of each layer: Gemma's "per-layer embeddings".

For each token a layer has a vector e, by which it gates what it adds to the residual stream x:

    x ← x + norm(up (act(gate x) · e))
    e = (norm(W x₀ / √D) + √E · table[token]) / √2

where x₀ is what goes into the first layer. W and the table are those of all layers.

Dims: B rows, T tokens, D model width, L layers, E features.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.model.adapter import Adapter
from jaxllm.model.config import ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.layers import ACTIVATIONS, Embed, Linear, RMSNorm
from jaxllm.model.parts import gathered_layer


class LayerEmbeds(nnx.Module):
    """(tokens [B, T], x₀ [B, T, D]) -> e of every layer, [L, B, T, E]."""

    def __init__(self, cfg: ModelConfig, *, peft: Adapter, dtype: Any, rngs: nnx.Rngs):
        assert cfg.layer_embeds is not None
        D, E, V = cfg.hidden_size, cfg.layer_embeds.size, cfg.layer_embeds.vocab_size
        keys: dict[str, Any] = dict(peft=peft, dtype=dtype, rngs=rngs)
        width = cfg.num_layers * E
        self.table = Embed(cfg, "layer_embeds.table", (V, width), **keys)
        self.project = Linear(cfg, "layer_embeds.project", ("embed", "latent"), (D, width), **keys)
        self.norm = RMSNorm(cfg, E, dtype=dtype)
        self.size = E

    def __call__(self, tokens: jax.Array, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        graph, weights = nnx.split(self.project)
        project = nnx.merge(graph, gathered_layer(weights, x_BTD.dtype))

        def by_layer(y: jax.Array) -> jax.Array:
            return jnp.moveaxis(y.reshape(*y.shape[:2], -1, self.size), 2, 0)

        seen = by_layer(project(x_BTD, ctx)) * x_BTD.shape[-1] ** -0.5
        own = by_layer(self.table(tokens, x_BTD.dtype, ctx)) * math.sqrt(self.size)
        return (self.norm(seen) + own) * 0.5**0.5


class LayerEmbed(nnx.Module):
    """What a layer adds to the residual stream for its e."""

    def __init__(self, cfg: ModelConfig, path: str, *, peft: Adapter, dtype: Any, rngs: nnx.Rngs):
        assert cfg.layer_embeds is not None
        D, E = cfg.hidden_size, cfg.layer_embeds.size
        keys: dict[str, Any] = dict(peft=peft, dtype=dtype, rngs=rngs)
        self.gate = Linear(cfg, f"{path}.gate", ("embed", "latent"), (D, E), **keys)
        self.up = Linear(cfg, f"{path}.up", ("latent", "embed"), (E, D), **keys)
        self.norm = RMSNorm(cfg, D, dtype=dtype)
        self.activation = cfg.activation

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        gate_BTE = ACTIVATIONS[self.activation](self.gate(x_BTD, ctx))
        return self.norm(self.up(gate_BTE * ctx.embeds, ctx))
