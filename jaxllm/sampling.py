# SPDX-License-Identifier: Apache-2.0
"""Sampling and batched generation: a prefill, then one decode loop with a key/value cache.

The loop serves streams, batches, and the completions of online runs with their log-probabilities.

Dims: B rows, P tokens of the padded prompts, N new tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding

from jaxllm import dist
from jaxllm.errors import UserError
from jaxllm.mesh import data_parallel, put
from jaxllm.model.cache import Cache
from jaxllm.model.decoder import Decoder
from jaxllm.model.stack import unstack
from jaxllm.ops.decoding import argmax, prefers_unstacked, shared_length
from jaxllm.peft.combine import Choice, choice_weights

BUCKET = 64  # lengths are padded to a multiple of this, so that few shapes are compiled
CHUNK = 16  # tokens that are decoded before the host reads them


@dataclass(frozen=True)
class Sampling:
    """How the next token is selected. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 are off.

    Filters apply in the order temperature, top_k, top_p, min_p. A row ends with the first of its
    `stop_ids`, which is part of the result.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()
    seed: int = 0

    def check(self) -> None:
        """Raises UserError for a value outside its range."""
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; it must be in [0, 1]")


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [B, V] after temperature and filters; -inf for tokens that are filtered out."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        logits = nucleus(logits, sampling.top_p)
    if sampling.min_p > 0:
        probs = jax.nn.softmax(logits, -1)
        low = probs < sampling.min_p * jnp.max(probs, -1, keepdims=True)
        logits = jnp.where(low, -jnp.inf, logits)
    return logits


def nucleus(logits: jax.Array, top_p: Any) -> jax.Array:
    """Logits [B, V], -inf but for the most likely tokens whose probabilities sum to top_p."""
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    probs = jax.nn.softmax(ordered, -1)
    in_nucleus = jnp.cumsum(probs, -1) - probs < top_p  # with the token that crosses
    least = jnp.min(jnp.where(in_nucleus, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def sample(logits: jax.Array, sampling: Sampling, key: jax.Array, step: jax.Array) -> jax.Array:
    """Next tokens int32 [B]; randomness is a function of (key, row, step) alone."""
    if sampling.temperature == 0:
        return argmax(logits)
    return draw(filtered(logits, sampling), key, step, jnp.arange(logits.shape[0]))


def draw(logits: jax.Array, key: jax.Array, step: Any, rows_B: jax.Array) -> jax.Array:
    """Random tokens int32 [B] from softmax(logits), a function of (key, row, step)."""
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, step)))(rows_B)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


@partial(jax.jit, static_argnames="graph")
def _unstacked(graph: Any, params: Any) -> tuple[Any, Any]:
    return nnx.split(unstack(nnx.merge(graph, params)))


def decoding_layout(graph: Any, params: Any) -> tuple[Any, Any]:
    """(graph, params) in the layout that decodes fastest: unstacked layers on a CPU, which takes
    one copy of the weights unless they are so already."""
    if not prefers_unstacked() or isinstance(nnx.merge(graph, params).first_stack, nnx.List):
        return graph, params
    return _unstacked(graph, params)


def for_decoding(model: Decoder) -> Decoder:
    """Changes a model that only generates to `decoding_layout`, in the same memory; returns it."""
    if not prefers_unstacked() or isinstance(model.first_stack, nnx.List):
        return model
    with mesh_of(model):
        return unstack(model, release=True)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoding:
    """Completions in progress, of at most N tokens each."""

    step: Any  # int32 scalar: tokens per row so far
    prompts: jax.Array  # int32 [B, P]
    cache: Cache  # of the prompts and all tokens but the last
    ended: jax.Array  # bool [B]
    tokens: jax.Array  # int32 [B, N]; 0 after `step`
    logps: jax.Array  # float32 [B, N], under softmax(logits / temperature) before any filter

    def append(self, logits_BV: jax.Array, cache: Cache, sampling: Sampling, key: Any) -> Decoding:
        """Samples one more token per row."""
        token_B = sample(logits_BV, sampling, key, self.step)
        logits_BV = logits_BV / (sampling.temperature or 1.0)
        total_B1 = jax.nn.logsumexp(logits_BV, -1, keepdims=True)
        logp_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], 1) - total_B1
        tokens = lax.dynamic_update_slice(self.tokens, token_B[:, None], (0, self.step))
        logps = lax.dynamic_update_slice(self.logps, logp_B1, (0, self.step))
        ended = self.ended | jnp.isin(token_B, jnp.asarray(sampling.stop_ids or (-1,)))
        return Decoding(self.step + 1, self.prompts, cache, ended, tokens, logps)


def after_prompts(
    model: Decoder, tokens: Any, segment_ids: Any, slots: int, adapter_weights: Any
) -> tuple[jax.Array, Cache]:
    """(logits [B, V] after left-padded prompts [B, P], their cache, which has so many slots)."""
    cache = model.empty_cache(len(tokens), slots)
    positions = cache.length + jnp.maximum(jnp.cumsum(segment_ids, 1) - 1, 0)
    out = model.hidden(tokens, segment_ids, positions, cache, adapter_weights=adapter_weights)
    assert out.cache is not None
    cache = replace(out.cache, length=jnp.int32(out.cache.length))
    return model.logits(out.x[:, -1], adapter_weights), cache


def after_token(
    model: Decoder, token_B1: jax.Array, cache: Cache, adapter_weights: Any
) -> tuple[jax.Array, Cache]:
    """(logits [B, V] after one more token per row, the cache with it)."""
    positions = jnp.sum(cache.segment_ids != 0, 1, keepdims=True)
    ones = jnp.ones_like(token_B1)
    out = model.hidden(token_B1, ones, positions, cache, adapter_weights=adapter_weights)
    assert out.cache is not None
    return model.logits(out.x[:, 0], adapter_weights), out.cache


@partial(jax.jit, static_argnames=("graph", "new", "sampling", "copies"))
def prefill(
    graph: Any,
    params: Any,
    tokens: jax.Array,
    segment_ids: jax.Array,
    key: jax.Array,
    new: int,
    sampling: Sampling,
    adapter_weights: jax.Array | None = None,
    copies: int = 1,
) -> Decoding:
    """The first token after left-padded prompts, with buffers for N = `new` tokens.

    copies: completions of each prompt, so that B / copies prompts are computed.
    """
    model: Decoder = nnx.merge(graph, params)
    slots = tokens.shape[1] + bucketed(new)
    logits, cache = after_prompts(model, tokens, segment_ids, slots, adapter_weights)
    cache = cache.repeated(copies)
    logits, tokens, segment_ids = (jnp.repeat(x, copies, 0) for x in (logits, tokens, segment_ids))
    empty = Decoding(
        jnp.int32(0),
        tokens,
        cache,
        ~jnp.any(segment_ids, 1),  # rows without a prompt pad the batch to the devices
        jnp.zeros((len(tokens), new), jnp.int32),
        jnp.zeros((len(tokens), new), jnp.float32),
    )
    return empty.append(logits, cache, sampling, key)


@partial(jax.jit, static_argnames=("graph", "sampling"), donate_argnames="state")
def decode(
    graph: Any,
    params: Any,
    state: Decoding,
    key: jax.Array,
    stop: Any,
    sampling: Sampling,
    adapter_weights: jax.Array | None = None,
) -> Decoding:
    """Generates until rows have `stop` tokens or all have ended. Ignore the tokens of a row after
    its end.

    Where the frequencies depend on the length of a text (longrope), the cache is computed again as
    soon as a row is longer than the length at which they change.
    """
    model: Decoder = nnx.merge(graph, params)

    def unfinished(state: Decoding) -> jax.Array:
        return (state.step < stop) & ~jnp.all(state.ended)

    def body(state: Decoding) -> Decoding:
        token_B1 = lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, 1)
        logits_BV, cache = after_token(model, token_B1, state.cache, adapter_weights)
        return state.append(logits_BV, cache, sampling, key)

    changes = [rope.original_length for rope in model.cfg.ropes if rope.kind == "longrope"]
    if not changes:
        return lax.while_loop(unfinished, body, state)

    def outgrows(state: Decoding) -> jax.Array:
        """True if the next token of a row is the first for which the frequencies are others."""
        lengths_B1 = jnp.sum(state.cache.segment_ids != 0, 1, keepdims=True)
        return jnp.any((lengths_B1 == jnp.asarray(changes)) & ~state.ended[:, None])

    def again(state: Decoding) -> Decoding:
        cache = recomputed(model, state, adapter_weights)
        return within(body(replace(state, cache=cache)))

    def within(state: Decoding) -> Decoding:
        return lax.while_loop(lambda state: unfinished(state) & ~outgrows(state), body, state)

    return lax.while_loop(unfinished, again, within(state))


def recomputed(model: Decoder, state: Decoding, adapter_weights: jax.Array | None) -> Cache:
    """The cache of `state`, as a text has it that goes on with another token."""
    old, rows = state.cache, len(state.prompts)
    prefix = 0 if model.prefix is None else model.prefix.length
    segment_ids = old.segment_ids[:, prefix:]  # 0 in the slots that are empty
    slots = segment_ids.shape[1]
    tokens = jnp.concatenate([state.prompts, state.tokens], 1)
    tokens = jnp.pad(tokens, ((0, 0), (0, slots - tokens.shape[1])))
    # The empty slots have the position of the next token, which counts for the text's length.
    positions = prefix + jnp.cumsum(segment_ids, 1) - segment_ids
    empty = model.empty_cache(rows, slots)
    out = model.hidden(tokens, segment_ids, positions, empty, adapter_weights=adapter_weights)
    assert out.cache is not None
    return replace(out.cache, length=old.length)


class PromptTooLong(UserError):
    """A prompt and its new tokens exceed the model's positions."""


def check_prompts(positions: int, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    """Raises UserError for an empty prompt and for a value of `sampling` out of range, and
    PromptTooLong for a prompt that exceeds the model's positions with its new tokens."""
    sampling.check()
    lengths = [len(p) for p in prompts]
    if min(lengths, default=0) == 0:
        raise UserError("a prompt has no tokens; give it some text")
    if max(lengths) + sampling.max_new_tokens > positions:
        raise PromptTooLong(
            f"{max(lengths)} prompt tokens and {sampling.max_new_tokens} new ones exceed the "
            f"model's {positions} positions; shorten the prompt or generate fewer"
        )


def bucketed(length: int) -> int:
    """The length rounded up to a multiple of BUCKET."""
    return -(-length // BUCKET) * BUCKET


def left_padded(
    prompts: Sequence[Sequence[int]], rows: int, longest: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segment_ids) int32 [rows, P] of prompts padded on the left.

    P is `longest` if that is given, else the length of the longest prompt, rounded up.
    """
    width = shared_length(longest) if longest else bucketed(max(map(len, prompts)))
    tokens, segment_ids = np.zeros((2, rows, width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        segment_ids[row, width - len(prompt) :] = 1
    return tokens, segment_ids


@dataclass(frozen=True)
class Completions:
    """Completions of prompts, on the host; N is `max_new_tokens`."""

    tokens: np.ndarray  # int32 [B, N]
    logps: np.ndarray  # float32 [B, N], under softmax(logits / temperature) before any filter
    lengths: np.ndarray  # int32 [B]: tokens up to and including the stop id, or N
    truncated: np.ndarray  # bool [B]: True if there is no stop id


def completions(
    graph: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    mesh: Mesh,
    key: jax.Array | None = None,
    longest: int = 0,
    copies: int = 1,
) -> Completions:
    """Completions of prompts, `copies` of each, by the model whose nnx.split is (graph, params).

    Rows are sharded over the mesh's data and fsdp axes; weights keep their sharding (but see
    `decoding_layout`). On every mesh, randomness is a function of (key, row, step); the default key
    is that of `sampling.seed`. longest: the longest prompt of all calls, so that they share one
    compiled program.
    """
    parts, count = data_parallel(mesh), len(prompts) * copies
    if len(prompts) % parts:  # rows that pad the batch would have copies too
        prompts, copies = [prompt for prompt in prompts for _ in range(copies)], 1
    rows = -(-len(prompts) // parts) * parts
    tokens, segment_ids = left_padded(prompts, rows, longest)
    key = jax.random.key(sampling.seed) if key is None else key
    with jax.set_mesh(mesh):
        graph, params = decoding_layout(graph, params)
        batch = put(mesh, {"tokens": tokens, "segment_ids": segment_ids})
        static, new = replace(sampling, seed=0), sampling.max_new_tokens
        given = batch["tokens"], batch["segment_ids"]
        state = prefill(graph, params, *given, key, new, static, copies=copies)
        state = decode(graph, params, state, key, jnp.int32(new), static)
        tokens, logps = dist.gather((state.tokens, state.logps))
    tokens, logps = tokens[:count], logps[:count]
    stopped = np.isin(tokens, sampling.stop_ids)
    lengths = np.where(stopped.any(1), stopped.argmax(1) + 1, new).astype(np.int32)
    return Completions(tokens, logps, lengths, np.logical_not(stopped.any(1)))


def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    chunk: int = 1,
    adapters: Sequence[Choice] = (),
) -> Iterator[np.ndarray]:
    """Yields new tokens int32 [B, n] (n = 1, then up to `chunk`) until each row has max_new_tokens.

    adapters: a choice of the model's adapters for each row (combine.choice_weights); empty: the
    model's active adapter. Raises UserError as `check_prompts` does.
    """
    check_prompts(model.cfg.max_positions - model.peft.length, prompts, sampling)
    tokens, segment_ids = left_padded(prompts, len(prompts))
    graph, params = decoding_layout(*nnx.split(model))
    key, count = jax.random.key(sampling.seed), sampling.max_new_tokens
    # Fields that differ between calls without changing the program; the caller ends the rows.
    static = replace(sampling, max_new_tokens=1, stop_ids=(), seed=0)
    rows = [choice_weights(model.peft, choice) for choice in adapters]
    assert not rows or len(rows) == len(prompts)
    weights = jnp.asarray(rows, jnp.float32) if rows else None
    with mesh_of(model):
        state = prefill(graph, params, tokens, segment_ids, key, bucketed(count), static, weights)
    yield np.array(state.tokens)[:, :1]
    for done in range(1, count, chunk):
        stop = min(done + chunk, count)
        with mesh_of(model):
            state = decode(graph, params, state, key, jnp.int32(stop), static, weights)
        yield np.array(state.tokens)[:, done:stop]


def mesh_of(model: Decoder) -> AbstractContextManager[Any]:
    """Sets the mesh of the weights, whose devices a kernel has to know."""
    sharding = model.embed.embedding.get_value().sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else nullcontext()


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stopped: Callable[[list[int]], bool] | None = None,
    adapters: Sequence[Choice] = (),
) -> list[list[int]]:
    """New tokens of each prompt, up to and including its first stop id.

    `stopped(new tokens of a row)` ends a row early too; it is called once per chunk. adapters: as
    in `stream`.
    """
    out: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for new in stream(model, prompts, sampling, CHUNK, adapters):
        for row, tokens in enumerate(new.tolist()):
            for token in tokens:
                if not done[row]:
                    out[row].append(token)
                    done[row] = token in sampling.stop_ids
            done[row] = done[row] or (stopped is not None and stopped(out[row]))
        if all(done):
            break
    return out
