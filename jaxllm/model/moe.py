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
from jaxllm.model.expert_axis import over_experts
from jaxllm.model.layers import ACTIVATIONS, MLP, Linear, RMSNorm, unit_rms
from jaxllm.model.routing import Routing, routing_of
from jaxllm.ops.grouped import by_group, grouped, permuted
from jaxllm.ops.matmul import product
from jaxllm.ops.residuals import saveable

OBSTACLE = "its MLP is a mixture of experts"
UP, DOWN = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
# Dims of what `over_mesh` splits: kernels, biases, and A and B of LoRA.
MATRICES = {"gate": UP, "up": UP, "down": DOWN}
DIMS: dict[str, tuple[str | None, ...]] = {
    **MATRICES,
    **{f"{name}_bias": (e, o) for name, (e, _, o) in MATRICES.items()},
    **{f"{name}_a": (e, i, None) for name, (e, i, _) in MATRICES.items()},
    **{f"{name}_b": (e, None, o) for name, (e, _, o) in MATRICES.items()},
    "gate_up_a": (*UP[:2], None),
    "scale": ("experts",),
}


def route(
    logits_NE: jax.Array, bias_E: jax.Array | None, experts: Experts
) -> tuple[jax.Array, jax.Array]:
    """(weights float32 [N, C], chosen experts int32 [N, C]).

    The bias takes part in the choice alone (arXiv:2408.15664). Of equal scores the first is chosen.
    """
    score = jax.nn.softmax if experts.score == "softmax" else jax.nn.sigmoid
    scores_NE = score(logits_NE.astype(jnp.float32))
    choice_NE = lax.stop_gradient(scores_NE)
    if experts.score == "sigmoid" and bias_E is None and experts.groups == 1:
        choice_NE = lax.stop_gradient(logits_NE)  # of which fewer are equal
    if bias_E is not None:
        choice_NE = choice_NE + lax.stop_gradient(bias_E.astype(jnp.float32))
    if experts.groups > 1:
        choice_NGE = choice_NE.reshape(len(choice_NE), experts.groups, -1)
        group_NG = lax.top_k(choice_NGE, experts.group_best)[0].sum(-1)
        best = lax.top_k(group_NG, experts.top_groups)[1]
        kept_NG = jax.nn.one_hot(best, experts.groups).sum(1) > 0
        choice_NE = jnp.where(kept_NG[..., None], choice_NGE, -jnp.inf).reshape(choice_NE.shape)
    chosen_NC = lax.top_k(choice_NE, experts.top_k)[1]
    weights_NC = jnp.take_along_axis(scores_NE, chosen_NC, 1)
    if experts.renormalised:
        total_N1 = jnp.sum(weights_NC, -1, keepdims=True)
        total_N1 = total_N1 + experts.sum_eps if experts.sum_eps else total_N1
        weights_NC = weights_NC / total_N1
    weights_NC = weights_NC if experts.scale == 1 else weights_NC * experts.scale
    return weights_NC, chosen_NC


def nothing_routed(mlp: Any, x_BTD: jax.Array) -> Routing | None:
    """The sums before the first layer; None if its MLP has no experts."""
    if not isinstance(mlp, MoE):
        return None
    zeros = jnp.zeros(x_BTD.shape[:2])
    by_expert = jnp.zeros((*zeros.shape, mlp.router.get_value().shape[-1]))
    return Routing(by_expert, by_expert, zeros, zeros)


class Kernels(nnx.Module):
    """The matrices of all experts, [E, I, O], and their biases [E, O]."""

    def __init__(
        self,
        cfg: ModelConfig,
        path: str,
        axes: tuple[str, ...],
        shape: tuple[int, ...],
        *,
        peft: Adapter,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        kernel = jax.random.normal(rngs.params(), shape, jnp.float32) * cfg.initializer_range
        self.kernel = nnx.Param(kernel.astype(dtype), axes=axes)
        zeros = jnp.zeros((shape[0], shape[2]), dtype)
        biased = cfg.experts is not None and cfg.experts.bias
        self.bias = nnx.Param(zeros, axes=(axes[0], axes[2])) if biased else None
        self.lora = peft.experts(path, axes, shape, rngs)


class MoE(nnx.Module):
    """Σ of the chosen experts' outputs, weighted by the router, and of the shared expert's."""

    def __init__(self, cfg: ModelConfig, path: str, *, peft: Adapter, dtype: Any, rngs: nnx.Rngs):
        experts = cfg.experts
        assert experts is not None
        E, D, F = experts.count, cfg.hidden_size, experts.size
        keys: dict[str, Any] = dict(peft=peft, dtype=dtype, rngs=rngs)
        router = jax.random.normal(rngs.params(), (D, E)) * cfg.initializer_range
        self.router = nnx.Param(router.astype(dtype), axes=("embed", "router"))
        self.choice_bias = nnx.Param(jnp.zeros(E), axes=("router",)) if experts.has_bias else None
        zeros = jnp.zeros(E, dtype)
        self.router_bias = nnx.Param(zeros, axes=("router",)) if experts.bias else None
        self.router_lora = peft.linear(f"{path}.router_lora", ("embed", "router"), (D, E), rngs)
        # W: features of what the experts read and give
        W, gated = experts.latent_size or D, cfg.gated_mlp
        self.gate = Kernels(cfg, f"{path}.gate", UP, (E, W, F), **keys) if gated else None
        self.up = Kernels(cfg, f"{path}.up", UP, (E, W, F), **keys)
        self.down = Kernels(cfg, f"{path}.down", DOWN, (E, F, W), **keys)
        self.gate_up = peft.experts(f"{path}.gate_up", UP, (E, W, 2 * F), rngs) if gated else None
        linear = partial(Linear, cfg, bias=cfg.mlp_bias, **keys)
        narrow, wide = ("embed", "latent"), ("latent", "embed")
        self.inward = linear(f"{path}.inward", narrow, (D, W)) if experts.latent_size else None
        self.outward = linear(f"{path}.outward", wide, (W, D)) if experts.latent_size else None
        self.shared = (
            MLP(cfg, f"{path}.shared", experts.shared_size, **keys) if experts.shared_size else None
        )
        self.shared_gate = (
            Linear(cfg, f"{path}.shared_gate", ("embed", None), (D, 1), **keys)
            if experts.shared_gate
            else None
        )
        norm = partial(RMSNorm, cfg, D, dtype=dtype)
        if experts.branch:
            self.norm, self.post_norm, self.shared_post_norm = norm(), norm(), norm()
            self.router_scale = nnx.Param(jnp.ones(D, dtype), axes=("norm",))
            self.scale = nnx.Param(jnp.ones(E, dtype), axes=("experts",))
        self.cfg, self.branch, self.mean = cfg, experts.branch, experts.shared_mean

    def obstacle(self, blocks: int) -> str:
        """As `MLP.obstacle`: why the hidden features cannot be computed in blocks."""
        return OBSTACLE

    def __call__(
        self, x_BTD: jax.Array, ctx: Context, stream_BTD: jax.Array
    ) -> tuple[jax.Array, Routing]:
        """(output [B, T, D], Routing). x: the residual stream after the norm of the MLP."""
        if ctx.mlp_blocks > 1:
            raise UserError(f"mlp_blocks {ctx.mlp_blocks} is not possible: {OBSTACLE}")
        bias = None if self.choice_bias is None else self.choice_bias[...]
        read_BTD = routed_BTD = x_BTD
        if self.branch:
            scale = self.router_scale[...].astype(x_BTD.dtype) * x_BTD.shape[-1] ** -0.5
            read_BTD = unit_rms(stream_BTD, self.cfg.norm_eps) * scale
            routed_BTD = self.norm(stream_BTD)
        router_DE = self.router[...].astype(x_BTD.dtype)
        logits_BTE = product(read_BTD, router_DE, (2, 0), jnp.float32)
        if self.router_bias is not None:
            logits_BTE = logits_BTE + self.router_bias[...].astype(jnp.float32)
        if self.router_lora is not None:
            logits_BTE = self.router_lora(read_BTD, logits_BTE, None, ctx)
        run, kernels = partial(routed, self.cfg), self.kernels(ctx)
        if self.inward is not None:
            routed_BTD = self.inward(routed_BTD, ctx)
        y_BTD, chosen_BTC = over_mesh(run, routed_BTD, logits_BTE, bias, kernels)
        if self.outward is not None:
            y_BTD = self.outward(y_BTD, ctx)
        routing = routing_of(logits_BTE, chosen_BTC, ctx.segment_ids != 0)
        if self.shared is None:
            return y_BTD, routing
        shared_BTD = self.shared(x_BTD, ctx)
        if self.shared_gate is not None:
            shared_BTD = shared_BTD * jax.nn.sigmoid(self.shared_gate(x_BTD, ctx))
        if self.branch:
            y_BTD, shared_BTD = self.post_norm(y_BTD), self.shared_post_norm(shared_BTD)
        total_BTD = y_BTD + shared_BTD
        return (total_BTD / 2 if self.mean else total_BTD), routing

    def kernels(self, ctx: Context) -> dict[str, Any]:
        """The weights of the experts, and A and B of LoRA, by their names in DIMS."""
        found: dict[str, Any] = {"scale": self.scale[...]} if self.branch else {}
        for name in ("gate", "up", "down") if self.gate is not None else ("up", "down"):
            part: Kernels = getattr(self, name)
            found[name] = part.kernel.get_value()
            if part.bias is not None:
                found[f"{name}_bias"] = part.bias[...]
            if part.lora is not None:
                found[f"{name}_a"], found[f"{name}_b"] = part.lora.factors_of_experts(ctx)
        if self.gate_up is not None:
            found["gate_up_a"], b = self.gate_up.factors_of_experts(ctx)
            found["gate_b"], found["up_b"] = jnp.split(b, 2, -1)
        return found


def routed(
    cfg: ModelConfig, x_BTD: jax.Array, logits_BTE: jax.Array, bias_E: Any, kernels: dict[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """(Σ of the outputs of each token's chosen experts, weighted; the chosen experts [B, T, C])."""
    experts = cfg.experts
    assert experts is not None
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    weights_NC, chosen_NC = route(logits_BTE.reshape(len(x_ND), -1), bias_E, experts)
    if len(jax.tree.leaves(kernels["up"])[0]) < experts.count:
        run = partial(weighted_rows, cfg)
        y_ND: Any = over_experts(run, x_ND, weights_NC, chosen_NC, kernels)
    else:
        order, inverse, sizes = by_group(chosen_NC.ravel(), experts.count)
        rows = jnp.repeat(x_ND, experts.top_k, 0)
        if experts.on_input:
            rows = weighted(rows, weights_NC.ravel())
            weights_NC = jnp.ones_like(weights_NC)
        rows = permuted(rows, order, inverse)
        out = expert_rows(cfg, rows, chosen_NC.ravel()[order], sizes, kernels)
        out_NCD = permuted(out, inverse, order).reshape(*chosen_NC.shape, -1).astype(jnp.float32)
        y_ND = jnp.sum(out_NCD * weights_NC[..., None], 1)
    y_BTD = y_ND.astype(x_BTD.dtype).reshape(x_BTD.shape)
    return y_BTD, chosen_NC.reshape(*x_BTD.shape[:2], -1)


def weighted(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Rows x [N, D] times their weights [N], in x's dtype."""
    return (x.astype(weights.dtype) * weights[:, None]).astype(x.dtype)


def weighted_rows(
    cfg: ModelConfig, rows: jax.Array, weights: jax.Array, *groups_and_kernels: Any
) -> jax.Array:
    """The weighted outputs of rows [M, D], float32; as `expert_rows`."""
    assert cfg.experts is not None
    if cfg.experts.on_input:
        rows, weights = weighted(rows, weights), jnp.ones_like(weights)
    out_MD = expert_rows(cfg, rows, *groups_and_kernels)
    return out_MD.astype(jnp.float32) * weights[:, None]


def expert_rows(
    cfg: ModelConfig, rows: jax.Array, group: jax.Array, sizes: jax.Array, kernels: dict[str, Any]
) -> jax.Array:
    """The outputs of rows [M, D] that are sorted by expert; `group` [M] is each row's expert."""
    experts, activation = cfg.experts, ACTIVATIONS[cfg.activation]
    assert experts is not None

    def linear(rows: jax.Array, name: str, inner: Any = None) -> jax.Array:
        """inner: the product of the rows and A, if it is not this matrix's own A."""
        y = saveable(grouped(rows, kernels[name], sizes), "dot")
        if (bias_EO := kernels.get(f"{name}_bias")) is not None:
            # In float32, in which the gradients of an expert's rows are then added.
            y = (y + bias_EO.astype(jnp.float32)[group]).astype(y.dtype)
        if f"{name}_b" not in kernels:
            return y
        inner = grouped(rows, kernels[f"{name}_a"], sizes) if inner is None else inner
        return y + grouped(inner, kernels[f"{name}_b"], sizes)

    inner = grouped(rows, kernels["gate_up_a"], sizes) if "gate_up_a" in kernels else None
    gate = linear(rows, "gate", inner) if cfg.gated_mlp else None
    up = linear(rows, "up", inner)
    if gate is None:
        hidden = activation(up)
    else:
        hidden = clamped(gate, up, experts) if experts.limit else activation(gate) * up
    y = linear(hidden, "down")
    if (scale_E := kernels.get("scale")) is None:
        return y
    return (y * scale_E.astype(jnp.float32)[group][:, None]).astype(y.dtype)


def clamped(gate: jax.Array, up: jax.Array, experts: Experts) -> jax.Array:
    gate, up = jnp.minimum(gate, experts.limit), jnp.clip(up, -experts.limit, experts.limit)
    return (up + 1) * gate * jax.nn.sigmoid(experts.alpha * gate)


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
    specs = {
        n: jax.tree.map(lambda leaf, n=n: spec(DIMS[n], leaf.shape, mesh, drop="fsdp"), w)
        for n, w in kernels.items()
    }
    stream, whole = stream_specs(x_BTD.shape)
    features = [n for n in specs if "mlp" in DIMS[n]]
    parts = [s[DIMS[n].index("mlp")] for n in features for s in jax.tree.leaves(specs[n])]
    split = all(part in ("tensor", ("tensor",)) for part in parts)  # JAX may unwrap a tuple of one
    if not split:  # e.g. the scales of a quantized weight do not divide
        stream, specs = whole, P()
    by_sequence = stream[1] != whole[1]

    def own(
        x_BTD: jax.Array, logits_BTE: jax.Array, bias_E: Any, kernels: dict[str, Any]
    ) -> tuple[jax.Array, jax.Array]:
        if split and "down_bias" in kernels:  # one device of those whose outputs are added has it
            first = lax.axis_index("tensor") == 0
            kernels = kernels | {"down_bias": jnp.where(first, kernels["down_bias"], 0)}
        if by_sequence:
            gather = partial(lax.all_gather, axis_name="tensor", axis=1, tiled=True)
            x_BTD, logits_BTE = gather(x_BTD), gather(logits_BTE)
        y_BTD, chosen_BTC = run(x_BTD, logits_BTE, bias_E, kernels)
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
