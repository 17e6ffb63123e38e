# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts in place of the MLP: the router, the experts, and the shared expert.

No token is dropped: the rows of all chosen experts are sorted by expert and multiplied in groups.

Dims: B rows, T tokens, N = B · T, D model width, E experts, C chosen ones, F hidden features.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxllm.errors import UserError
from jaxllm.mesh import automatic_axes, spec, stream_specs
from jaxllm.model.adapter import Adapter
from jaxllm.model.config import Experts, ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.layers import ACTIVATIONS, MLP, Linear
from jaxllm.model.routing import Routing, routing_of
from jaxllm.ops.grouped import by_group, grouped, permuted
from jaxllm.ops.matmul import product
from jaxllm.ops.residuals import saveable

OBSTACLE = "its MLP is a mixture of experts"
UP, DOWN = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")


def route(
    logits_NE: jax.Array, bias_E: jax.Array | None, experts: Experts
) -> tuple[jax.Array, jax.Array]:
    """(weights float32 [N, C], chosen experts int32 [N, C]).

    The bias takes part in the choice alone (arXiv:2408.15664). Of equal scores the first is chosen.
    """
    score = jax.nn.softmax if experts.score == "softmax" else jax.nn.sigmoid
    scores_NE = score(logits_NE.astype(jnp.float32))
    choice_NE = lax.stop_gradient(scores_NE)
    if bias_E is not None:
        choice_NE = choice_NE + lax.stop_gradient(bias_E.astype(jnp.float32))
    chosen_NC = lax.top_k(choice_NE, experts.top_k)[1]
    weights_NC = jnp.take_along_axis(scores_NE, chosen_NC, 1)
    if experts.renormalised:
        weights_NC = weights_NC / jnp.sum(weights_NC, -1, keepdims=True)
    return weights_NC, chosen_NC


def nothing_routed(mlp: Any, x_BTD: jax.Array) -> Routing | None:
    """The sums before the first layer; None if its MLP has no experts."""
    if not isinstance(mlp, MoE):
        return None
    zeros = jnp.zeros(x_BTD.shape[:2])
    by_expert = jnp.zeros((*zeros.shape, mlp.router.get_value().shape[-1]))
    return Routing(by_expert, by_expert, zeros, zeros)


class Kernels(nnx.Module):
    """The matrices of all experts, [E, I, O]."""

    def __init__(
        self, cfg: ModelConfig, axes: tuple[str, ...], shape: tuple[int, ...], dtype: Any, rngs: Any
    ):
        kernel = jax.random.normal(rngs.params(), shape, jnp.float32) * cfg.initializer_range
        self.kernel = nnx.Param(kernel.astype(dtype), axes=axes)


class MoE(nnx.Module):
    """Σ of the chosen experts' outputs, weighted by the router, and of the shared expert's."""

    def __init__(self, cfg: ModelConfig, *, peft: Adapter, dtype: Any, rngs: nnx.Rngs):
        experts = cfg.experts
        assert experts is not None
        E, D, F = experts.count, cfg.hidden_size, experts.size
        keys: dict[str, Any] = dict(peft=peft, dtype=dtype, rngs=rngs)
        router = jax.random.normal(rngs.params(), (D, E)) * cfg.initializer_range
        self.router = nnx.Param(router.astype(dtype), axes=("embed", "router"))
        self.choice_bias = nnx.Param(jnp.zeros(E), axes=("router",)) if experts.has_bias else None
        self.gate = Kernels(cfg, UP, (E, D, F), dtype, rngs)
        self.up = Kernels(cfg, UP, (E, D, F), dtype, rngs)
        self.down = Kernels(cfg, DOWN, (E, F, D), dtype, rngs)
        self.shared = (
            MLP(cfg, "layers.mlp.shared", experts.shared_size, **keys)
            if experts.shared_size
            else None
        )
        self.shared_gate = (
            Linear(cfg, "layers.mlp.shared_gate", ("embed", None), (D, 1), **keys)
            if experts.shared_gate
            else None
        )
        self.cfg = cfg

    def obstacle(self, blocks: int) -> str:
        """As `MLP.obstacle`: why the hidden features cannot be computed in blocks."""
        return OBSTACLE

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Routing]:
        if ctx.mlp_blocks > 1:
            raise UserError(f"mlp_blocks {ctx.mlp_blocks} is not possible: {OBSTACLE}")
        bias = None if self.choice_bias is None else self.choice_bias[...]
        kernels = {n: getattr(self, n).kernel.get_value() for n in ("gate", "up", "down")}
        router_DE = self.router[...].astype(x_BTD.dtype)
        logits_BTE = product(x_BTD, router_DE, (2, 0), jnp.float32)
        y_BTD, chosen_BTC = over_mesh(partial(routed, self.cfg), x_BTD, logits_BTE, bias, kernels)
        routing = routing_of(logits_BTE, chosen_BTC, ctx.segment_ids != 0)
        if self.shared is None:
            return y_BTD, routing
        shared_BTD = self.shared(x_BTD, ctx)
        if self.shared_gate is not None:
            shared_BTD = shared_BTD * jax.nn.sigmoid(self.shared_gate(x_BTD, ctx))
        return y_BTD + shared_BTD, routing


def routed(
    cfg: ModelConfig, x_BTD: jax.Array, logits_BTE: jax.Array, bias_E: Any, kernels: dict[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """(Σ of the outputs of each token's chosen experts, weighted; the chosen experts [B, T, C])."""
    experts, activation = cfg.experts, ACTIVATIONS[cfg.activation]
    assert experts is not None
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    weights_NC, chosen_NC = route(logits_BTE.reshape(len(x_ND), -1), bias_E, experts)
    order, inverse, sizes = by_group(chosen_NC.ravel(), experts.count)
    rows = permuted(jnp.repeat(x_ND, experts.top_k, 0), order, inverse)
    gate, up = (saveable(grouped(rows, kernels[n], sizes), "dot") for n in ("gate", "up"))
    out = saveable(grouped(activation(gate) * up, kernels["down"], sizes), "dot")
    out_NCD = permuted(out, inverse, order).reshape(*chosen_NC.shape, -1).astype(jnp.float32)
    y_ND = jnp.sum(out_NCD * weights_NC[..., None], 1).astype(x_BTD.dtype)
    return y_ND.reshape(x_BTD.shape), chosen_NC.reshape(*x_BTD.shape[:2], -1)


def over_mesh(
    run: Any, x_BTD: jax.Array, logits_BTE: jax.Array, bias_E: Any, kernels: dict[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """`run` for a device's own tokens, with its part of the hidden features.

    XLA's partitioner would sort the tokens of all devices. Along the tensor axis a device has a
    part of each expert's features, gathers the tokens, and sends parts of their outputs back.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or all(mesh.shape[a] == 1 for a in automatic_axes()):
        return run(x_BTD, logits_BTE, bias_E, kernels)
    axes = {"gate": UP, "up": UP, "down": DOWN}
    specs = {
        n: jax.tree.map(lambda leaf, n=n: spec(axes[n], leaf.shape, mesh, drop="fsdp"), w)
        for n, w in kernels.items()
    }
    stream, whole = stream_specs(x_BTD.shape)
    parts = [s[axes[n].index("mlp")] for n in specs for s in jax.tree.leaves(specs[n])]
    split = all(part == ("tensor",) for part in parts)
    if not split:  # e.g. the scales of a quantized weight do not divide
        stream, specs = whole, P()
    by_sequence = stream[1] != whole[1]

    def own(x_BTD: jax.Array, logits_BTE: jax.Array, *weights: Any) -> tuple[jax.Array, jax.Array]:
        if by_sequence:
            gather = partial(lax.all_gather, axis_name="tensor", axis=1, tiled=True)
            x_BTD, logits_BTE = gather(x_BTD), gather(logits_BTE)
        y_BTD, chosen_BTC = run(x_BTD, logits_BTE, *weights)
        if by_sequence:
            y_BTD = lax.psum_scatter(y_BTD, "tensor", scatter_dimension=1, tiled=True)
        elif split:
            y_BTD = lax.psum(y_BTD, "tensor")
        return y_BTD, chosen_BTC

    mapped = jax.shard_map(
        own,
        in_specs=(stream, stream, P(), specs),
        out_specs=(stream, whole),
        axis_names=automatic_axes(),
        check_vma=False,
    )
    return mapped(x_BTD, logits_BTE, bias_E, kernels)
