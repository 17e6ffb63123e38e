# SPDX-License-Identifier: Apache-2.0
"""Fused attention kernels of a GPU for whole rows of segments: no scores in memory.

    name     is                                                                needs
    mosaic   tokamax's Pallas kernel (Mosaic GPU)                              Hopper or newer
    triton   tokamax's Pallas kernel (Triton); no soft cap                     Ampere or newer
    cudnn    cuDNN's packed ("THD") layout; no window, no soft cap, at most
             SEGMENTS runs of equal segment ids in a row                       Hopper or newer

Each computes what `attention.attention` does of a row's own keys. Libraries are imported when used.

Dims: B rows, T tokens, H query heads, N key/value heads, K head_dim, M segments of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

SEGMENTS = 64  # of a row, padding counted as one, that cudnn() has room for


def begins(segments: jax.Array) -> jax.Array:
    """bool [B, T]: where a run of equal segment ids begins."""
    return jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0


def starts(segments: jax.Array) -> jax.Array:
    """int32 [B, T]: the first place of the run that a token lies in."""
    places = jnp.where(begins(segments), jnp.arange(segments.shape[1]), 0)
    return lax.cummax(places.astype(jnp.int32), axis=1)


def runs(segments: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """int32 (first places [B, count + 1], lengths [B, count]) of the runs, -1 where there is none.

    A row has more than `count` runs where its last place is not -1.
    """
    T = segments.shape[1]
    find = jax.vmap(lambda row: jnp.nonzero(row, size=count + 1, fill_value=-1)[0])
    first = find(begins(segments)).astype(jnp.int32)
    end = jnp.where(first[:, 1:] < 0, T, first[:, 1:])
    return first, jnp.where(first[:, :-1] < 0, -1, end - first[:, :-1])


def cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, scale: float, count: int
) -> jax.Array:
    """[B, T, H, K] of rows that have at most `count` runs; wrong for others (see `runs`).

    jax.nn.dot_product_attention does not pass segments on to cuDNN, so the function under it is
    called. k and v are repeated to H heads: jax before 0.11 offsets them as if they had so many.
    """
    api: Any = import_module("jax._src.cudnn.fused_attention_stablehlo")
    first, lengths = runs(segments, count)
    first = jnp.where(jnp.arange(count + 1) < count, first, -1)
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    mask = api.MaskType.PADDING_CAUSAL
    return api.dot_product_attention(
        q, k, v, None, None, lengths, lengths, first, first, scale=scale, mask_type=mask
    )


def tokamax(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    implementation: str,
) -> jax.Array:
    """[B, T, H, K] through tokamax's flash attention.

    tokamax.dot_product_attention takes segments as a mask [B, 1, T, T] alone, which is read whole;
    the classes under it take the first key of each query, and skip what lies before.
    """
    api: Any = import_module("tokamax._src.ops.attention.api")
    base: Any = import_module("tokamax._src.ops.attention.base")
    first = starts(segments)
    if window is not None:
        first = jnp.maximum(first, jnp.arange(q.shape[1]) - (window - 1))
    mask = base.Mask(k_start=first[:, None, :], is_causal=True)
    cap = softcap or None
    run = api.IMPLEMENTATIONS[implementation]
    return run(q, k, v, mask=mask, logits_scale=scale, logits_soft_cap=cap)


def attend(
    kernel: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *,
    scale: float,
    window: int | None,
    softcap: float,
    other: Callable[[], jax.Array],
) -> jax.Array:
    """[B, T, H, K] through `kernel`, or `other()` where it does not do what is asked."""
    if kernel == "mosaic" or (kernel == "triton" and not softcap):
        name = "mosaic_gpu" if kernel == "mosaic" else kernel
        options: dict[str, Any] = dict(window=window, softcap=softcap, implementation=name)
        return tokamax(q, k, v, segments, scale=scale, **options)
    if kernel == "cudnn" and window is None and not softcap:
        fits = jnp.all(runs(segments, SEGMENTS)[0][:, -1] < 0)
        return lax.cond(fits, lambda: cudnn(q, k, v, segments, scale=scale, count=SEGMENTS), other)
    return other()
