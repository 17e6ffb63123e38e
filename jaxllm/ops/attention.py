# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention inside segments: one mask rule, one function.

Dims: B rows, T queries, S keys, H query heads, N key/value heads, G = H / N, K head_dim.
A query sees the keys at or before its own place that lie in its segment (and window).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.mesh import platform
from jaxllm.ops import attention_gpu as kernels
from jaxllm.ops.matmul import softcapped
from jaxllm.ops.residuals import kept, named

EVERYWHERE = -1  # the segment of keys that every query sees: a prefix before each text
# A whole row goes by blocks of so many tokens. Pairs of blocks that see nothing of each other are
# left out: those after another, those of other texts and those outside the window.
BLOCK, GPU_BLOCK = 128, 512  # on a CPU; on accelerators
MOST_BLOCKS = 64  # of a row; in longer ones they are larger
NOWHERE = -2  # the segment of what fills the last block of a row
# What a whole row of bfloat16 goes through on a GPU: xla, which is the code below, a kernel of
# kernels.py, or the best of them. benchmarks/gpu.py measures them.
GPU_KERNEL = "best"


def visible(
    q_segments: jax.Array,
    k_segments: jax.Array,
    q_positions: jax.Array,
    q_places: jax.Array,
    k_places: jax.Array,
    window: int | None,
) -> jax.Array:
    """bool [B, T, S]. Places are int32 [T] and [S], counted among the keys; segments must be equal.

    Keys of the segment EVERYWHERE stand at the first places of the keys and of each text alike, so
    their distance is counted from the query's position in its text.
    """
    everywhere = (k_segments == EVERYWHERE)[:, None, :]
    same = (q_segments[:, :, None] == k_segments[:, None, :]) & (k_places <= q_places[:, None])
    if window is not None:
        same &= q_places[:, None] - k_places < window
        everywhere &= q_positions[:, :, None] - k_places < window
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
    own = q_segments is k_segments  # neither a cache nor a prefix stands before the row
    plain = partial(
        _plain,
        *(q_BTHK, k_BNSK, v_BNSK, q_segments, k_segments, q_positions),
        offset=offset,
        window=window,
        softcap=softcap,
        scale=scale,
    )
    kernel = kernels.best() if GPU_KERNEL == "best" else GPU_KERNEL
    if not (kernel != "xla" and platform() == "gpu" and own):
        return plain()
    if q_BTHK.dtype != jnp.bfloat16 or jax.sharding.get_abstract_mesh().size > 1:
        return plain()
    if kernel == "triton" and softcap:
        return plain()
    out = kernels.attend(
        kernel,
        *(q_BTHK, k_BNSK.swapaxes(1, 2), v_BNSK.swapaxes(1, 2), q_segments),
        scale=scale,
        window=window,
        softcap=softcap,
    )
    return kept(out, "attention")


def _plain(
    q_BTHK, k_BNSK, v_BNSK, q_segments, k_segments, q_positions, *, offset, window, softcap, scale
) -> jax.Array:
    """`attention` in XLA's own operations: a whole row (and what is known to stand before it) block
    by block, else all at once."""
    B, T, H, K = q_BTHK.shape
    N, S = k_BNSK.shape[1:3]
    size = _block_size(T) if isinstance(offset, int) and T + offset == S else T
    front = -offset % size if size < T else 0  # so that blocks of keys begin where the row does
    queries = partial(_split, size=size)
    keys = partial(_split, size=size if size < T else S, front=front)
    q = (
        queries(q_BTHK.astype(k_BNSK.dtype), 1)
        .reshape(-1, B, size, N, H // N, K)
        .transpose(0, 1, 3, 4, 2, 5)
    )
    k, v = keys(k_BNSK, 2), keys(v_BNSK, 2)
    at = (
        queries(q_segments, 1, fill=NOWHERE),
        keys(k_segments, 1, fill=NOWHERE),
        queries(q_positions, 1),
        (jnp.asarray(offset), jnp.asarray(-front)),
    )
    out: Any = _attend(q, k, v, at, scale, window, softcap)  # [n, B, N, G, size, K]
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, H, K)[:, :T]
    return out.astype(q_BTHK.dtype)


def _block_size(length: int) -> int:
    """Tokens in a block of a row of `length`."""
    size = BLOCK if platform() == "cpu" else GPU_BLOCK
    while length > MOST_BLOCKS * size:
        size *= 2
    return min(size, length)


def _split(x: jax.Array, axis: int, size: int, front: int = 0, fill: int = 0) -> jax.Array:
    """[..., T, ...] -> [n, ..., size, ...], the axis in blocks: `front` times `fill` before it, and
    as many after it as the last block lacks."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (front, -(x.shape[axis] + front) % size)
    x = jnp.pad(x, pad, constant_values=fill)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Batched over [B, N], float32 out of operands of any dtype."""
    dims = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _pairs(at: Any, window: int | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(blocks of queries, blocks of keys, how many pairs of them count): those in which some query
    of some row may see a key come first."""
    q_segments, k_segments, _, (first_query, first_key) = at
    (count, _, size), of_keys = q_segments.shape, len(k_segments)
    i, j = np.tril_indices(count, of_keys - count, of_keys)

    def ends(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Lowest and highest id of each block and row, [n, B]; padding as the highest."""
        padding = (segments == 0) | (segments == NOWHERE)
        ids = jnp.where(padding, jnp.iinfo(jnp.int32).max, segments)
        return ids.min(-1), ids.max(-1)

    (q_low, q_high), (k_low, k_high) = ends(q_segments), ends(k_segments)
    seen = ((q_low[i] <= k_high[j]) & (k_low[j] <= q_high[i])).any(-1)
    if window is not None:
        seen &= first_query + i * size - (first_key + j * size + size - 1) < window
    seen |= (k_segments == EVERYWHERE).any((1, 2))[j]
    order = jnp.argsort(~seen, stable=True)
    return jnp.asarray(i)[order], jnp.asarray(j)[order], jnp.sum(seen)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, at, scale: float, window: int | None, softcap: float) -> Any:
    """q [n, B, N, G, T, K], k and v [m, B, N, S, K] in blocks -> as q.

    at: segments of queries [n, B, T] and keys [m, B, S], positions [n, B, T], and the places of the
    first query and the first key.
    """
    return _forward(q, k, v, at, scale, window, softcap)[0]


def _slot(x: jax.Array, i: Any) -> jax.Array:
    return lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _scores(q, k, at: Any, i: Any, j: Any, scale, window, softcap: float) -> jax.Array:
    """float32 [B, N, G, T, S] of two blocks, scaled in float32 (a bfloat16 scale or product would
    be off by up to 0.4 %) and soft-capped; -1e30 where a query must not look."""
    q_segments, k_segments, q_positions, (first_query, first_key) = at
    (_, B, N, G, T, K), S = q.shape, k.shape[3]
    scores = _product(_slot(q, i).reshape(B, N, G * T, K), _slot(k, j), (3, 3))
    scores = softcapped(scale * scores.reshape(B, N, G, T, S), softcap)
    segments = _slot(q_segments, i), _slot(k_segments, j)
    places = first_query + i * T + jnp.arange(T), first_key + j * S + jnp.arange(S)
    mask = visible(*segments, _slot(q_positions, i), *places, window)
    return jnp.where(mask[:, None, None], scores, -1e30)


def _over_pairs(visit: Any, sums: Any, at: Any, window: int | None) -> Any:
    """sums = visit(i, j, sums) for each pair of blocks that counts."""
    q_blocks, k_blocks, count = _pairs(at, window)
    return lax.fori_loop(0, count, lambda n, sums: visit(q_blocks[n], k_blocks[n], sums), sums)


def _forward(q, k, v, at, scale: float, window: int | None, softcap: float):
    n, B, N, G, T, K = q.shape

    def look(i: Any, j: Any) -> tuple[jax.Array, ...]:
        """Of a pair: the highest score, Σ exp(score - it), Σ exp(score - it) v."""
        scores = _scores(q, k, at, i, j, scale, window, softcap)
        top = jnp.max(scores, -1, keepdims=True)
        probs = jnp.exp(scores - top)
        total = jnp.sum(probs, -1, keepdims=True)
        mixed = _product(probs.astype(v.dtype).reshape(B, N, G * T, -1), _slot(v, j), (3, 2))
        return top, total, mixed.reshape(B, N, G, T, K)

    def visit(i: Any, j: Any, sums: Any) -> Any:
        before, found = [_slot(x, i) for x in sums], look(i, j)
        top = jnp.maximum(before[0], found[0])
        parts = [(jnp.exp(x[0] - top), x) for x in (before, found)]
        total, mixed = (sum(scale * x[part] for scale, x in parts) for part in (1, 2))
        now = zip(sums, (top, total, mixed), strict=True)
        return tuple(lax.dynamic_update_index_in_dim(x, y, i, 0) for x, y in now)

    if n == len(k) == 1:
        top, total, mixed = (x[None] for x in look(0, 0))
    else:
        zeros = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
        start = (zeros - 1e30, zeros, jnp.zeros(q.shape, jnp.float32))
        top, total, mixed = _over_pairs(visit, start, at, window)
    out = named((mixed / total).astype(v.dtype), "attention")
    lse = named((jnp.log(total) + top)[..., 0], "attention")
    return out, (q, k, v, at, out, lse)


def _backward(scale: float, window: int | None, softcap: float, saved, g):
    q, k, v, at, out, lse = saved
    n, B, N, G, T, K = q.shape
    g = g.astype(v.dtype)
    inner = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1)

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape(B, N, G * T, x.shape[-1])

    def visit(i: Any, j: Any, sums: Any) -> Any:
        scores = _scores(q, k, at, i, j, scale, window, softcap)
        probs = jnp.exp(scores - _slot(lse, i)[..., None])
        slope = _product(rows(_slot(g, i)), _slot(v, j), (3, 3)).reshape(probs.shape)
        slope = probs * (slope - _slot(inner, i)[..., None])
        if softcap:
            slope = slope * (1.0 - jnp.square(jnp.where(scores > -1e29, scores, 0.0) / softcap))
        slope = rows((scale * slope).astype(q.dtype))
        dq = _product(slope, _slot(k, j), (3, 2)).reshape(B, N, G, T, K)
        dk = _product(slope, rows(_slot(q, i)), (2, 2))
        dv = _product(rows(probs.astype(v.dtype)), rows(_slot(g, i)), (2, 2))
        each = zip(sums, (dq, dk, dv), (i, j, j), strict=True)
        return tuple(
            lax.dynamic_update_index_in_dim(x, _slot(x, n) + dx, n, 0) for x, dx, n in each
        )

    sums: Any = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
    sums = visit(0, 0, sums) if n == len(k) == 1 else _over_pairs(visit, tuple(sums), at, window)
    return *(d.astype(x.dtype) for d, x in zip(sums, (q, k, v), strict=True)), None


_attend.defvjp(_forward, _backward)
