# SPDX-License-Identifier: Apache-2.0
"""A state-space mixer in place of attention: Mamba-2 (arXiv:2405.21060).

The state S of a head adds each token's features under a key b, decays, and is read with a query c:

    S ← αS + b (δx)ᵀ,   y = Sᵀc + skip · x
    δ = max(softplus(dt x + dt_bias), least_step),   α = exp(-exp(a_log) · δ)

Before that, x, b and c pass a causal convolution over a few tokens. After it, y times silu(gate x)
has a norm. Tokens are computed in chunks: all but the state that goes from chunk to chunk is
products of matrices. Neither the state nor the convolution crosses texts of a packed row, and
padding changes nothing.

Dims: B rows, T tokens, D model width, H heads, P features of a head, G groups of heads that share b
and c, R = H / G, N features of b and c, W taps of the convolution; n chunks of C tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxllm.model.adapter import Adapter
from jaxllm.model.cache import StateCache
from jaxllm.model.config import MAMBA_PARTS, Mamba, ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.delta import carried, check_whole, chunk_size, convolved, decays, in_chunks
from jaxllm.model.layers import ACTIVATIONS, Linear, fused, unit_rms
from jaxllm.ops.residuals import saveable


class MambaMixer(nnx.Module):
    """Projections, convolution, state space, and a norm of what the gate multiplies."""

    def __init__(self, cfg: ModelConfig, path: str, *, peft: Adapter, dtype: Any, rngs: nnx.Rngs):
        mamba, D = cfg.mamba, cfg.hidden_size
        assert mamba is not None
        H, widths = mamba.heads, mamba.widths
        # The unit in which a mesh axis divides these dims is a head, or a group of heads.
        heads, groups = ("heads", H), ("heads", mamba.groups)
        linear = partial(Linear, cfg, bias=mamba.bias, peft=peft, dtype=dtype, rngs=rngs)
        self.gate, self.x, self.b, self.c, self.dt = (
            linear(f"{path}.{name}", ("embed", groups if name in "bc" else heads), (D, width))
            for name, width in widths.items()
        )
        total = sum(widths.values())
        self.inputs = peft.linear(f"{path}.inputs", ("embed", "heads"), (D, total), rngs)
        inner, features = widths["x"], widths["x"] + widths["b"] + widths["c"]
        taps = jax.random.normal(rngs.params(), (features, mamba.taps)) * cfg.initializer_range
        self.conv = nnx.Param(taps.astype(dtype), axes=(None, None))  # of x, then b, then c
        zeros = jnp.zeros(features, dtype)
        self.conv_bias = nnx.Param(zeros, axes=("norm",)) if mamba.conv_bias else None
        step = jnp.exp(jax.random.uniform(rngs.params(), (H,), minval=-6.9, maxval=-2.3))
        start = jnp.log(1.0 + jnp.arange(H)), jnp.log(jnp.expm1(step)), jnp.ones(H)
        self.a_log, self.dt_bias, self.skip = (nnx.Param(x, axes=(heads,)) for x in start)
        self.scale = nnx.Param(jnp.ones(inner, dtype), axes=("norm",))
        self.o = linear(f"{path}.o", (heads, "embed"), (inner, D))
        self.cfg, self.mamba = cfg, mamba

    def __call__(self, x_BTD: jax.Array, ctx: Context, past: Any) -> tuple[jax.Array, Any]:
        """(output [B, T, D], new past). past: a layer's StateCache, or None."""
        check_whole(self.cfg)
        real_BT, text_BT = ctx.segment_ids != 0, carried(ctx.segment_ids)
        linears = tuple(getattr(self, part) for part in MAMBA_PARTS)
        gate_BTI, *xbc, dt_BTH = fused(self.inputs, x_BTD, linears, ctx)
        _, shapes, _ = self.cfg.remembered
        pairs = zip(xbc, shapes, strict=True)
        inputs = tuple(
            jnp.where(real_BT[..., None, None], y.reshape(*y.shape[:2], *shape), 0)
            for y, shape in pairs
        )
        dt_BTH = jax.nn.softplus(dt_BTH.astype(jnp.float32) + self.dt_bias[...])
        dt_BTH = jnp.maximum(dt_BTH, least) if (least := self.mamba.least_step) > 0 else dt_BTH
        dt_BTH = jnp.where(real_BT[..., None], dt_BTH, 0)
        before = past or StateCache.empty(self.cfg, len(x_BTD), dtype=x_BTD.dtype)
        # Recomputed in the backward pass, as those of delta nets.
        out_BTHP, state = jax.checkpoint(self.mix)(inputs, dt_BTH, text_BT, before)
        if past is not None:
            past = past.after(inputs, real_BT, state)
        out_BTI = saveable(out_BTHP, "attention").reshape(gate_BTI.shape).astype(jnp.float32)
        out_BTI = out_BTI * jax.nn.silu(gate_BTI.astype(jnp.float32))
        by_group = out_BTI.reshape(*out_BTI.shape[:2], self.mamba.groups, -1)
        unit_BTI = unit_rms(by_group, self.cfg.norm_eps).reshape(out_BTI.shape)
        out_BTI = unit_BTI * self.scale[...].astype(jnp.float32)
        return self.o(out_BTI.astype(x_BTD.dtype), ctx), past

    def mix(
        self, inputs: Any, dt_BTH: jax.Array, text_BT: jax.Array, before: StateCache
    ) -> tuple[jax.Array, jax.Array]:
        """(output [B, T, H, P] in the inputs' dtype, state after the last token)."""
        ends = np.cumsum([x.shape[-2] * x.shape[-1] for x in inputs])[:-1]
        bias = jnp.zeros(len(self.conv[...])) if self.conv_bias is None else self.conv_bias[...]
        taps, biases = jnp.split(self.conv[...], ends), jnp.split(bias, ends)
        activation, dtype = ACTIVATIONS[self.mamba.activation], inputs[0].dtype

        def convolution(x: jax.Array, window: jax.Array, taps: jax.Array, bias: jax.Array):
            y = convolved(x, window, taps, text_BT) + bias.reshape(x.shape[2:]).astype(jnp.float32)
            return activation(y).astype(dtype).astype(jnp.float32)

        parts = zip(inputs, before.windows, taps, biases, strict=True)
        x_BTHP, b_BTGN, c_BTGN = (convolution(*part) for part in parts)
        log_BTH = -jnp.exp(self.a_log[...]) * dt_BTH
        state = before.state.astype(jnp.float32)
        values = dt_BTH[..., None] * x_BTHP
        out, state = state_space(c_BTGN, b_BTGN, values, log_BTH, text_BT, state)
        return (out + self.skip[...][:, None] * x_BTHP).astype(dtype), state


def products(mamba: Mamba, length: int) -> float:
    """FLOPs of `state_space` for each token of rows of `length` tokens."""
    C, N, P = chunk_size(length), mamba.state, mamba.head_dim
    return mamba.groups * 2 * C * N + mamba.heads * (2 * C * P + 4 * N * P)


def state_space(
    c_BTGN, b_BTGN, v_BTHP, log_BTH, text_BT, state_BHNP
) -> tuple[jax.Array, jax.Array]:
    """(y [B, T, H, P], the state after the last token), all float32.

    log: of α. text: a number for each text of a row; `state` is that of the row's first text. In a
    chunk, with Γ as in `delta.delta_rule`,

        y = Γ C S + (Γ C Bᵀ) V
        S ← Γ_C S + Bᵀ (Γ V)
    """
    (B, T, G, N), (H, P) = c_BTGN.shape, v_BTHP.shape[2:]
    by_head = G, H // G
    c, b = in_chunks(c_BTGN, (G,)), in_chunks(b_BTGN, (G,))
    v, log = in_chunks(v_BTHP, by_head), in_chunks(log_BTH, by_head)
    between, reads, writes = decays(log, in_chunks(text_BT, mode="edge"))
    scores = jnp.einsum("nbgik,nbgjk->nbgij", c, b)[:, :, :, None] * between
    own = jnp.einsum("nbgrij,nbgrjp->nbgrip", scores, v)
    new = jnp.einsum("nbgjk,nbgrjp->nbgrkp", b, writes[..., None] * v)

    def chunk(state: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        c, own, new, reads = inputs
        y = own + reads[..., None] * jnp.einsum("bgik,bgrkp->bgrip", c, state)
        return reads[..., -1, None, None] * state + new, y

    state, y = lax.scan(chunk, state_BHNP.reshape(B, *by_head, N, P), (c, own, new, reads))
    y = jnp.moveaxis(y, 4, 2)  # [n, B, C, G, R, P]
    return jnp.moveaxis(y, 0, 1).reshape(B, -1, H, P)[:, :T], state.reshape(B, H, N, P)
