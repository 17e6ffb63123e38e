# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens before each text, whose keys and values every layer attends to.

Prefix tuning (arXiv:2101.00190) trains each layer's keys and values themselves, as they are after
the rotation; prompt tuning (arXiv:2104.08691) trains embeddings, from which the model computes
them. They see only one another, so they are computed once for all rows, and each text of a packed
row has them before it. A text's positions start behind them, so as much less of the model's context
is left to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import PeftSection
from jaxllm.errors import UserError
from jaxllm.model.adapter import Peft, PeftParam, score_of
from jaxllm.model.cache import Cache
from jaxllm.model.config import ModelConfig


class PrefixParam(PeftParam):
    """Keys and values, or embeddings, of virtual tokens."""


@dataclass(frozen=True)
class PrefixPeft(Peft):
    """`length` virtual tokens; method: prefix | prompt."""

    method: str
    length: int
    saved: tuple[str, ...] = ()

    def trains(self, path: tuple[Any, ...], variable: Any) -> bool:
        return isinstance(variable, PrefixParam) or ".".join(map(str, path)) in self.saved

    def summary(self, model: Any) -> list[str]:
        whole = model.cfg.max_positions
        left = f"{self.length} virtual tokens leave each text {whole - self.length:,} of {whole:,}"
        return [*super().summary(model), f"{left} positions"]

    def prefix(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Prefix | Prompt:
        return (Prefix if self.method == "prefix" else Prompt)(cfg, self.length, rngs)

    def begin(self, model: Any) -> None:
        model.prefix.begin(model)


def _some_tokens(model: Any, length: int) -> jax.Array:
    """int32 [1, length]: tokens spread over the vocabulary, where training starts from."""
    return jnp.linspace(0, model.cfg.vocab_size - 1, length).astype(jnp.int32)[None]


class Prefix(nnx.Module):
    """Keys and values [L, P, N, K]; they begin as those of some tokens of the vocabulary."""

    def __init__(self, cfg: ModelConfig, length: int, rngs: nnx.Rngs):
        shape = (cfg.num_layers, length, cfg.num_kv_heads, cfg.head_dim)
        axes = ("layers", None, "kv_heads", None)
        keys, values = jax.random.normal(rngs.peft(), (2, *shape)) * cfg.initializer_range
        self.keys, self.values = PrefixParam(keys, axes=axes), PrefixParam(values, axes=axes)
        self.length = length

    def kv(self, model: Any) -> tuple[jax.Array, jax.Array]:
        dtype = model.compute_dtype
        return self.keys[...][:, None].astype(dtype), self.values[...][:, None].astype(dtype)

    def begin(self, model: Any) -> None:
        cache = Cache.empty(model.cfg, 1, self.length, jnp.float32)
        _, cache = model.hidden(_some_tokens(model, self.length), cache=cache)
        for variable, value in ((self.keys, cache.k.swapaxes(3, 4)), (self.values, cache.v)):
            value = value[:, 0].swapaxes(1, 2)
            variable.set_value(jax.device_put(value, variable.get_value().sharding))


class Prompt(nnx.Module):
    """Embeddings [P, D], as they enter the first layer; they begin as some tokens'."""

    def __init__(self, cfg: ModelConfig, length: int, rngs: nnx.Rngs):
        start = jax.random.normal(rngs.peft(), (length, cfg.hidden_size)) * cfg.initializer_range
        self.embeddings = PrefixParam(start, axes=(None, "embed"))
        self.length = length

    def kv(self, model: Any) -> tuple[jax.Array, jax.Array]:
        x = self.embeddings[...].astype(model.compute_dtype)[None]
        cache = Cache.empty(model.cfg, 1, self.length, model.compute_dtype)
        ones = jnp.ones((1, self.length), jnp.int32)
        _, cache = model.run(x, ones, None, cache, model.context())
        return cache.k.transpose(0, 1, 4, 2, 3), cache.v.swapaxes(2, 3)

    def begin(self, model: Any) -> None:
        table = model.embed.embedding[...].astype(jnp.float32) * model.cfg.embed_scale
        start = jnp.take(table, _some_tokens(model, self.length)[0], axis=0)
        start = jax.device_put(start, self.embeddings.get_value().sharding)
        self.embeddings.set_value(start)


def resolve(cfg: ModelConfig, section: PeftSection, strict: bool = True) -> PrefixPeft:
    """The virtual tokens that a configuration describes. Raises ValueError for too many."""
    length = section.num_virtual_tokens
    if length >= cfg.max_positions:
        raise UserError(
            f"peft.num_virtual_tokens {length} leaves nothing of the model's "
            f"{cfg.max_positions} positions; lower it"
        )
    return PrefixPeft(section.method, length, score_of(cfg))
