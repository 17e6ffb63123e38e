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


def _chunk_terms(hs, kernels, targets, weights, softcap: float, z_loss: float):
    """One chunk: sums (loss, nll, correct, entropy) and the gradient of the loss to the logits."""
    raw = [product(h, w, (h.ndim - 1, 0), jnp.float32) for h, w in zip(hs, kernels, strict=True)]
    logits = softcapped(sum(raw[1:], raw[0]), softcap)
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


def _sum_chunks(terms, targets, weights, options, wanted: list[bool] | None = None) -> Any:
    """(sums, gradients of the hs, of the kernels); `wanted`: which kernels', None: no gradients."""
    softcap, z_loss, chunk = options
    hs = [h for h, _ in terms]
    B, T, _ = hs[0].shape
    parts = _parts(B)
    size = min(T, max(chunk * parts // B, 1))
    count = math.ceil(T / size)
    ws = [gathered(w.astype(h.dtype), HEAD_AXES) for h, w in terms]
    split = partial(_chunks, count=count, size=size)
    own_gradient = jax.vmap(partial(weight_gradient, dtype=jnp.float32))

    def body(carry, xs):
        sums, dws = carry
        hc, tc, wc = xs
        found, slope = _chunk_terms(hc, ws, tc, wc, softcap, z_loss)
        if wanted is None:
            return (sums + found, dws), None
        slope = slope.astype(hs[0].dtype)
        dhs = [product(slope, w, (2, 1), h.dtype) for h, w in zip(hc, ws, strict=True)]

        def add(dw, h):
            # Each device sums its own rows, so that the devices add up once, not once a chunk.
            part = own_gradient(
                h.reshape(parts, -1, h.shape[-1]), slope.reshape(parts, -1, slope.shape[-1])
            )
            # Else a single chunk's product takes in the transpose of a tied table, a form that the
            # CPU has no bfloat16 kernel for.
            return constrain(dw + lax.optimization_barrier(part), "batch", None, "vocab")

        dws = [None if dw is None else add(dw, h) for dw, h in zip(dws, hc, strict=True)]
        return (sums + found, dws), dhs

    dws = [
        jnp.zeros((parts, *w.shape), jnp.float32) if asked else None
        for w, asked in zip(ws, wanted or [False] * len(ws), strict=True)
    ]
    carry = (jnp.zeros(4, jnp.float32), dws)
    (sums, dws), dhs = lax.scan(
        body, carry, ([split(h) for h in hs], split(targets), split(weights))
    )
    if dhs is None:
        return sums, None, None
    dws = [None if dw is None else jnp.sum(dw, 0) for dw in dws]
    dhs = [jnp.moveaxis(dh, 0, 1).reshape(B, count * size, -1)[:, :T] for dh in dhs]
    return sums, dhs, dws


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(terms, targets, weights, options: tuple[float, float, int]) -> Any:
    """Weighted sums over tokens: float32 [4] = loss (nll + z-loss), nll, correct, entropy.

    terms: pairs (h [B, T, D], kernel [D, V]) whose products add up to the logits; targets int32 and
    weights float32 [B, T]; options = (softcap, z_loss coefficient, tokens whose logits exist at a
    time on a device). Only the first sum has a gradient. It is computed in the forward pass, chunk
    by chunk, so no logits outlive their chunk and none are computed twice; a frozen kernel's is not
    computed at all.
    """
    return _sum_chunks(terms, targets, weights, options)[0]


def _forward(terms: Any, targets: Any, weights: Any, options):
    wanted = [w.perturbed for _, w in terms]
    values = [(h.value, w.value) for h, w in terms]
    sums, dhs, dws = _sum_chunks(values, targets.value, weights.value, options, wanted)
    dws = [None if d is None else d.astype(w.dtype) for d, (_, w) in zip(dws, values, strict=True)]
    return sums, (dhs, dws)


def _backward(options, saved, g):
    dhs, dws = saved

    def scaled(d):
        return None if d is None else d * g[0].astype(d.dtype)

    pairs = [(scaled(dh), scaled(dw)) for dh, dw in zip(dhs, dws, strict=True)]
    return pairs, None, None


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


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
    h = model.hidden(batch.tokens, batch.segment_ids, batch.positions, rng=rng)
    h = constrain(h, "batch", "length", "features")
    options = (model.cfg.logit_softcap, z_loss, chunk)
    terms = model.head_terms(h, rng)
    sums: Any = cross_entropy(terms, batch.targets, batch.weights, options)
    weight = jnp.sum(batch.weights)
    metrics = {"nll": sums[1], "accuracy": sums[2], "entropy": sums[3]}
    return sums[0], weight, {k: (lax.stop_gradient(v), weight) for k, v in metrics.items()}
