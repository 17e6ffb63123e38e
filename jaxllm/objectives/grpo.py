# SPDX-License-Identifier: Apache-2.0
"""GRPO: advantages relative to a group of completions (arXiv:2402.03300, eq. 3 and 4).

    A_i  = (r_i - mean(r)) / std(r)                       over the group of completion i
    loss = -min(ρ A, clip(ρ, 1 - ε, 1 + ε') A) + β KL     of each token, ρ = π / π_old

Without the division by std(r) this is Dr. GRPO's advantage (arXiv:2503.20783). ε' > ε is DAPO's
clip-higher, and the mean over all tokens is DAPO's normalizer (arXiv:2503.14476).

Dims: B rows, T tokens, N completions.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.batch import Experience
from jaxllm.model.decoder import Decoder
from jaxllm.objectives.lm import Loss, Metrics, logps

STD_FLOOR = 1e-4  # added to the standard deviation of a group's rewards


def group_advantages(rewards: np.ndarray, group_size: int, *, scale: bool = True) -> np.ndarray:
    """Advantages float32 [N] of rewards [N], in consecutive groups; NaN = no reward.

    Uses the sample standard deviation (n - 1). The advantage is 0 for a completion without a reward
    and for the only completion of its group that has one.
    """
    r = np.asarray(rewards, np.float64).reshape(-1, group_size)
    valid = ~np.isnan(r)
    count = valid.sum(1, keepdims=True)
    mean = np.where(valid, r, 0).sum(1, keepdims=True) / np.maximum(count, 1)
    advantages = np.where(valid, r - mean, 0.0)
    if scale:
        std = np.sqrt(np.square(advantages).sum(1, keepdims=True) / np.maximum(count - 1, 1))
        advantages = advantages / (std + STD_FLOOR)
    return np.where(count > 1, advantages, 0.0).reshape(-1).astype(np.float32)


def clipped_terms(logp, old, advantage, *, clip=0.2, clip_high=0.2) -> tuple[Any, Any]:
    """Returns (-min(ρ A, clip(ρ) A), True where clipping changes the minimum) per token."""
    ratio = jnp.exp(logp - old)
    plain, clipped = ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip_high) * advantage
    return -jnp.minimum(plain, clipped), clipped < plain


def kl_terms(logp: Any, reference: Any, kind: Literal["k1", "k3"]) -> Any:
    """Per-token estimates of KL(π ‖ π') on samples of π: k1 = log π - log π', and
    k3 = π'/π - 1 - log(π'/π), which is never negative (http://joschu.net/blog/kl-approx.html)."""
    log_ratio = logp - reference
    return log_ratio if kind == "k1" else jnp.exp(-log_ratio) - 1 + log_ratio


def token_weights(
    mask_BT: jax.Array,
    normalizer: Literal["tokens", "sequence", "constant"],
    max_tokens: int,
    segments_BT: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (weight of each token, float32 [B, T]; divisor of the sum). mask: 0 or 1.

    segments: int32 [B, T], the completions of a row; default: a row is one completion.
    """
    if normalizer == "tokens":
        return mask_BT, jnp.sum(mask_BT)
    segments_BT = jnp.ones(mask_BT.shape) if segments_BT is None else segments_BT
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    lengths_BT = jnp.sum(jnp.where(same_BTT, mask_BT[:, None, :], 0), -1)
    shares_BT = mask_BT / jnp.maximum(lengths_BT, 1.0)
    completions = jnp.round(jnp.sum(shares_BT))
    return shares_BT if normalizer == "sequence" else mask_BT / max_tokens, completions


def grpo_loss(
    model: Decoder,
    batch: Experience,
    rng: Any,
    reference: Any = None,
    *,
    beta: float = 0.0,
    kl: Literal["k1", "k3"] = "k3",
    normalizer: Literal["tokens", "sequence", "constant"] = "tokens",
    max_tokens: int = 1,
    on_policy: bool = False,
    temperature: float = 1.0,
    chunk: int = 0,
    **clips: float,
) -> Loss:
    """Returns (Σ loss, weight, metrics). max_tokens: the longest completion, for `constant`.

    clips: `clip` and `clip_high`, ε and ε'. Dropout is off, since with dropout the ratio would not
    start at 1. on_policy: the model is the policy that sampled, so that its own log-probabilities
    are the old ones; `batch.old_logps` has the sampler's, for the metric `sampler_gap`.
    """
    logp_BT, entropy_BT, out = logps(model, batch, chunk=chunk, temperature=temperature)
    old_BT, mask_BT, tokens = batch.old_logps, batch.weights, jnp.sum(batch.weights)
    metrics: Metrics = {}
    if on_policy:
        metrics["sampler_gap"] = (jnp.sum(jnp.abs(old_BT - logp_BT) * mask_BT), tokens)
        old_BT = jax.lax.stop_gradient(logp_BT)
    with jax.named_scope("loss"):
        terms_BT, clipped_BT = clipped_terms(logp_BT, old_BT, batch.advantages, **clips)
        if beta:
            terms_BT = terms_BT + beta * kl_terms(logp_BT, batch.reference_logps, kl)
        weights_BT, weight = token_weights(mask_BT, normalizer, max_tokens, batch.segment_ids)
        loss = jnp.sum(terms_BT * weights_BT)
    metrics |= {
        "entropy": (jnp.sum(entropy_BT * mask_BT), tokens),
        "clip_fraction": (jnp.sum(clipped_BT * mask_BT), tokens),
        "update_kl": (jnp.sum((old_BT - logp_BT) * mask_BT), tokens),
    }
    return loss, weight, jax.lax.stop_gradient(metrics) | out.aux
