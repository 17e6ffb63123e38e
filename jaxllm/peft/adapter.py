# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters: h + up(gelu(down(h))) on what a sublayer adds to the residual.

After attention and after the MLP (Houlsby, arXiv:1902.00751) or after the MLP alone (Pfeiffer,
arXiv:2005.00247). `up` starts at 0, so a model begins as it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import PeftSection
from jaxllm.model.adapter import Peft, PeftParam, score_of
from jaxllm.model.config import ModelConfig
from jaxllm.ops.matmul import dot


class AdapterParam(PeftParam):
    """A matrix or a bias of a bottleneck."""


@dataclass(frozen=True)
class AdapterPeft(Peft):
    """Bottlenecks of one width in every layer."""

    method = "adapter"
    width: int
    placement: str
    saved: tuple[str, ...] = ()

    def trains(self, path: tuple[Any, ...], variable: Any) -> bool:
        return isinstance(variable, AdapterParam) or ".".join(map(str, path)) in self.saved

    def sublayer(self, path: str, size: int, rngs: nnx.Rngs) -> Bottleneck | None:
        wanted = self.placement == "houlsby" or path == "layers.mlp_adapter"
        return Bottleneck(size, self.width, rngs) if wanted else None


class Bottleneck(nnx.Module):
    """down [D, W], up [W, D] and their biases."""

    def __init__(self, size: int, width: int, rngs: nnx.Rngs):
        down = jax.random.normal(rngs.peft(), (size, width)) / math.sqrt(size)
        self.down = AdapterParam(down, axes=("embed", None))
        self.down_bias = AdapterParam(jnp.zeros(width), axes=(None,))
        self.up = AdapterParam(jnp.zeros((width, size)), axes=(None, "embed"))
        self.up_bias = AdapterParam(jnp.zeros(size), axes=("norm",))

    def __call__(self, h: jax.Array) -> jax.Array:
        inner: Any = dot(h, self.down[...], ("embed", None))
        inner = inner + self.down_bias[...].astype(h.dtype)
        outer: Any = dot(jax.nn.gelu(inner), self.up[...], (None, "embed"))
        return h + (outer + self.up_bias[...].astype(h.dtype))


def resolve(cfg: ModelConfig, section: PeftSection, strict: bool = True) -> AdapterPeft:
    """The bottlenecks that a configuration describes."""
    return AdapterPeft(section.bottleneck, section.placement, score_of(cfg))
