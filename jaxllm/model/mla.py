# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention (arXiv:2405.04434): keys and values are made from one latent.

A token's latent c is norm(x Wₐ). Head h has the keys c Kₕ and the values c Vₕ; its keys have a
rotated part besides, which all heads share. There are two forms of the same attention:

    expanded   keys and values are computed for each head: training and prefill, any kernel
    absorbed   (q Kₕᵀ)·c = q·(c Kₕ) and (Σ p c) Vₕ = Σ p (c Vₕ), so the heads attend to the latents
               of the cache: decoding, where one token would otherwise expand the whole cache

Dims: B rows, T tokens, S keys, D model width, H heads, R features of the latent, P rotated features
of a head (head_dim), N the others, V features of its values, C = N + V, r LoRA's rank (or R),
Q features of the queries' latent (or D).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.model.adapter import Adapter
from jaxllm.model.config import ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.indexer import Indexer
from jaxllm.model.layers import Linear, RMSNorm, fused
from jaxllm.model.rope import rotate
from jaxllm.ops.attention import attention
from jaxllm.ops.matmul import by_outputs, dot, operand

NORM_EPS = 1e-6  # of the latents' norms, in all families


def softmax_scale(cfg: ModelConfig) -> float:
    """What q·k is multiplied by: more than usual where YaRN stretches the context."""
    (rope,), (width, _) = cfg.ropes, cfg.attention_dims
    stretch = 0.1 * rope.mscale_all_dim * math.log(rope.factor) if rope.factor > 1 else 0.0
    return width**-0.5 * (1 + stretch) ** 2


class LatentAttention(nnx.Module):
    """Latents and their norms, rotary positions, softmax attention."""

    def __init__(self, cfg: ModelConfig, path: str, *, peft: Adapter, dtype: Any, rngs: nnx.Rngs):
        latent, D, H, P = cfg.latent, cfg.hidden_size, cfg.num_heads, cfg.head_dim
        assert latent is not None
        (QK, V), Q, R, heads = cfg.attention_dims, latent.q_rank, latent.kv_rank, ("heads", H)
        linear = partial(Linear, cfg, peft=peft, dtype=dtype, rngs=rngs)
        norm = partial(RMSNorm, replace(cfg, norm_eps=NORM_EPS), dtype=dtype)
        low = partial(linear, axes=("embed", "latent"), bias=cfg.qkv_bias)
        self.q_a = low(f"{path}.q_a", shape=(D, Q)) if Q else None
        self.q_norm = norm(Q) if Q else None
        self.q_b = linear(f"{path}.q_b", ("latent" if Q else "embed", heads), (Q or D, H * QK))
        self.kv_a = low(f"{path}.kv_a", shape=(D, R + P))  # the latent, and the rotated keys
        self.kv_norm = norm(R)
        self.kv_b = linear(f"{path}.kv_b", ("latent", heads), (R, H * (latent.nope_dim + V)))
        self.o = linear(f"{path}.o", (heads, "embed"), (H * V, D), bias=cfg.o_bias)
        keys: dict[str, Any] = dict(peft=peft, dtype=dtype, rngs=rngs)
        self.indexer = Indexer(cfg, f"{path}.indexer", **keys) if cfg.indexer else None
        self.cfg, self.latent, self.scale = cfg, latent, softmax_scale(cfg)

    def project(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, ...]:
        """Queries [B, T, H, N] and [B, T, H, P], latents [B, T, 1, R] and keys [B, T, 1, P]; those
        of P features are rotated. And what queries are made from, [B, T, Q]."""
        low_BTQ = x_BTD
        if self.q_a is None or self.q_norm is None:
            q, kv = fused(None, x_BTD, (self.q_b, self.kv_a), ctx)
        else:
            low, kv = fused(None, x_BTD, (self.q_a, self.kv_a), ctx)
            low_BTQ = self.q_norm(low)
            q = self.q_b(low_BTQ, ctx)
        cos, sin = [table[ctx.rope] for table in ctx.rope_tables[self.cfg.head_dim]]
        turned = partial(rotate, cos=cos, sin=sin, pairs=self.cfg.rope_pairs)
        q = q.reshape(*q.shape[:2], self.cfg.num_heads, -1)
        q_BTHN, q_BTHP = jnp.split(q, [self.latent.nope_dim], -1)
        latent, k = jnp.split(kv[:, :, None], [self.latent.kv_rank], -1)
        return q_BTHN, turned(q_BTHP), self.kv_norm(latent), turned(k), low_BTQ

    def __call__(self, x_BTD: jax.Array, ctx: Context, past: Any) -> tuple[jax.Array, Any]:
        """(output [B, T, D], new past). past: a LayerCache or VirtualTokens, whose keys are the
        rotated ones, each before the indexer's key, and whose values are the latents; or None."""
        q_BTHN, q_BTHP, latent_BS1R, k_BS1P, low_BTQ = self.project(x_BTD, ctx)
        if self.indexer is not None:
            k_BS1P = jnp.concatenate([k_BS1P, self.indexer.keys(x_BTD, ctx)], -1)
        if past is not None:
            past, k_BS1P, latent_BS1R = past.extend(k_BS1P, latent_BS1R, ctx.offset)
        if self.indexer is not None:
            k_BS1P, index_BS1K = jnp.split(k_BS1P, [self.cfg.head_dim], -1)
            selected = self.indexer(x_BTD, low_BTQ, index_BS1K[:, :, 0], ctx)
            ctx = replace(ctx, selected=selected)
        decoding = not isinstance(ctx.offset, int)
        form = self.absorbed if decoding else self.expanded
        out_BTHV = form(q_BTHN, q_BTHP, latent_BS1R, k_BS1P, ctx)
        return self.o(out_BTHV.reshape(*x_BTD.shape[:2], -1), ctx), past

    def expanded(self, q_BTHN, q_BTHP, latent_BS1R, k_BS1P, ctx: Context) -> jax.Array:
        """[B, T, H, V]"""
        kv = self.kv_b(latent_BS1R[:, :, 0], ctx)
        kv = kv.reshape(*kv.shape[:2], self.cfg.num_heads, -1)
        k_BSHN, v_BSHV = jnp.split(kv, [self.latent.nope_dim], -1)
        k_BSHP = jnp.broadcast_to(k_BS1P, (*k_BSHN.shape[:3], k_BS1P.shape[-1]))
        return self.attend((q_BTHN, q_BTHP), (k_BSHN, k_BSHP), v_BSHV, ctx)

    def absorbed(self, q_BTHN, q_BTHP, latent_BS1R, k_BS1P, ctx: Context) -> jax.Array:
        """[B, T, H, V]"""
        N, dtype = self.latent.nope_dim, q_BTHN.dtype
        terms = self.terms(ctx, dtype)

        def query(a_Rr: Any, s: Any, b_HCr: jax.Array) -> jax.Array:
            q_BTHr = _by_head("bthc,hcr->bthr", q_BTHN, b_HCr[:, :N])
            return q_BTHr if a_Rr is None else dot((s * q_BTHr).astype(dtype), a_Rr.T)

        q_BTHR = sum(query(*term) for term in terms)
        out_BTHR = self.attend((q_BTHR, q_BTHP), (latent_BS1R, k_BS1P), latent_BS1R, ctx)

        def value(a_Rr: Any, s: Any, b_HCr: jax.Array) -> jax.Array:
            x = out_BTHR if a_Rr is None else (s * dot(out_BTHR, a_Rr)).astype(dtype)
            return _by_head("bthr,hcr->bthc", x, b_HCr[:, N:])

        return cast(jax.Array, sum(value(*term) for term in terms))

    def terms(self, ctx: Context, dtype: Any) -> list[tuple[Any, Any, jax.Array]]:
        """[(A [R, r], s, B [H, C, r])]: the matrix [Kₕ Vₕ] of each head is the sum of A·s·Bₕᵀ. The
        first is the kernel, whose A is the identity (None); the others are LoRA's."""
        terms: list[Any] = [(None, 1, by_outputs(self.kv_b.kernel.get_value(), dtype))]
        if (lora := self.kv_b.lora) is not None:
            factors, columns_O = lora.factors(self.kv_b.dense, ctx, ndim=4)
            terms += [(a, s, b.T) for a, s, b in factors]
            if columns_O is not None:
                terms = [(a, s, columns_O[:, None] * b) for a, s, b in terms]
        return [(a, s, b.reshape(self.cfg.num_heads, -1, b.shape[-1])) for a, s, b in terms]

    def attend(self, queries: Any, keys: Any, values: jax.Array, ctx: Context) -> jax.Array:
        """Attention of queries and keys that are given in two parts each."""
        return attention(
            jnp.concatenate(queries, -1),
            jnp.concatenate(keys, -1).swapaxes(1, 2),
            values.swapaxes(1, 2),
            ctx.segment_ids,
            ctx.key_segment_ids,
            ctx.positions,
            offset=ctx.offset,
            window=ctx.window,
            selected=ctx.selected,
            scale=self.scale,
            kernel=ctx.kernel,
        )


def _by_head(dims: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """A product for each head, accumulated in float32, in x's dtype."""
    w = operand(w.astype(x.dtype))
    return jnp.einsum(dims, operand(x), w, preferred_element_type=jnp.float32).astype(x.dtype)
