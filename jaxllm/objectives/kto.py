# SPDX-License-Identifier: Apache-2.0
"""KTO: answers judged good or bad, one at a time (arXiv:2402.01306, eq. 7 and 8).

    loss = λ_D (1 - σ(β (Δ - z)))   of a good answer
           λ_U (1 - σ(β (z - Δ)))   of a bad one,

Δ = log π(answer | prompt) - log π'(answer | prompt) with the reference π'. z is how far the model
is from the reference: the mean over the update of Δ on prompts with answers to other prompts, not
below 0, and without a gradient.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.data.batch import Batch
from jaxllm.model.decoder import Decoder
from jaxllm.objectives.dpo import answer_logps, reference_logps
from jaxllm.objectives.lm import Metrics


def answer_terms(
    delta: Any, z: Any, good: Any, *, beta: float, desirable: float, undesirable: float
):
    """The loss of each answer: delta float32 and good bool [...]; z not below 0."""
    signed = jnp.where(good, delta - z, z - delta)
    return jnp.where(good, desirable, undesirable) * (1 - jax.nn.sigmoid(beta * signed))


def kto_loss(
    model: Decoder,
    batch: Batch,
    rng: Any,
    reference: Decoder | None = None,
    *,
    beta: float = 0.1,
    desirable: float = 1.0,
    undesirable: float = 1.0,
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """(Σ loss, answers, metrics). `batch.baseline` is the mean that `kto_baseline` is of."""
    segments = [batch.chosen_segment, batch.rejected_segment]
    sums, _ = answer_logps(model, batch, segments, rng, chunk)
    held = reference_logps(reference, batch, chunk)
    good, bad = (s > 0 for s in segments)
    delta = jnp.where(good, sums[0] - held[0], sums[1] - held[1])
    z = jnp.maximum(batch.baseline, 0.0)
    terms = answer_terms(delta, z, good, beta=beta, desirable=desirable, undesirable=undesirable)
    counts = [jnp.sum(x).astype(jnp.float32) for x in (good, bad)]

    def total(x: Any, where: Any) -> jax.Array:
        return jnp.sum(jnp.where(where, x, 0.0))

    judged = counts[0] + counts[1]
    metrics: Metrics = {
        "kl": (jnp.mean(z) * judged, judged),
        "reward_chosen": (total(beta * delta, good), counts[0]),
        "reward_rejected": (total(beta * delta, bad), counts[1]),
        "logp_chosen": (total(sums[0], good), counts[0]),
        "logp_rejected": (total(sums[1], bad), counts[1]),
    }
    return total(terms, good | bad), judged, jax.lax.stop_gradient(metrics)


def kto_baseline(
    model: Decoder, reference: Any, batch: Batch, *, chunk: int = 512
) -> tuple[jax.Array, jax.Array]:
    """(Σ, count) of Δ on prompts with another one's answer, over the rows at hand."""
    segments = [batch.unpaired_segment]
    (ours,), _ = answer_logps(model, batch, segments, chunk=chunk)
    theirs = batch.unpaired_logps
    if theirs is None:
        (theirs,), _ = answer_logps(reference, batch, segments, chunk=chunk)
    return jnp.sum(ours - theirs), jnp.sum(batch.unpaired_segment > 0).astype(jnp.float32)
