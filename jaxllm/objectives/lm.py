# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction: loss = -Σ w log p(target), over all tokens with weight w.

Dims: B rows, T tokens, D model width, S segments.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.data.batch import Batch
from jaxllm.mesh import constrain
from jaxllm.model.decoder import Decoder, Forward
from jaxllm.model.mtp import after, continues
from jaxllm.ops.cross_entropy import Head, cross_entropy, token_logps

Metrics = dict[str, tuple[jax.Array, jax.Array]]
Loss = tuple[jax.Array, jax.Array, Metrics]  # (Σ loss, Σ weight, {metric: (Σ, weight)}), float32


def forward(model: Decoder, batch: Batch, rng: Any = None) -> Forward:
    """The model's hidden states of the batch, and what its routers did."""
    out = model.hidden(batch.tokens, batch.segment_ids, batch.positions, rng=rng)
    return replace(out, x=constrain(out.x, "batch", "length", "features"))


def lm_loss(
    model: Decoder, batch: Batch, rng: Any, reference: Any = None, *, z_loss=0.0, chunk=0
) -> Loss:
    """Returns (Σ loss, Σ weight, metrics), float32 scalars.

    rng: keys for dropout; None = no dropout. z_loss: coefficient of (log Z)². chunk: tokens whose
    logits exist at one time; 0 = the platform's default. These mean the same in every objective.
    Metrics include those of the routers and of multi-token prediction, whose losses `make_step`
    adds.
    """
    head = Head(model.cfg.logit_softcap, z_loss, chunk, blocks=model.loss_blocks)
    out = forward(model, batch, rng)
    terms = model.head_terms(out.x, rng)
    sums: Any = cross_entropy(terms, batch.targets, batch.weights, head)
    weight = jnp.sum(batch.weights)
    metrics = {"nll": sums[1], "accuracy": sums[2], "entropy": sums[3]}
    metrics = {k: (lax.stop_gradient(v), weight) for k, v in metrics.items()}
    if out.ahead:
        metrics |= ahead_metrics(model, out.ahead, batch, rng, head._replace(z_loss=0.0))
    return sums[0], weight, metrics | out.aux


def ahead_metrics(
    model: Decoder, ahead: tuple[jax.Array, ...], batch: Batch, rng: Any, head: Head
) -> Metrics:
    """Cross-entropy and accuracy of predicting tokens further ahead, as {metric: (Σ, weight)} over
    all modules. A target has the loss weight that it has for the model.

    ahead: `Forward.ahead`.
    """
    loss = correct = weight = jnp.zeros(())
    for depth, x_BTD in enumerate(ahead, 1):
        same_BT = continues(batch.segment_ids, depth)
        weights_BT = jnp.where(same_BT, after(batch.weights, depth), 0.0)
        x_BTD = constrain(x_BTD, "batch", "length", "features")
        terms = model.head_terms(x_BTD, rng)
        sums: Any = cross_entropy(terms, after(batch.targets, depth), weights_BT, head)
        loss, correct, weight = loss + sums[0], correct + sums[2], weight + jnp.sum(weights_BT)
    correct = lax.stop_gradient(correct)
    return {"mtp_loss": (loss, weight), "mtp_accuracy": (correct, weight)}


def logps(
    model: Decoder, batch: Batch, rng: Any = None, *, chunk: int = 0, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array, Forward]:
    """Returns (log p(target), entropy, the forward pass).

    The first two are float32 [B, T], and 0 at tokens without a loss weight.
    """
    out = forward(model, batch, rng)
    head = Head(model.cfg.logit_softcap, 0.0, chunk, temperature, model.loss_blocks)
    terms: Any = token_logps(model.head_terms(out.x, rng), batch.targets, batch.weights, head)
    return *terms, out


def segment_sums(x_BT: jax.Array, segment_ids_BT: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """Sums of x over the tokens of `segments` [..., B, S], in their shape; 0 for segment 0."""
    ids_BS1 = segments_BS[..., None]
    mask_BST = (segment_ids_BT[:, None, :] == ids_BS1) & (ids_BS1 > 0)
    return jnp.sum(jnp.where(mask_BST, x_BT[:, None, :], 0.0), -1)
