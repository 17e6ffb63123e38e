# SPDX-License-Identifier: Apache-2.0
"""Attention of a block: projections, rotary positions, cache.

Dims: B rows, T tokens, D model width, H heads, N key/value heads, K head_dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.model.adapter import Adapter
from jaxllm.model.cache import written
from jaxllm.model.config import LayerKind, ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.layers import Linear, RMSNorm, fused
from jaxllm.model.rope import rotate
from jaxllm.ops.attention import attention


class Attention(nnx.Module):
    """Projections, optional q/k norms, rotary positions, softmax attention."""

    def __init__(self, cfg: ModelConfig, *, peft: Adapter, dtype: Any, rngs: nnx.Rngs):
        D, Q, KV = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        keys: dict[str, Any] = dict(peft=peft, dtype=dtype, rngs=rngs)
        heads, kv_heads = ("heads", cfg.num_heads), ("kv_heads", cfg.num_kv_heads)
        inner = partial(Linear, cfg, bias=cfg.qkv_bias, **keys)
        self.q = inner("layers.attn.q", ("embed", heads), (D, Q))
        self.k = inner("layers.attn.k", ("embed", kv_heads), (D, KV))
        self.v = inner("layers.attn.v", ("embed", kv_heads), (D, KV))
        self.o = Linear(cfg, "layers.attn.o", (heads, "embed"), (Q, D), bias=cfg.o_bias, **keys)
        self.qkv = peft.linear("layers.attn.qkv", ("embed", "heads"), (D, Q + 2 * KV), rngs)
        if cfg.qk_norm != "none":
            full = cfg.qk_norm == "full"
            self.q_norm = RMSNorm(cfg, Q if full else cfg.head_dim, dtype=dtype)
            self.k_norm = RMSNorm(cfg, KV if full else cfg.head_dim, dtype=dtype)
        self.cfg = cfg

    def heads(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, T, H, K], k and v [B, T, N, K], normalised where the family does."""
        cfg = self.cfg
        q, k, v = fused(self.qkv, x, (self.q, self.k, self.v), ctx)
        if cfg.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(*y.shape[:2], -1, cfg.head_dim) for y in (q, k, v))
        if cfg.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def __call__(
        self, x: jax.Array, ctx: Context, kind: Any, kv: Any, prefix: bool
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D]; kv is the layer's cache or, with `prefix`, the keys and values of the virtual
        tokens before each text, [1, P, N, K]."""
        cfg = self.cfg
        q, k, v = self.heads(x, ctx)

        def mix(layer: LayerKind, q, k, v, kv):
            table = None if layer.rope is None else ctx.rope_tables[layer.rope]
            q, k = rotate(q, table), rotate(k, table)
            if kv is not None and prefix:
                k, v = (
                    jnp.concatenate([jnp.broadcast_to(p, (y.shape[0], *p.shape[1:])), y], 1)
                    for p, y in zip(kv, (k, v), strict=True)
                )
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
            segments, offset = ctx.key_segment_ids, ctx.offset
            if kv is not None and not prefix:
                kv = written(kv, k, v, offset)
                k, v = kv[0].swapaxes(2, 3), kv[1]
                if isinstance(offset, int):  # how much is held is known: empty slots are left out
                    held = offset + q.shape[1]
                    k, v = (x[:, :, :held].astype(q.dtype) for x in (k, v))
                    segments = segments[:, :held]
            out = attention(
                q,
                k,
                v,
                ctx.segment_ids,
                None if kv is None else segments,
                ctx.positions,
                offset=offset,
                window=layer.window,
                softcap=cfg.attention_softcap,
                scale=cfg.query_scale or cfg.head_dim**-0.5,
            )
            return out, None if prefix else kv

        forms = [partial(mix, layer) for layer in cfg.kinds]
        if isinstance(kind, int) or len(forms) == 1:
            out, kv = forms[kind if isinstance(kind, int) else 0](q, k, v, kv)
        else:
            out, kv = lax.switch(kind, forms, q, k, v, kv)
        return self.o(out.reshape(*out.shape[:2], -1), ctx), kv
