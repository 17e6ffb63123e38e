# SPDX-License-Identifier: Apache-2.0
"""One update as a function to be jitted, and the shardings of its arrays.

Dims: A micro-batches of an update, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxllm.data.batch import Batch
from jaxllm.mesh import axes_of, param_sharding
from jaxllm.model.decoder import merge
from jaxllm.ops.conditional import update_if
from jaxllm.optim import clip, opt_state_shardings

# (trainable, frozen) -> (the model, the reference or None)
Models = Callable[[Any, Any], tuple[Any, Any]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step replaces. `trainable` is a nested dict of arrays, the model's tree of weights."""

    step: jax.Array  # int32 scalar: updates done
    trainable: Any
    opt_state: Any


def with_baseline(batch: Batch, mean: Any) -> Batch:
    """The batch in which every row has the mean as its baseline."""
    return replace(batch, baseline=jnp.full((*batch.tokens.shape[:-1], 1), mean, jnp.float32))


def alone(graph: Any) -> Models:
    """The model whose weights a step trains, and no reference."""
    return lambda trainable, frozen: (merge(graph, trainable, frozen), None)


def make_step(
    models: Models,
    objective: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    baseline: Callable[..., Any] | None = None,
    max_norm: float = 0.0,
    seed: int = 0,
    gradient_shardings: Any = None,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """One update, to be jitted: `step(state, frozen, batch [A, B, T]) -> (state, metrics)`.

    Gradients of the loss sums are accumulated in float32 over the A micro-batches and divided once,
    by the weight of all of them, so A does not change the result. A batch without learned tokens
    gives zero gradients. Each metric is its (sum, weight) over the update.

    Args:
      models: (trainable, frozen) -> (policy, reference or None).
      objective: (model, batch [B, T], row keys [B], reference) -> (Σ loss, weight, metrics).
      baseline: (model, reference, batch [B, T]) -> (Σ, weight). Its mean over the update's rows is
        computed before the gradients, and the objective reads it as `batch.baseline`.
      max_norm: global gradient norm above which gradients are scaled down; 0 = off.
      seed: a row's dropout key is folded from the seed, the step and the row's index in the update,
        so it does not depend on micro-batches or the mesh.
      gradient_shardings: shardings of the accumulated gradients.

    If the loss or the gradient norm is not finite, the weights and the optimizer state stay as
    they were.
    """

    def loss_of(trainable, frozen, batch, rng):
        model, reference = models(trainable, frozen)
        loss, weight, metrics = objective(model, batch, rng, reference)
        metrics = {"loss": (loss, weight)} | metrics
        real = jnp.sum(batch.segment_ids > 0).astype(jnp.float32)
        learned = jnp.sum(batch.weights > 0).astype(jnp.float32)
        counts = {"tokens": (real, jnp.zeros(())), "learned": (learned, jnp.zeros(()))}
        return loss, metrics | counts

    gradient = jax.grad(loss_of, has_aux=True)

    def micro_batch(trainable, frozen, batch, rng):
        grads, metrics = gradient(trainable, frozen, batch, rng)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        if gradient_shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, gradient_shardings)
        return grads, metrics

    def step(state: TrainState, frozen: Any, batch: Batch):
        rows = batch.tokens.shape[1]
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def row_keys(index: Any) -> jax.Array:
            """One key per row of a micro-batch, [B]."""
            return jax.vmap(partial(jax.random.fold_in, rng))(index * rows + jnp.arange(rows))

        if baseline is not None:
            with jax.named_scope("baseline"):
                sums = jax.lax.map(partial(baseline, *models(state.trainable, frozen)), batch)
                total, weight = jax.tree.map(jnp.sum, sums)
                batch = with_baseline(batch, total / jnp.maximum(weight, 1.0))
        with jax.named_scope("gradients"):
            run = partial(micro_batch, state.trainable, frozen)
            grads, metrics = accumulated(run, batch, row_keys)
        with jax.named_scope("optimizer"):
            weight = metrics["loss"][1]
            scale = jnp.where(weight > 0, 1.0 / jnp.maximum(weight, 1e-30), 0.0)
            norm = scale * optax.tree.norm(grads)
            finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"][0])
            clipped = partial(clip, norm=norm, max_norm=max_norm, scale=scale)
            old = state.trainable, state.opt_state
            update = partial(updated, optimizer, clipped)
            trainable, opt_state = update_if(finite, update, old, grads)
        rate = jnp.asarray(schedule(state.step), jnp.float32)
        metrics |= {"grad_norm": (norm, jnp.ones(())), "learning_rate": (rate, jnp.ones(()))}
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return step


def accumulated(run: Callable[..., Any], batch: Batch, row_keys: Callable[[Any], Any]) -> Any:
    """The sum of `run(micro_batch [B, T], row_keys(a))` over the A micro-batches."""
    first = jax.tree.map(lambda x: x[0], batch)
    count = len(batch.tokens)
    if count == 1:
        return run(first, row_keys(0))

    def add(carry, xs):
        index, micro = xs
        return jax.tree.map(jnp.add, carry, run(micro, row_keys(index))), None

    shapes = jax.eval_shape(run, first, row_keys(0))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (jnp.arange(count), batch))[0]


def updated(optimizer: Any, clipped: Any, trainable: Any, opt_state: Any, grads: Any) -> Any:
    """(weights, optimizer state) after an update with `clipped(grads)`."""
    updates, opt_state = optimizer.update(clipped(grads), opt_state, trainable)
    return optax.apply_updates(trainable, updates), opt_state


def weight_shardings(state: Any, mesh: Mesh, *, replicated: bool) -> Any:
    """NamedShardings of weights (a quantised one has two), split or `replicated` along fsdp."""

    def sharding(variable: Any) -> Any:
        axes = axes_of(variable)
        return jax.tree.map(
            lambda x: param_sharding(mesh, axes, x.shape, drop="fsdp" if replicated else ""),
            variable.get_value(),
        )

    variables = jax.tree.map(
        lambda v: v.replace(sharding(v)), state, is_leaf=lambda v: isinstance(v, nnx.Variable)
    )
    return nnx.to_pure_dict(variables)


def state_shardings(
    graph_state: Any, optimizer: Any, mesh: Mesh, zero: int
) -> tuple[Any, Any, Any]:
    """NamedShardings by ZeRO stage of (weights, gradients, optimizer state)."""
    split, replicated = (
        weight_shardings(graph_state, mesh, replicated=flag) for flag in (False, True)
    )
    params = nnx.to_pure_dict(graph_state)
    moments = opt_state_shardings(
        jax.eval_shape(optimizer.init, params), params, split if zero >= 1 else replicated
    )
    return split if zero >= 3 else replicated, split if zero >= 2 else replicated, moments
