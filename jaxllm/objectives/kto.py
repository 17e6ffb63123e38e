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
from jaxllm.objectives.dpo import answer_logps, reference_logps
from jaxllm.objectives.lm import Metrics


def answer_terms(
    delta: Any, z: Any, good: Any, *, beta: float, desirable: float, undesirable: float
):
    """The loss of each answer. delta: float32 [...]; good: bool [...]; z ≥ 0, a scalar."""
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
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Returns (Σ loss, number of answers, metrics). batch.baseline: the mean of `kto_baseline`."""
    segments = [batch.chosen_segment, batch.rejected_segment]
    sums, _ = answer_logps(model, batch, segments, rng, chunk)
    reference_sums = reference_logps(reference, batch, chunk)
    good_BP, bad_BP = (s > 0 for s in segments)
    deltas = [x - y for x, y in zip(sums, reference_sums, strict=True)]
    delta_BP = jnp.where(good_BP, *deltas)
    z = jnp.maximum(batch.baseline, 0.0)
    counts = [jnp.sum(x).astype(jnp.float32) for x in (good_BP, bad_BP)]
    answers = counts[0] + counts[1]

    def total(x_BP: Any, mask_BP: Any) -> jax.Array:
        return jnp.sum(jnp.where(mask_BP, x_BP, 0.0))

    with jax.named_scope("loss"):
        constants = {"beta": beta, "desirable": desirable, "undesirable": undesirable}
        loss = total(answer_terms(delta_BP, z, good_BP, **constants), good_BP | bad_BP)
    metrics: Metrics = {
        "kl": (jnp.mean(z) * answers, answers),
        "reward_chosen": (total(beta * delta_BP, good_BP), counts[0]),
        "reward_rejected": (total(beta * delta_BP, bad_BP), counts[1]),
        "logp_chosen": (total(sums[0], good_BP), counts[0]),
        "logp_rejected": (total(sums[1], bad_BP), counts[1]),
    }
    return loss, answers, jax.lax.stop_gradient(metrics)


def kto_baseline(
    model: Decoder, reference: Any, batch: Batch, *, chunk: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Returns (Σ Δ, count) over prompts with the answer to another prompt."""
    segments = [batch.unpaired_segment]
    (logps_BP,), _ = answer_logps(model, batch, segments, chunk=chunk)
    reference_BP = batch.unpaired_logps
    if reference_BP is None:
        (reference_BP,), _ = answer_logps(reference, batch, segments, chunk=chunk)
    return jnp.sum(logps_BP - reference_BP), jnp.sum(batch.unpaired_segment > 0).astype(jnp.float32)
