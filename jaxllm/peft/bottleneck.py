# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters: h + up(gelu(down(h))), applied to what a sublayer adds to the residual.

After attention and after the MLP (Houlsby, arXiv:1902.00751), or after the MLP only (Pfeiffer,
arXiv:2005.00247). `up` is zero-initialized, so the model starts equal to its base. peft has no such
method and does not load these files.

Dims: D model width, W width of the bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import PeftSection
from jaxllm.model.adapter import AdapterParam, score_paths
from jaxllm.model.config import ModelConfig
from jaxllm.ops.matmul import dot
from jaxllm.peft.base import PeftAdapter, Slot


@dataclass(frozen=True)
class BottleneckAdapter(PeftAdapter):
    """Bottlenecks of one width in every layer."""

    method = "adapter"
    peft_type = "BOTTLENECK"
    decayed = {"down": True, "down_bias": False, "up": True, "up_bias": False}
    width: int
    placement: str
    saved: tuple[str, ...] = ()

    @classmethod
    def from_section(cls, cfg: ModelConfig, section: PeftSection, strict: bool = True) -> Self:
        return cls(section.bottleneck, section.placement, score_paths(cfg))

    def to_config(self, model: Any) -> dict[str, Any]:
        shape = {"bottleneck": self.width, "placement": self.placement}
        return super().to_config(model) | shape

    def sublayer(self, path: str, size: int, rngs: nnx.Rngs) -> Bottleneck | None:
        adapted = self.placement == "houlsby" or path.endswith(".mlp_adapter")
        return Bottleneck(size, self.width, rngs) if adapted else None

    def slots(self, model: Any, which: int = 0) -> Iterator[Slot]:
        stacks = model.cfg.stacks.items()
        for place, (stack, layers) in product(("attn_adapter", "mlp_adapter"), stacks):
            module = getattr(getattr(model, stack), place)
            for leaf in self.decayed if module is not None else ():
                part, _, bias = leaf.partition("_")
                for index, layer in enumerate(layers):
                    name = f"layers.{layer}.{place}.{part}.{bias or 'weight'}"
                    yield Slot(name, getattr(module, leaf), index, transpose=not bias)


class Bottleneck(nnx.Module):
    """down [D, W], up [W, D] and their biases."""

    def __init__(self, size: int, width: int, rngs: nnx.Rngs):
        down = jax.random.normal(rngs.peft(), (size, width)) / math.sqrt(size)
        self.down = AdapterParam(down, axes=("embed", None))
        self.down_bias = AdapterParam(jnp.zeros(width), axes=(None,))
        self.up = AdapterParam(jnp.zeros((width, size)), axes=(None, "embed"))
        self.up_bias = AdapterParam(jnp.zeros(size), axes=("norm",))

    def __call__(self, h_BTD: jax.Array) -> jax.Array:
        dtype = h_BTD.dtype
        inner_BTW: Any = dot(h_BTD, self.down[...])
        inner_BTW = inner_BTW + self.down_bias[...].astype(dtype)
        outer_BTD: Any = dot(jax.nn.gelu(inner_BTW), self.up[...])
        return h_BTD + (outer_BTD + self.up_bias[...].astype(dtype))
