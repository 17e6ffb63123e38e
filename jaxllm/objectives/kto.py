# SPDX-License-Identifier: Apache-2.0
"""KTO: answers labelled good or bad, without pairs (arXiv:2402.01306, eq. 7 and 8).

    loss = λ_D (1 - σ(β (Δ - z)))   of a good answer
           λ_U (1 - σ(β (z - Δ)))   of a bad one,

Δ = log π(answer | prompt) - log π'(answer | prompt) with the reference π'. z estimates the KL
divergence from the reference: the mean over the update of Δ for prompts with the answers to other
prompts, clipped at 0, without a gradient.

Dims: B rows, T tokens, P answers per row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.data.batch import Batch
from jaxllm.model.decoder import Decoder
from jaxllm.objectives.dpo import answer_logps, pair_logps
from jaxllm.objectives.lm import Loss, Metrics


def answer_terms(delta, z, good, *, beta=0.1, desirable=1.0, undesirable=1.0) -> jax.Array:
    """The loss of each answer. delta: float32 [...]; good: bool [...]; z ≥ 0, a scalar."""
    signed = jnp.where(good, delta - z, z - delta)
    return jnp.where(good, desirable, undesirable) * (1 - jax.nn.sigmoid(beta * signed))


def kto_loss(
    model: Decoder, batch: Batch, rng: Any, reference: Any = None, *, beta=0.1, chunk=0, **weights
) -> Loss:
    """Returns (Σ loss, number of answers, metrics). batch.baseline: the mean of `kto_baseline`.

    weights: `desirable` and `undesirable`, λ_D and λ_U.
    """
    sums, reference_sums, _, _, aux = pair_logps(model, reference, batch, rng, chunk)
    good_BP, bad_BP = batch.chosen_segment > 0, batch.rejected_segment > 0
    delta_BP = jnp.where(good_BP, *(sums - reference_sums))
    z = jnp.maximum(batch.baseline, 0.0)
    good, bad = jnp.sum(good_BP, dtype=jnp.float32), jnp.sum(bad_BP, dtype=jnp.float32)
    with jax.named_scope("loss"):
        terms_BP = answer_terms(delta_BP, z, good_BP, beta=beta, **weights)
        loss = jnp.sum(terms_BP, where=good_BP | bad_BP)
    metrics: Metrics = {
        "kl": (jnp.mean(z) * (good + bad), good + bad),
        "reward_chosen": (jnp.sum(beta * delta_BP, where=good_BP), good),
        "reward_rejected": (jnp.sum(beta * delta_BP, where=bad_BP), bad),
        "logp_chosen": (jnp.sum(sums[0], where=good_BP), good),
        "logp_rejected": (jnp.sum(sums[1], where=bad_BP), bad),
    }
    return loss, good + bad, jax.lax.stop_gradient(metrics) | aux


def kto_baseline(
    model: Decoder, reference: Any, batch: Batch, *, chunk: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Returns (Σ Δ, count) over prompts with the answer to another prompt."""
    segments = [batch.unpaired_segment]
    logps_NBP, *_ = answer_logps(model, batch, segments, chunk=chunk)
    reference_BP = batch.unpaired_logps
    if reference_BP is None:
        (reference_BP,), *_ = answer_logps(reference, batch, segments, chunk=chunk)
    count = jnp.sum(batch.unpaired_segment > 0, dtype=jnp.float32)
    return jnp.sum(logps_NBP - reference_BP), count
