# SPDX-License-Identifier: Apache-2.0
"""PPO for language models (arXiv:1707.06347, arXiv:2203.02155), in the words of reinforcement
learning:

    state s_t     the prompt and the completion so far, tokens[: t + 1]
    action a_t    the next token, targets[t]
    policy π      the model: log π(a_t | s_t)
    value V(s_t)  what the rest is expected to earn, read from a head with one output
    reward r_t    -β KL_t, and at the completion's last token its score too

    A_t  = Σ_k (γ λ)^k δ_{t+k},  δ_t = r_t + γ V(s_{t+1}) - V(s_t)         (arXiv:1506.02438)
    loss = -min(ρ A, clip(ρ) A) + c/2 max((V - R)², (clip(V) - R)²),  R_t = A_t + V_old(s_t)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.data.batch import Experience
from jaxllm.model.decoder import Decoder
from jaxllm.objectives.grpo import clipped_terms
from jaxllm.objectives.lm import Metrics
from jaxllm.ops.cross_entropy import Head, token_logps


class ValueParam(nnx.Variable):
    """A weight of the value's head."""


class Value(nnx.Module):
    """The critic: V(s_t) = h_t · w + b, of the policy's hidden states or of its own `trunk`'s.

    It begins at 0 everywhere: nothing is expected before anything was seen.
    """

    def __init__(self, size: int, trunk: Decoder | None = None):
        self.kernel = ValueParam(jnp.zeros((size, 1)), axes=("embed", None))
        self.bias = ValueParam(jnp.zeros(1), axes=(None,))
        self.trunk = trunk

    def __call__(self, batch: Experience, hidden: jax.Array) -> jax.Array:
        """float32 [B, T] from the policy's hidden states [B, T, D]."""
        if self.trunk is not None:
            hidden = self.trunk.hidden(batch.tokens, batch.segment_ids, batch.positions).x
        wide = hidden.astype(jnp.float32)
        return jnp.einsum("btd,do->bt", wide, self.kernel[...]) + self.bias[...]


def token_rewards(
    kl: np.ndarray, scores: np.ndarray, weights: np.ndarray, beta: float
) -> np.ndarray:
    """r_t, float32 [B, T]: -β KL_t of each token of the completion, at the last its score [B]."""
    last = weights.shape[1] - 1 - np.argmax(weights[:, ::-1] > 0, 1)
    rewards = -beta * kl * weights
    rewards[np.arange(len(scores)), last] += np.where(weights.any(1), scores, 0.0)
    return rewards.astype(np.float32)


def gae(
    rewards: np.ndarray, values: np.ndarray, weights: np.ndarray, discount: float, decay: float
) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, returns), float32 [B, T], 0 outside the completion, whose end is worth 0."""
    here = weights > 0
    advantages = np.zeros(rewards.shape, np.float64)
    ahead = later = np.zeros(len(rewards))
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + discount * later - values[:, t]
        ahead = np.where(here[:, t], delta + discount * decay * ahead, 0.0)
        later = np.where(here[:, t], values[:, t], 0.0)
        advantages[:, t] = ahead
    returns = np.where(here, advantages + values, 0.0)
    return advantages.astype(np.float32), returns.astype(np.float32)


def whiten(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(x - mean) / std over the tokens with a weight, 0 elsewhere; float32."""
    here = weights > 0
    found = np.asarray(x, np.float64)[here]
    if not len(found):
        return np.zeros_like(x, np.float32)
    apart = (x - found.mean()) / np.sqrt(found.var() + 1e-8)
    return np.where(here, apart, 0.0).astype(np.float32)


def value_terms(values: Any, old: Any, returns: Any, clip: float) -> tuple[Any, Any]:
    """(max((V - R)², (clip(V) - R)²) / 2, whether the clipped one counts) of each token."""
    held = old + jnp.clip(values - old, -clip, clip)
    plain, other = jnp.square(values - returns), jnp.square(held - returns)
    return 0.5 * jnp.maximum(plain, other), other > plain


@dataclass
class KlController:
    """β of the KL in the reward; with a target it follows it (arXiv:1909.08593, eq. 3 ff.)."""

    beta: float
    target: float = 0.0
    horizon: float = 10_000.0

    def update(self, kl: float, completions: int) -> None:
        """After a rollout of some completions whose mean KL was `kl` nats each."""
        if self.target:
            error = float(np.clip(kl / self.target - 1, -0.2, 0.2))
            self.beta *= 1 + error * completions / self.horizon


def ppo_loss(
    model: Any,
    batch: Experience,
    rng: Any,
    reference: Any = None,
    *,
    clip: float = 0.2,
    clip_high: float = 0.2,
    clip_value: float = 0.2,
    value_weight: float = 0.1,
    temperature: float = 1.0,
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """(Σ loss, tokens, metrics) of a policy with a `Value`. Dropout is off."""
    logp, entropy, values = act(model, batch, temperature=temperature, chunk=chunk)
    policy, clipped = clipped_terms(
        logp, batch.old_logps, batch.advantages, clip=clip, clip_high=clip_high
    )
    value, held = value_terms(values, batch.old_values, batch.returns, clip_value)
    tokens = jnp.sum(batch.weights)

    def total(x: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(x * batch.weights), tokens

    metrics: Metrics = {
        "policy_loss": total(policy),
        "value_loss": total(value),
        "entropy": total(entropy),
        "clip_fraction": total(clipped),
        "value_clip_fraction": total(held),
        "update_kl": total(batch.old_logps - logp),
    }
    loss, _ = total(policy + value_weight * value)
    return loss, tokens, jax.lax.stop_gradient(metrics)


def act(
    model: Any, batch: Experience, *, temperature: float = 1.0, chunk: int = 512
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log π(a_t | s_t), entropy of π(· | s_t), V(s_t)), float32 [B, T]; no critic: V is 0. The
    first two are of the completions' tokens alone, else 0."""
    h = model.hidden(batch.tokens, batch.segment_ids, batch.positions).x
    head = Head(model.cfg.logit_softcap, 0.0, chunk, temperature)
    found: Any = token_logps(model.head_terms(h), batch.targets, batch.weights, head)
    values = jnp.zeros(batch.tokens.shape) if model.value is None else model.value(batch, h)
    return *found, values
