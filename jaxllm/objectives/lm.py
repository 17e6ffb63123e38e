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
Loss = tuple[jax.Array, jax.Array, Metrics]  # (Σ loss, Σ weight, {metric: (Σ, weight)}), float32


def hidden_states(model: Decoder, batch: Batch, rng: Any = None) -> jax.Array:
    """The model's hidden states of the batch, [B, T, D]."""
    x_BTD = model.hidden(batch.tokens, batch.segment_ids, batch.positions, rng=rng).x
    return constrain(x_BTD, "batch", "length", "features")


def lm_loss(
    model: Decoder, batch: Batch, rng: Any, reference: Any = None, *, z_loss=0.0, chunk=0
) -> Loss:
    """Returns (Σ loss, Σ weight, metrics), float32 scalars.

    rng: keys for dropout; None = no dropout. z_loss: coefficient of (log Z)². chunk: tokens whose
    logits exist at one time; 0 = the platform's default. These mean the same in every objective.
    """
    head = Head(model.cfg.logit_softcap, z_loss, chunk, blocks=model.loss_blocks)
    terms = model.head_terms(hidden_states(model, batch, rng), rng)
    sums: Any = cross_entropy(terms, batch.targets, batch.weights, head)
    weight = jnp.sum(batch.weights)
    metrics = {"nll": sums[1], "accuracy": sums[2], "entropy": sums[3]}
    return sums[0], weight, {k: (lax.stop_gradient(v), weight) for k, v in metrics.items()}


def logps(
    model: Decoder, batch: Batch, rng: Any = None, *, chunk: int = 0, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (log p(target), entropy, hidden states [B, T, D]).

    The first two are float32 [B, T], and 0 at tokens without a loss weight.
    """
    x_BTD = hidden_states(model, batch, rng)
    head = Head(model.cfg.logit_softcap, 0.0, chunk, temperature, model.loss_blocks)
    terms: Any = token_logps(model.head_terms(x_BTD, rng), batch.targets, batch.weights, head)
    return *terms, x_BTD


def segment_sums(x_BT: jax.Array, segment_ids_BT: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """Sums of x over the tokens of `segments` [..., B, S], in their shape; 0 for segment 0."""
    ids_BS1 = segments_BS[..., None]
    mask_BST = (segment_ids_BT[:, None, :] == ids_BS1) & (ids_BS1 > 0)
    return jnp.sum(jnp.where(mask_BST, x_BT[:, None, :], 0.0), -1)
