# SPDX-License-Identifier: Apache-2.0
"""Flash attention by blocks in XLA operations, with its own backward pass (arXiv:2205.14135).

One loop visits the pairs of blocks in which some query may see a key. The backward pass recomputes
the scores from the log-sum-exp of the forward pass, so none are stored.

Dims: B rows, T queries, S keys, H query heads, N key/value heads, G = H / N, K head_dim of queries
and keys, V head_dim of values; in the loop, T and S are the sizes of a block, and n and m the
numbers of blocks of queries and keys.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.mesh import platform
from jaxllm.ops.attention_mask import NOWHERE, visible, visible_blocks
from jaxllm.ops.matmul import operand, softcapped
from jaxllm.ops.residuals import saveable_in_vjp

# Tokens in a block: the fastest sizes measured. Smaller ones skip more pairs, larger ones make
# larger products.
CPU_BLOCK, ACCELERATOR_BLOCK = 128, 512
MAX_BLOCKS = 64  # in a row; longer rows have larger blocks, since the pairs are a compiled list
MASKED = -1e30  # a score whose exp is 0; -inf would give NaN where a query sees no key


def block_size(length: int) -> int:
    """Tokens in a block of a row of `length`."""
    size = CPU_BLOCK if platform() == "cpu" else ACCELERATOR_BLOCK
    while length > MAX_BLOCKS * size:
        size *= 2
    return min(size, length)


def attend(
    q_BTHK,
    k_BNSK,
    v_BNSV,
    q_segments,
    k_segments,
    q_positions,
    *,
    size: int,
    offset: Any,
    sinks: jax.Array | None = None,
    selected: jax.Array | None = None,
    chunked: bool = False,
    **options,
) -> jax.Array:
    """`attention.attention` in blocks of `size` tokens, or in one block if `size` is T.

    offset: index of the first query among the keys, or int32 [parts]: of the first query of each
    of so many equal parts of the queries, which `size` divides. options: window, scale, softcap and
    chunked.
    """
    B, T, H, K = q_BTHK.shape
    N, S = k_BNSK.shape[1:3]
    # Blocks of keys begin where blocks of queries do, if that is known now.
    front: Any = -offset % size if size < T and isinstance(offset, int) else 0
    queries = partial(split, size=size)
    keys = partial(split, size=size if size < T else S, front=front)
    q = queries(q_BTHK.astype(k_BNSK.dtype), 1).reshape(-1, B, size, N, H // N, K)
    q, k, v = q.transpose(0, 1, 3, 4, 2, 5), keys(k_BNSK, 2), keys(v_BNSV, 2)
    parts = jnp.reshape(offset, (-1, 1))
    where = (
        queries(q_segments, 1, fill=NOWHERE),
        keys(k_segments, 1, fill=NOWHERE),
        queries(q_positions, 1),
        ((parts + size * jnp.arange(len(q) // len(parts))).ravel(), jnp.asarray(-front)),
        None if selected is None else keys(queries(selected, 1), 3).swapaxes(0, 1),
    )
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(N, -1, 1, 1)
    # [n, B, N, G, size, V]
    known: Any = dict(aligned=isinstance(offset, int), chunked=chunked)
    out: Any = _attend(q, k, v, sinks, where, **known, **options)
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, H, v.shape[-1])[:, :T]
    return out.astype(q_BTHK.dtype)


def split(x: jax.Array, axis: int, size: int, front: int = 0, fill: int = 0) -> jax.Array:
    """[..., T, ...] -> [n, ..., size, ...]: the axis in blocks, padded with `fill`.

    `front` elements are added before the axis, and after it as many as the last block lacks.
    """
    pad = [(0, 0)] * x.ndim
    pad[axis] = (front, -(x.shape[axis] + front) % size)
    x = jnp.pad(x, pad, constant_values=fill)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product over the dims `contract`, batched over [B, N], in float32."""
    dims = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    return lax.dot_general(operand(a), operand(b), dims, preferred_element_type=jnp.float32)


def _visible_pairs(
    where: Any, window: Any, aligned: bool, chunked: bool
) -> tuple[Any, Any, jax.Array]:
    """(blocks of queries, blocks of keys, number of visible pairs), the visible pairs first.

    A pair is visible if some query of some row may see one of its keys. aligned: the last blocks of
    queries and keys are the same tokens, so no later block of keys is seen.
    """
    q_segments, k_segments, q_positions, (starts, first_key), *_ = where
    (n, _, T), (m, _, S) = q_segments.shape, k_segments.shape
    if chunked:  # the window of a block's first query that has in it the chunk of every query
        window = jnp.max(q_positions % window + 1 - jnp.arange(T), (1, 2))[:, None]
    k_starts = first_key + S * jnp.arange(m)
    ranges = (starts, starts + T - 1), (k_starts, k_starts + S - 1)
    seen = visible_blocks(q_segments, k_segments, *ranges, window)
    i, j = np.tril_indices(n, m - n, m) if aligned else np.indices((n, m)).reshape(2, -1)
    seen = seen[i, j]
    order = jnp.argsort(~seen, stable=True)
    return jnp.asarray(i)[order], jnp.asarray(j)[order], jnp.sum(seen)


def _block(x: jax.Array, i: Any) -> jax.Array:
    return lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _merged(x: jax.Array) -> jax.Array:
    """[B, N, G, T, ...] -> [B, N, G * T, ...]"""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _attend(
    q, k, v, sinks, where, window: Any, scale: float, softcap: float, aligned: bool, chunked: bool
) -> Any:
    """q [n, B, N, G, T, K], k [m, B, N, S, K] and v [m, B, N, S, V] -> [n, B, N, G, T, V].

    sinks: float32 [N, G, 1, 1], or None. where: segments of queries [n, B, T] and keys [m, B, S],
    positions [n, B, T], the indices of the first query of each block [n] and of the first key, and
    bool [n, m, B, T, S] or None: `selected` of `attention.attention`.
    window: an int32 scalar or None. aligned: as in `_visible_pairs`. chunked: as in `visible`.
    """
    return _forward(q, k, v, sinks, where, window, scale, softcap, aligned, chunked)[0]


def _scores(q, k, where: Any, i: Any, j: Any, scale, window, softcap, chunked) -> jax.Array:
    """Scores of two blocks, float32 [B, N, G, T, S]; MASKED where a query does not see a key.

    They are scaled in float32: a bfloat16 scale or product would be off by up to 0.4 %.
    """
    q_segments, k_segments, q_positions, (starts, first_key), selected = where
    (_, B, N, G, T, _), S = q.shape, k.shape[3]
    scores = _product(_merged(_block(q, i)), _block(k, j), (3, 3))
    scores = softcapped(scale * scores.reshape(B, N, G, T, S), softcap)
    segments = _block(q_segments, i), _block(k_segments, j)
    indices = _block(starts, i) + jnp.arange(T), first_key + j * S + jnp.arange(S)
    mask = visible(*segments, _block(q_positions, i), *indices, window, chunked)
    if selected is not None:
        mask &= _block(_block(selected, i), j)
    return jnp.where(mask[:, None, None], scores, MASKED)


def _over_pairs(visit: Any, sums: Any, *pairs: Any) -> Any:
    """sums = visit(i, j, sums) for each visible pair of blocks. pairs: as of `_visible_pairs`."""
    q_blocks, k_blocks, count = _visible_pairs(*pairs)
    return lax.fori_loop(0, count, lambda n, sums: visit(q_blocks[n], k_blocks[n], sums), sums)


def _forward(
    q, k, v, sinks, where, window: Any, scale: float, softcap: float, aligned: bool, chunked: bool
):
    shape = (*q.shape[:-1], v.shape[-1])  # [n, B, N, G, T, V]

    def one_pair(i: Any, j: Any) -> tuple[jax.Array, ...]:
        """max(scores), Σ exp(scores - max) and Σ exp(scores - max) v of a pair of blocks."""
        scores = _scores(q, k, where, i, j, scale, window, softcap, chunked)
        top = jnp.max(scores, -1, keepdims=True)
        probs = jnp.exp(scores - top)
        total = jnp.sum(probs, -1, keepdims=True)
        weighted = _product(_merged(probs.astype(v.dtype)), _block(v, j), (3, 2))
        return top, total, weighted.reshape(shape[1:])

    def visit(i: Any, j: Any, sums: Any) -> Any:
        old, new = [_block(x, i) for x in sums], one_pair(i, j)
        top = jnp.maximum(old[0], new[0])
        keep, add = jnp.exp(old[0] - top), jnp.exp(new[0] - top)
        merged = (top, *(keep * x + add * y for x, y in zip(old[1:], new[1:], strict=True)))
        updates = zip(sums, merged, strict=True)
        return tuple(lax.dynamic_update_index_in_dim(x, y, i, 0) for x, y in updates)

    if len(q) == len(k) == 1:
        top, total, weighted = (x[None] for x in one_pair(0, 0))
    else:
        zeros = jnp.zeros((*shape[:-1], 1), jnp.float32)
        start = (zeros + MASKED, zeros, jnp.zeros(shape, jnp.float32))
        top, total, weighted = _over_pairs(visit, start, where, window, aligned, chunked)
    if sinks is not None:  # one more score, whose value is 0
        old, top = top, jnp.maximum(top, sinks)
        keep = jnp.exp(old - top)
        total, weighted = keep * total + jnp.exp(sinks - top), keep * weighted
    out = saveable_in_vjp((weighted / total).astype(v.dtype), "attention")
    lse = saveable_in_vjp((jnp.log(total) + top)[..., 0], "attention")
    return out, (q, k, v, sinks, where, window, out, lse)


def _backward(scale: float, softcap: float, aligned: bool, chunked: bool, saved, g):
    q, k, v, sinks, where, window, out, lse = saved
    g = g.astype(v.dtype)
    inner = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1)

    def visit(i: Any, j: Any, sums: Any) -> Any:
        scores = _scores(q, k, where, i, j, scale, window, softcap, chunked)
        probs = jnp.exp(scores - _block(lse, i)[..., None])
        slope = _product(_merged(_block(g, i)), _block(v, j), (3, 3)).reshape(probs.shape)
        slope = probs * (slope - _block(inner, i)[..., None])
        if softcap:
            capped = jnp.where(scores > MASKED / 10, scores, 0.0)
            slope = slope * (1.0 - jnp.square(capped / softcap))
        slope = _merged((scale * slope).astype(q.dtype))
        dq = _product(slope, _block(k, j), (3, 2)).reshape(q.shape[1:])
        dk = _product(slope, _merged(_block(q, i)), (2, 2))
        dv = _product(_merged(probs.astype(v.dtype)), _merged(_block(g, i)), (2, 2))
        updates = zip(sums, (dq, dk, dv), (i, j, j), strict=True)
        return tuple(
            lax.dynamic_update_index_in_dim(x, _block(x, n) + dx, n, 0) for x, dx, n in updates
        )

    sums: Any = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
    if len(q) == len(k) == 1:
        sums = visit(0, 0, sums)
    else:
        sums = _over_pairs(visit, tuple(sums), where, window, aligned, chunked)
    if sinks is not None:
        slope = -jnp.exp(sinks - lse[..., None]) * inner[..., None]
        sinks = jnp.sum(slope, (0, 1, 4), keepdims=True)[0, 0]
    return *(d.astype(x.dtype) for d, x in zip(sums, (q, k, v), strict=True)), sinks, None, None


_attend.defvjp(_forward, _backward)
