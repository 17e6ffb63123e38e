# SPDX-License-Identifier: Apache-2.0
"""A reward model from pairs of answers: the Bradley-Terry loss (arXiv:2203.02155, eq. 1).

    loss = -log σ(r_chosen - r_rejected - margin) + centering · (r_chosen + r_rejected)²

The margin is that of Llama 2 (arXiv:2307.09288, eq. 2); the second term keeps rewards around 0
(arXiv:2312.09244), for differences alone do not say where they lie.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.data.batch import Batch
from jaxllm.model.decoder import Decoder
from jaxllm.objectives.lm import Metrics


def pair_terms(
    chosen: jax.Array, rejected: jax.Array, margin: jax.Array, *, centering: float = 0.0
) -> jax.Array:
    """The loss of each pair from its two rewards and its margin, float32 of their shape."""
    away = centering * jnp.square(chosen + rejected)
    return -jax.nn.log_sigmoid(chosen - rejected - margin) + away


def reward_loss(
    model: Decoder,
    batch: Batch,
    rng: Any,
    reference: Any = None,
    *,
    centering: float = 0.0,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """(Σ loss, pairs, metrics) of a reward model. A tie counts as wrong.

    reward_min and reward_max are of the rows at hand: over several micro-batches, their means.
    """
    hidden = model.hidden(batch.tokens, batch.segment_ids, batch.positions, rng=rng).x
    chosen = model.scores(hidden, batch.segment_ids, batch.chosen_segment)
    rejected = model.scores(hidden, batch.segment_ids, batch.rejected_segment)
    here = batch.chosen_segment > 0
    pairs = jnp.sum(here).astype(jnp.float32)
    some = jnp.float32(pairs > 0)

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(here, x, 0.0))

    def extreme(reduce: Any, empty: float, *values: jax.Array) -> jax.Array:
        found = reduce(jnp.stack([jnp.where(here, v, empty) for v in values]))
        return jnp.where(pairs > 0, found, 0.0)

    inf = float("inf")
    metrics = {
        "accuracy": (total(chosen > rejected), pairs),
        "margin": (total(chosen - rejected), pairs),
        "reward_mean": (total(chosen + rejected), 2 * pairs),
        "reward_square": (total(jnp.square(chosen) + jnp.square(rejected)), 2 * pairs),
        "reward_min": (extreme(jnp.min, inf, chosen, rejected), some),
        "reward_max": (extreme(jnp.max, -inf, chosen, rejected), some),
    }
    loss = total(pair_terms(chosen, rejected, batch.margin, centering=centering))
    return loss, pairs, jax.lax.stop_gradient(metrics)
