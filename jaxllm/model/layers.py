# SPDX-License-Identifier: Apache-2.0
"""Linear, Embed, norms, MLP and rotary positions.

Dims: B rows, T tokens, D model width, I in, O out, H heads, K head_dim, V vocabulary.
Weights are float32 or bfloat16; activations keep the dtype they come in.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxllm.collectives import gathered
from jaxllm.errors import UserError
from jaxllm.mesh import Axes, constrain
from jaxllm.model.adapter import Adapter
from jaxllm.model.config import ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.parts import gathered_layer, shapes_of, split_into_blocks
from jaxllm.ops.embedding import TABLE_AXES, lookup
from jaxllm.ops.matmul import dots
from jaxllm.ops.quantized import Quantized, dense
from jaxllm.ops.residuals import saveable

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class Linear(nnx.Module):
    """y = x W + b. `kernel` is [I, O]: the transpose of a torch Linear's weight."""

    def __init__(
        self,
        cfg: ModelConfig,
        path: str,
        axes: Axes,
        shape: tuple[int, int],
        *,
        peft: Adapter,
        bias: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kernel = jax.random.normal(rngs.params(), shape, jnp.float32) * cfg.initializer_range
        self.kernel = nnx.Param(kernel.astype(dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros(shape[1], dtype), axes=axes[1:]) if bias else None
        self.lora = peft.linear(path, axes, shape, rngs)

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        return self.output(x, products(x, (self,))[0], ctx)

    def output(self, x: jax.Array, y: jax.Array, ctx: Context) -> jax.Array:
        """The output from the product y of x and the kernel."""
        y = saveable(y, "dot")
        if self.lora is not None:
            y = self.lora(x, y, self.dense, ctx)
        return self.biased(y)

    def biased(self, y: jax.Array) -> jax.Array:
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def dense(self) -> jax.Array:
        """The kernel in float32."""
        return dense(self.kernel.get_value(), jnp.float32)


class Embed(nnx.Module):
    """Token table [V, D]."""

    def __init__(
        self,
        cfg: ModelConfig,
        path: str,
        shape: tuple[int, int],
        *,
        peft: Adapter,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        table = jax.random.normal(rngs.params(), shape, jnp.float32) * cfg.initializer_range
        self.embedding = nnx.Param(table.astype(dtype), axes=TABLE_AXES)
        self.lora = peft.linear(path, TABLE_AXES, shape, rngs)
        self.shape = shape

    def __call__(self, tokens: jax.Array, dtype: Any, ctx: Context) -> jax.Array:
        table = self.embedding[...]
        x = lookup(table, tokens, self.shape[1], dtype)
        if self.lora is not None:
            x = self.lora(tokens, x, lambda: gathered(table, TABLE_AXES, self.shape), ctx)
        return constrain(x, "batch", "sequence", "features")


def unit_rms(x: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last dim, in x's dtype; computed in float32."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) · (offset + scale) over the last dim, statistics in float32 (arXiv:1910.07467)."""

    def __init__(self, cfg: ModelConfig, size: int, *, dtype: Any = jnp.float32):
        start = jnp.full(size, 1.0 - cfg.norm_offset, dtype)
        self.scale = nnx.Param(start, axes=("norm",)) if cfg.norm_weight else None
        self.eps, self.offset = cfg.norm_eps, cfg.norm_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scaled(x.astype(jnp.float32)).astype(x.dtype)

    def scaled(self, x: jax.Array) -> jax.Array:
        y = unit_rms(x, self.eps)
        return y if self.scale is None else y * (self.offset + self.scale[...].astype(jnp.float32))


class LayerNorm(RMSNorm):
    """RMSNorm of x minus its mean, plus a shift where the family has one (arXiv:1607.06450)."""

    def __init__(self, cfg: ModelConfig, size: int, *, dtype: Any = jnp.float32):
        super().__init__(cfg, size, dtype=dtype)
        self.shift = nnx.Param(jnp.zeros(size, dtype), axes=("norm",)) if cfg.norm_bias else None

    def scaled(self, x: jax.Array) -> jax.Array:
        y = super().scaled(x - jnp.mean(x, -1, keepdims=True))
        return y if self.shift is None else y + self.shift[...].astype(jnp.float32)


class XIELU(nnx.Module):
    """α x² + β x for positive x, else α' (e^min(x, ε) - 1 - x) + β x (arXiv:2411.13010).

    α is softplus(above), α' is β + softplus(below). β and ε, the slope and the limit, are not
    trained.
    """

    def __init__(self, dtype: Any):
        def learned(alpha: float) -> nnx.Param:
            return nnx.Param(jnp.full(1, math.log(math.expm1(alpha)), dtype), axes=(None,))

        self.above, self.below = learned(0.8), learned(0.3)
        self.slope = nnx.Param(jnp.asarray(0.5, dtype), axes=())
        self.limit = nnx.Param(jnp.asarray(-1e-6, dtype), axes=())

    def __call__(self, x: jax.Array) -> jax.Array:
        above, below = (jax.nn.softplus(w[...]).astype(x.dtype) for w in (self.above, self.below))
        slope, limit = (lax.stop_gradient(w[...]).astype(x.dtype) for w in (self.slope, self.limit))
        negative = (slope + below) * (jnp.expm1(jnp.minimum(x, limit)) - x)
        return jnp.where(x > 0, above * x * x, negative) + slope * x


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


class MLP(nnx.Module):
    """Feed-forward: down(act(gate x) · up x), or down(act(up x)) without a gate."""

    def __init__(
        self, cfg: ModelConfig, path: str, F: int, *, peft: Adapter, dtype: Any, rngs: nnx.Rngs
    ):
        D = cfg.hidden_size
        keys: dict[str, Any] = dict(peft=peft, bias=cfg.mlp_bias, dtype=dtype, rngs=rngs)
        linear = partial(Linear, cfg, axes=("embed", "mlp"), shape=(D, F), **keys)
        self.gate = linear(f"{path}.gate") if cfg.gated_mlp else None
        self.up = linear(f"{path}.up")
        self.down = Linear(cfg, f"{path}.down", ("mlp", "embed"), (F, D), **keys)
        self.gate_up = peft.linear(f"{path}.gate_up", ("embed", "mlp"), (D, 2 * F), rngs)
        self.xielu = XIELU(dtype) if cfg.activation == "xielu" else None
        self.activation = cfg.activation

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        if ctx.mlp_blocks > 1:
            return self.in_blocks(x, ctx)
        activation = self.xielu or ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(activation(self.up(x, ctx)), ctx)
        gate, up = fused(self.gate_up, x, (self.gate, self.up), ctx)
        return self.down(activation(gate) * up, ctx)

    def obstacle(self, blocks: int) -> str:
        """Why the hidden features cannot be computed in so many blocks on the mesh in context;
        empty if they can."""
        mesh: dict[str, int] = dict(jax.sharding.get_abstract_mesh().shape)
        parts = (self.gate, self.up, self.down)
        branches = [p.lora for p in parts if p is not None and p.lora is not None]
        if isinstance(self.up.kernel.get_value(), Quantized):
            return "its weights are quantized"
        if mesh.get("tensor", 1) > 1:
            return "mesh.tensor splits them already"
        if self.down.bias is not None:
            return "the MLP has biases"
        if self.gate_up is not None:
            return "the adapter has one LoRA branch for gate and up"
        if not all(branch.additive for branch in branches):
            return "its LoRA branches have dropout or the norms of DoRA"
        features, fsdp = shapes_of(self.down.kernel)[0][0], mesh.get("fsdp", 1)
        parts = fsdp if features % fsdp == 0 else 1
        if features % (parts * blocks):
            each = f"{features:,} / fsdp {parts} = {features // parts:,}"
            return f"{blocks} is not a divisor of {each} features"
        return ""

    def in_blocks(self, x: jax.Array, ctx: Context) -> jax.Array:
        """The output as a sum over blocks of the hidden features, one after another.

        Each block's weights are gathered when it runs and again in its backward pass, and their
        gradients are scattered before the next block. Sums over blocks are in float32.
        """
        if obstacle := self.obstacle(ctx.mlp_blocks):
            raise UserError(f"mlp_blocks {ctx.mlp_blocks} is not possible: {obstacle}")
        graph, weights = nnx.split(self)
        blocks, others = split_into_blocks(weights, "mlp", ctx.mlp_blocks)
        wide, ctx = x.astype(jnp.float32), replace(ctx, mlp_blocks=1)

        @partial(jax.checkpoint, prevent_cse=False)
        def add(y: jax.Array, block: Any) -> tuple[jax.Array, None]:
            whole = gathered_layer(nnx.merge_state(block, others), x.dtype)
            part = nnx.merge(graph, whole)(wide.astype(x.dtype), ctx)
            return y + part.astype(y.dtype), None

        return lax.scan(add, jnp.zeros_like(wide), blocks)[0].astype(x.dtype)


def products(x: jax.Array, parts: tuple[Linear, ...]) -> list[jax.Array]:
    """The product of x and the kernel of each part."""
    kernels = [part.kernel for part in parts]
    return dots(x, [k.get_value() for k in kernels], [k.get_metadata("axes")[-2:] for k in kernels])


def fused(lora: Any, x: jax.Array, parts: tuple[Linear, ...], ctx: Context) -> list[jax.Array]:
    """The output of each part. `lora` is one branch for all parts, if HF has them in one tensor."""
    ys = products(x, parts)
    if lora is None:
        return [part.output(x, y, ctx) for part, y in zip(parts, ys, strict=True)]
    ys = [saveable(y, "dot") for y in ys]
    ends = np.cumsum([y.shape[-1] for y in ys])[:-1]

    def kernel() -> jax.Array:
        return jnp.concatenate([part.dense() for part in parts], -1)

    ys = jnp.split(lora(x, jnp.concatenate(ys, -1), kernel, ctx), ends, -1)
    return [part.biased(y) for part, y in zip(parts, ys, strict=True)]
