# SPDX-License-Identifier: Apache-2.0
"""Reward model on pairs of answers: the Bradley-Terry loss (arXiv:2203.02155, eq. 1).

    loss = -log σ(r_chosen - r_rejected - margin) + centering · (r_chosen + r_rejected)²

The margin is that of Llama 2 (arXiv:2307.09288, eq. 2). The second term centers the rewards at 0
(arXiv:2312.09244), which differences alone leave undetermined.

Dims: B rows, T tokens, D model width, P pairs per row.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.collectives import across_rows
from jaxllm.data.batch import Batch
from jaxllm.model.decoder import Decoder
from jaxllm.objectives.lm import Loss, forward


def pair_terms(chosen, rejected, margin, *, centering: float = 0.0) -> jax.Array:
    """The loss of each pair; all arrays are float32 [...]."""
    offset = centering * jnp.square(chosen + rejected)
    return -jax.nn.log_sigmoid(chosen - rejected - margin) + offset


def reward_loss(
    model: Decoder, batch: Batch, rng: Any, reference: Any = None, *, centering: float = 0.0
) -> Loss:
    """Returns (Σ loss, number of pairs, metrics). In the accuracy a tie counts as wrong.

    reward_min and reward_max are extremes of a micro-batch, averaged over micro-batches.
    """
    out = forward(model, batch, rng)
    with jax.named_scope("head"):
        chosen_BP = model.scores(out.x, batch.segment_ids, batch.chosen_segment)
        rejected_BP = model.scores(out.x, batch.segment_ids, batch.rejected_segment)
    mask_BP = batch.chosen_segment > 0
    pairs = jnp.sum(mask_BP, dtype=jnp.float32)
    has_pairs = jnp.float32(pairs > 0)
    total = partial(jnp.sum, where=mask_BP, dtype=jnp.float32)
    with jax.named_scope("loss"):
        loss = total(pair_terms(chosen_BP, rejected_BP, batch.margin, centering=centering))
    low = jnp.min(jnp.minimum(chosen_BP, rejected_BP), where=mask_BP, initial=jnp.inf)
    high = jnp.max(jnp.maximum(chosen_BP, rejected_BP), where=mask_BP, initial=-jnp.inf)
    # Not of a device's own rows. Each device counts the same pair, so their mean is that pair's.
    low, high = lax.stop_gradient((low, high))
    low, high = across_rows(lax.pmin, low), across_rows(lax.pmax, high)
    has_pairs = across_rows(lax.pmax, has_pairs)
    metrics = {
        "accuracy": (total(chosen_BP > rejected_BP), pairs),
        "margin": (total(chosen_BP - rejected_BP), pairs),
        "reward_mean": (total(chosen_BP + rejected_BP), 2 * pairs),
        "reward_square": (total(jnp.square(chosen_BP) + jnp.square(rejected_BP)), 2 * pairs),
        "reward_min": (jnp.where(has_pairs > 0, low, 0.0), has_pairs),
        "reward_max": (jnp.where(has_pairs > 0, high, 0.0), has_pairs),
    }
    return loss, pairs, lax.stop_gradient(metrics) | out.aux
