# SPDX-License-Identifier: Apache-2.0
"""Fused attention kernels of tokamax for NVIDIA GPUs; scores are never written to memory.

    name     kernel                          needs
    mosaic   Pallas, Mosaic GPU              Hopper or newer
    triton   Pallas, Triton; no soft cap     Ampere or newer

The only module that imports tokamax, and it does so when a kernel is traced.

Dims: B rows, T tokens, H query heads, N key/value heads, K head_dim.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.ops.attention_mask import SELECTED, first_visible, in_chunks
from jaxllm.ops.residuals import saveable

IMPLEMENTATIONS = {"mosaic": "mosaic_gpu", "triton": "triton"}  # tokamax's names
# `run` imports private modules, so a version counts only once benchmarks/gpu.py has passed with it.
TOKAMAX_VERSIONS = ("0.0.17",)
MOST_FEATURES = 256  # of a head, for which the kernels were tried


def mosaic_unproven() -> str:
    """Why mosaic is not known to be the fastest kernel here; empty if benchmarks/results say so."""
    hopper = jax.devices()[0].compute_capability[:2] == "9."
    return "" if hopper else "mosaic is the fastest kernel on Hopper only"


def obstacle(
    *,
    dtype: Any,
    softcap: float,
    head_dims: tuple[int, int] = (0, 0),
    prefix: bool = False,
    context: int = 1,
    sinks: bool = False,
    selected: bool = False,
    soft_caps: bool = True,
    **_: Any,
) -> str:
    """Why the kernel cannot run on a GPU; empty if it can.

    soft_caps: True if the kernel has them. context: devices that a row is split among. The others
    are facts of `attention.choose`.
    """
    if jax.devices()[0].platform != "gpu":
        return "tokamax asks the attached device for its architecture, and that is no GPU"
    try:
        version = metadata.version("tokamax")
    except metadata.PackageNotFoundError:
        return f"tokamax is not installed (pip install tokamax=={TOKAMAX_VERSIONS[-1]})"
    if version not in TOKAMAX_VERSIONS:
        return f"tokamax {version} is not one of the tested versions {', '.join(TOKAMAX_VERSIONS)}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it needs model.compute_dtype bfloat16, not {jnp.dtype(dtype)}"
    if softcap and not soft_caps:
        return "it has no soft cap, and this model has one"
    if max(head_dims) > MOST_FEATURES:
        return f"head_dim is {max(head_dims)}, over the {MOST_FEATURES} that it was tried with"
    if head_dims[0] != head_dims[1]:
        return f"head_dim is {head_dims[0]} for queries and {head_dims[1]} for values"
    if sinks:
        return "it has no attention sinks, and this model has them"
    if selected:
        return SELECTED
    if context > 1:
        return "mesh.context splits the rows"
    return "keys of a prefix precede each text" if prefix else ""


def run(
    kernel: str, q, k, v, segments, *, scale: float, window: Any, softcap: float, chunked: bool
) -> jax.Array:
    """Attention of rows to themselves, [B, T, H, K]; q is that, k and v are [B, N, T, K].

    segments are int32 [B, T]. tokamax.dot_product_attention would take them as a mask [B, 1, T, T],
    which its kernels read from memory. The classes below it take the first visible key of each
    query, and skip the blocks before it.
    """
    api: Any = import_module("tokamax._src.ops.attention.api")
    base: Any = import_module("tokamax._src.ops.attention.base")
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if chunked:
        segments, window = in_chunks(segments, window), None
    mask = base.Mask(k_start=first_visible(segments, window)[:, None, :], is_causal=True)
    implementation = api.IMPLEMENTATIONS[IMPLEMENTATIONS[kernel]]
    cap = softcap or None
    out = implementation(q, k, v, mask=mask, logits_scale=scale, logits_soft_cap=cap)
    return saveable(out, "attention")
