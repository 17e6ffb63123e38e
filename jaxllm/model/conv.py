# SPDX-License-Identifier: Apache-2.0
"""A short convolution in place of attention (LFM2): o(c · convolution(b · x)), where b, c and x are
projections of the input, and each feature is convolved over the last few tokens of its text.

Dims: B rows, T tokens, D model width, W taps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.model.adapter import Adapter
from jaxllm.model.cache import StateCache
from jaxllm.model.config import ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.delta import carried, check_whole, convolved
from jaxllm.model.layers import Linear, fused
from jaxllm.ops.residuals import saveable


class ShortConv(nnx.Module):
    """Three projections, the convolution between two products with them, and an output."""

    def __init__(self, cfg: ModelConfig, path: str, *, peft: Adapter, dtype: Any, rngs: nnx.Rngs):
        conv, D = cfg.conv, cfg.hidden_size
        assert conv is not None
        linear = partial(Linear, cfg, bias=conv.bias, peft=peft, dtype=dtype, rngs=rngs)
        self.b, self.c, self.x = (
            linear(f"{path}.{name}", ("embed", "heads"), (D, D)) for name in ("b", "c", "x")
        )
        self.bcx = peft.linear(f"{path}.bcx", ("embed", "heads"), (D, 3 * D), rngs)
        taps = jax.random.normal(rngs.params(), (D, conv.taps)) * cfg.initializer_range
        self.conv = nnx.Param(taps.astype(dtype), axes=(None, None))
        zeros = jnp.zeros(D, dtype)
        self.conv_bias = nnx.Param(zeros, axes=("norm",)) if conv.bias else None
        self.o = linear(f"{path}.o", ("heads", "embed"), (D, D))
        self.cfg = cfg

    def __call__(self, x_BTD: jax.Array, ctx: Context, past: Any) -> tuple[jax.Array, Any]:
        """(output [B, T, D], new past). past: a layer's StateCache, or None."""
        check_whole(self.cfg)
        b_BTD, c_BTD, x = fused(self.bcx, x_BTD, (self.b, self.c, self.x), ctx)
        real_BT = ctx.segment_ids != 0
        input_BT1D = jnp.where(real_BT[..., None], b_BTD * x, 0)[:, :, None]
        before = past or StateCache.empty(self.cfg, len(x), dtype=x.dtype)
        text_BT = carried(ctx.segment_ids)
        y_BT1D = convolved(input_BT1D, before.windows[0], self.conv[...], text_BT)
        if past is not None:
            past = past.after((input_BT1D,), real_BT)
        y_BTD = y_BT1D[:, :, 0]
        if self.conv_bias is not None:
            y_BTD = y_BTD + self.conv_bias[...].astype(jnp.float32)
        return self.o(c_BTD * saveable(y_BTD.astype(x.dtype), "attention"), ctx), past
