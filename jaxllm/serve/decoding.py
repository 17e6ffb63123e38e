# SPDX-License-Identifier: Apache-2.0
"""Decode texts one token at a time, each alone in its batch, in few compiled programs.

A text depends on no other text, whatever else is decoded meanwhile. Prompts are padded and caches
grow to a few lengths, and what a request chooses is no constant of a program, so a server compiles
two programs for each of these lengths.

Dims: B = 1 row, P tokens of a padded prompt, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxllm.model.cache import Cache
from jaxllm.model.decoder import Decoder
from jaxllm.ops.decoding import argmax
from jaxllm.sampling import (
    Sampling,
    after_prompts,
    after_token,
    decoding_layout,
    draw,
    left_padded,
    mesh_of,
    nucleus,
)

PROMPT, SLOTS = 64, 512  # least lengths of a padded prompt, and of a cache that is decoded with
MOST_TOPS = 20  # most likely tokens that a request may ask for
COLDEST = 1e-5  # temperature below which decoding is greedy, since logits would overflow


def padded_length(length: int, least: int) -> int:
    """The smallest of least, 1.5 least, 2 least, 3 least, 4 least, 6 least, … for `length`."""
    octave = least << max(math.ceil(math.log2(length / least)), 0)
    return octave * 3 // 4 if octave > least and length <= octave * 3 // 4 else octave


@partial(jax.jit, static_argnames="graph")
def _begin(graph: Any, params: Any, tokens: Any, segment_ids: Any, weights: Any) -> Any:
    model: Decoder = nnx.merge(graph, params)
    return after_prompts(model, tokens, segment_ids, tokens.shape[1], weights)


@partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def _advance(graph: Any, params: Any, cache: Cache, token: Any, weights: Any) -> Any:
    model: Decoder = nnx.merge(graph, params)
    return after_token(model, jnp.reshape(token, (1, 1)), cache, weights)


_grown = jax.jit(Cache.grown, static_argnames="slots")


@jax.jit
def _greedy(logits_BV: jax.Array) -> jax.Array:
    return argmax(logits_BV)


@jax.jit
def _draw(logits_BV: Any, temperature: Any, top_p: Any, key: Any, step: Any, row: Any) -> jax.Array:
    logits_BV = logits_BV / temperature
    logits_BV = jnp.where(top_p < 1, nucleus(logits_BV, top_p), logits_BV)
    return draw(logits_BV, key, step, row[None])


def _logprobs(logits_V: jax.Array, token: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log-probability of a token, ids and log-probabilities of the most likely tokens)."""
    logps_V = jax.nn.log_softmax(logits_V)
    tops, ids = lax.top_k(logps_V, min(MOST_TOPS, len(logps_V)))
    return logps_V[token], ids, tops


_token_logprobs = jax.jit(_logprobs)


@partial(jax.jit, static_argnames="graph")
def _prompt_logprobs(graph: Any, params: Any, tokens: Any, segment_ids: Any, weights: Any) -> Any:
    """`_logprobs` of each token but the first of a prompt [1, P], at the position before it."""
    model: Decoder = nnx.merge(graph, params)
    positions = jnp.maximum(jnp.cumsum(segment_ids, 1) - 1, 0)
    x_TD = model.hidden(tokens, segment_ids, positions, adapter_weights=weights).x[0]

    def one(args: tuple[jax.Array, jax.Array]) -> Any:
        x_D, target = args
        return _logprobs(model.logits(x_D[None], weights)[0], target)

    return lax.map(one, (x_TD, jnp.roll(tokens[0], -1)), batch_size=32)


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of probabilities: of a token, and of the most likely ones, in order."""

    token: float
    tops: tuple[tuple[int, float], ...]

    @staticmethod
    def of(found: Any, tops: int) -> Logprobs:
        logp, ids, logps = (np.asarray(x) for x in found)
        return Logprobs(
            float(logp), tuple(zip(ids[:tops].tolist(), logps[:tops].tolist(), strict=True))
        )


@dataclass
class Text:
    """A text in progress: all of its tokens, and what predicts the next one."""

    tokens: list[int]
    logits: jax.Array  # float32 [1, V]
    cache: Cache
    left: int  # slots of the cache that are empty

    def copy(self) -> Text:
        """Another text that goes on from here. The cache is shared, and only a grown one is
        written to."""
        assert not self.left
        return Text(list(self.tokens), self.logits, self.cache, 0)


class Texts:
    """The texts of a model. weights: float32 [1, adapters], the weight of each adapter, or None."""

    def __init__(self, model: Decoder) -> None:
        with mesh_of(model):
            self._model = decoding_layout(*nnx.split(model))
        self._mesh = partial(mesh_of, model)
        self._prefix = 0 if model.prefix is None else model.prefix.length
        # Lengths after which a text has other frequencies, so that its cache is computed again.
        ropes = [rope for rope in model.cfg.ropes if rope.kind == "longrope"]
        self._changes = {rope.original_length - self._prefix for rope in ropes}

    def begin(self, prompt: Sequence[int], weights: Any = None) -> Text:
        """A text that goes on after a prompt of at least one token."""
        with self._mesh():
            made = _begin(*self._model, *self._padded(prompt), weights)
        logits, cache = jax.block_until_ready(made)  # a prompt is one step of the engine
        return Text(list(prompt), logits, cache, 0)

    def advance(self, text: Text, token: int, weights: Any = None) -> None:
        """Adds a token to a text."""
        text.tokens.append(token)
        if len(text.tokens) - 1 in self._changes:
            again = self.begin(text.tokens, weights)
            text.logits, text.cache, text.left = again.logits, again.cache, 0
            return
        with self._mesh():
            if not text.left:
                used = text.cache.segment_ids.shape[1]
                slots = padded_length(used + 1, SLOTS)
                text.cache, text.left = _grown(text.cache, slots=slots), slots - used
            made = _advance(*self._model, text.cache, token, weights)
        text.logits, text.cache = jax.block_until_ready(made)
        text.left -= 1

    def next_token(self, text: Text, sampling: Sampling, step: int, row: int) -> int:
        """The token that follows: the `step`th new one of the `row`th text of a request. It is the
        one that `jaxllm.sampling.sample` selects; top_k and min_p are not used."""
        with self._mesh():
            if sampling.temperature < COLDEST:
                return int(_greedy(text.logits)[0])
            options = np.float32(sampling.temperature), np.float32(sampling.top_p)
            key = jax.random.key(sampling.seed)
            return int(_draw(text.logits, *options, key, step, jnp.int32(row))[0])

    def logprobs(self, text: Text, token: int, tops: int) -> Logprobs:
        """Of a token that may follow, before temperature and filters."""
        with self._mesh():
            return Logprobs.of(_token_logprobs(text.logits[0], token), tops)

    def prompt_logprobs(
        self, prompt: Sequence[int], tops: int, weights: Any = None
    ) -> list[Logprobs]:
        """Of each token of a prompt but the first."""
        tokens, segment_ids = self._padded(prompt)
        with self._mesh():
            found = _prompt_logprobs(*self._model, tokens, segment_ids, weights)
        columns = [np.asarray(x)[tokens.shape[1] - len(prompt) : -1] for x in found]
        return [Logprobs.of(one, tops) for one in zip(*columns, strict=True)]

    @staticmethod
    def _padded(prompt: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, segment_ids) int32 [1, P]."""
        return left_padded([prompt], 1, padded_length(len(prompt), PROMPT))
