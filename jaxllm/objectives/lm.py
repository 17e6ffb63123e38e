# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction.

Dims: B rows, T tokens, S segments.
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
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """(Σ weight · -log p(target), Σ weight, {metric: (sum, weight)}), float32 scalars."""
    h = model.hidden(batch.tokens, batch.segment_ids, batch.positions, rng=rng).x
    h = constrain(h, "batch", "length", "features")
    head = Head(model.cfg.logit_softcap, z_loss, chunk)
    sums: Any = cross_entropy(model.head_terms(h, rng), batch.targets, batch.weights, head)
    weight = jnp.sum(batch.weights)
    metrics = {"nll": sums[1], "accuracy": sums[2], "entropy": sums[3]}
    return sums[0], weight, {k: (lax.stop_gradient(v), weight) for k, v in metrics.items()}


def logps(
    model: Decoder, batch: Batch, rng: Any = None, *, chunk: int = 512, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """(log p(target), entropy) of each learned token of a batch under the model, float32 [B, T]; 0
    of the others."""
    h = model.hidden(batch.tokens, batch.segment_ids, batch.positions, rng=rng).x
    h = constrain(h, "batch", "length", "features")
    head = Head(model.cfg.logit_softcap, 0.0, chunk, temperature)
    found: Any = token_logps(model.head_terms(h, rng), batch.targets, batch.weights, head)
    return found


def segment_sums(x: jax.Array, segment_ids: jax.Array, segments: jax.Array) -> jax.Array:
    """Σ of x [B, T] over the tokens of each of `segments` [B, S] (0 = none: 0); float32 [B, S]."""
    here = (segment_ids[:, None, :] == segments[..., None]) & (segments[..., None] > 0)
    return jnp.sum(jnp.where(here, x[:, None, :], 0.0), -1)
