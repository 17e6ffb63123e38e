# SPDX-License-Identifier: Apache-2.0
"""Reward model on pairs of answers: the Bradley-Terry loss (arXiv:2203.02155, eq. 1).

    loss = -log σ(r_chosen - r_rejected - margin) + centering · (r_chosen + r_rejected)²

The margin is that of Llama 2 (arXiv:2307.09288, eq. 2). The second term centers the rewards at 0
(arXiv:2312.09244), which differences alone leave undetermined.

Dims: B rows, T tokens, D model width, P pairs per row.
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
    """The loss of each pair; all arrays are float32 [...]."""
    offset = centering * jnp.square(chosen + rejected)
    return -jax.nn.log_sigmoid(chosen - rejected - margin) + offset


def reward_loss(
    model: Decoder,
    batch: Batch,
    rng: Any,
    reference: Any = None,
    *,
    centering: float = 0.0,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Returns (Σ loss, number of pairs, metrics). In the accuracy a tie counts as wrong.

    reward_min and reward_max are extremes of a micro-batch, averaged over micro-batches.
    """
    x_BTD = model.hidden(batch.tokens, batch.segment_ids, batch.positions, rng=rng).x
    chosen_BP = model.scores(x_BTD, batch.segment_ids, batch.chosen_segment)
    rejected_BP = model.scores(x_BTD, batch.segment_ids, batch.rejected_segment)
    mask_BP = batch.chosen_segment > 0
    pairs = jnp.sum(mask_BP).astype(jnp.float32)
    has_pairs = jnp.float32(pairs > 0)

    def total(x_BP: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask_BP, x_BP, 0.0))

    def extreme(reduce: Any, empty: float, *values: jax.Array) -> jax.Array:
        value = reduce(jnp.stack([jnp.where(mask_BP, v, empty) for v in values]))
        return jnp.where(pairs > 0, value, 0.0)

    inf = float("inf")
    metrics = {
        "accuracy": (total(chosen_BP > rejected_BP), pairs),
        "margin": (total(chosen_BP - rejected_BP), pairs),
        "reward_mean": (total(chosen_BP + rejected_BP), 2 * pairs),
        "reward_square": (total(jnp.square(chosen_BP) + jnp.square(rejected_BP)), 2 * pairs),
        "reward_min": (extreme(jnp.min, inf, chosen_BP, rejected_BP), has_pairs),
        "reward_max": (extreme(jnp.max, -inf, chosen_BP, rejected_BP), has_pairs),
    }
    with jax.named_scope("loss"):
        loss = total(pair_terms(chosen_BP, rejected_BP, batch.margin, centering=centering))
    return loss, pairs, jax.lax.stop_gradient(metrics)
