# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction: cross-entropy over a large vocabulary without its logits.

Dims: B rows, T tokens, D model width, V vocabulary, C tokens of a row per chunk.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.data.batch import Batch
from jaxllm.mesh import constrain, data_parallel, gathered
from jaxllm.model.decoder import HEAD_AXES, Decoder
from jaxllm.model.layers import product, softcapped, weight_gradient

Metrics = dict[str, tuple[jax.Array, jax.Array]]


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


def _chunk_terms(h, kernel, targets, weights, softcap: float, z_loss: float):
    """One chunk: sums (loss, nll, correct, entropy) and the gradient of the loss to the logits."""
    logits = softcapped(product(h, kernel, (h.ndim - 1, 0), jnp.float32), softcap)
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
    loss = nll + z_loss * lse * lse
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    slope = exps * ((1.0 + 2.0 * z_loss * lse) / total)[..., None] - hit
    if softcap:
        slope = slope * (1.0 - (logits / softcap) ** 2)
    sums = [jnp.sum(x * weights) for x in (loss, nll, correct, entropy)]
    return jnp.stack(sums), slope * weights[..., None]


def _sum_chunks(h, kernel, targets, weights, options, *, gradient: bool):
    softcap, z_loss, chunk = options
    B, T, D = h.shape
    parts = _parts(B)
    size = min(T, max(chunk * parts // B, 1))
    count = math.ceil(T / size)
    w = gathered(kernel.astype(h.dtype), HEAD_AXES)
    split = partial(_chunks, count=count, size=size)
    own_gradient = jax.vmap(partial(weight_gradient, dtype=jnp.float32))

    def body(carry, xs):
        sums, dw = carry
        hc, tc, wc = xs
        terms, slope = _chunk_terms(hc, w, tc, wc, softcap, z_loss)
        if not gradient:
            return (sums + terms, dw), None
        slope = slope.astype(h.dtype)
        dh = product(slope, w, (2, 1), h.dtype)
        # Each device sums its own rows, so that the devices add up once, not once a chunk.
        part = own_gradient(hc.reshape(parts, -1, D), slope.reshape(parts, -1, w.shape[-1]))
        # Else a single chunk's product takes in the transpose of a tied table, a form that the CPU
        # has no bfloat16 kernel for.
        dw = dw + lax.optimization_barrier(part)
        return (sums + terms, constrain(dw, "batch", None, "vocab")), dh

    dw = jnp.zeros((parts, *kernel.shape) if gradient else (), jnp.float32)
    carry = (jnp.zeros(4, jnp.float32), dw)
    (sums, dw), dh = lax.scan(body, carry, (split(h), split(targets), split(weights)))
    if dh is not None:
        dw = jnp.sum(dw, 0)
        dh = jnp.moveaxis(dh, 0, 1).reshape(B, count * size, D)[:, :T]
    return sums, dh, dw


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(h, kernel, targets, weights, options: tuple[float, float, int]) -> Any:
    """Weighted sums over tokens: float32 [4] = loss (nll + z-loss), nll, correct, entropy.

    h [B, T, D], kernel [D, V], targets int32 and weights float32 [B, T]; options = (softcap, z_loss
    coefficient, tokens whose logits exist at a time on a device). Only the first sum has a
    gradient. It is computed in the forward pass, chunk by chunk, so no logits outlive their chunk
    and none are computed twice.
    """
    return _sum_chunks(h, kernel, targets, weights, options, gradient=False)[0]


def _forward(h, kernel, targets, weights, options):
    sums, dh, dw = _sum_chunks(h, kernel, targets, weights, options, gradient=True)
    return sums, (dh, dw.astype(kernel.dtype))


def _backward(options, saved, g):
    dh, dw = saved
    return (dh * g[0].astype(dh.dtype)), (dw * g[0].astype(dw.dtype)), None, None


cross_entropy.defvjp(_forward, _backward)


def lm_loss(
    model: Decoder,
    batch: Batch,
    rng: Any,
    reference: Any = None,
    *,
    z_loss: float = 0.0,
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """(Σ weight · -log p(target), Σ weight, {metric: (sum, weight)}), float32 scalars."""
    h = model.hidden(batch.tokens, batch.segment_ids, batch.positions)
    h = constrain(h, "batch", "length", "features")
    options = (model.cfg.logit_softcap, z_loss, chunk)
    sums: Any = cross_entropy(h, model.head_kernel(), batch.targets, batch.weights, options)
    weight = jnp.sum(batch.weights)
    metrics = {"nll": sums[1], "accuracy": sums[2], "entropy": sums[3]}
    return sums[0], weight, {k: (lax.stop_gradient(v), weight) for k, v in metrics.items()}
