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

from jaxllm.model.adapter import Adapter
from jaxllm.model.config import Experts, ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.layers import ACTIVATIONS, MLP, Linear
from jaxllm.ops.grouped import by_group, grouped, permuted
from jaxllm.ops.matmul import product


def route(
    logits_NE: jax.Array, bias_E: jax.Array | None, experts: Experts
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(weights float32 [N, C], chosen experts int32 [N, C], scores float32 [N, E]).

    The bias takes part in the choice alone (arXiv:2408.15664). Of equal scores the first is chosen.
    """
    score = jax.nn.softmax if experts.score == "softmax" else jax.nn.sigmoid
    scores_NE = score(logits_NE.astype(jnp.float32))
    choice_NE = lax.stop_gradient(scores_NE)
    if bias_E is not None:
        choice_NE = choice_NE + bias_E.astype(jnp.float32)
    if experts.groups > 1:  # the best groups, by the sum of their two best experts
        by_group = choice_NE.reshape(len(choice_NE), experts.groups, -1)
        best = jnp.sum(lax.top_k(by_group, 2)[0], -1)
        _, kept = lax.top_k(best, experts.top_groups)
        mask = jnp.any(jnp.arange(experts.groups)[None, :, None] == kept[:, None], -1)
        choice_NE = jnp.where(mask[..., None], by_group, -jnp.inf).reshape(choice_NE.shape)
    chosen_NC = lax.top_k(choice_NE, experts.top_k)[1]
    weights_NC = jnp.take_along_axis(scores_NE, chosen_NC, 1)
    if experts.renormalised:
        total = jnp.sum(weights_NC, -1, keepdims=True)
        weights_NC = weights_NC / jnp.maximum(total, experts.least_sum)
    return weights_NC * experts.scale, chosen_NC, scores_NE


class Kernels(nnx.Module):
    """The matrices of all experts, [E, I, O]."""

    def __init__(
        self,
        cfg: ModelConfig,
        path: str,
        axes: tuple[str, str],
        shape: tuple[int, int],
        *,
        peft: Adapter,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        assert cfg.experts is not None
        shape = (cfg.experts.count, *shape)
        kernel = jax.random.normal(rngs.params(), shape, jnp.float32) * cfg.initializer_range
        self.kernel = nnx.Param(kernel.astype(dtype), axes=("experts", *axes))

    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        return grouped(x, self.kernel.get_value(), sizes)


class MoE(nnx.Module):
    """Σ of the chosen experts' outputs, weighted by the router, and of the shared expert's."""

    def __init__(self, cfg: ModelConfig, *, peft: Adapter, dtype: Any, rngs: nnx.Rngs):
        experts = cfg.experts
        assert experts is not None
        D, F = cfg.hidden_size, experts.size
        keys: dict[str, Any] = dict(peft=peft, dtype=dtype, rngs=rngs)
        router = jax.random.normal(rngs.params(), (D, experts.count)) * cfg.initializer_range
        self.router = nnx.Param(router.astype(dtype), axes=("embed", "router"))
        self.bias = (
            nnx.Param(jnp.zeros(experts.count), axes=("router",)) if experts.has_bias else None
        )
        make = partial(Kernels, cfg, **keys)
        self.gate = make("layers.mlp.experts.gate", ("embed", "mlp"), (D, F))
        self.up = make("layers.mlp.experts.up", ("embed", "mlp"), (D, F))
        self.down = make("layers.mlp.experts.down", ("mlp", "embed"), (F, D))
        self.shared = self.shared_gate = None
        if experts.shared_size:
            self.shared = MLP(cfg, "layers.mlp.shared", experts.shared_size, **keys)
        if experts.shared_gate:
            path, axes = "layers.mlp.shared_gate", ("embed", None)
            self.shared_gate = Linear(cfg, path, axes, (D, 1), **keys)
        self.cfg = cfg

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        experts, activation = self.cfg.experts, ACTIVATIONS[self.cfg.activation]
        assert experts is not None
        x_ND = x.reshape(-1, x.shape[-1])
        logits_NE = product(x_ND, self.router[...].astype(x.dtype), (1, 0), jnp.float32)
        bias = None if self.bias is None else self.bias[...]
        weights_NC, chosen_NC, _ = route(logits_NE, bias, experts)
        order, inverse, sizes = by_group(chosen_NC.ravel(), experts.count)
        rows = permuted(jnp.repeat(x_ND, experts.top_k, 0), order, inverse)
        hidden = activation(self.gate(rows, sizes)) * self.up(rows, sizes)
        out = permuted(self.down(hidden, sizes), inverse, order)
        out_NCD = out.reshape(*chosen_NC.shape, -1).astype(jnp.float32)
        y = jnp.sum(out_NCD * weights_NC[..., None], 1).astype(x.dtype).reshape(x.shape)
        if self.shared is None:
            return y
        shared = self.shared(x, ctx)
        if self.shared_gate is not None:
            shared = shared * jax.nn.sigmoid(self.shared_gate(x, ctx))
        return y + shared
