# SPDX-License-Identifier: Apache-2.0
"""Multi-token prediction (arXiv:2412.19437, section 2.2): modules that predict further tokens.

Module k reads what the head reads of the module before it, or of the model, at each token, and the
embedding of the k-th token after it:

    h⁰ = the model's hidden states         hᵏ = norm(layer(M [norm(emb(t + k)) ; norm(hᵏ⁻¹)]))

The head predicts token t + k + 1 from hᵏ. Table and head are those of the model.

Dims: B rows, T tokens, D model width.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.model.adapter import NO_ADAPTER
from jaxllm.model.block import Block
from jaxllm.model.config import ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.layers import NORMS, Linear
from jaxllm.model.routing import Routing
from jaxllm.model.stack import Scan


class MTP(Block):
    """One module. No adapter changes it."""

    def __init__(self, cfg: ModelConfig, name: str, *, dtype: Any, rngs: nnx.Rngs):
        keys: dict[str, Any] = dict(peft=NO_ADAPTER, dtype=dtype, rngs=rngs)
        super().__init__(cfg, name, cfg.mtp_kind, **keys)
        D, norm = cfg.hidden_size, partial(NORMS[cfg.norm], cfg, cfg.hidden_size, dtype=dtype)
        self.embed_norm, self.hidden_norm, self.norm = norm(), norm(), norm()
        self.proj = Linear(cfg, f"{name}.proj", ("embed", None), (2 * D, D), **keys)

    def __call__(self, x_BTD: jax.Array, ctx: Context, past: Any) -> tuple[jax.Array, Any, Any]:
        """As a Block's; but the first result is what the head reads."""
        parts = self.embed_norm(ctx.next_BTD), self.hidden_norm(x_BTD)
        x_BTD, past, routing = super().__call__(
            self.proj(jnp.concatenate(parts, -1), ctx), ctx, past
        )
        return self.norm(x_BTD), past, routing


def after(x: jax.Array, count: int) -> jax.Array:
    """x [B, T, ...] of the token that is `count` tokens later; 0 after the end of the row."""
    rest = [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x[:, count:], [(0, 0), (0, count), *rest])


def continues(segment_ids: jax.Array, count: int) -> jax.Array:
    """True, bool [B, T], for tokens whose text has a token `count` tokens later."""
    return (after(segment_ids, count) == segment_ids) & (segment_ids != 0)


def predict_ahead(
    model: Any, embedded_BTD: jax.Array, x_BTD: jax.Array, ctx: Context
) -> tuple[tuple[jax.Array, ...], dict[str, Routing | None]]:
    """(the hidden states of each module of a Decoder, {its name: its Routing}).

    x: the model's hidden states after the final norm. embedded: its embeddings. A token whose text
    ends too early is padding to a module: nothing attends to it.
    """
    hidden, routings = [], {}
    for depth, name in enumerate(model.cfg.mtp_names, 1):
        real_BT = continues(ctx.segment_ids, depth)
        segments = jnp.where(real_BT, ctx.segment_ids, 0)
        here = replace(ctx, segment_ids=segments, next_BTD=after(embedded_BTD, depth))
        x_BTD, _, (routing,), _ = _scan(model, name)(x_BTD, here, (None,))
        hidden.append(x_BTD)
        routings[name] = routing and _without_padding(routing, real_BT)
    return tuple(hidden), routings


def _scan(model: Any, name: str) -> Scan:
    """A module as a scan over one layer, which gathers and recomputes as those of the model do."""
    graph, weights = nnx.split(getattr(model, name))
    stack = nnx.merge(graph, jax.tree.map(lambda x: x[None], weights))
    kinds = ((model.cfg.mtp_kind,),)
    return Scan((stack,), (range(1),), kinds, model.compute_dtype, model.remat)


def _without_padding(routing: Routing, real_BT: jax.Array) -> Routing:
    def masked(x: jax.Array) -> jax.Array:
        return jnp.where(real_BT.reshape(*real_BT.shape, *[1] * (x.ndim - 2)), x, 0.0)

    return replace(jax.tree.map(masked, replace(routing, load=None)), load=routing.load)
