# SPDX-License-Identifier: Apache-2.0
"""An indexer chooses the keys that each query attends to (arXiv:2512.02556, section 2.1).

Few small heads score every key that a query sees, and the best ones are selected:

    score of a key k = Σₕ wₕ relu(qₕ·k)          wₕ and k are projections of x, q of its latent

The choice has no gradient, so an indexer does not learn from the loss of the model. Its keys are in
the cache beside those of the attention. In rows of no more keys than it chooses, it does nothing.

Dims: B rows, T tokens, S keys, D model width, Q features of the queries' latent, H heads of the
indexer, K features of such a head; n blocks of queries, m of keys.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.errors import UserError
from jaxllm.mesh import context_shards, context_splits
from jaxllm.model.adapter import Adapter
from jaxllm.model.config import ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.delta import OBSTACLE
from jaxllm.model.layers import LayerNorm, Linear
from jaxllm.model.rope import rotate
from jaxllm.ops.attention_blocks import block_size, split
from jaxllm.ops.attention_mask import NOWHERE, visible
from jaxllm.ops.matmul import operand
from jaxllm.ops.residuals import saveable_in_vjp

NORM_EPS = 1e-6
WHOLE_ROWS = OBSTACLE.format("indexers")


class Indexer(nnx.Module):
    """Projections, the keys' norm, rotary positions. A mesh axis does not divide its heads, whose
    scores are summed for each pair of tokens."""

    def __init__(self, cfg: ModelConfig, path: str, *, peft: Adapter, dtype: Any, rngs: nnx.Rngs):
        assert cfg.indexer is not None and cfg.latent is not None
        D, Q, H, K = cfg.hidden_size, cfg.latent.q_rank, cfg.indexer.heads, cfg.indexer.dim
        linear = partial(Linear, cfg, peft=peft, dtype=dtype, rngs=rngs)
        self.q = linear(f"{path}.q", ("latent", None), (Q, H * K))
        self.k = linear(f"{path}.k", ("embed", None), (D, K))
        self.k_norm = LayerNorm(replace(cfg, norm_bias=True, norm_eps=NORM_EPS), K, dtype=dtype)
        self.weigh = linear(f"{path}.weigh", ("embed", None), (D, H))
        self.cfg, self.indexer = cfg, cfg.indexer

    def rotated(self, y_BTHK: jax.Array, ctx: Context) -> jax.Array:
        cos, sin = [table[ctx.rope] for table in ctx.rope_tables[self.cfg.head_dim]]
        return rotate(y_BTHK, cos, sin, self.indexer.pairs)

    def keys(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        """[B, T, 1, K]"""
        k_BTK = self.k_norm(self.k(lax.stop_gradient(x_BTD), ctx))
        return lax.stop_gradient(self.rotated(k_BTK[:, :, None], ctx))

    def __call__(
        self, x_BTD: jax.Array, low_BTQ: jax.Array, k_BSK: jax.Array, ctx: Context
    ) -> jax.Array | None:
        """The keys that each query attends to among those that it sees, bool [B, T, S]; None if it
        attends to all."""
        if context_shards() > 1 or context_splits(x_BTD.shape[1]):
            raise UserError(f"mesh.context is not possible: {WHOLE_ROWS}")
        H, K = self.indexer.heads, self.indexer.dim
        if k_BSK.shape[1] <= self.indexer.top_keys:
            return None
        x_BTD, low_BTQ = lax.stop_gradient((x_BTD, low_BTQ))
        q_BTHK = self.rotated(self.q(low_BTQ, ctx).reshape(*x_BTD.shape[:2], H, K), ctx)
        w_BTH = self.weigh(x_BTD, ctx).astype(jnp.float32) * (H * K) ** -0.5
        chosen = select(*lax.stop_gradient((q_BTHK, w_BTH, k_BSK)), ctx, self.indexer.top_keys)
        return saveable_in_vjp(chosen, "attention")


def select(
    q_BTHK: jax.Array, w_BTH: jax.Array, k_BSK: jax.Array, ctx: Context, count: int
) -> jax.Array:
    """True for the `count` keys with the highest scores among those that a query sees, or for all
    of them if they are fewer, bool [B, T, S].

    Scores are float32. They exist for one block of queries at a time, and those of each head for
    one pair of blocks.
    """
    (B, T), S = q_BTHK.shape[:2], k_BSK.shape[1]
    k_segments = ctx.segment_ids if ctx.key_segment_ids is None else ctx.key_segment_ids
    size = block_size(T)
    queries = partial(split, axis=1, size=size)
    k_mBSK = split(k_BSK, 1, size if size < T else S)

    def one_block(block: Any) -> jax.Array:
        q_BTHK, w_BTH, q_segments, q_positions, start = block

        def scored(k_BSK: jax.Array) -> jax.Array:
            keys = operand(k_BSK)
            products = jnp.einsum(
                "bthk,bsk->bths", operand(q_BTHK), keys, preferred_element_type=jnp.float32
            )
            return jnp.sum(w_BTH[..., None] * jax.nn.relu(products), 2)

        scores = jnp.moveaxis(lax.map(scored, k_mBSK), 0, 2).reshape(B, size, -1)[..., :S]
        indices = start + jnp.arange(size), jnp.arange(S)
        seen = visible(q_segments, k_segments, q_positions, *indices, None)
        return seen & highest(jnp.where(seen, scores, -jnp.inf), count)

    blocks = (
        queries(q_BTHK.astype(k_BSK.dtype)),
        queries(w_BTH),
        queries(ctx.segment_ids, fill=NOWHERE),
        queries(ctx.positions),
    )
    starts = ctx.offset + jnp.arange(0, T, size)
    selected_nBTS = lax.map(one_block, (*blocks, starts))
    return jnp.moveaxis(selected_nBTS, 0, 1).reshape(B, -1, S)[:, :T]


def highest(scores: jax.Array, count: int) -> jax.Array:
    """True for the `count` highest scores of the last axis; of equal ones, for the first."""
    values, indices = lax.top_k(scores, count)
    least, last = values[..., -1:], indices[..., -1:]
    tied = (scores == least) & (jnp.arange(scores.shape[-1]) <= last)
    return (scores > least) | tied
