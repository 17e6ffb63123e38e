# SPDX-License-Identifier: Apache-2.0
"""One layer: attention, or what takes its place, and MLP around the residual stream, or only one.

Dims: B rows, T tokens, D model width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.mesh import constrain
from jaxllm.model.adapter import Adapter
from jaxllm.model.attention import Attention
from jaxllm.model.config import LayerKind, ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.conv import ShortConv
from jaxllm.model.delta import DeltaNet
from jaxllm.model.layer_embeds import LayerEmbed
from jaxllm.model.layers import MLP, NORMS
from jaxllm.model.mamba import MambaMixer
from jaxllm.model.mla import LatentAttention
from jaxllm.model.moe import MoE


class Block(nnx.Module):
    """x + attention, x + MLP, or one of them alone, with norms before, after, or on both sides of
    each; or x + attention + MLP of the same x (`parallel`), normed once or for each of them. Then x
    + what the layer's own embedding gates, and all of it times a number, where the family has
    these.

    path: the attribute of the decoder that holds the stack. kind: of one of its layers.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        path: str,
        kind: LayerKind,
        *,
        peft: Adapter,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        cfg = cfg.of(kind)
        norm = partial(NORMS[cfg.norm], cfg, cfg.hidden_size, dtype=dtype)
        before = cfg.norm_placement in ("pre", "sandwich", "parallel_each")
        self.parallel, self.scale = cfg.norm_placement.startswith("parallel"), cfg.residual_scale
        after = cfg.norm_placement in ("post", "sandwich")
        keys: dict[str, Any] = dict(peft=peft, dtype=dtype, rngs=rngs)
        mixer = partial(Attention, kind=kind) if cfg.latent is None else LatentAttention
        others = {"delta": DeltaNet, "conv": ShortConv, "mamba": MambaMixer}
        mixer = others.get(kind.mixer, mixer)
        mixes = kind.mixer != "none"
        mlp = partial(MLP, F=cfg.intermediate_size)
        mlp = MoE if cfg.experts and kind.routed else mlp
        self.attn = mixer(cfg, f"{path}.attn", **keys) if mixes else None
        self.mlp = mlp(cfg, f"{path}.mlp", **keys) if kind.mlp else None
        self.attn_norm = norm() if mixes and (before or self.parallel) else None
        self.attn_post_norm = norm() if mixes and after else None
        self.mlp_norm = norm() if kind.mlp and before else None
        self.mlp_post_norm = norm() if kind.mlp and after else None
        self.embed = LayerEmbed(cfg, f"{path}.embed", **keys) if cfg.layer_embeds else None
        self.scalar = nnx.Param(jnp.ones(1, dtype), axes=(None,)) if cfg.layer_scale else None
        adapter = partial(peft.sublayer, size=cfg.hidden_size, rngs=rngs)
        self.attn_adapter = adapter(f"{path}.attn_adapter") if mixes else None
        self.mlp_adapter = adapter(f"{path}.mlp_adapter") if kind.mlp else None

    def __call__(self, x_BTD: jax.Array, ctx: Context, past: Any) -> tuple[jax.Array, Any, Any]:
        """(x_BTD, the layer's new past, its Routing or None without experts).

        past: a LayerCache, StateCache, VirtualTokens, or None.
        """
        given_BTD = n_BTD = x_BTD
        routing = None
        if self.attn is not None:
            with jax.named_scope("attention"):
                n_BTD = x_BTD if self.attn_norm is None else self.attn_norm(x_BTD)
                h_BTD, past = self.attn(n_BTD, ctx, past)
                x_BTD = self.added(x_BTD, h_BTD, self.attn_post_norm, self.attn_adapter)
        if self.mlp is not None:
            with jax.named_scope("mlp"):
                if self.mlp_norm is not None:
                    n_BTD = self.mlp_norm(given_BTD if self.parallel else x_BTD)
                elif not self.parallel:
                    n_BTD = x_BTD
                if isinstance(self.mlp, MoE):
                    h_BTD, routing = self.mlp(n_BTD, ctx, x_BTD)
                else:
                    h_BTD = self.mlp(n_BTD, ctx)
                x_BTD = self.added(x_BTD, h_BTD, self.mlp_post_norm, self.mlp_adapter)
        if self.embed is not None:
            x_BTD = x_BTD + self.embed(x_BTD, ctx)
        if self.scalar is not None:
            x_BTD = x_BTD * lax.stop_gradient(self.scalar[...]).astype(x_BTD.dtype)
        return constrain(x_BTD, "batch", "sequence", "features"), past, routing

    def added(self, x_BTD: jax.Array, h_BTD: jax.Array, norm: Any, adapter: Any) -> jax.Array:
        """The residual stream plus the output of attention or MLP."""
        h_BTD = h_BTD if norm is None else norm(h_BTD)
        h_BTD = h_BTD if adapter is None else adapter(h_BTD)
        return x_BTD + (h_BTD if self.scale == 1 else h_BTD * self.scale)
