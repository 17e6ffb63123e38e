# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention inside segments: one mask rule, one function.

Dims: B rows, T queries, S keys, H query heads, N key/value heads, G = H / N, K head_dim.
A query sees the keys at or before its own place that lie in its segment (and window).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxllm.model import kernels
from jaxllm.model.layers import softcapped

EVERYWHERE = -1  # the segment of keys that every query sees: a prefix before each text
BLOCKS = 4  # query blocks of a whole row: keys after a block are never touched
# What a whole row of bfloat16 goes through on a GPU: xla, which is the code below, a kernel of
# kernels.py, or the best of them. benchmarks/gpu.py measures them.
GPU_KERNEL = "best"


def visible(
    q_segments: jax.Array,
    k_segments: jax.Array,
    q_positions: jax.Array,
    offset: jax.Array | int,
    window: int | None,
) -> jax.Array:
    """bool [B, T, S]. Query t stands at place offset + t of the keys; segments must be equal.

    Keys of the segment EVERYWHERE stand at the first places of the keys and of each text alike, so
    their distance is counted from the query's position in its text.
    """
    q_place = offset + jnp.arange(q_segments.shape[1])[:, None]
    k_place = jnp.arange(k_segments.shape[1])[None, :]
    everywhere = (k_segments == EVERYWHERE)[:, None, :]
    same = (q_segments[:, :, None] == k_segments[:, None, :]) & (k_place <= q_place)
    if window is not None:
        same &= q_place - k_place < window
        everywhere &= q_positions[:, :, None] - k_place < window
    return same | everywhere


def attention(
    q_BTHK: jax.Array,
    k_BNSK: jax.Array,
    v_BNSK: jax.Array,
    q_segments: jax.Array,
    k_segments: jax.Array,
    q_positions: jax.Array,
    *,
    offset: jax.Array | int = 0,
    window: int | None = None,
    softcap: float = 0.0,
    scale: float,
) -> jax.Array:
    """softmax(scale q·k) v -> [B, T, H, K] in q's dtype; scores and softmax in float32.

    Keys and values come in the products' own order, which a cache keeps; where it is wider than q,
    the products are of its dtype.

    Segments are int32 [B, T] and [B, S], positions int32 [B, T]. The backward pass recomputes the
    scores from the log-sum-exp of the forward pass (arXiv:2205.14135), so none are stored.
    """
    whole = isinstance(offset, int) and offset == 0 and q_BTHK.shape[1] == k_BNSK.shape[2]
    plain = partial(
        _plain,
        *(q_BTHK, k_BNSK, v_BNSK, q_segments, k_segments, q_positions),
        offset=offset,
        window=window,
        softcap=softcap,
        scale=scale,
    )
    kernel = kernels.best() if GPU_KERNEL == "best" else GPU_KERNEL
    if not (kernel != "xla" and jax.default_backend() == "gpu" and whole):
        return plain()
    if q_BTHK.dtype != jnp.bfloat16 or jax.sharding.get_abstract_mesh().size > 1:
        return plain()
    out = kernels.attend(
        kernel,
        *(q_BTHK, k_BNSK.swapaxes(1, 2), v_BNSK.swapaxes(1, 2), q_segments),
        scale=scale,
        window=window,
        softcap=softcap,
    )
    return checkpoint_name(out, "attention")


def _plain(
    q_BTHK, k_BNSK, v_BNSK, q_segments, k_segments, q_positions, *, offset, window, softcap, scale
) -> jax.Array:
    """`attention` in XLA's own operations."""
    B, T, H, K = q_BTHK.shape
    N = k_BNSK.shape[1]
    q = (q_BTHK * jnp.asarray(scale, q_BTHK.dtype)).reshape(B, T, N, H // N, K)
    q = q.transpose(0, 2, 3, 1, 4).astype(k_BNSK.dtype)
    at = (q_segments, k_segments, q_positions, jnp.asarray(offset))
    lead = offset if isinstance(offset, int) else None
    out: Any = _attend(q, k_BNSK, v_BNSK, at, window, softcap, lead)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K).astype(q_BTHK.dtype)


def _blocks(
    q: jax.Array, k: jax.Array, window: int | None, lead: int | None
) -> Iterator[tuple[slice, slice]]:
    """(queries, keys) that are looked at together. A whole row goes block by block, over the keys
    up to its own block and inside the window alone: the mask would hide the rest. `lead`: how many
    keys stand before the row's own, None where that is not known (a cache)."""
    T, S = q.shape[3], k.shape[2]
    size = T // BLOCKS if lead is not None and T + lead == S and T % BLOCKS == 0 and T >= 128 else T
    for start in range(0, T, size):
        if size == T:
            yield slice(0, T), slice(0, S)
        else:
            first = 0 if window is None or lead else max(0, start - window + 1)
            yield slice(start, start + size), slice(first, (lead or 0) + start + size)


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Batched over [B, N], float32 out of operands of any dtype."""
    dims = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _scores(q_BNGTK, k_BNSK, at: Any, queries: slice, keys: slice, window, softcap) -> jax.Array:
    """float32 [B, N, G, T, S] of one block, soft-capped; -1e30 where a query must not look."""
    q_segments, k_segments, q_positions, offset = at
    B, N, G, T, K = q_BNGTK.shape
    scores = _product(q_BNGTK.reshape(B, N, G * T, K), k_BNSK, (3, 3)).reshape(B, N, G, T, -1)
    scores = softcapped(scores, softcap)
    shift = offset + queries.start - keys.start
    segments = q_segments[:, queries], k_segments[:, keys]
    mask = visible(*segments, q_positions[:, queries], shift, window)
    return jnp.where(mask[:, None, None], scores, -1e30)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, at, window, softcap, lead) -> Any:
    """q [B, N, G, T, K] (scaled), k and v [B, N, S, K] -> [B, N, G, T, K]; `at` as in _scores."""
    return _forward(q, k, v, at, window, softcap, lead)[0]


def _forward(q, k, v, at, window: int | None, softcap: float, lead: int | None):
    B, N, G, T, K = q.shape
    outs, sums = [], []
    for queries, keys in _blocks(q, k, window, lead):
        scores = _scores(q[:, :, :, queries], k[:, :, keys], at, queries, keys, window, softcap)
        top = jnp.max(scores, -1, keepdims=True)
        probs = jnp.exp(scores - top)
        total = jnp.sum(probs, -1, keepdims=True)
        rows = probs.astype(v.dtype).reshape(B, N, -1, probs.shape[-1])
        mixed = _product(rows, v[:, :, keys], (3, 2)).reshape(*probs.shape[:-1], K)
        outs.append((mixed / total).astype(v.dtype))
        sums.append((jnp.log(total) + top)[..., 0])
    out = checkpoint_name(jnp.concatenate(outs, 3), "attention")
    lse = checkpoint_name(jnp.concatenate(sums, 3), "attention")
    return out, (q, k, v, at, out, lse)


def _backward(window: int | None, softcap: float, lead: int | None, saved, g):
    q, k, v, at, out, lse = saved
    B, N, G, T, K = q.shape
    g = g.astype(v.dtype)
    inner = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    dqs = []
    dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape(B, N, -1, x.shape[-1])

    for queries, keys in _blocks(q, k, window, lead):
        qb, gb = q[:, :, :, queries], g[:, :, :, queries]
        scores = _scores(qb, k[:, :, keys], at, queries, keys, window, softcap)
        probs = jnp.exp(scores - lse[:, :, :, queries, None])
        slope = _product(rows(gb), v[:, :, keys], (3, 3)).reshape(probs.shape)
        slope = probs * (slope - inner[:, :, :, queries])
        if softcap:
            slope = slope * (1.0 - jnp.square(jnp.where(scores > -1e29, scores, 0.0) / softcap))
        slope = rows(slope.astype(q.dtype))
        dqs.append(_product(slope, k[:, :, keys], (3, 2)).reshape(qb.shape).astype(q.dtype))
        dk = dk.at[:, :, keys].add(_product(slope, rows(qb), (2, 2)))
        dv = dv.at[:, :, keys].add(_product(rows(probs.astype(v.dtype)), rows(gb), (2, 2)))
    return jnp.concatenate(dqs, 3), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
