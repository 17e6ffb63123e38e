# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention inside segments: one mask rule, one function.

Dims: B rows, T queries, S keys, H query heads, N key/value heads, G = H / N, K head_dim.
A query sees the keys at or before its own place that lie in its segment (and window).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.model.layers import product_batched

BLOCKS = 4  # query blocks of the training form: keys after a block are never touched


def visible(
    q_segments: jax.Array, k_segments: jax.Array, offset: jax.Array | int, window: int | None
) -> jax.Array:
    """bool [B, T, S]. Query t stands at place offset + t of the keys; segments must be equal."""
    q_place = offset + jnp.arange(q_segments.shape[1])[:, None]
    k_place = jnp.arange(k_segments.shape[1])[None, :]
    near = k_place <= q_place
    if window is not None:
        near &= q_place - k_place < window
    return near & (q_segments[:, :, None] == k_segments[:, None, :])


def attention(
    q_BTHK: jax.Array,
    k_BSNK: jax.Array,
    v_BSNK: jax.Array,
    q_segments: jax.Array,
    k_segments: jax.Array,
    *,
    offset: jax.Array | int = 0,
    window: int | None = None,
    softcap: float = 0.0,
    scale: float,
) -> jax.Array:
    """softmax(scale q·k) v -> [B, T, H, K] in q's dtype; scores and softmax in float32.

    With keys and queries of the same row (offset 0, T == S) the queries go block by block over the
    keys up to their own block only, which leaves out most of what the causal mask would hide.
    """
    B, T, H, K = q_BTHK.shape
    S, N = k_BSNK.shape[1:3]
    # One batched product a block: the queries of a group lie one after another.
    q = q_BTHK.reshape(B, T, N, H // N, K).transpose(0, 2, 3, 1, 4) * jnp.asarray(
        scale, q_BTHK.dtype
    )
    k, v = k_BSNK.transpose(0, 2, 1, 3), v_BSNK.transpose(0, 2, 1, 3)
    causal = isinstance(offset, int) and offset == 0 and T == S and T % BLOCKS == 0 and T >= 128
    size = T // BLOCKS if causal else T
    outputs = []
    for start in range(0, T, size):
        last = start + size if causal else S
        first = 0 if window is None or not causal else max(0, start - window + 1)
        mask = visible(
            q_segments[:, start : start + size],
            k_segments[:, first:last],
            offset + start - first,
            window,
        )
        outputs.append(
            _block(
                q[:, :, :, start : start + size],
                k[:, :, first:last],
                v[:, :, first:last],
                mask,
                softcap,
            )
        )
    out = jnp.concatenate(outputs, 3) if len(outputs) > 1 else outputs[0]
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def _block(q_BNGTK, k_BNSK, v_BNSK, mask_BTS, softcap: float) -> jax.Array:
    B, N, G, T, K = q_BNGTK.shape
    S = k_BNSK.shape[2]
    scores = product_batched(q_BNGTK.reshape(B, N, G * T, K), k_BNSK, 3).reshape(B, N, G, T, S)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask_BTS[:, None, None], scores, -1e30)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_BNSK.dtype)
    out = product_batched(probs.reshape(B, N, G * T, S), v_BNSK, 2).astype(v_BNSK.dtype)
    return out.reshape(B, N, G, T, K)
