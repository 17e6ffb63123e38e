# SPDX-License-Identifier: Apache-2.0
"""The attention of a block: projections, rotary positions, cache.

Dims: B rows, T tokens, D model width, H heads, N key/value heads, K head_dim, V that of values.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.model.adapter import Adapter
from jaxllm.model.cache import Kept
from jaxllm.model.config import LayerKind, ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.layers import Linear, RMSNorm, fused, unit_rms
from jaxllm.model.rope import rotate
from jaxllm.ops.attention import attention


class Attention(nnx.Module):
    """Projections, optional norms, rotary positions, softmax attention.

    A layer that uses the keys and values of an earlier one has queries alone.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        path: str,
        kind: LayerKind,
        *,
        peft: Adapter,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        D, H, N, (K, V) = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.attention_dims
        # The unit in which a mesh axis divides these dims is a head.
        heads, kv_heads = ("heads", H), ("kv_heads", N)
        options: dict[str, Any] = dict(peft=peft, dtype=dtype, rngs=rngs)
        qkv = partial(Linear, cfg, bias=cfg.qkv_bias, **options)
        own_k = kind.uses is None
        own_v = own_k and not kind.values_from_keys
        # With a gate in q, a head's outputs of q are its query, then its gate.
        in_q = cfg.output_gate == "query"
        self.q = qkv(f"{path}.q", ("embed", heads), (D, H * K * (1 + in_q)))
        self.k = qkv(f"{path}.k", ("embed", kv_heads), (D, N * K)) if own_k else None
        self.v = qkv(f"{path}.v", ("embed", kv_heads), (D, N * V)) if own_v else None
        gates = {"feature": H * V, "head": H}.get(cfg.output_gate)
        gate = partial(Linear, cfg, f"{path}.gate", ("embed", heads), **options)
        self.gate = gate((D, gates)) if gates else None
        self.o = Linear(cfg, f"{path}.o", (heads, "embed"), (H * V, D), bias=cfg.o_bias, **options)
        outputs = H * K + N * (K + V)
        self.qkv = peft.linear(f"{path}.qkv", ("embed", "heads"), (D, outputs), rngs)
        if cfg.sinks:
            drawn = jax.random.normal(rngs.params(), (H,)) * cfg.initializer_range
            self.sinks = nnx.Param(drawn.astype(dtype), axes=(heads,))
        full, normed = cfg.qk_norm == "full", cfg.qk_norm not in ("none", "unit")
        norm = partial(RMSNorm, cfg, dtype=dtype)
        self.q_norm: Any = norm(H * K if full else K) if normed else None
        self.k_norm: Any = norm(N * K if full else K) if normed and own_k else None
        self.cfg, self.kind = cfg, kind

    def placed(self, y: jax.Array, norm: Any, ctx: Context) -> jax.Array:
        """Queries or keys [B, T, H or N, K], normed where the family does, at their positions."""
        cfg = self.cfg
        cos, sin, *_ = (table[ctx.rope] for table in ctx.rope_tables[cfg.head_dim])
        y = norm(y) if cfg.qk_norm == "head" else y
        y = rotate(y, cos, sin, cfg.rope_pairs)
        if cfg.qk_norm == "unit":
            rotated = jnp.asarray([rope.kind != "none" for rope in cfg.ropes])[ctx.rope]
            y = jnp.where(rotated, unit_rms(y, cfg.norm_eps), y)
        return norm(y) if cfg.qk_norm == "rotated" else y

    def clipped(self, y: jax.Array) -> jax.Array:
        limit = self.cfg.qkv_clip
        return jnp.clip(y, -limit, limit) if limit else y

    def queries(self, q: jax.Array, ctx: Context) -> tuple[jax.Array, ...]:
        """Queries [B, T, H, K], and what gates the output, where it is a part of q's."""
        cfg = self.cfg
        _, _, *scale = ctx.rope_tables[cfg.head_dim]
        q = self.clipped(self.q_norm(q) if cfg.qk_norm == "full" else q)
        q = q.reshape(*q.shape[:2], cfg.num_heads, -1)
        q, *gate = jnp.split(q, 2, -1) if cfg.output_gate == "query" else [q]
        q = self.placed(q, self.q_norm, ctx)
        q = q * scale[0][ctx.rope].astype(q.dtype) if scale else q
        return q, *gate

    def keys_and_values(self, k: jax.Array, v: jax.Array, ctx: Context) -> tuple[jax.Array, ...]:
        """[B, T, N, K] and [B, T, N, V]."""
        cfg = self.cfg
        k = self.k_norm(k) if cfg.qk_norm == "full" else k
        k, v = (self.clipped(y).reshape(*y.shape[:2], cfg.num_kv_heads, -1) for y in (k, v))
        v = v if cfg.value_scale == 1 else v * cfg.value_scale
        v = unit_rms(v, cfg.norm_eps) if cfg.value_norm else v
        return self.placed(k, self.k_norm, ctx), v

    def __call__(self, x_BTD: jax.Array, ctx: Context, past: Any) -> tuple[jax.Array, Any]:
        """(output [B, T, D], new past). past: a layer's LayerCache, its VirtualTokens, or None. The
        new one is a Kept where later layers use the keys and values too."""
        parts = tuple(part for part in (self.q, self.k, self.v) if part is not None)
        q, *own = fused(self.qkv, x_BTD, parts, ctx)
        q_BTHK, *gate = self.queries(q, ctx)
        if own:
            k_BTNK, v_BTNK = self.keys_and_values(own[0], own[-1], ctx)
            if past is not None:
                past, k_BTNK, v_BTNK = past.extend(k_BTNK, v_BTNK, ctx.offset)
        else:
            k_BTNK, v_BTNK = ctx.kept[self.kind.uses]
        if self.kind.keeps is not None:
            past = Kept(k_BTNK, v_BTNK, past)
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
        if self.gate is not None:
            gate = [self.gate(x_BTD, ctx).reshape(*out_BTHK.shape[:-1], -1)]
        if gate:
            out_BTHK = out_BTHK * jax.nn.sigmoid(gate[0])
        return self.o(out_BTHK.reshape(*x_BTD.shape[:2], -1), ctx), past
