# SPDX-License-Identifier: Apache-2.0
"""Linear, Embed, RMSNorm, MLP and rotary positions.

Dims: B rows, T tokens, D model width, I in, O out, H heads, K head_dim, V vocabulary.
Weights are float32 or bfloat16; activations keep the dtype they come in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.experimental.layout import Layout, with_layout_constraint

from jaxllm.mesh import constrain
from jaxllm.model.config import ModelConfig, Rope
from jaxllm.model.quantized import Quantized, dense

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
    """xᵀ g over all leading dims: [..., I], [..., O] -> [I, O]."""
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    if g.shape[1] * 8 <= x.shape[1]:  # LoRA's A: the thin side is the one to turn round
        return lax.optimization_barrier(product(transposed(g), x, (1, 0), dtype)).T
    return product(transposed(x), g, (1, 0), dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot(x: jax.Array, w: Any, axes: tuple[str | None, ...]) -> jax.Array:
    """x [..., I] · w [I, O] in x's dtype; the gradient of w comes out in w's dtype, unrounded.

    `axes` are w's logical axes: what ZeRO-3 has split is gathered here, after the cast. A Quantized
    w is widened here, again in the backward pass, and has no gradient.
    """
    return product(x, dense(w, axes, x.dtype), (x.ndim - 1, 0), x.dtype)


def _dot_forward(x: Any, w: Any, axes: tuple[str | None, ...]):
    # Only what a gradient is asked of costs memory or arithmetic: of a frozen weight there is none.
    learned = any(leaf.perturbed for leaf in jax.tree.leaves(w))
    w = jax.tree.map(lambda leaf: leaf.value, w)
    kept = x.value if learned else jnp.zeros((), x.value.dtype)
    return dot(x.value, w, axes), (kept, w)


def _dot_backward(axes: tuple[str | None, ...], saved, g):
    x, w = saved
    g = jnp.zeros(g.shape, x.dtype) if isinstance(g, SymbolicZero) else g.astype(x.dtype)
    dx = product(g, dense(w, axes, x.dtype), (g.ndim - 1, 1), x.dtype)
    return dx, weight_gradient(x, g, w.dtype) if x.ndim else None


dot.defvjp(_dot_forward, _dot_backward, symbolic_zeros=True)


def named(x: jax.Array, name: str) -> jax.Array:
    """x under a name that a policy of decoder.REMAT may keep for the backward pass; without a
    gradient: for the forward rule of a function that has its own.

    Of what it keeps of its layers a scan writes slot by slot, and of bfloat16 a CPU does so by way
    of a float32 copy of the whole: there the bits are kept.
    """
    if jax.default_backend() != "cpu" or x.dtype != jnp.bfloat16:
        return checkpoint_name(x, name)
    bits = checkpoint_name(lax.bitcast_convert_type(x, jnp.uint16), name)
    return lax.bitcast_convert_type(bits, x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def kept(x: jax.Array, name: str) -> jax.Array:
    """`named`, with the gradient of x."""
    return named(x, name)


@kept.defjvp
def _kept_jvp(name: str, x: Any, dx: Any) -> tuple[jax.Array, Any]:
    return named(x[0], name), dx[0]


def softcapped(logits: jax.Array, cap: float) -> jax.Array:
    """cap · tanh(logits / cap), within (-cap, cap); 0 leaves them as they are."""
    return cap * jnp.tanh(logits / cap) if cap else logits


class PeftParam(nnx.Variable):
    """A weight that a PEFT method adds, float32. No nnx.Param: who asks for the model's own weights
    does not get it, in whatever order they ask."""


@dataclass(frozen=True)
class Peft:
    """What is trained, and what a PEFT method adds where the model asks: here all, and nothing.

    `path` names a place in the model's tree, the layers as one ("layers.attn.q"). Must be hashable:
    it is part of the model's graph. `mix` is how much of each of several adapters a row gets.
    """

    method = "none"  # its row in interop.METHODS
    mix = ()
    saved = ()  # paths of the model's own weights that are trained beside what is added
    length = 0  # virtual tokens before each text
    needs_base = False  # whether what was trained means nothing without them

    @property
    def frozen(self) -> bool:
        """Whether the model's own weights stay as they are, but those `saved`."""
        return self.method != "none"

    def begin(self, model: Any) -> None:
        """Sets those of the added weights that depend on the model's own, once it has these."""

    def count(self, model: Any) -> int:
        """How many numbers are trained."""
        return sum(
            v.get_value().size
            for path, v in nnx.to_flat_state(nnx.state(model))
            if self.trains(path, v)
        )

    def summary(self, model: Any) -> list[str]:
        """What a user is told of it when a run begins."""
        if not self.frozen:
            return []
        held = [v.get_value() for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param))]
        total, trained = sum(math.prod(x.shape) for x in held), self.count(model)
        lines = [f"trainable: {trained:,} parameters beside {total:,} ({trained / total:.2%})"]
        if packed := [x for x in held if isinstance(x, Quantized)]:
            half = sum(math.prod(x.shape) for x in packed) * 2 / 2**20
            lines.append(
                f"base: the layers' kernels as {packed[0].kind} take "
                f"{sum(x.nbytes for x in packed) / 2**20:,.1f} MiB; float32 would {2 * half:,.1f}, "
                f"bfloat16 {half:,.1f}"
            )
        return lines

    def trains(self, path: tuple[Any, ...], variable: Any) -> bool:
        """Whether a weight of the model is trained; the rest is frozen."""
        return isinstance(variable, nnx.Param)

    def linear(
        self, path: str, axes: tuple[str, str], shape: tuple[int, int], rngs: nnx.Rngs
    ) -> Any:
        """None, or `f(x, y, kernel, at)`: y, the result of a Linear (before its bias) or of Embed,
        changed; x came in (Embed: tokens), `at` tells layer, dropout key and mix of adapters,
        `kernel()` is the weight."""

    def sublayer(self, path: str, size: int, rngs: nnx.Rngs) -> Any:
        """None, or `f(h)`: what attention or MLP adds to the residual, changed."""

    def prefix(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Any:
        """None, or an object whose `length` is a number of virtual tokens before each text and
        whose `kv(decoder)` gives their keys and values, [L, 1, length, N, K] each."""


PLAIN = Peft()


def score_of(cfg: ModelConfig) -> tuple[str, ...]:
    """Paths of a reward model's head, which every method trains: no base has it."""
    return ("score.kernel",) if cfg.scores else ()


class Linear(nnx.Module):
    """y = x W + b. `kernel` is [I, O]: the transpose of a torch Linear's weight."""

    def __init__(
        self,
        cfg: ModelConfig,
        path: str,
        axes: tuple[str, str],
        shape: tuple[int, int],
        *,
        peft: Peft,
        bias: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kernel = jax.random.normal(rngs.params(), shape, jnp.float32) * cfg.initializer_range
        self.kernel = nnx.Param(kernel.astype(dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros(shape[1], dtype), axes=axes[1:]) if bias else None
        self.lora = peft.linear(path, axes, shape, rngs)

    def __call__(self, x: jax.Array, at: Any) -> jax.Array:
        axes = self.kernel.get_metadata("axes")[-2:]
        y = kept(dot(x, self.kernel.get_value(), axes), "dot")
        if self.lora is not None:
            y = self.lora(x, y, self.dense, at)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def dense(self) -> jax.Array:
        """The kernel in float32, whole along fsdp."""
        axes = self.kernel.get_metadata("axes")[-2:]
        return dense(self.kernel.get_value(), axes, jnp.float32)


class Embed(nnx.Module):
    """Token table [V, D]."""

    def __init__(self, cfg: ModelConfig, *, peft: Peft, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        shape, axes = (cfg.vocab_size, cfg.hidden_size), ("vocab", "embed")
        table = jax.random.normal(rngs.params(), shape, jnp.float32) * cfg.initializer_range
        self.embedding = nnx.Param(table.astype(dtype), axes=axes)
        self.lora = peft.linear("embed", axes, shape, rngs)

    def __call__(self, tokens: jax.Array, dtype: Any, at: Any) -> jax.Array:
        x = jnp.take(self.embedding[...], tokens, axis=0, mode="clip").astype(dtype)
        if self.lora is not None:
            x = self.lora(tokens, x, lambda: self.embedding[...], at)
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

    def __init__(self, cfg: ModelConfig, *, peft: Peft, dtype: Any, rngs: nnx.Rngs):
        D, F = cfg.hidden_size, cfg.intermediate_size
        keys: dict[str, Any] = dict(peft=peft, bias=cfg.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate = Linear(cfg, "layers.mlp.gate", ("embed", "mlp"), (D, F), **keys)
        self.up = Linear(cfg, "layers.mlp.up", ("embed", "mlp"), (D, F), **keys)
        self.down = Linear(cfg, "layers.mlp.down", ("mlp", "embed"), (F, D), **keys)
        self.gate_up = peft.linear("layers.mlp.gate_up", ("embed", "mlp"), (D, 2 * F), rngs)
        self.activation = cfg.activation

    def __call__(self, x: jax.Array, at: Any) -> jax.Array:
        gate, up = fused(self.gate_up, x, (self.gate, self.up), at)
        return self.down(ACTIVATIONS[self.activation](gate) * up, at)


def fused(lora: Any, x: jax.Array, parts: tuple[Linear, ...], at: Any) -> list[jax.Array]:
    """Each part's result; `lora` changes all of them as one, where HF keeps them in one tensor."""
    ys = [part(x, at) for part in parts]
    if lora is None:
        return ys
    ends = np.cumsum([y.shape[-1] for y in ys])[:-1]

    def kernel() -> jax.Array:
        return jnp.concatenate([part.dense() for part in parts], -1)

    return jnp.split(lora(x, jnp.concatenate(ys, -1), kernel, at), ends, -1)


def rope_frequencies(rope: Rope, head_dim: int, length: int) -> tuple[np.ndarray, float]:
    """Angle per position of each rotated pair, float32 [R/2], and what cos and sin are scaled by.

    `length` (tokens in the text or the cache) chooses between longrope's short and long factors.
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


def text_lengths(segments: jax.Array, positions: jax.Array) -> jax.Array:
    """Of each token, the tokens of the text it lies in, int32 [B, T]."""
    T = segments.shape[1]
    last = jnp.diff(segments, axis=1, append=segments[:, -1:] - 1) != 0
    end = lax.cummin(jnp.where(last, jnp.arange(T), T), axis=1, reverse=True)
    return jnp.take_along_axis(positions, end, 1) + 1


def rope_table(rope: Rope, head_dim: int, positions: jax.Array, lengths: Any):
    """cos and sin of positions [...], float32 [..., 1, R/2]. lengths: `length` of rope_frequencies,
    or int32 [...]: that of each token's text."""
    known = isinstance(lengths, int)
    inverse, mscale = rope_frequencies(rope, head_dim, lengths if known else 0)
    if not known and rope.kind == "longrope":
        stretched, _ = rope_frequencies(rope, head_dim, rope.original_length + 1)
        long = lengths[..., None, None] > rope.original_length
        inverse = jnp.where(long, stretched, inverse)
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
