# SPDX-License-Identifier: Apache-2.0
"""A gated delta net in place of attention (arXiv:2412.06464): a head remembers one matrix.

The state S of a head maps keys to values. Each token lets it decay, corrects what it holds under
the token's key, and reads it:

    S ← αS,   S ← S + k (β (v - Sᵀk))ᵀ,   y = Sᵀq / √K
    α = exp(-exp(a_log) · softplus(decay x + dt_bias)),   β = sigmoid(beta x)

where q and k have length 1; β is twice that in some models (arXiv:2411.12537). Before that, q, k
and v pass a causal convolution over a few tokens. Tokens are computed in chunks (arXiv:2406.06484):
the corrections of a chunk solve a triangular system, so all but the state that goes from chunk to
chunk is products of matrices. Neither the state nor the convolution crosses texts of a packed row,
and padding changes nothing.

Dims: B rows, T tokens, D model width, G heads of queries and keys, H heads of values, R = H / G,
K features of a key, V of a value, W taps of the convolution; n chunks of C tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxllm.errors import UserError
from jaxllm.mesh import context_shards
from jaxllm.model.adapter import Adapter
from jaxllm.model.cache import StateCache
from jaxllm.model.config import Delta, ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.layers import ACTIVATIONS, Linear, RMSNorm, fused
from jaxllm.ops.residuals import saveable

CHUNK = 64  # tokens
OBSTACLE = "{} do not support rows split along context; set it to 1"  # what: ModelConfig.recurrent


class DeltaNet(nnx.Module):
    """Projections, convolution, delta rule, and a norm that is gated by silu(gate x)."""

    def __init__(self, cfg: ModelConfig, path: str, *, peft: Adapter, dtype: Any, rngs: nnx.Rngs):
        delta, D = cfg.delta, cfg.hidden_size
        assert delta is not None
        G, H = delta.key_heads, delta.value_heads
        QK, HV = G * delta.key_dim, H * delta.value_dim
        # The unit in which a mesh axis divides these dims is a head.
        key_heads, heads = ("heads", G), ("heads", H)
        linear = partial(Linear, cfg, peft=peft, dtype=dtype, rngs=rngs)
        if delta.grouped:
            self.qkvz = linear(f"{path}.qkvz", ("embed", key_heads), (D, 2 * QK + 2 * HV))
            self.ba = linear(f"{path}.ba", ("embed", key_heads), (D, 2 * H))
        else:
            self.q = linear(f"{path}.q", ("embed", key_heads), (D, QK))
            self.k = linear(f"{path}.k", ("embed", key_heads), (D, QK))
            self.v = linear(f"{path}.v", ("embed", heads), (D, HV))
            self.qkv = peft.linear(f"{path}.qkv", ("embed", "heads"), (D, 2 * QK + HV), rngs)
            self.gate = linear(f"{path}.gate", ("embed", heads), (D, HV))
            self.beta = linear(f"{path}.beta", ("embed", heads), (D, H))
            self.decay = linear(f"{path}.decay", ("embed", heads), (D, H))

        def taps(channels: int) -> nnx.Param:
            drawn = jax.random.normal(rngs.params(), (channels, delta.taps)) * cfg.initializer_range
            return nnx.Param(drawn.astype(dtype), axes=(None, None))

        self.q_conv, self.k_conv, self.v_conv = taps(QK), taps(QK), taps(HV)
        a = jax.random.uniform(rngs.params(), (H,), minval=0.01, maxval=16.0)
        self.a_log, self.dt_bias = (nnx.Param(x, axes=(heads,)) for x in (jnp.log(a), jnp.ones(H)))
        plain = replace(cfg, norm_offset=0.0, norm_eps=delta.norm_eps or cfg.norm_eps)
        self.norm = RMSNorm(plain, delta.value_dim, dtype=jnp.float32)
        self.o = linear(f"{path}.o", (heads, "embed"), (HV, D))
        self.cfg, self.delta, self.activation = cfg, delta, cfg.activation

    def __call__(self, x_BTD: jax.Array, ctx: Context, past: Any) -> tuple[jax.Array, Any]:
        """(output [B, T, D], new past). past: a layer's StateCache, or None."""
        check_whole(self.cfg)
        q, k, v, gate_BTHV, beta_BTH, decay_BTH = self.project(x_BTD, ctx)
        real_BT, text_BT = ctx.segment_ids != 0, carried(ctx.segment_ids)
        inputs = tuple(jnp.where(real_BT[..., None, None], x, 0) for x in (q, k, v))
        beta_BTH = jnp.where(real_BT[..., None], jax.nn.sigmoid(beta_BTH.astype(jnp.float32)), 0)
        beta_BTH = 2 * beta_BTH if self.delta.negative else beta_BTH
        rate_BTH = jax.nn.softplus(decay_BTH.astype(jnp.float32) + self.dt_bias[...])
        log_BTH = jnp.where(real_BT[..., None], -jnp.exp(self.a_log[...]) * rate_BTH, 0)
        before = past or StateCache.empty(self.cfg, len(x_BTD), dtype=x_BTD.dtype)
        # Recomputed in the backward pass: these products cost little compared with those of the
        # weights, but would store much for each chunk.
        out_BTHV, state = jax.checkpoint(self.mix)(inputs, beta_BTH, log_BTH, text_BT, before)
        if past is not None:
            past = past.after(inputs, real_BT, state)
        unit_BTHV = self.norm.scaled(saveable(out_BTHV, "attention").astype(jnp.float32))
        out_BTHV = unit_BTHV * jax.nn.silu(gate_BTHV.astype(jnp.float32))
        return self.o(out_BTHV.astype(x_BTD.dtype).reshape(*x_BTD.shape[:2], -1), ctx), past

    def project(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, ...]:
        """q and k [B, T, G, K], v and gate [B, T, H, V], beta and decay [B, T, H]."""
        delta = self.delta
        G, H = delta.key_heads, delta.value_heads
        if delta.grouped:
            pair = fused(None, x_BTD, (self.qkvz, self.ba), ctx)
            qkvz, ba = (y.reshape(*y.shape[:2], G, -1) for y in pair)
            sizes = delta.key_dim, delta.key_dim, H // G * delta.value_dim
            q, k, v, gate = jnp.split(qkvz, np.cumsum(sizes), -1)
            beta, decay = jnp.split(ba, 2, -1)
        else:
            q, k, v = fused(self.qkv, x_BTD, (self.q, self.k, self.v), ctx)
            gate, beta, decay = fused(None, x_BTD, (self.gate, self.beta, self.decay), ctx)
        shapes = (G, -1), (G, -1), (H, -1), (H, -1), (H,), (H,)
        ys = zip((q, k, v, gate, beta, decay), shapes, strict=True)
        return tuple(y.reshape(*x_BTD.shape[:2], *shape) for y, shape in ys)

    def mix(
        self, inputs: Any, beta_BTH: Any, log_BTH: Any, text_BT: Any, before: StateCache
    ) -> tuple[jax.Array, jax.Array]:
        """(output [B, T, H, V] in the inputs' dtype, state after the last token)."""
        taps = (conv[...] for conv in (self.q_conv, self.k_conv, self.v_conv))
        parts = zip(inputs, before.windows, taps, strict=True)
        activation, dtype = ACTIVATIONS[self.activation], inputs[0].dtype
        q, k, v = (activation(convolved(*part, text_BT)).astype(dtype) for part in parts)
        q, k = (unit(x.astype(jnp.float32)) for x in (q, k))
        q = q * self.delta.key_dim**-0.5
        state = before.state.astype(jnp.float32)
        out, state = delta_rule(q, k, v.astype(jnp.float32), beta_BTH, log_BTH, text_BT, state)
        return out.astype(dtype), state


def check_whole(cfg: ModelConfig) -> None:
    """Raises UserError where rows are split over devices."""
    if (shards := context_shards()) > 1:
        obstacle = OBSTACLE.format(cfg.recurrent)
        raise UserError(f"mesh.context {shards} is not possible: {obstacle}")


def chunk_size(length: int) -> int:
    """Tokens of a chunk in rows of `length` tokens."""
    return min(CHUNK, 1 << (length - 1).bit_length())


def products(delta: Delta, length: int) -> float:
    """FLOPs of `delta_rule` for each token of rows of `length` tokens."""
    C, K, V = chunk_size(length), delta.key_dim, delta.value_dim
    solved = 2 * (C * C - 1) / 3  # `inverse`
    each = solved + 2 * C * K + 4 * C * V + 6 * K * V
    return delta.key_heads * 4 * C * K + delta.value_heads * each


def carried(segment_ids: jax.Array) -> jax.Array:
    """The segment of the last token up to each that is not padding, int32 [B, T]; before the first
    one, its segment. A call with a past begins with the text that the past ends with."""
    real_BT = segment_ids != 0
    first_B1 = jnp.argmax(real_BT, 1, keepdims=True)
    last_BT = lax.cummax(jnp.where(real_BT, jnp.arange(segment_ids.shape[1]), 0), axis=1)
    return jnp.take_along_axis(segment_ids, jnp.maximum(last_BT, first_B1), 1)


def unit(x: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)


def convolved(x_BTHF: Any, window_BHwF: Any, taps_OW: jax.Array, text_BT: Any) -> jax.Array:
    """The sum over the last W tokens of the text, each times its tap; float32 [B, T, H, F].

    window: the W - 1 tokens before x. taps: [H · F, W], that of the token itself last.
    """
    (_, T, H, F), W = x_BTHF.shape, taps_OW.shape[-1]
    taps_WHF = taps_OW.T.reshape(W, H, F).astype(jnp.float32)
    x = jnp.concatenate([window_BHwF.swapaxes(1, 2).astype(x_BTHF.dtype), x_BTHF], 1)
    text = jnp.concatenate([jnp.repeat(text_BT[:, :1], W - 1, 1), text_BT], 1)

    def term(i: int) -> jax.Array:
        same_BT = text[:, i : i + T] == text_BT
        return jnp.where(same_BT[..., None, None], x[:, i : i + T], 0) * taps_WHF[i]

    return sum(map(term, range(1, W)), start=term(0))


def in_chunks(x: jax.Array, heads: tuple[int, ...] = (), mode: str = "constant") -> jax.Array:
    """[B, T, heads, ...] -> [n, B, heads, C, ...], the last chunk padded."""
    C = chunk_size(x.shape[1])
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % C)] + [(0, 0)] * (x.ndim - 2), mode=mode)
    x = x.reshape(len(x), -1, C, *heads, *x.shape[3:])
    return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 2, 2 + len(heads))


def decays(log: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Γ between the tokens of each chunk [n, B, G, R, C, C], since the state before the chunk, and
    until the one after it [n, B, G, R, C]; 0 between texts.

    log: of α, [n, B, G, R, C]. text: [n, B, C].
    """
    total, C = jnp.cumsum(log, -1), log.shape[-1]
    before = jnp.concatenate([text[:1, :, 0], text[:-1, :, -1]])[..., None]

    def where(same: jax.Array, log: jax.Array) -> jax.Array:
        """exp(log) between tokens of one text, else 0. same: [n, B, ...]"""
        return jnp.exp(jnp.where(same[:, :, None, None], log, -jnp.inf))

    order = jnp.tril(jnp.ones((C, C), bool))
    same = (text[..., :, None] == text[..., None, :]) & order
    between = where(same, total[..., :, None] - total[..., None, :])
    reads = where(text == before, total)
    return between, reads, where(text == text[..., -1:], total[..., -1:] - total)


def delta_rule(
    q_BTGK, k_BTGK, v_BTHV, beta_BTH, log_BTH, text_BT, state_BHKV
) -> tuple[jax.Array, jax.Array]:
    """(y [B, T, H, V], the state after the last token), all float32.

    log: of α. text: a number for each text of a row; `state` is that of the row's first text. In a
    chunk, with Γᵢⱼ = αⱼ₊₁ … αᵢ for tokens j ≤ i of one text, and Γᵢ since the state before it,

        δ = M V - M Γ K S,   M = (I + tril(β Γ K Kᵀ, -1))⁻¹ β
        y = Γ Q S + (Γ Q Kᵀ) δ
        S ← Γ_C S + Kᵀ (Γ δ)
    """
    (B, T, G, K), (H, V) = q_BTGK.shape, v_BTHV.shape[2:]
    C = chunk_size(T)
    by_head = G, H // G
    q, k, v = in_chunks(q_BTGK, (G,)), in_chunks(k_BTGK, (G,)), in_chunks(v_BTHV, by_head)
    beta, log = in_chunks(beta_BTH, by_head), in_chunks(log_BTH, by_head)
    between, reads, writes = decays(log, in_chunks(text_BT, mode="edge"))
    system = jnp.einsum("nbgik,nbgjk->nbgij", k, k)[:, :, :, None] * between
    system = jnp.where(jnp.eye(C, dtype=bool), 0, beta[..., None] * system)
    solved = inverse(system) * beta[..., None, :]
    values = jnp.einsum("nbgrij,nbgrjv->nbgriv", solved, v)
    keys = jnp.einsum("nbgrij,nbgjk->nbgrik", solved * reads[..., None, :], k)
    scores = jnp.einsum("nbgik,nbgjk->nbgij", q, k)[:, :, :, None] * between

    def chunk(state: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        q, k, values, keys, scores, reads, writes = inputs
        change = values - jnp.einsum("bgrik,bgrkv->bgriv", keys, state)
        old = reads[..., None] * jnp.einsum("bgik,bgrkv->bgriv", q, state)
        y = old + jnp.einsum("bgrij,bgrjv->bgriv", scores, change)
        new = jnp.einsum("bgjk,bgrjv->bgrkv", k, writes[..., None] * change)
        return reads[..., -1, None, None] * state + new, y

    state = state_BHKV.reshape(B, *by_head, K, V)
    inputs = q, k, values, keys, scores, reads, writes
    state, y = lax.scan(chunk, state, inputs)
    y = jnp.moveaxis(y, 4, 2)  # [n, B, C, G, R, V]
    return jnp.moveaxis(y, 0, 1).reshape(B, -1, H, V)[:, :T], state.reshape(B, H, K, V)


_product = partial(jnp.matmul, precision="highest")


@jax.custom_vjp
def inverse(a: jax.Array) -> jax.Array:
    """(I + a)⁻¹ of strictly lower triangular matrices [..., C, C]; C is a power of 2.

    By halves: that of [[P, 0], [L, Q]] is [[P⁻¹, 0], [-Q⁻¹ L P⁻¹, Q⁻¹]]. It loses no digits where a
    series in powers of a would: these are huge for tokens with one and the same key.
    """
    C = a.shape[-1]
    blocks = jnp.ones((*a.shape[:-2], C, 1, 1), a.dtype)  # of the diagonal
    while (size := blocks.shape[-1]) < C:
        pairs = a.reshape(*a.shape[:-2], *(C // (2 * size), 2 * size) * 2)
        lower = jnp.einsum("...nsnt->...nst", pairs[..., size:, :, :size])
        first, second = blocks[..., ::2, :, :], blocks[..., 1::2, :, :]
        corner = -_product(_product(second, lower), first)
        top = jnp.concatenate([first, jnp.zeros_like(first)], -1)
        blocks = jnp.concatenate([top, jnp.concatenate([corner, second], -1)], -2)
    return blocks[..., 0, :, :]


def _inverse_forward(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = inverse(a)
    return x, x


def _inverse_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    x = x.swapaxes(-1, -2)
    return (jnp.tril(-_product(_product(x, g), x), -1),)


inverse.defvjp(_inverse_forward, _inverse_backward)
