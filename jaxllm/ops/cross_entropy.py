# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a large vocabulary that never stores all logits.

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

from jaxllm.mesh import constrain, data_parallel, gathered, platform, scattered
from jaxllm.ops.matmul import product, softcapped, weight_gradient

HEAD_AXES = ("embed", "vocab")  # logical axes of an output kernel [D, V]


def default_chunk() -> int:
    """Tokens per device whose logits exist at one time: the fastest sizes measured.

    Small chunks fit a CPU's cache; an accelerator needs large products.
    """
    return 512 if platform() == "cpu" else 4096


def _parts(rows: int) -> int:
    """Number of devices that the rows are split among."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else data_parallel(mesh)
    return parts if rows % parts == 0 else 1


def whole_head(h: jax.Array, w: jax.Array) -> jax.Array:
    """A kernel [D, V] of h [..., D], whole along fsdp, in h's dtype."""
    return gathered(w.astype(h.dtype), HEAD_AXES, (h.shape[-1], w.shape[1]))


class Head(NamedTuple):
    """How logits become a loss. All fields are static."""

    softcap: float = 0.0  # logits are within (-softcap, softcap); 0 = unbounded
    z_loss: float = 0.0  # coefficient of the squared log-partition function
    chunk: int = 0  # tokens per device whose logits exist at one time; 0 = `default_chunk`
    temperature: float = 1.0  # divisor of the logits


def _chunk_terms(hs, kernels, targets, head: Head):
    """(loss, nll, correct, entropy) of each token, [4, B, C], and the gradient of its loss with
    respect to its logits, [B, C, V], for one chunk."""
    pairs = zip(hs, kernels, strict=True)
    with jax.named_scope("head"):
        raw = [product(h, w, (h.ndim - 1, 0), jnp.float32) for h, w in pairs]
    capped = softcapped(sum(raw[1:], raw[0]), head.softcap)
    logits = capped if head.temperature == 1 else capped / head.temperature
    top = jnp.max(logits, -1, keepdims=True)
    exps = jnp.exp(logits - top)
    # One reduction for both sums: with two, XLA would write exps * logits to memory.
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
    one_hot = jnp.arange(logits.shape[-1]) == targets[..., None]
    slope = exps * ((1.0 + 2.0 * head.z_loss * lse) / total)[..., None] - one_hot
    if head.softcap:
        slope = slope * (1.0 - (capped / head.softcap) ** 2)
    if head.temperature != 1:
        slope = slope / head.temperature
    return jnp.stack([loss, nll, correct.astype(jnp.float32), entropy]), slope


@jax.named_scope("loss")
def _over_chunks(terms, targets, weights, head: Head, trained: list[bool] | None = None) -> Any:
    """(values [4, B, T] of `_chunk_terms`, gradients of the hs, gradients of the kernels).

    The gradients are those of Σ weight · loss, in the dtypes of the hs and the kernels.
    trained: which kernels need a gradient; None: no gradients, not of h either. Tokens of weight 0
    have values of 0: the others are moved to the front of their rows, and chunks of weight 0 are
    skipped.
    """
    hs = [h for h, _ in terms]
    B, T, _ = hs[0].shape
    parts = _parts(B)
    size = min(T, max((head.chunk or default_chunk()) * parts // B, 1))
    count = math.ceil(T / size)
    ws = [whole_head(h, w) for h, w in terms]
    needed = weights != 0
    order = jnp.argsort(~needed, axis=1, stable=True)
    device_gradients = jax.vmap(partial(weight_gradient, dtype=jnp.float32))

    def reordered(x, order):
        """x [B, T, ...] with the tokens of each row in another order."""
        return jnp.take_along_axis(x, order.reshape(B, -1, *[1] * (x.ndim - 2)), 1)

    def split(x):
        """[B, T, ...] -> [count, B, size, ...], zero-padded at the end.

        Chunks are ranges of a row's tokens, so every device works on its own rows in each chunk.
        """
        pad = [(0, 0), (0, count * size - T)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(reordered(x, order), pad)
        return jnp.moveaxis(x.reshape(B, count, size, *x.shape[2:]), 1, 0)

    def joined(x):
        """[count, B, size, ...] -> [B, T, ...], tokens in their original order."""
        return reordered(jnp.moveaxis(x, 0, 1).reshape(B, count * size, *x.shape[3:]), original)

    def body(i, sums):
        dws, values, dhs = sums
        hc, tc, wc = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 0, False), chunks)
        chunk_values, slope = _chunk_terms(hc, ws, tc, head)
        values = lax.dynamic_update_index_in_dim(values, chunk_values, i, 0)
        if trained is None:
            return dws, values, dhs
        slope = (slope * wc[..., None]).astype(hs[0].dtype)

        def updated(dhs, h, w):
            return lax.dynamic_update_index_in_dim(dhs, product(slope, w, (2, 1), h.dtype), i, 0)

        def added(dw, h):
            # Each device sums over its own rows, so one all-reduce follows, not one per chunk.
            by_device = (x.reshape(parts, -1, x.shape[-1]) for x in (h, slope))
            # The barrier keeps XLA from folding the transpose of a tied embedding into the product
            # of a single chunk, for which XLA:CPU has no bfloat16 kernel.
            part = lax.optimization_barrier(device_gradients(*by_device))
            return constrain(dw + part, "batch", None, "vocab")

        with jax.named_scope("head"):
            dhs = [updated(*xs) for xs in zip(dhs, hc, ws, strict=True)]
            dws = [None if dw is None else added(dw, h) for dw, h in zip(dws, hc, strict=True)]
        return dws, values, dhs

    original = jnp.argsort(order, axis=1)
    dws = [
        jnp.zeros((parts, *w.shape), jnp.float32) if needs_gradient else None
        for w, needs_gradient in zip(ws, trained or [False] * len(ws), strict=True)
    ]
    chunks = ([split(h) for h in hs], split(targets), split(weights))
    values = jnp.zeros((count, 4, B, size), jnp.float32)
    dhs = None if trained is None else [jnp.zeros_like(h) for h in chunks[0]]
    used = -(-jnp.max(jnp.sum(needed, 1)) // size)
    dws, values, dhs = lax.fori_loop(0, used, body, (dws, values, dhs))
    values = jnp.stack([joined(x) for x in jnp.moveaxis(values, 1, 0)])
    values = jnp.where(needed, values, 0.0)
    if dhs is None:
        return values, None, None
    kernels = [w for _, w in terms]
    dws = [
        None if dw is None else _part(jnp.sum(dw, 0), w).astype(w.dtype)
        for dw, w in zip(dws, kernels, strict=True)
    ]
    return values, [joined(dh) for dh in dhs], dws


def _part(dw: jax.Array, w: jax.Array) -> jax.Array:
    """The gradient of a whole kernel -> that of w, which may be split along fsdp."""
    return dw if dw.shape == w.shape else scattered(dw, 0)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(terms, targets, weights, head: Head) -> Any:
    """Weighted sums over tokens of loss (nll + z-loss), nll, correct and entropy, float32 [4].

    terms: pairs (h [B, T, D], kernel [D, V]); the logits are the sum of their products. targets are
    int32 [B, T], weights float32 [B, T]. Only the loss has a gradient. The forward pass computes
    it, chunk by chunk, so no logits are stored or computed twice. A frozen kernel's gradient is not
    computed.
    """
    return jnp.sum(_over_chunks(terms, targets, weights, head)[0] * weights, (1, 2))


def _forward(terms: Any, targets: Any, weights: Any, head: Head):
    trained = [w.perturbed for _, w in terms]
    pairs = [(h.value, w.value) for h, w in terms]
    values, *gradients = _over_chunks(pairs, targets.value, weights.value, head, trained)
    return jnp.sum(values * weights.value, (1, 2)), gradients


def _backward(head: Head, residuals, g):
    dhs, dws = jax.tree.map(lambda d: d * g[0].astype(d.dtype), residuals)
    return list(zip(dhs, dws, strict=True)), None, None


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_logps(terms, targets, learned, head: Head) -> Any:
    """(log p(target), entropy) of each token, float32 [B, T]; 0 where `learned` [B, T] is not > 0.

    For losses that are not linear in the log-probabilities, so that the weight of a token is known
    only in the backward pass. If all kernels are frozen, the gradient of `h` is computed in the
    forward pass with weights of 1 and scaled later; if one is trained, the backward pass computes
    the logits again. The entropy has no gradient.
    """
    values, _, _ = _over_chunks(terms, targets, jnp.float32(learned > 0), head)
    return -values[1], values[3]


def _logps_forward(terms: Any, targets: Any, learned: Any, head: Head):
    trained = [w.perturbed for _, w in terms]
    pairs = [(h.value, w.value) for h, w in terms]
    ones = jnp.float32(learned.value > 0)
    recompute = any(trained)
    values, dhs, _ = _over_chunks(pairs, targets.value, ones, head, None if recompute else trained)
    inputs = (pairs, targets.value, ones) if recompute else None
    # Residuals are a pytree of arrays, so `trained` is stored as its structure: () or None.
    return (-values[1], values[3]), (dhs, inputs, [() if w else None for w in trained])


def _logps_backward(head: Head, residuals, g):
    dhs, inputs, structure = residuals
    weights = jnp.zeros(()) if isinstance(g[0], SymbolicZero) else -g[0]
    if dhs is not None:
        return [(dh * weights[..., None].astype(dh.dtype), None) for dh in dhs], None, None
    pairs, targets, ones = inputs
    trained = [w is not None for w in structure]
    _, dhs, dws = _over_chunks(pairs, targets, weights * ones, head, trained)
    return list(zip(dhs, dws, strict=True)), None, None


token_logps.defvjp(_logps_forward, _logps_backward, symbolic_zeros=True)
