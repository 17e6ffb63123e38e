# SPDX-License-Identifier: Apache-2.0
"""PPO for language models (arXiv:1707.06347, arXiv:2203.02155).

    state s_t     prompt and completion so far, tokens[: t + 1]
    action a_t    next token, targets[t]
    policy π      the model: log π(a_t | s_t)
    value V(s_t)  expected return from s_t on, from a head with one output
    reward r_t    -β KL_t, plus the completion's score at its last token

    A_t  = Σ_k (γ λ)^k δ_{t+k},  δ_t = r_t + γ V(s_{t+1}) - V(s_t)         (arXiv:1506.02438)
    loss = -min(ρ A, clip(ρ) A) + c/2 max((V - R)², (clip(V) - R)²),  R_t = A_t + V_old(s_t)

Dims: B rows, T tokens, D model width.
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
from jaxllm.objectives.lm import Loss, Metrics, forward, logps


class ValueParam(nnx.Variable):
    """A weight of the value head."""


class Value(nnx.Module):
    """The critic: V(s_t) = h_t · w + b, on hidden states of the policy or of a separate `trunk`.

    Its weights start at 0.
    """

    def __init__(self, size: int, trunk: Decoder | None = None):
        self.kernel = ValueParam(jnp.zeros((size, 1)), axes=(None, None))
        self.bias = ValueParam(jnp.zeros(1), axes=(None,))
        self.trunk = trunk

    def __call__(self, batch: Experience, x_BTD: jax.Array) -> jax.Array:
        """Values, float32 [B, T], from the policy's hidden states."""
        if self.trunk is not None:
            x_BTD = forward(self.trunk, batch).x
        x_BTD = x_BTD.astype(jnp.float32)
        return jnp.einsum("btd,do->bt", x_BTD, self.kernel[...]) + self.bias[...]


def token_rewards(kl, scores, weights, beta: float) -> np.ndarray:
    """r_t, float32 [B, T]: -β KL_t at each token of the completion, plus scores [B] at the last."""
    last = weights.shape[1] - 1 - np.argmax(weights[:, ::-1] > 0, 1)
    rewards = -beta * kl * weights
    rewards[np.arange(len(scores)), last] += np.where(weights.any(1), scores, 0.0)
    return rewards.astype(np.float32)


def gae(rewards, values, weights, discount, decay) -> tuple[np.ndarray, np.ndarray]:
    """Returns (advantages, returns), float32 [B, T]; 0 outside the completion, V = 0 after it.

    rewards, values and weights are float32 [B, T]; discount is γ and decay λ.
    """
    mask_BT = weights > 0
    advantages = np.zeros(rewards.shape, np.float64)
    advantage = next_value = np.zeros(len(rewards))
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        advantage = np.where(mask_BT[:, t], delta + discount * decay * advantage, 0.0)
        next_value = np.where(mask_BT[:, t], values[:, t], 0.0)
        advantages[:, t] = advantage
    returns = np.where(mask_BT, advantages + values, 0.0)
    return advantages.astype(np.float32), returns.astype(np.float32)


def whiten(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(x - mean) / std over tokens with a weight, 0 elsewhere; float32."""
    mask = weights > 0
    values = np.asarray(x, np.float64)[mask]
    if not len(values):
        return np.zeros_like(x, np.float32)
    whitened = (x - values.mean()) / np.sqrt(values.var() + 1e-8)
    return np.where(mask, whitened, 0.0).astype(np.float32)


def value_terms(values: Any, old: Any, returns: Any, clip: float) -> tuple[Any, Any]:
    """Returns (max((V - R)², (clip(V) - R)²) / 2, True where the clipped one is larger)."""
    clipped_values = old + jnp.clip(values - old, -clip, clip)
    plain, clipped = jnp.square(values - returns), jnp.square(clipped_values - returns)
    return 0.5 * jnp.maximum(plain, clipped), clipped > plain


@dataclass
class KlController:
    """KL coefficient β of the reward; with a target it adapts (arXiv:1909.08593, eq. 3 ff.)."""

    beta: float
    target: float = 0.0
    horizon: float = 10_000.0

    def update(self, kl: float, completions: int) -> None:
        """Adapt β after a rollout. kl: mean KL per completion, in nats."""
        if self.target:
            error = float(np.clip(kl / self.target - 1, -0.2, 0.2))
            self.beta *= 1 + error * completions / self.horizon


def ppo_loss(
    model: Any,
    batch: Experience,
    rng: Any,
    reference: Any = None,
    *,
    clip_value: float = 0.2,
    value_weight: float = 0.1,
    temperature: float = 1.0,
    chunk: int = 0,
    **clips: float,
) -> Loss:
    """Returns (Σ loss, number of tokens, metrics) of a policy with a `Value`. Dropout is off.

    clips: `clip` and `clip_high` of `grpo.clipped_terms`.
    """
    logp_BT, entropy_BT, values_BT, aux = act(model, batch, temperature=temperature, chunk=chunk)
    tokens = jnp.sum(batch.weights)

    def total(x_BT: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(x_BT * batch.weights), tokens

    old_BT = batch.old_logps
    with jax.named_scope("loss"):
        policy_BT, clipped_BT = clipped_terms(logp_BT, old_BT, batch.advantages, **clips)
        value_BT, limited_BT = value_terms(values_BT, batch.old_values, batch.returns, clip_value)
        loss, _ = total(policy_BT + value_weight * value_BT)
    metrics: Metrics = {
        "policy_loss": total(policy_BT),
        "value_loss": total(value_BT),
        "entropy": total(entropy_BT),
        "clip_fraction": total(clipped_BT),
        "value_clip_fraction": total(limited_BT),
        "update_kl": total(old_BT - logp_BT),
    }
    return loss, tokens, jax.lax.stop_gradient(metrics) | aux


def act(
    model: Any, batch: Experience, *, temperature: float = 1.0, chunk: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array, Metrics]:
    """Returns (log π(a_t | s_t), entropy of π(· | s_t), V(s_t), float32 [B, T] each; the routers'
    metrics).

    The first two are 0 outside the completion; V is 0 without a critic.
    """
    logp_BT, entropy_BT, out = logps(model, batch, chunk=chunk, temperature=temperature)
    if model.value is None:
        return logp_BT, entropy_BT, jnp.zeros(batch.tokens.shape), out.aux
    return logp_BT, entropy_BT, model.value(batch, out.x), out.aux
