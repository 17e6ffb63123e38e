# SPDX-License-Identifier: Apache-2.0
"""The decoder: embed, L blocks under one scan, final norm, head.

Dims: B rows, T tokens, D model width, H heads, N key/value heads, K head_dim, L layers, V tokens of
the vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.mesh import constrain, gathered
from jaxllm.model.attention import attention
from jaxllm.model.cache import Cache
from jaxllm.model.config import LayerKind, ModelConfig
from jaxllm.model.layers import MLP, Embed, Linear, RMSNorm, product, rope_table, rotate, softcapped

# What the backward pass may keep; it recomputes the rest of each layer.
REMAT: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("dot"),
    "names": jax.checkpoint_policies.save_only_these_names("attention"),
}

HEAD_AXES = ("embed", "vocab")


class Attention(nnx.Module):
    """Projections, optional q/k norms, rotary positions, softmax attention."""

    def __init__(self, cfg: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        D, Q, KV = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        keys: dict[str, Any] = dict(bias=cfg.qkv_bias, dtype=dtype, rngs=rngs)
        self.q = Linear(cfg, ("embed", "heads"), (D, Q), **keys)
        self.k = Linear(cfg, ("embed", "kv_heads"), (D, KV), **keys)
        self.v = Linear(cfg, ("embed", "kv_heads"), (D, KV), **keys)
        self.o = Linear(cfg, ("heads", "embed"), (Q, D), bias=cfg.o_bias, dtype=dtype, rngs=rngs)
        if cfg.qk_norm != "none":
            full = cfg.qk_norm == "full"
            self.q_norm = RMSNorm(cfg, Q if full else cfg.head_dim, dtype=dtype)
            self.k_norm = RMSNorm(cfg, KV if full else cfg.head_dim, dtype=dtype)
        self.cfg = cfg

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, T, H, K], k and v [B, T, N, K], normalised where the family does."""
        cfg = self.cfg
        q, k, v = self.q(x), self.k(x), self.v(x)
        if cfg.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(*y.shape[:2], -1, cfg.head_dim) for y in (q, k, v))
        if cfg.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def __call__(self, x: jax.Array, at: Any, kind: jax.Array, kv: Any) -> tuple[jax.Array, Any]:
        """x [B, T, D]; `at` tells where the tokens stand; kv is the layer's cache."""
        cfg = self.cfg
        q, k, v = self.heads(x)

        def mix(layer: LayerKind, q, k, v, kv):
            table = None if layer.rope is None else at["ropes"][layer.rope]
            q, k = rotate(q, table), rotate(k, table)
            if kv is not None:
                start = (0, at["offset"], 0, 0)
                k = lax.dynamic_update_slice(kv[0], k.astype(kv[0].dtype), start)
                v = lax.dynamic_update_slice(kv[1], v.astype(kv[1].dtype), start)
            out = attention(
                q,
                k,
                v,
                at["segments"],
                at["key_segments"],
                offset=at["offset"],
                window=layer.window,
                softcap=cfg.attention_softcap,
                scale=cfg.query_scale or cfg.head_dim**-0.5,
            )
            return out, None if kv is None else (k, v)

        forms = [partial(mix, layer) for layer in cfg.kinds]
        if len(forms) == 1:
            out, kv = forms[0](q, k, v, kv)
        else:
            out, kv = lax.switch(kind, forms, q, k, v, kv)
        return self.o(out.reshape(*out.shape[:2], -1)), kv


class Block(nnx.Module):
    """x + attention, x + MLP, with norms before, after, or on both sides of each."""

    def __init__(self, cfg: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        norm = partial(RMSNorm, cfg, cfg.hidden_size, dtype=dtype)
        before = cfg.norm_placement in ("pre", "sandwich")
        after = cfg.norm_placement in ("post", "sandwich")
        self.attn = Attention(cfg, dtype=dtype, rngs=rngs)
        self.mlp = MLP(cfg, dtype=dtype, rngs=rngs)
        self.attn_norm = norm() if before else None
        self.attn_post_norm = norm() if after else None
        self.mlp_norm = norm() if before else None
        self.mlp_post_norm = norm() if after else None

    def __call__(self, x: jax.Array, at: Any, kind: jax.Array, kv: Any) -> tuple[jax.Array, Any]:
        h, kv = self.attn(x if self.attn_norm is None else self.attn_norm(x), at, kind, kv)
        x = x + (h if self.attn_post_norm is None else self.attn_post_norm(h))
        h = self.mlp(x if self.mlp_norm is None else self.mlp_norm(x))
        x = x + (h if self.mlp_post_norm is None else self.mlp_post_norm(h))
        return constrain(x, "batch", "length", "features"), kv


class Decoder(nnx.Module):
    """A causal language model: `model(tokens) -> logits`.

    Args:
      cfg: its shape.
      rngs: `params` stream for the random weights.
      dtype: of the weights. compute_dtype: of activations and products (default: the weights').
      remat: none | full | dots | names, what a layer's backward pass recomputes.
      scan_unroll: layers in one iteration of the scan.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        compute_dtype: Any = None,
        remat: str = "none",
        scan_unroll: int = 1,
    ):
        @nnx.split_rngs(splits=cfg.num_layers)
        @partial(nnx.vmap, in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(cfg, dtype=dtype, rngs=rngs)

        self.cfg = cfg
        self.hf_config = ""  # the config.json it was made from, as text
        self.compute_dtype = jnp.dtype(compute_dtype or dtype)
        self.remat, self.scan_unroll = remat, scan_unroll
        self.embed = Embed(cfg, dtype=dtype, rngs=rngs)
        self.layers = stack(rngs)
        self.norm = RMSNorm(cfg, cfg.hidden_size, dtype=dtype)
        head_shape = (cfg.hidden_size, cfg.vocab_size)
        self.head = (
            None
            if cfg.tie_embeddings
            else Linear(cfg, HEAD_AXES, head_shape, dtype=dtype, rngs=rngs)
        )

    def hidden(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Last hidden states after the final norm, [B, T, D] in compute_dtype.

        tokens, segment_ids (default: one segment, no padding) and positions (default: 0, 1, …) are
        int32 [B, T]. With a cache the tokens are written into its next slots and attend to what it
        holds; returns (hidden, cache) then.
        """
        cfg = self.cfg
        B, T = tokens.shape
        segments = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
        offset: Any = 0
        keys, slots = segments, T
        if cache is not None:
            offset, slots = cache.length, cache.k.shape[2]
            keys = lax.dynamic_update_slice(cache.segments, segments, (0, offset))
        if positions is None:
            positions = jnp.broadcast_to(offset + jnp.arange(T), (B, T))
        ropes = [rope_table(r, cfg.head_dim, positions, slots) for r in cfg.ropes]
        at = {"segments": segments, "key_segments": keys, "ropes": ropes}

        graph, stacked = nnx.split(self.layers)

        def body(x, scanned):
            params, kind, kv = scanned
            block = nnx.merge(graph, params)
            return block(x, at | {"offset": offset}, kind, kv)

        if self.remat != "none" and cache is None:
            body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=False)
        x = self.embed(tokens, self.compute_dtype)
        if cfg.embed_scale != 1.0:
            x = x * jnp.asarray(cfg.embed_scale, x.dtype)
        kinds = jnp.asarray(cfg.layer_kinds or (0,) * cfg.num_layers, jnp.int32)
        kv = None if cache is None else (cache.k, cache.v)
        x, kv = lax.scan(body, x, (stacked, kinds, kv), unroll=self.scan_unroll)
        x = self.norm(x)
        if cache is None:
            return x
        return x, Cache(kv[0], kv[1], keys, offset + T)

    def head_kernel(self) -> jax.Array:
        """[D, V], the transposed token table when tied; float32 or bfloat16 as stored."""
        return self.embed.embedding[...].T if self.head is None else self.head.kernel[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V], soft-capped where the family does; not rounded before."""
        w = gathered(self.head_kernel().astype(hidden.dtype), HEAD_AXES)
        raw = product(hidden, w, (hidden.ndim - 1, 0), jnp.float32)
        return softcapped(raw, self.cfg.logit_softcap)

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the next token, float32 [B, T, V]."""
        return self.logits(self.hidden(tokens, segment_ids, positions))


def merge(graph: Any, trainable: Any, frozen: Any) -> Any:
    """The model whose weights are the leaves of two nested dicts."""
    state = nnx.State({})
    for part in (frozen, trainable):
        state = nnx.merge_state(state, nnx.State(part))
    return nnx.merge(graph, state)
