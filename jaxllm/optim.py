# SPDX-License-Identifier: Apache-2.0
"""Schedules and optimizers, each a row of a table; clipping as torch does it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxllm.config import OptimSection

DECAYED = ("kernel", "embedding")  # names of the leaves that weight decay pulls to zero


def _span(value: float, total: int) -> int:
    """Steps, from steps or (below 1) a share of all steps."""
    return round(value * total) if value < 1 else round(value)


def make_schedule(optim: OptimSection, total_steps: int) -> Callable[[Any], Any]:
    """Learning rate of update 0, 1, …: a linear warm-up from 0, then the shape down to `final`.

    warmup_log is DeepSpeed's WarmupLR: log(step + 1) / log(warmup), then constant. Raises ValueError
    when the warm-up is longer than the run.
    """
    warmup, peak, floor = _span(optim.warmup, total_steps), optim.learning_rate, optim.final
    if warmup > total_steps:
        raise ValueError(
            f"optim.warmup is {warmup} steps, longer than the run's {total_steps}; lower it"
        )
    rest = max(total_steps - warmup, 1)
    decay = min(max(_span(optim.decay, total_steps), 1), rest)
    shapes: dict[str, Callable[[Any], Any]] = {
        "cosine": lambda t: floor + (1 - floor) * 0.5 * (1 + jnp.cos(math.pi * jnp.minimum(t / rest, 1))),
        "linear": lambda t: floor + (1 - floor) * (1 - jnp.minimum(t / rest, 1)),
        "constant": lambda t: jnp.ones_like(t),
        "wsd": lambda t: 1 - (1 - floor) * jnp.clip((t - (rest - decay)) / decay, 0, 1),
        "inverse_sqrt": lambda t: jnp.sqrt(max(warmup, 1) / (t + max(warmup, 1))),
        "warmup_log": lambda t: jnp.ones_like(t),
    }
    if optim.schedule not in shapes:
        raise ValueError(f"optim.schedule {optim.schedule!r} is not known; known: {', '.join(shapes)}")
    shape = shapes[optim.schedule]

    def rate(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        rise = step / max(warmup, 1)
        if optim.schedule == "warmup_log":
            rise = jnp.log(step + 1) / math.log(max(warmup, 2))
        return peak * jnp.where(step < warmup, rise, shape(jnp.maximum(step - warmup, 0.0)))

    return rate


def decay_mask(params: Any) -> Any:
    """True for matrices and the token table, False for norms and biases, by the leaf's name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


# name -> (constructor, our field -> its keyword)
MOMENTS = {"b1": "b1", "b2": "b2"}
OPTIMIZERS: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "adamw": (optax.adamw, MOMENTS | {"eps": "eps"}),
    "nadamw": (optax.nadamw, MOMENTS | {"eps": "eps"}),
    "lion": (optax.lion, MOMENTS),
    "lamb": (optax.lamb, MOMENTS | {"eps": "eps"}),
    "adafactor": (optax.adafactor, {}),
    "sgd": (optax.sgd, {}),
    "muon": (contrib.muon, {"eps": "eps"}),
    "schedule_free_adamw": (contrib.schedule_free_adamw, MOMENTS | {"eps": "eps"}),
}


def make_optimizer(optim: OptimSection, schedule: Any, params: Any) -> optax.GradientTransformation:
    """The optax optimizer of `optim.name`; weight decay is masked off norms and biases.

    adamw equals torch.optim.AdamW. Gradients come in already clipped. Raises ValueError for a name
    or an option that is not known.
    """
    if optim.name not in OPTIMIZERS:
        raise ValueError(f"optim.name {optim.name!r} is not known; known: {', '.join(OPTIMIZERS)}")
    make, names = OPTIMIZERS[optim.name]
    accepted = inspect.signature(make).parameters
    unknown = [key for key in optim.options if key not in accepted]
    if unknown:
        raise ValueError(
            f"optim.options.{unknown[0]} is not an option of {optim.name}; it has {', '.join(accepted)}"
        )
    keys: dict[str, Any] = {theirs: getattr(optim, ours) for ours, theirs in names.items()}
    if optim.weight_decay:
        if "weight_decay" in accepted:
            keys["weight_decay"] = optim.weight_decay
        elif "weight_decay_rate" in accepted:
            keys["weight_decay_rate"] = optim.weight_decay
        else:
            raise ValueError(f"{optim.name} has no weight decay; set optim.weight_decay to 0")
        mask = {"mask", "weight_decay_mask"} & set(accepted)
        keys |= {name: decay_mask(params) for name in mask}
    elif "weight_decay" in accepted:
        keys["weight_decay"] = 0.0
    return make(learning_rate=schedule, **keys | optim.options)


def clip(grads: Any, norm: jax.Array, max_norm: float) -> Any:
    """Scales gradients of global norm `norm` down to `max_norm`, as torch's clip_grad_norm_ does."""
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * scale, grads)
