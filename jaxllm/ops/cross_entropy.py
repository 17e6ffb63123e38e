# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a large vocabulary without storing its logits.

Dims: B rows, T tokens, D model width, V vocabulary, C tokens of a row per chunk.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxllm.mesh import constrain, data_parallel, gathered, platform
from jaxllm.ops.matmul import product, softcapped, weight_gradient

HEAD_AXES = ("embed", "vocab")  # logical axes of an output kernel [D, V]


def default_chunk() -> int:
    """Tokens whose logits exist at one time: the fastest sizes measured. A CPU's cache wants small
    ones, an accelerator large products."""
    return 512 if platform() == "cpu" else 4096


def _parts(rows: int) -> int:
    """Among how many devices the rows are divided."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else data_parallel(mesh)
    return parts if rows % parts == 0 else 1


def _chunks(x: jax.Array, count: int, size: int) -> jax.Array:
    """[B, T, ...] -> [count, B, size, ...], zero-filled at the end: chunks run along the row, so
    that every device works on its own rows in each."""
    pad = [(0, 0), (0, count * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad).reshape(x.shape[0], count, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


class Head(NamedTuple):
    """How logits become a loss. All fields are static: they are part of the program."""

    softcap: float = 0.0
    """logits are within (-softcap, softcap); 0 = as they are"""
    z_loss: float = 0.0
    """coefficient of the squared log-partition"""
    chunk: int = 0
    """tokens of a device whose logits exist at a time; 0 = `default_chunk`"""
    temperature: float = 1.0
    """logits are divided by it"""


def _chunk_terms(hs, kernels, targets, head: Head):
    """One chunk: (loss, nll, correct, entropy) of each token, [4, B, C], and the gradient of its
    loss to the logits."""
    raw = [product(h, w, (h.ndim - 1, 0), jnp.float32) for h, w in zip(hs, kernels, strict=True)]
    capped = softcapped(sum(raw[1:], raw[0]), head.softcap)
    logits = capped if head.temperature == 1 else capped / head.temperature
    top = jnp.max(logits, -1, keepdims=True)
    exps = jnp.exp(logits - top)
    # One pass for both sums: a product that is summed alone would be written out first.
    total, dotted = lax.reduce(
        (exps, exps * logits),
        (jnp.float32(0), jnp.float32(0)),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        (logits.ndim - 1,),
    )
    lse = jnp.log(total) + top[..., 0]
    picked = jnp.take_along_axis(logits, targets[..., None], -1)
    nll = lse - picked[..., 0]
    entropy = lse - dotted / total
    correct = (picked == top)[..., 0]
    loss = nll + head.z_loss * lse * lse
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    slope = exps * ((1.0 + 2.0 * head.z_loss * lse) / total)[..., None] - hit
    if head.softcap:
        slope = slope * (1.0 - (capped / head.softcap) ** 2)
    if head.temperature != 1:
        slope = slope / head.temperature
    return jnp.stack([loss, nll, correct.astype(jnp.float32), entropy]), slope


def _over_chunks(terms, targets, weights, head: Head, wanted: list[bool] | None = None) -> Any:
    """([4, B, T] as `_chunk_terms` has it; gradients of Σ weight · loss to the hs and the kernels).

    wanted: to which kernels, None: no gradients at all. Tokens of weight 0 have 0: the others come
    first in their rows, and chunks without any are left out.
    """
    hs = [h for h, _ in terms]
    B, T, _ = hs[0].shape
    parts = _parts(B)
    size = min(T, max((head.chunk or default_chunk()) * parts // B, 1))
    count = math.ceil(T / size)
    ws = [gathered(w.astype(h.dtype), HEAD_AXES) for h, w in terms]
    needed = weights != 0
    order = jnp.argsort(~needed, axis=1, stable=True)
    own_gradient = jax.vmap(partial(weight_gradient, dtype=jnp.float32))

    def moved(x, order):
        """x [B, T, ...] in another order of each row's tokens."""
        return jnp.take_along_axis(x, order.reshape(B, -1, *[1] * (x.ndim - 2)), 1)

    def split(x):
        return _chunks(moved(x, order), count, size)

    def body(i, sums):
        dws, found, dhs = sums
        hc, tc, wc = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 0, False), chunks)
        here, slope = _chunk_terms(hc, ws, tc, head)
        found = lax.dynamic_update_index_in_dim(found, here, i, 0)
        if wanted is None:
            return dws, found, dhs
        slope = (slope * wc[..., None]).astype(hs[0].dtype)
        each = [product(slope, w, (2, 1), h.dtype) for h, w in zip(hc, ws, strict=True)]
        pairs = zip(dhs, each, strict=True)
        dhs = [lax.dynamic_update_index_in_dim(into, dh, i, 0) for into, dh in pairs]

        def add(dw, h):
            # Each device sums its own rows, so that the devices add up once, not once a chunk.
            part = own_gradient(
                h.reshape(parts, -1, h.shape[-1]), slope.reshape(parts, -1, slope.shape[-1])
            )
            # Else a single chunk's product takes in the transpose of a tied table, a form that the
            # CPU has no bfloat16 kernel for.
            return constrain(dw + lax.optimization_barrier(part), "batch", None, "vocab")

        dws = [None if dw is None else add(dw, h) for dw, h in zip(dws, hc, strict=True)]
        return dws, found, dhs

    back = jnp.argsort(order, axis=1)

    def whole(x):
        """Chunks in one row again, its tokens in their places: [count, B, size, ...]."""
        return moved(jnp.moveaxis(x, 0, 1).reshape(B, count * size, *x.shape[3:]), back)

    dws = [
        jnp.zeros((parts, *w.shape), jnp.float32) if asked else None
        for w, asked in zip(ws, wanted or [False] * len(ws), strict=True)
    ]
    chunks = ([split(h) for h in hs], split(targets), split(weights))
    found = jnp.zeros((count, 4, B, size), jnp.float32)
    dhs = None if wanted is None else [jnp.zeros_like(h) for h in chunks[0]]
    used = -(-jnp.max(jnp.sum(needed, 1)) // size)
    dws, found, dhs = lax.fori_loop(0, used, body, (dws, found, dhs))
    found = jnp.stack([whole(x) for x in jnp.moveaxis(found, 1, 0)])
    found = jnp.where(needed, found, 0.0)
    if dhs is None:
        return found, None, None
    dws = [None if dw is None else jnp.sum(dw, 0) for dw in dws]
    return found, [whole(dh) for dh in dhs], dws


def _rounded(dws: Any, kernels: Any) -> Any:
    """Gradients of kernels in the kernels' dtypes."""
    return [None if d is None else d.astype(w.dtype) for d, w in zip(dws, kernels, strict=True)]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(terms, targets, weights, head: Head) -> Any:
    """Weighted sums over tokens: float32 [4] = loss (nll + z-loss), nll, correct, entropy.

    terms: pairs (h [B, T, D], kernel [D, V]) whose products add up to the logits; targets int32 and
    weights float32 [B, T]. Only the first sum has a gradient. It is computed in the forward pass,
    chunk by chunk, so no logits outlive their chunk and none are computed twice; a frozen kernel's
    is not computed at all.
    """
    return jnp.sum(_over_chunks(terms, targets, weights, head)[0] * weights, (1, 2))


def _forward(terms: Any, targets: Any, weights: Any, head: Head):
    wanted = [w.perturbed for _, w in terms]
    values = [(h.value, w.value) for h, w in terms]
    found, dhs, dws = _over_chunks(values, targets.value, weights.value, head, wanted)
    sums = jnp.sum(found * weights.value, (1, 2))
    return sums, (dhs, _rounded(dws, [w for _, w in values]))


def _backward(head: Head, saved, g):
    dhs, dws = saved

    def scaled(d):
        return None if d is None else d * g[0].astype(d.dtype)

    pairs = [(scaled(dh), scaled(dw)) for dh, dw in zip(dhs, dws, strict=True)]
    return pairs, None, None


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_logps(terms, targets, learned, head: Head) -> Any:
    """(log p(target), entropy) of each token, float32 [B, T]; the latter has no gradient. 0 where
    `learned` [B, T] is not above 0.

    As `cross_entropy`, for a loss that is not linear in the tokens: how much each of them counts is
    known only after all are. Where the kernels are frozen the gradient to `h` is computed in the
    forward pass, of each token with weight 1; where one is trained, the logits are computed again.
    """
    found, _, _ = _over_chunks(terms, targets, jnp.float32(learned > 0), head)
    return -found[1], found[3]


def _logps_forward(terms: Any, targets: Any, learned: Any, head: Head):
    wanted = [w.perturbed for _, w in terms]
    values = [(h.value, w.value) for h, w in terms]
    ones = jnp.float32(learned.value > 0)
    found, dhs, _ = _over_chunks(values, targets.value, ones, head, None if any(wanted) else wanted)
    again = (values, targets.value, ones) if any(wanted) else None
    # A static list in what is saved is a part of its structure: Nones and empty tuples.
    return (-found[1], found[3]), (dhs, again, [() if w else None for w in wanted])


def _logps_backward(head: Head, saved, g):
    dhs, again, wanted = saved
    weights = jnp.zeros(()) if isinstance(g[0], SymbolicZero) else -g[0]
    if dhs is not None:
        return [(dh * weights[..., None].astype(dh.dtype), None) for dh in dhs], None, None
    values, targets, ones = again
    asked = [w is not None for w in wanted]
    _, dhs, dws = _over_chunks(values, targets, weights * ones, head, asked)
    pairs = zip(dhs, _rounded(dws, [w for _, w in values]), strict=True)
    return list(pairs), None, None


token_logps.defvjp(_logps_forward, _logps_backward, symbolic_zeros=True)
