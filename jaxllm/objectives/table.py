# SPDX-License-Identifier: Apache-2.0
"""The objective of each training command: one row each, built from a config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from inspect import isroutine
from typing import Any

import jax.numpy as jnp

from jaxllm.config import TrainConfig
from jaxllm.errors import UserError
from jaxllm.objectives.dpo import REFERENCE_FREE, dpo_baseline, dpo_loss
from jaxllm.objectives.grpo import grpo_loss
from jaxllm.objectives.kto import kto_baseline, kto_loss
from jaxllm.objectives.lm import lm_loss
from jaxllm.objectives.ppo import ppo_loss
from jaxllm.objectives.reward import reward_loss


@dataclass(frozen=True)
class Objective:
    """The functions of an objective, with its hyperparameters bound."""

    loss: Callable[..., Any]  # (model, batch, rng, reference) -> lm.Loss
    compares: bool = False  # true if the loss needs the reference model
    # (model, reference, batch) -> (Σ, weight), a mean over all rows of an update. The loss reads it
    # as `batch.baseline`, so that it does not depend on the division into micro-batches.
    baseline: Callable[..., Any] | None = None
    on_policy: bool = False  # true if the loss needs no log-probabilities of a rollout
    own: str = ""  # MODULE.NAME of a loss that a user gave instead


def _language(cfg: TrainConfig) -> Objective:
    return Objective(partial(lm_loss, z_loss=cfg.model.z_loss, chunk=cfg.model.loss_chunk))


def _dpo(cfg: TrainConfig) -> Objective:
    align = cfg.align
    names = align.loss if cfg.objective == "dpo" else (cfg.objective,)
    losses = tuple(zip(names, align.loss_weights or (1.0,) * len(names), strict=True))
    assert align.beta is not None  # resolve
    shared: dict[str, Any] = {"beta": align.beta, "length_normalized": align.length_normalized}
    shared["chunk"] = cfg.model.loss_chunk
    smoothing, gamma = align.label_smoothing, align.gamma
    loss = partial(dpo_loss, losses=losses, label_smoothing=smoothing, gamma=gamma, **shared)
    baseline = partial(dpo_baseline, **shared) if "bco" in names else None
    return Objective(loss, not set(names) <= set(REFERENCE_FREE), baseline)


def _kto(cfg: TrainConfig) -> Objective:
    align, chunk = cfg.align, cfg.model.loss_chunk
    assert align.beta is not None  # resolve
    weights = {"desirable": align.desirable_weight, "undesirable": align.undesirable_weight}
    loss = partial(kto_loss, beta=align.beta, **weights, chunk=chunk)
    return Objective(loss, True, partial(kto_baseline, chunk=chunk))


def _online(cfg: TrainConfig) -> dict[str, Any]:
    rl = cfg.rl
    clip_high = rl.clip if rl.clip_high is None else rl.clip_high
    shared = {"clip": rl.clip, "clip_high": clip_high, "temperature": rl.temperature}
    return shared | {"chunk": cfg.model.loss_chunk}


def _ppo(cfg: TrainConfig) -> Objective:
    rl = cfg.rl
    options = {"clip_value": rl.clip_value, "value_weight": rl.value_weight}
    return Objective(partial(ppo_loss, **_online(cfg), **options), compares=True)


def _grpo(cfg: TrainConfig) -> Objective:
    rl, beta = cfg.rl, cfg.align.beta
    options = {"beta": beta, "kl": rl.kl, "normalizer": rl.normalizer}
    # The KL is logged even if beta is 0, if the reference is the base model of an adapter.
    compares = bool(beta) or cfg.peft.method != "none"
    options["on_policy"] = on_policy = rl.updates == 1 and not compares
    loss = partial(grpo_loss, **_online(cfg), **options, max_tokens=rl.max_new_tokens)
    return Objective(loss, compares, on_policy=on_policy)


OBJECTIVES: dict[str, Callable[[TrainConfig], Objective]] = {
    "pretrain": _language,
    "sft": _language,
    "reward": lambda cfg: Objective(partial(reward_loss, centering=cfg.align.centering)),
    "dpo": _dpo,
    "orpo": _dpo,
    "simpo": _dpo,
    "kto": _kto,
    "ppo": _ppo,
    "grpo": _grpo,
}


def make_objective(cfg: TrainConfig, own: Callable[..., Any] | None = None) -> Objective:
    """The objective of a resolved config. Raises UserError for one without a row.

    own: a user's loss, which replaces that of the objective. It gets the objective's batches and,
    if the objective compares, its reference model.
    """
    if cfg.objective not in OBJECTIVES:
        known = ", ".join(OBJECTIVES)
        raise UserError(f"objective {cfg.objective!r} is not known; known: {known}")
    objective = OBJECTIVES[cfg.objective](cfg)
    if own is None:
        return objective
    inner = own.func if isinstance(own, partial) else own
    named = inner if isroutine(inner) else type(inner)
    name = f"{named.__module__}.{named.__qualname__}"
    return replace(
        objective, loss=partial(_own_loss, own, name), baseline=None, on_policy=False, own=name
    )


# Metrics that every step adds to those of the objective.
_TAKEN = {"loss", "tokens", "learned", "grad_norm", "learning_rate"}


def _own_loss(own: Callable[..., Any], name: str, *args: Any) -> Any:
    """The result of a user's loss as float32 scalars. Raises UserError for another form."""
    result = own(*args)
    if not (isinstance(result, tuple) and len(result) == 3 and isinstance(result[2], Mapping)):
        raise UserError(f"the objective {name} must return (Σ loss, weight, metrics)")
    loss, weight, metrics = result
    loads = {key: metrics[key] for key in metrics if key == "expert_load"}  # arrays
    metrics = {key: metrics[key] for key in metrics if key not in loads}
    for key, pair in {"the loss": (loss, weight), **metrics}.items():
        if key in _TAKEN:
            raise UserError(f"the objective {name}: every run has a metric {key}; rename it")
        if not (isinstance(pair, tuple) and len(pair) == 2) or any(map(jnp.ndim, pair)):
            raise UserError(f"the objective {name}: {key} must be two scalars, (Σ, weight)")

    def scalars(pair: Any) -> Any:
        return tuple(jnp.asarray(x, jnp.float32) for x in pair)

    metrics = {key: scalars(pair) for key, pair in metrics.items()}
    return *scalars((loss, weight)), metrics | loads
