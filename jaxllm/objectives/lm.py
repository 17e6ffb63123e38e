# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction: loss = -Σ w log p(target), over all tokens with weight w.

Dims: B rows, T tokens, D model width, S segments.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.data.batch import Batch
from jaxllm.mesh import constrain
from jaxllm.model.decoder import Decoder
from jaxllm.ops.cross_entropy import Head, cross_entropy, token_logps

Metrics = dict[str, tuple[jax.Array, jax.Array]]


def lm_loss(
    model: Decoder,
    batch: Batch,
    rng: Any,
    reference: Any = None,
    *,
    z_loss: float = 0.0,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Returns (Σ loss, Σ weight, {metric: (sum, weight)}), float32 scalars.

    rng: keys for dropout; None = no dropout. z_loss: coefficient of (log Z)². chunk: tokens whose
    logits exist at one time; 0 = the platform's default. These mean the same in every objective.
    """
    x_BTD = model.hidden(batch.tokens, batch.segment_ids, batch.positions, rng=rng).x
    x_BTD = constrain(x_BTD, "batch", "length", "features")
    head = Head(model.cfg.logit_softcap, z_loss, chunk)
    sums: Any = cross_entropy(model.head_terms(x_BTD, rng), batch.targets, batch.weights, head)
    weight = jnp.sum(batch.weights)
    metrics = {"nll": sums[1], "accuracy": sums[2], "entropy": sums[3]}
    return sums[0], weight, {k: (lax.stop_gradient(v), weight) for k, v in metrics.items()}


def logps(
    model: Decoder, batch: Batch, rng: Any = None, *, chunk: int = 0, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Returns (log p(target), entropy), float32 [B, T]; 0 at tokens without a loss weight."""
    x_BTD = model.hidden(batch.tokens, batch.segment_ids, batch.positions, rng=rng).x
    x_BTD = constrain(x_BTD, "batch", "length", "features")
    head = Head(model.cfg.logit_softcap, 0.0, chunk, temperature)
    terms: Any = token_logps(model.head_terms(x_BTD, rng), batch.targets, batch.weights, head)
    return terms


def segment_sums(x_BT: jax.Array, segment_ids_BT: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """Sum x over the tokens of each segment id in `segments`, float32 [B, S]; 0 for segment 0."""
    ids_BS1 = segments_BS[..., None]
    mask_BST = (segment_ids_BT[:, None, :] == ids_BS1) & (ids_BS1 > 0)
    return jnp.sum(jnp.where(mask_BST, x_BT[:, None, :], 0.0), -1)
