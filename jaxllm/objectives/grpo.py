# SPDX-License-Identifier: Apache-2.0
"""GRPO: completions of one prompt compared with one another (arXiv:2402.03300, eq. 3 and 4).

    A_i  = (r_i - mean(r)) / std(r)                       over the group of completion i
    loss = -min(ρ A, clip(ρ, 1 - ε, 1 + ε') A) + β KL     of each token, ρ = π / π_old

Without the division it is Dr. GRPO's advantage (arXiv:2503.20783); ε' > ε is DAPO's clip-higher and
the mean over all tokens its normaliser (arXiv:2503.14476).
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.batch import Experience
from jaxllm.model.decoder import Decoder
from jaxllm.objectives.lm import Metrics, logps

STD_FLOOR = 1e-4  # added to the standard deviation of a group's rewards


def group_advantages(rewards: np.ndarray, group_size: int, *, scale: bool = True) -> np.ndarray:
    """Advantages float32 [N] of rewards [N], groups one after another; NaN is no reward.

    The standard deviation is that of a sample (n - 1). A completion without a reward, or alone in
    its group with one, has advantage 0.
    """
    r = np.asarray(rewards, np.float64).reshape(-1, group_size)
    known = ~np.isnan(r)
    count = known.sum(1, keepdims=True)
    mean = np.where(known, r, 0).sum(1, keepdims=True) / np.maximum(count, 1)
    away = np.where(known, r - mean, 0.0)
    if scale:
        std = np.sqrt(np.square(away).sum(1, keepdims=True) / np.maximum(count - 1, 1))
        away = away / (std + STD_FLOOR)
    return np.where(count > 1, away, 0.0).reshape(-1).astype(np.float32)


def clipped_terms(
    logp: Any, old: Any, advantage: Any, *, clip: float, clip_high: float
) -> tuple[Any, Any]:
    """(-min(ρ A, clip(ρ) A), whether the clipped one counts and differs) of each token."""
    ratio = jnp.exp(logp - old)
    held = jnp.clip(ratio, 1 - clip, 1 + clip_high)
    return -jnp.minimum(ratio * advantage, held * advantage), held * advantage < ratio * advantage


def kl_terms(logp: Any, reference: Any, kind: Literal["k1", "k3"]) -> Any:
    """Estimates of KL(π ‖ π') from a draw of π, each token's: k1 = log π - log π', and
    k3 = π'/π - 1 - log(π'/π), never negative (http://joschu.net/blog/kl-approx.html)."""
    ahead = logp - reference
    return ahead if kind == "k1" else jnp.exp(-ahead) - 1 + ahead


def token_weights(
    weights: jax.Array, normalizer: Literal["tokens", "sequence", "constant"], most: int
) -> tuple[jax.Array, jax.Array]:
    """(weight of each token, float32 [B, T]; what their sum is divided by) from 1 or 0 [B, T]."""
    lengths = jnp.sum(weights, 1, keepdims=True)
    rows = jnp.sum(lengths > 0).astype(jnp.float32)
    if normalizer == "tokens":
        return weights, jnp.sum(weights)
    return weights / (jnp.maximum(lengths, 1.0) if normalizer == "sequence" else most), rows


def grpo_loss(
    model: Decoder,
    batch: Experience,
    rng: Any,
    reference: Any = None,
    *,
    clip: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    kl: Literal["k1", "k3"] = "k3",
    normalizer: Literal["tokens", "sequence", "constant"] = "tokens",
    most: int = 1,
    temperature: float = 1.0,
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """(Σ loss, weight, metrics) of completions of at most `most` tokens. Dropout is off, for with
    it the ratio would not begin at 1."""
    logp, entropy = logps(model, batch, None, chunk=chunk, temperature=temperature)
    terms, clipped = clipped_terms(
        logp, batch.old_logps, batch.advantages, clip=clip, clip_high=clip_high
    )
    if beta:
        terms = terms + beta * kl_terms(logp, batch.reference_logps, kl)
    each, weight = token_weights(batch.weights, normalizer, most)
    tokens = jnp.sum(batch.weights)
    metrics: Metrics = {
        "entropy": (jnp.sum(entropy * batch.weights), tokens),
        "clip_fraction": (jnp.sum(clipped * batch.weights), tokens),
        "update_kl": (jnp.sum((batch.old_logps - logp) * batch.weights), tokens),
    }
    return jnp.sum(terms * each), weight, jax.lax.stop_gradient(metrics)
