# SPDX-License-Identifier: Apache-2.0
"""The attention of a block: projections, rotary positions, cache.

Dims: B rows, T tokens, D model width, H heads, N key/value heads, K head_dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.model.adapter import Adapter
from jaxllm.model.config import ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.layers import Linear, RMSNorm, fused, unit_rms
from jaxllm.model.rope import rotate
from jaxllm.ops.attention import attention


class Attention(nnx.Module):
    """Projections, optional q/k norms, rotary positions, softmax attention."""

    def __init__(self, cfg: ModelConfig, path: str, *, peft: Adapter, dtype: Any, rngs: nnx.Rngs):
        D, Q, KV = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        # The unit in which a mesh axis divides these dims is a head.
        heads, kv_heads = ("heads", cfg.num_heads), ("kv_heads", cfg.num_kv_heads)
        options: dict[str, Any] = dict(peft=peft, dtype=dtype, rngs=rngs)
        qkv = partial(Linear, cfg, bias=cfg.qkv_bias, **options)
        # With an output gate, a head's outputs of q are its query, then its gate.
        self.q = qkv(f"{path}.q", ("embed", heads), (D, Q * (1 + cfg.output_gate)))
        self.k = qkv(f"{path}.k", ("embed", kv_heads), (D, KV))
        self.v = qkv(f"{path}.v", ("embed", kv_heads), (D, KV))
        self.o = Linear(cfg, f"{path}.o", (heads, "embed"), (Q, D), bias=cfg.o_bias, **options)
        self.qkv = peft.linear(f"{path}.qkv", ("embed", "heads"), (D, Q + 2 * KV), rngs)
        if cfg.sinks:
            drawn = jax.random.normal(rngs.params(), (cfg.num_heads,)) * cfg.initializer_range
            self.sinks = nnx.Param(drawn.astype(dtype), axes=(heads,))
        if cfg.qk_norm not in ("none", "unit"):
            full = cfg.qk_norm == "full"
            self.q_norm = RMSNorm(cfg, Q if full else cfg.head_dim, dtype=dtype)
            self.k_norm = RMSNorm(cfg, KV if full else cfg.head_dim, dtype=dtype)
        self.cfg = cfg

    def project(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, ...]:
        """Queries [B, T, H, K], keys and values [B, T, N, K], before the rotary positions; and what
        gates the output [B, T, H, K], where the family does."""
        cfg = self.cfg
        q, k, v = fused(self.qkv, x_BTD, (self.q, self.k, self.v), ctx)
        if cfg.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.reshape(*q.shape[:2], cfg.num_heads, -1)
        k, v = (y.reshape(*y.shape[:2], -1, cfg.head_dim) for y in (k, v))
        q, *gate = jnp.split(q, 2, -1) if cfg.output_gate else [q]
        if cfg.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v, *gate

    def __call__(self, x_BTD: jax.Array, ctx: Context, past: Any) -> tuple[jax.Array, Any]:
        """(output [B, T, D], new past). past: a layer's LayerCache, its VirtualTokens, or None."""
        q_BTHK, k_BTNK, v_BTNK, *gate = self.project(x_BTD, ctx)
        cos, sin, *scale = [x[ctx.rope] for x in ctx.rope_tables]
        pairs = self.cfg.rope_pairs
        q_BTHK, k_BTNK = rotate(q_BTHK, cos, sin, pairs), rotate(k_BTNK, cos, sin, pairs)
        if self.cfg.qk_norm == "rotated":
            q_BTHK, k_BTNK = self.q_norm(q_BTHK), self.k_norm(k_BTNK)
        if self.cfg.qk_norm == "unit":
            rotated = jnp.asarray([rope.kind != "none" for rope in self.cfg.ropes])[ctx.rope]
            q_BTHK, k_BTNK = (
                jnp.where(rotated, unit_rms(y, self.cfg.norm_eps), y) for y in (q_BTHK, k_BTNK)
            )
        if scale:
            q_BTHK = q_BTHK * scale[0].astype(q_BTHK.dtype)
        if past is not None:
            past, k_BTNK, v_BTNK = past.extend(k_BTNK, v_BTNK, ctx.offset)
        out_BTHK = attention(
            q_BTHK,
            k_BTNK.swapaxes(1, 2),
            v_BTNK.swapaxes(1, 2),
            ctx.segment_ids,
            ctx.key_segment_ids,
            ctx.positions,
            offset=ctx.offset,
            window=ctx.window,
            chunked=self.cfg.chunked,
            softcap=self.cfg.attention_softcap,
            scale=self.cfg.query_scale or self.cfg.head_dim**-0.5,
            sinks=self.sinks[...] if self.cfg.sinks else None,
            kernel=ctx.kernel,
        )
        if gate:
            out_BTHK = out_BTHK * jax.nn.sigmoid(gate[0])
        return self.o(out_BTHK.reshape(*x_BTD.shape[:2], -1), ctx), past
