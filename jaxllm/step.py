# SPDX-License-Identifier: Apache-2.0
"""One update as a function to be jitted, and the shardings of its arrays.

Dims: A micro-batches of an update, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxllm.collectives import (
    Reduction,
    across_rows,
    fsdp_dim,
    keep_axes,
    reducing,
    scattered,
    shard_over_rows,
    summed_gradient,
)
from jaxllm.config import TrainConfig
from jaxllm.data.batch import Batch
from jaxllm.errors import UserError
from jaxllm.mesh import ROWS, automatic_axes, axes_of, in_memory, param_sharding
from jaxllm.model.decoder import merge
from jaxllm.ops.conditional import update_if
from jaxllm.optim import clip, opt_state_shardings

NO_METRICS = (
    " needs the metrics of routers or of multi-token prediction: an objective must return "
    "`model.hidden(…).aux` or `lm.ahead_metrics(…)` too; or set it to 0"
)

# (trainable, frozen) -> (the model, the reference or None)
Models = Callable[[Any, Any], tuple[Any, Any]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The state that a step updates. `trainable` is the model's tree of weights, a nested dict."""

    step: jax.Array  # int32 scalar: updates done
    trainable: Any
    opt_state: Any


@dataclass(frozen=True)
class StepShardings:
    """Shardings of a step on a mesh of several devices. `weights` (the trainable ones), `frozen`
    and `gradients` are trees of NamedShardings."""

    mesh: Any
    weights: Any
    frozen: Any
    gradients: Any
    reduction: Reduction


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
    added_losses: Mapping[str, float] | None = None,
    bias_rate: float = 0.0,
    max_norm: float = 0.0,
    seed: int = 0,
    offloaded: Any = None,
    shardings: StepShardings | None = None,
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
      added_losses: {metric of the objective: coefficient}. The mean of each over the update, times
        the coefficient, is added to the mean loss.
      bias_rate: how much `balanced` moves the routers' biases.
      max_norm: global gradient norm above which gradients are scaled down; 0 = off.
      seed: a row's dropout key is folded from the seed, the step and the row's index in the update,
        so it does not depend on micro-batches or the mesh.
      offloaded: shardings of the optimizer state, if it is kept in the host's memory.
      shardings: of the arrays on a mesh; None = one device.

    If the loss or the gradient norm is not finite, the weights and the optimizer state stay as
    they were.
    """
    gradients = make_gradients(models, objective, baseline, shardings, added_losses or {})

    def step(state: TrainState, frozen: Any, batch: Batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        rows = jnp.arange(batch.tokens[..., 0].size).reshape(batch.tokens.shape[:2])
        keys = jax.vmap(jax.vmap(partial(jax.random.fold_in, rng)))(rows)
        with jax.named_scope("gradients"):
            grads, metrics = gradients(state.trainable, frozen, batch, keys)
        with jax.named_scope("optimizer"):
            loss, weight = metrics["loss"]
            scale = jnp.where(weight > 0, 1.0 / jnp.maximum(weight, 1e-30), 0.0)
            norm = scale * optax.tree.norm(grads)

            loads, _ = metrics.pop("expert_load", ({}, 0))
            if bias_rate and not loads:
                raise UserError("model.router_bias_rate" + NO_METRICS)

            def update(trainable, opt_state, grads, loads):
                clipped = clip(grads, norm, max_norm, scale)
                updates, opt_state = optimizer.update(clipped, opt_state, trainable)
                trainable = optax.apply_updates(trainable, updates)
                return balanced(trainable, loads, bias_rate), opt_state

            old = state.trainable, state.opt_state
            finite = jnp.isfinite(norm) & jnp.isfinite(loss)
            args = grads, loads
            trainable, opt_state = update_if(finite, update, old, *args, offloaded=offloaded)
        rate = jnp.asarray(schedule(state.step), jnp.float32)
        metrics |= {"grad_norm": (norm, jnp.ones(())), "learning_rate": (rate, jnp.ones(()))}
        if loads:
            metrics["max_expert_load"] = (largest_load(loads), jnp.ones(()))
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return step


def balanced(trainable: Any, loads: dict[str, jax.Array], rate: float) -> Any:
    """The weights after each router's bias has moved by `rate`: up for experts whose load is below
    the mean of their layer, down for those above it (arXiv:2408.15664, algorithm 1).

    loads: {stack: tokens of the update that chose the expert, [L, E]}.
    """
    for stack, load_LE in loads.items() if rate else ():
        below_LE = jnp.sign(jnp.mean(load_LE, 1, keepdims=True) - load_LE)
        layers, mlp = trainable[stack], trainable[stack]["mlp"]
        bias = mlp["choice_bias"]  # [L, E], or [E] of a layer that is in no stack
        mlp = mlp | {"choice_bias": bias + rate * below_LE.reshape(bias.shape)}
        trainable = trainable | {stack: layers | {"mlp": mlp}}
    return trainable


def largest_load(loads: dict[str, jax.Array]) -> jax.Array:
    """The largest load of an expert relative to the mean of its layer. loads: {stack: [L, E]}."""
    layers = jnp.concatenate(list(loads.values()))
    return jnp.max(layers / jnp.maximum(jnp.mean(layers, 1, keepdims=True), 1e-30))


def make_gradients(
    models: Models,
    objective: Callable[..., Any],
    baseline: Any,
    shardings: Any,
    added_losses: Mapping[str, float],
) -> Callable[..., Any]:
    """(trainable, frozen, batch [A, B, T], row keys [A, B]) -> (float32 gradients of the loss sum,
    metrics). The arguments are those of `make_step`.

    On a mesh each device computes the gradients of its own rows, which are then summed.
    """

    def loss_of(trainable, frozen, batch, keys, shares):
        model, reference = models(trainable, frozen)
        loss, weight, metrics = objective(model, batch, keys, reference)
        for name, coefficient in added_losses.items():
            loss = loss + coefficient * shares[name] * metrics[name][0]
        counts = {
            name: (jnp.sum(mask, dtype=jnp.float32), jnp.zeros(()))
            for name, mask in (("tokens", batch.segment_ids != 0), ("learned", batch.weights > 0))
        }
        return loss, {"loss": (loss, weight)} | metrics | counts

    def micro_batch_gradients(trainable, frozen, shares, batch, keys):
        grads, metrics = jax.grad(loss_of, has_aux=True)(trainable, frozen, batch, keys, shares)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        if shardings is not None:
            grads = jax.tree.map(scatter_whole, grads, weights, gradients)
        return grads, metrics

    def local_gradients(trainable, frozen, batch, keys):
        if baseline is not None:
            with jax.named_scope("baseline"):
                sums = jax.lax.map(partial(baseline, *models(trainable, frozen)), batch)
                total, weight = across_rows(jax.lax.psum, jax.tree.map(jnp.sum, sums))
                batch = with_baseline(batch, total / jnp.maximum(weight, 1.0))
        shares = {}
        if added_losses:
            of = models, objective, added_losses, trainable, frozen
            shares = weight_shares(*of, batch, keys)
        return accumulated(partial(micro_batch_gradients, trainable, frozen, shares), batch, keys)

    if shardings is None:
        return local_gradients

    weights, frozen, gradients = (
        jax.tree.map(lambda sharding: sharding.spec, tree)
        for tree in (shardings.weights, shardings.frozen, shardings.gradients)
    )

    def scatter_whole(g, weight, gradient):
        """Reduce-scatters the gradient of a replicated weight where gradients are split: ZeRO-2."""
        if fsdp_dim(gradient) < 0 or fsdp_dim(weight) >= 0:
            return g
        return scattered(g, fsdp_dim(gradient), keep_axes(gradient, automatic_axes()))

    def summed_gradients(*args):
        with reducing(shardings.reduction):
            grads, metrics = local_gradients(*args)
            grads = jax.tree.map(summed_gradient, grads, gradients)
            return grads, across_rows(jax.lax.psum, metrics)

    in_specs = weights, frozen, P(None, ROWS), P(None, ROWS)
    run = shard_over_rows(summed_gradients, shardings.mesh, in_specs, (gradients, P()))

    def sharded_gradients(*args):
        grads, metrics = run(*args)
        return jax.lax.with_sharding_constraint(grads, shardings.gradients), metrics

    return sharded_gradients


def weight_shares(
    models: Models,
    objective: Callable[..., Any],
    added_losses: Iterable[str],
    trainable: Any,
    frozen: Any,
    batch: Batch,
    keys: Any,
) -> dict[str, jax.Array]:
    """{added loss: the weight of an update's loss divided by that of the metric}.

    The sums of added losses are multiplied by it, since the sum of all losses is divided by the
    weight. No weight depends on the model, so no forward pass is computed.
    """

    def sums(inputs: Any) -> Any:
        rows, keys = inputs
        model, reference = models(trainable, frozen)
        _, weight, metrics = objective(model, rows, keys, reference)
        for name in added_losses:
            if name not in metrics:
                raise UserError(f"model.{name}" + NO_METRICS)
        return weight, {name: metrics[name][1] for name in added_losses}

    totals = jax.tree.map(jnp.sum, jax.lax.map(sums, (batch, keys)))
    weight, own = across_rows(jax.lax.psum, totals)
    return {name: jnp.where(w > 0, weight / jnp.maximum(w, 1e-30), 0.0) for name, w in own.items()}


def accumulated(run: Callable[..., Any], batch: Batch, keys: jax.Array) -> Any:
    """The sum of `run(batch[a], keys[a])` over the A micro-batches [B, T]."""
    first = jax.tree.map(lambda x: x[0], (batch, keys))
    if len(batch.tokens) == 1:
        return run(*first)

    def add(total, xs):
        return jax.tree.map(jnp.add, total, run(*xs)), None

    shapes = jax.eval_shape(run, *first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (batch, keys))[0]


def weight_shardings(state: Any, mesh: Mesh, *, replicated: bool) -> Any:
    """NamedShardings of weights (a quantized one has two), split or `replicated` along fsdp."""

    drop = "fsdp" if replicated else ""

    def sharded(variable: Any) -> Any:
        axes, value = axes_of(variable), variable.get_value()
        shardings = jax.tree.map(lambda x: param_sharding(mesh, axes, x.shape, drop=drop), value)
        return variable.replace(shardings)

    state = jax.tree.map(sharded, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return nnx.to_pure_dict(state)


def state_shardings(
    state: Any, optimizer: Any, mesh: Mesh, cfg: TrainConfig
) -> tuple[Any, Any, Any]:
    """NamedShardings of (weights, gradients, optimizer state) of a run."""
    weights, gradients, moments = (
        weight_shardings(state, mesh, replicated=cfg.mesh.zero < stage) for stage in (3, 2, 1)
    )
    params = nnx.to_pure_dict(state)
    opt_state = jax.eval_shape(optimizer.init, params)
    moments = opt_state_shardings(opt_state, params, moments)
    if cfg.optim.offload:
        moments = in_memory(moments, "pinned_host")
    return weights, gradients, moments
