# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings.

Dims: B rows, T tokens, H heads, K head_dim, R rotated features.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.model.config import ModelConfig, Rope


def rope_frequencies(rope: Rope, head_dim: int, length: int) -> tuple[np.ndarray, float]:
    """Angle per position of each rotated pair, float32 [R/2], and what cos and sin are scaled by.

    `length` (tokens in the text or the cache) chooses between longrope's short and long factors
    (arXiv:2402.13753). linear: positions / factor. llama3: long wavelengths / factor, a ramp
    between. yarn (arXiv:2309.00071): the same by rotations over the original length. dynamic: those
    of texts up to the original length; longer ones have `dynamic_frequencies`. proportional: all
    features are in pairs, and `partial` of these, the first, turn.
    Rounded to float32 where transformers rounds: a last bit here is an angle at far positions.
    """
    rotated = head_dim if rope.kind == "proportional" else int(head_dim * rope.partial)
    exponent = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    base = (rope.theta ** exponent.astype(np.float64)).astype(np.float32)
    inverse = 1 / base
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "llama3":
        # torch divides a number by a tensor as reciprocal times number: two roundings.
        wavelength = (1 / inverse) * (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        ramp = high - low or 1e-30  # Llama 4 has none
        smooth = np.clip(((1 / wavelength) * rope.original_length - low) / ramp, 0, 1)
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
    elif rope.kind == "none":
        inverse = np.zeros_like(base)
    elif rope.kind == "longrope":
        stretched = length > rope.original_length
        factors = rope.long_factor if stretched else rope.short_factor
        inverse = 1 / (np.asarray(factors, np.float32) * base)
    elif rope.kind == "proportional":
        inverse[int(rope.partial * head_dim // 2) :] = 0
        inverse = inverse / np.float32(rope.factor)
    assert inverse.dtype == np.float32
    return inverse, rope.mscale


def text_lengths(segments: jax.Array, positions: jax.Array) -> jax.Array:
    """Length of the text that each token belongs to, int32 [B, T]."""
    T = segments.shape[1]
    last = jnp.diff(segments, axis=1, append=segments[:, -1:] - 1) != 0
    end = lax.cummin(jnp.where(last, jnp.arange(T), T), axis=1, reverse=True)
    return jnp.take_along_axis(positions, end, 1) + 1


def dynamic_frequencies(rope: Rope, head_dim: int, lengths: jax.Array) -> jax.Array:
    """Angles per position in texts of `lengths` [...], float32 [..., 1, R/2]: a larger base for
    texts longer than the original length ("NTK-aware")."""
    rotated = int(head_dim * rope.partial)
    length = jnp.maximum(lengths, rope.original_length).astype(jnp.float32)
    stretch = rope.factor * length / rope.original_length - (rope.factor - 1)
    base = rope.theta * stretch ** (rotated / (rotated - 2))
    exponent = jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated
    return 1 / base[..., None, None] ** exponent


def rope_table(rope: Rope, head_dim: int, positions: jax.Array, lengths: Any):
    """cos and sin of positions [...], float32 [..., 1, R/2]. lengths: `length` of rope_frequencies,
    or int32 [...]: that of each token's text, or of each row's [B, 1]."""
    known = isinstance(lengths, int)
    inverse, mscale = rope_frequencies(rope, head_dim, lengths if known else 0)
    if not known and rope.kind == "longrope":
        stretched, _ = rope_frequencies(rope, head_dim, rope.original_length + 1)
        long = lengths[..., None, None] > rope.original_length
        inverse = jnp.where(long, stretched, inverse)
    elif not known and rope.kind == "dynamic":
        inverse = dynamic_frequencies(rope, head_dim, lengths)
    angle = positions.astype(jnp.float32)[..., None, None] * inverse
    return jnp.cos(angle) * mscale, jnp.sin(angle) * mscale


def cached_table(rope: Rope, head_dim: int, positions: jax.Array, slots: int):
    """`rope_table` of positions [B, T] that end at the last token of each row's text so far, for a
    cache of so many slots."""
    if rope.kind in ("longrope", "dynamic"):
        return rope_table(rope, head_dim, positions, positions.max(1, keepdims=True) + 1)
    table = rope_table(rope, head_dim, jnp.arange(slots), slots)  # one, of which rows are read
    return tuple(jnp.take(x, positions, 0, mode="clip") for x in table)


def query_scale(rope: Rope, positions: jax.Array) -> jax.Array:
    """What queries at positions [B, T] are multiplied by, float32 [B, T, 1, 1]."""
    turns = jnp.floor((positions + rope.query_shift) / max(rope.original_length, 1))
    return (1 + rope.query_beta * jnp.log1p(turns))[..., None, None]


def rope_tables(
    cfg: ModelConfig, segments: jax.Array, positions: jax.Array, slots: int | None
) -> dict[int, list[jax.Array]]:
    """`Context.rope_tables` of tokens [B, T]. slots: of the cache; None without one."""
    lengths = text_lengths(segments, positions) if slots is None else None

    def tables(head_dim: int) -> list[jax.Array]:
        if slots is None:
            found = [rope_table(rope, head_dim, positions, lengths) for rope in cfg.ropes]
        else:
            found = [cached_table(rope, head_dim, positions, slots) for rope in cfg.ropes]
        if any(rope.query_beta for rope in cfg.ropes):
            scales = [query_scale(rope, positions) for rope in cfg.ropes]
            found = [(*table, scale) for table, scale in zip(found, scales, strict=True)]
        return [jnp.stack(x) for x in zip(*found, strict=True)]

    return {dim: tables(dim) for dim in dict.fromkeys(cfg.of(kind).head_dim for kind in cfg.kinds)}


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, pairs: str = "halves") -> jax.Array:
    """Rotates the first R features of x [B, T, H, K] in pairs; cos, sin [B, T, 1, R/2].

    pairs: "halves", feature i with i + R/2; "swapped", feature i + R/2 with i, which turns them the
    other way round; "neighbours", feature 2i with 2i + 1.
    """
    return _rotate(x, cos, sin, pairs)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, pairs: str) -> Any:
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    rest = wide[..., 2 * half :]
    if pairs == "neighbours":
        a, b = wide[..., : 2 * half : 2], wide[..., 1 : 2 * half : 2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1)
        turned = turned.reshape(*x.shape[:-1], 2 * half)
        return jnp.concatenate([turned, rest], -1).astype(x.dtype)
    a, b = wide[..., :half], wide[..., half : 2 * half]
    sin = -sin if pairs == "swapped" else sin
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype(x.dtype)


# The gradient turns back: the transpose of a rotation, in the forward pass's own fast form.
_rotate.defvjp(
    lambda x, cos, sin, pairs: (_rotate(x, cos, sin, pairs), (cos, sin)),
    lambda pairs, table, g: (_rotate(g, table[0], -table[1], pairs), None, None),
)
