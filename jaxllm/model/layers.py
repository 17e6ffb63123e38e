# SPDX-License-Identifier: Apache-2.0
"""Linear, Embed, RMSNorm, MLP and rotary positions.

Dims: B rows, T tokens, D model width, I in, O out, H heads, K head_dim, V vocabulary.
Weights are float32 or bfloat16; activations keep the dtype they come in.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from jaxllm.mesh import constrain, gathered
from jaxllm.model.config import ModelConfig, Rope

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def transposed(x: jax.Array) -> jax.Array:
    """[I, O] -> [O, I], written out row by row where the CPU's fast product needs it so.

    XLA folds a transpose into the product that reads it; on CPU the folded form is a slower kernel
    (bf16: 180 against 370 GFLOP/s), so the layout is pinned there; on one device, since a pinned
    layout is not divided among several.
    """
    alone = jax.sharding.get_abstract_mesh().size <= 1
    if jax.default_backend() == "cpu" and x.dtype == jnp.bfloat16 and alone:
        return with_layout_constraint(x.T, Layout((0, 1)))
    return x.T


def product(x: jax.Array, w: jax.Array, contract: tuple[int, int], dtype: Any) -> jax.Array:
    """One matrix product with float32 accumulation, its result rounded once to `dtype`."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    # A CPU multiplies bfloat16 fast only when asked for float32 results; others keep the sum in
    # float32 inside and write the short form.
    wide = jnp.float32 if jax.default_backend() == "cpu" else dtype
    return lax.dot_general(x, w, dims, preferred_element_type=wide).astype(dtype)


def weight_gradient(x: jax.Array, g: jax.Array, dtype: Any) -> jax.Array:
    """xᵀ g over all leading dims: [..., I], [..., O] -> [I, O]; the smaller side is transposed."""
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return product(transposed(x), g, (1, 0), dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot(x: jax.Array, w: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """x [..., I] · w [I, O] in x's dtype; the gradient of w comes out in w's dtype, unrounded.

    `axes` are w's logical axes: what ZeRO-3 has split is gathered here, after the cast.
    """
    return product(x, gathered(w.astype(x.dtype), axes), (x.ndim - 1, 0), x.dtype)


def _dot_forward(x: jax.Array, w: jax.Array, axes: tuple[str | None, ...]):
    return dot(x, w, axes), (x, w)


def _dot_backward(axes: tuple[str | None, ...], saved, g):
    x, w = saved
    g = g.astype(x.dtype)
    dx = product(g, gathered(w.astype(x.dtype), axes), (g.ndim - 1, 1), x.dtype)
    return dx, weight_gradient(x, g, w.dtype)


dot.defvjp(_dot_forward, _dot_backward)


def softcapped(logits: jax.Array, cap: float) -> jax.Array:
    """cap · tanh(logits / cap), within (-cap, cap); 0 leaves them as they are."""
    return cap * jnp.tanh(logits / cap) if cap else logits


class Linear(nnx.Module):
    """y = x W + b. `kernel` is [I, O]: the transpose of a torch Linear's weight."""

    def __init__(
        self,
        cfg: ModelConfig,
        axes: tuple[str, str],
        shape: tuple[int, int],
        *,
        bias: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kernel = jax.random.normal(rngs.params(), shape, jnp.float32) * cfg.initializer_range
        self.kernel = nnx.Param(kernel.astype(dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros(shape[1], dtype), axes=axes[1:]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        axes = self.kernel.get_metadata("axes")[-2:]
        y = checkpoint_name(dot(x, self.kernel[...], axes), "dot")
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Embed(nnx.Module):
    """Token table [V, D]."""

    def __init__(self, cfg: ModelConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        shape = (cfg.vocab_size, cfg.hidden_size)
        table = jax.random.normal(rngs.params(), shape, jnp.float32) * cfg.initializer_range
        self.embedding = nnx.Param(table.astype(dtype), axes=("vocab", "embed"))

    def __call__(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        x = jnp.take(self.embedding[...], tokens, axis=0, mode="clip").astype(dtype)
        return constrain(x, "batch", "length", "features")


class RMSNorm(nnx.Module):
    """x / rms(x) · (offset + scale) over the last dim, statistics in float32 (arXiv:1910.07467)."""

    def __init__(self, cfg: ModelConfig, size: int, *, dtype: Any = jnp.float32):
        start = 1.0 - cfg.norm_offset
        self.scale = nnx.Param(jnp.full(size, start, dtype), axes=("norm",))
        self.eps, self.offset = cfg.norm_eps, cfg.norm_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        unit = wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        return (unit * (self.offset + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class MLP(nnx.Module):
    """Gated feed-forward: down(act(gate x) · up x)."""

    def __init__(self, cfg: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        D, F = cfg.hidden_size, cfg.intermediate_size
        keys: dict[str, Any] = dict(bias=cfg.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate = Linear(cfg, ("embed", "mlp"), (D, F), **keys)
        self.up = Linear(cfg, ("embed", "mlp"), (D, F), **keys)
        self.down = Linear(cfg, ("mlp", "embed"), (F, D), **keys)
        self.activation = cfg.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


def rope_frequencies(rope: Rope, head_dim: int, length: int) -> tuple[np.ndarray, float]:
    """Angle per position of each rotated pair, float32 [R/2], and what cos and sin are scaled by.

    `length` (tokens in the row or the cache) chooses between longrope's short and long factors.
    linear: positions / factor. llama3: long wavelengths / factor, a ramp between. yarn
    (arXiv:2309.00071): the same by rotations over the original length. longrope (arXiv:2402.13753).
    Rounded to float32 where transformers rounds: a last bit here is an angle at far positions.
    """
    rotated = int(head_dim * rope.partial)
    exponent = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    base = (rope.theta ** exponent.astype(np.float64)).astype(np.float32)
    inverse = 1 / base
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "llama3":
        # torch divides a number by a tensor as reciprocal times number: two roundings.
        wavelength = (1 / inverse) * (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        smooth = np.clip(((1 / wavelength) * rope.original_length - low) / (high - low), 0, 1)
        inverse = (1 - smooth) * inverse / rope.factor + smooth * inverse
    elif rope.kind == "yarn":

        def pair_of(rotations: float) -> float:
            span = rope.original_length / (rotations * 2 * math.pi)
            return rotated * math.log(span) / (2 * math.log(rope.theta))

        low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotated - 1)
        place = np.arange(rotated // 2, dtype=np.float32)
        kept = 1 - np.clip((place - low) / (high - low or 1e-3), 0, 1)
        inverse = 1 / (rope.factor * base) * (1 - kept) + inverse * kept
    elif rope.kind == "longrope":
        stretched = length > rope.original_length
        factors = rope.long_factor if stretched else rope.short_factor
        inverse = 1 / (np.asarray(factors, np.float32) * base)
    assert inverse.dtype == np.float32
    return inverse, rope.mscale


def rope_table(rope: Rope, head_dim: int, positions: jax.Array, length: int):
    """cos and sin of positions [B, T], float32 [B, T, 1, R/2]."""
    inverse, mscale = rope_frequencies(rope, head_dim, length)
    angle = positions.astype(jnp.float32)[..., None, None] * inverse
    return jnp.cos(angle) * mscale, jnp.sin(angle) * mscale


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """Rotates the two halves of x [B, T, H, K] (its first R features) by the table's angles."""
    return x if table is None else _rotate(x, *table)


@jax.custom_vjp
def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype(x.dtype)


# The gradient turns back: the transpose of a rotation, in the forward pass's own fast form.
_rotate.defvjp(
    lambda x, cos, sin: (_rotate(x, cos, sin), (cos, sin)),
    lambda table, g: (_rotate(g, table[0], -table[1]), None, None),
)
