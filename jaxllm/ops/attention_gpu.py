# SPDX-License-Identifier: Apache-2.0
"""Fused attention kernels of a GPU for whole rows of segments: no scores in memory.

    name     is                                                                needs
    mosaic   tokamax's Pallas kernel (Mosaic GPU)                              Hopper or newer
    triton   tokamax's Pallas kernel (Triton); no soft cap                     Ampere or newer

Each computes what `attention.attention` does of a row's own keys. tokamax is imported when used.

Dims: B rows, T tokens, H query heads, N key/value heads, K head_dim.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.mesh import platform

IMPLEMENTATIONS = {"mosaic": "mosaic_gpu", "triton": "triton"}  # tokamax's names


@cache
def best() -> str:
    """The fastest that was measured (benchmarks/results): mosaic on Hopper where tokamax is
    installed, else xla, which is none of these."""
    if platform() != "gpu" or find_spec("tokamax") is None:
        return "xla"
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return "mosaic" if capability.startswith("9.") else "xla"


def notes(devices: int) -> list[str]:
    """What a user of a GPU is told of its attention."""
    if platform() != "gpu":
        return []
    kernel = best() if devices == 1 else "xla"
    hint = "" if kernel != "xla" else " (no fused kernel; one Hopper GPU with tokamax has one)"
    return [f"attention: {kernel}{hint}"]


def begins(segments: jax.Array) -> jax.Array:
    """bool [B, T]: where a run of equal segment ids begins."""
    return jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0


def starts(segments: jax.Array) -> jax.Array:
    """int32 [B, T]: the first place of the run that a token lies in."""
    places = jnp.where(begins(segments), jnp.arange(segments.shape[1]), 0)
    return lax.cummax(places.astype(jnp.int32), axis=1)


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
) -> jax.Array:
    """[B, T, H, K] through the kernel of that name; k and v are [B, T, N, K].

    tokamax.dot_product_attention takes segments as a mask [B, 1, T, T] alone, which is read whole;
    the classes under it take the first key of each query, and skip what lies before.
    """
    api: Any = import_module("tokamax._src.ops.attention.api")
    base: Any = import_module("tokamax._src.ops.attention.base")
    first = starts(segments)
    if window is not None:
        first = jnp.maximum(first, jnp.arange(q.shape[1]) - (window - 1))
    mask = base.Mask(k_start=first[:, None, :], is_causal=True)
    run = api.IMPLEMENTATIONS[IMPLEMENTATIONS[kernel]]
    return run(q, k, v, mask=mask, logits_scale=scale, logits_soft_cap=softcap or None)
