# SPDX-License-Identifier: Apache-2.0
"""What each verb minimises: a row of one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxllm.config import TrainConfig
from jaxllm.objectives.dpo import ALONE, dpo_baseline, dpo_loss
from jaxllm.objectives.grpo import grpo_loss
from jaxllm.objectives.kto import kto_baseline, kto_loss
from jaxllm.objectives.lm import lm_loss
from jaxllm.objectives.ppo import ppo_loss
from jaxllm.objectives.reward import reward_loss


@dataclass(frozen=True)
class Objective:
    """What a run minimises."""

    loss: Callable[..., Any]
    """(model, batch, rng, reference) -> (Σ loss, weight, {metric: (Σ, weight)})"""
    compares: bool = False
    """whether it needs the reference"""
    baseline: Callable[..., Any] | None = None
    """(model, reference, batch) -> (Σ, weight) of a mean over all rows of an update that the loss
    reads as `batch.baseline`, so that it does not depend on how they are divided"""


def loss_chunk(cfg: TrainConfig) -> int:
    """Tokens whose logits exist at one time; 0: `ops.cross_entropy` chooses for the platform."""
    return cfg.model.loss_chunk


def _language(cfg: TrainConfig) -> Objective:
    return Objective(partial(lm_loss, z_loss=cfg.model.z_loss, chunk=loss_chunk(cfg)))


def _reward(cfg: TrainConfig) -> Objective:
    return Objective(partial(reward_loss, centering=cfg.align.centering))


def _dpo(cfg: TrainConfig) -> Objective:
    align, chunk = cfg.align, loss_chunk(cfg)
    names = align.loss if cfg.objective == "dpo" else (cfg.objective,)
    weights = align.loss_weights or (1.0,) * len(names)
    assert align.beta is not None  # resolve
    loss = partial(
        dpo_loss,
        losses=tuple(zip(names, weights, strict=True)),
        length_normalized=align.length_normalized,
        chunk=chunk,
        beta=align.beta,
        label_smoothing=align.label_smoothing,
        gamma=align.gamma,
    )
    shared = {"beta": align.beta, "length_normalized": align.length_normalized, "chunk": chunk}
    baseline = partial(dpo_baseline, **shared) if "bco" in names else None
    return Objective(loss, not set(names) <= set(ALONE), baseline)


def _kto(cfg: TrainConfig) -> Objective:
    align, chunk = cfg.align, loss_chunk(cfg)
    assert align.beta is not None  # resolve
    loss = partial(
        kto_loss,
        beta=align.beta,
        desirable=align.desirable_weight,
        undesirable=align.undesirable_weight,
        chunk=chunk,
    )
    return Objective(loss, True, partial(kto_baseline, chunk=chunk))


def _online(cfg: TrainConfig) -> dict[str, Any]:
    rl = cfg.rl
    clip_high = rl.clip if rl.clip_high is None else rl.clip_high
    shared = {"clip": rl.clip, "clip_high": clip_high, "temperature": rl.temperature}
    return shared | {"chunk": loss_chunk(cfg)}


def _ppo(cfg: TrainConfig) -> Objective:
    rl = cfg.rl
    value = {"clip_value": rl.clip_value, "value_weight": rl.value_weight}
    return Objective(partial(ppo_loss, **_online(cfg), **value), compares=True)


def _grpo(cfg: TrainConfig) -> Objective:
    rl, beta = cfg.rl, cfg.align.beta
    own = {"beta": beta, "kl": rl.kl, "normalizer": rl.normalizer, "most": rl.max_new_tokens}
    # Without a KL in the loss it is measured where that costs no second copy of the weights.
    compares = bool(beta) or cfg.peft.method != "none"
    return Objective(partial(grpo_loss, **_online(cfg), **own), compares)


OBJECTIVES: dict[str, Callable[[TrainConfig], Objective]] = {
    "pretrain": _language,
    "sft": _language,
    "reward": _reward,
    "dpo": _dpo,
    "orpo": _dpo,
    "simpo": _dpo,
    "kto": _kto,
    "ppo": _ppo,
    "grpo": _grpo,
}
