# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens before each text, which every layer attends to.

Prefix tuning (arXiv:2101.00190) trains each layer's keys and values, after RoPE. Prompt tuning
(arXiv:2104.08691) trains embeddings, from which the model computes keys and values. Virtual tokens
attend only to one another, so their keys and values are computed once for all rows, and each text
of a packed row has them before it. A text's positions start after them, which shortens the context
left to it.

Dims: L layers, P virtual tokens, N key/value heads, K head_dim, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm import dist
from jaxllm.config import PeftSection
from jaxllm.errors import UserError
from jaxllm.model.adapter import Adapter, AdapterParam, score_paths
from jaxllm.model.cache import Cache
from jaxllm.model.config import ModelConfig
from jaxllm.peft.base import PeftAdapter, Slot, set_value

TENSOR = "prompt_embeddings"  # peft's name of the one tensor, of either method


@dataclass(frozen=True)
class VirtualTokens(PeftAdapter):
    """`length` virtual tokens before each text."""

    root = "base_model."  # peft wraps the model and changes none of its modules
    length: int
    saved: tuple[str, ...] = ()

    @classmethod
    def from_section(cls, cfg: ModelConfig, section: PeftSection, strict: bool = True) -> Self:
        length = section.num_virtual_tokens
        alone = any(kind.mixer == "none" for kind in cfg.kinds)
        if what := cfg.recurrent or ("MLP layers" if alone else ""):
            raise UserError(
                f"peft.method {cls.method} adds keys and values before each text, which the "
                f"{what} of this model do not have; use method lora"
            )
        shapes = {(kind.head_dim, kind.num_kv_heads, kind.uses) for kind in cfg.kinds}
        if len(shapes) > 1 or cfg.value_dim:
            differ = "values have another width" if len(shapes) == 1 else "layers differ in these"
            raise UserError(
                f"peft.method {cls.method} adds keys and values of one shape to every layer, and "
                f"in this model {differ}; use method lora"
            )
        if length >= cfg.max_positions:
            raise UserError(
                f"peft.num_virtual_tokens {length} leaves nothing of the model's "
                f"{cfg.max_positions} positions; lower it"
            )
        return cls(length, score_paths(cfg))

    def summary(self, model: Any) -> list[str]:
        total = model.cfg.max_positions
        left = f"{self.length} virtual tokens leave each text {total - self.length:,} of {total:,}"
        return [*super().summary(model), f"{left} positions"]

    def begin(self, model: Any) -> None:
        model.prefix.begin(model)

    def to_config(self, model: Any) -> dict[str, Any]:
        heads, width = self.attention_shape(model.cfg)
        return super().to_config(model) | {
            "num_virtual_tokens": self.length,
            "num_layers": model.cfg.num_layers,
            "num_attention_heads": heads,
            "token_dim": width,
            "num_transformer_submodules": 1,
        }

    def attention_shape(self, cfg: ModelConfig) -> tuple[int, int]:
        """(num_attention_heads, token_dim), as peft's config has them."""
        raise NotImplementedError


class PrefixAdapter(VirtualTokens):
    """Prefix tuning."""

    method = "prefix"
    peft_type = "PREFIX_TUNING"
    decayed = {"keys": False, "values": False}

    def prefix(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Prefix:
        if cfg.latent is not None:
            raise UserError(
                "peft.method prefix adds keys and values of each head, which latent attention does "
                "not cache; use method prompt"
            )
        return Prefix(cfg, self.length, rngs)

    def attention_shape(self, cfg: ModelConfig) -> tuple[int, int]:
        return cfg.num_kv_heads, cfg.num_kv_heads * cfg.head_dim

    def tensors(self, model: Any) -> dict[str, np.ndarray]:
        kv_L2PNK = np.stack(dist.gather([model.prefix.keys[...], model.prefix.values[...]]), 1)
        return {TENSOR: kv_L2PNK.transpose(2, 0, 1, 3, 4).reshape(self.length, -1)}

    def check(
        self, model: Any, shapes: Mapping[str, tuple[int, ...]], file: Path, which: int = 0
    ) -> None:
        L, P, N, K = model.prefix.keys.get_value().shape
        if shapes.get(TENSOR) != (P, 2 * L * N * K):
            raise UserError(f"{file}: {TENSOR} is missing or does not fit the model")

    def load(self, model: Any, tensors: dict[str, np.ndarray], which: int = 0) -> None:
        L, P, N, K = model.prefix.keys.get_value().shape
        kv_2LPNK = tensors.pop(TENSOR).reshape(P, L, 2, N, K).transpose(2, 1, 0, 3, 4)
        set_value(model.prefix.keys, kv_2LPNK[0])
        set_value(model.prefix.values, kv_2LPNK[1])


class PromptAdapter(VirtualTokens):
    """Prompt tuning."""

    method = "prompt"
    peft_type = "PROMPT_TUNING"
    decayed = {"embeddings": False}

    def prefix(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Prompt:
        return Prompt(cfg, self.length, rngs)

    def attention_shape(self, cfg: ModelConfig) -> tuple[int, int]:
        return cfg.num_heads, cfg.hidden_size

    def slots(self, model: Any, which: int = 0) -> Iterator[Slot]:
        yield Slot(TENSOR, model.prefix.embeddings)


def _initial_tokens(model: Any, length: int) -> jax.Array:
    """int32 [1, length]: tokens spread evenly over the vocabulary, from which training starts."""
    return jnp.linspace(0, model.cfg.vocab_size - 1, length).astype(jnp.int32)[None]


class Prefix(nnx.Module):
    """Keys and values, each [L, P, N, K], initialized from tokens of the vocabulary."""

    def __init__(self, cfg: ModelConfig, length: int, rngs: nnx.Rngs):
        shape = (cfg.num_layers, length, cfg.num_kv_heads, cfg.head_dim)
        axes = ("layers", None, "kv_heads", None)
        keys, values = jax.random.normal(rngs.peft(), (2, *shape)) * cfg.initializer_range
        self.keys, self.values = AdapterParam(keys, axes=axes), AdapterParam(values, axes=axes)
        self.length = length

    def kv(self, model: Any) -> tuple[jax.Array, jax.Array]:
        """Keys and values in the compute dtype, each [L, 1, P, N, K]."""
        dtype = model.compute_dtype
        return self.keys[...][:, None].astype(dtype), self.values[...][:, None].astype(dtype)

    def begin(self, model: Any) -> None:
        """Sets keys and values to those that the model computes for the initial tokens."""
        cache = Cache.empty(model.cfg, 1, self.length, jnp.float32)
        cache = model.hidden(_initial_tokens(model, self.length), cache=cache).cache
        pairs = zip((self.keys, self.values), cache.read(model.cfg), strict=True)
        for variable, value_L1PNK in pairs:
            set_value(variable, value_L1PNK[:, 0])


class Prompt(nnx.Module):
    """Embeddings [P, D], the input of the first layer, initialized from the vocabulary's."""

    def __init__(self, cfg: ModelConfig, length: int, rngs: nnx.Rngs):
        start = jax.random.normal(rngs.peft(), (length, cfg.hidden_size)) * cfg.initializer_range
        self.embeddings = AdapterParam(start, axes=(None, None))
        self.length = length

    def kv(self, model: Any) -> tuple[jax.Array, jax.Array]:
        """Keys and values in the compute dtype, each [L, 1, P, N, K]."""
        x = self.embeddings[...].astype(model.compute_dtype)[None]
        cache = Cache.empty(model.cfg, 1, self.length, model.compute_dtype)
        return model.forward(x, cache=cache).cache.read(model.cfg)

    def begin(self, model: Any) -> None:
        """Sets the embeddings to those of the initial tokens."""
        table = model.embed.embedding[...].astype(jnp.float32) * model.cfg.embed_scale
        set_value(self.embeddings, jnp.take(table, _initial_tokens(model, self.length)[0], axis=0))


def context_length(cfg: ModelConfig, adapter: Adapter, max_length: int, new: int = 0) -> int:
    """Positions that the model has for a text, besides virtual tokens.

    Raises UserError if max_length, and the `new` tokens that an online run generates, exceed them.
    """
    left = cfg.max_positions - adapter.length
    if max_length + new > left:
        tokens = f" besides {adapter.length} virtual tokens" if adapter.length else ""
        given = f"data.max_length {max_length}"
        given += f" and rl.max_new_tokens {new} together are" if new else " is"
        raise UserError(
            f"{given} over the model's limit of {left} positions{tokens}; "
            f"lower {'one' if new else 'it'}"
        )
    return left
