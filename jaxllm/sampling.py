# SPDX-License-Identifier: Apache-2.0
"""Generation: prefill, then decode with a KV cache, batched; the same code for samples and chat.

Dims: B rows, P prompt slots, S cache slots, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from jaxllm.errors import UserError
from jaxllm.mesh import data_parallel, put
from jaxllm.model.cache import Cache
from jaxllm.model.decoder import Decoder
from jaxllm.model.stack import unstack
from jaxllm.ops.decoding import argmax, prefers_unstacked
from jaxllm.peft.combine import Choice, choice_weights

BUCKET = 64  # prompts are padded to a multiple of this, so that few shapes are compiled
CHUNK = 16  # tokens decoded between two looks of the host


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 are off.

    Filters apply in the order temperature, top_k, top_p, min_p. `stop_ids` end a row (the id itself
    is part of the result).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError for a value outside its range."""
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; it must lie in [0, 1]")


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [B, V] after temperature and filters; what may not be drawn is -inf."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]
        probs = jax.nn.softmax(ordered, -1)
        kept = jnp.cumsum(probs, -1) - probs < sampling.top_p  # the token that crosses stays
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.min_p > 0:
        probs = jax.nn.softmax(logits, -1)
        low = probs < sampling.min_p * jnp.max(probs, -1, keepdims=True)
        logits = jnp.where(low, -jnp.inf, logits)
    return logits


def sample(logits: jax.Array, sampling: Sampling, key: jax.Array, step: jax.Array) -> jax.Array:
    """Next tokens int32 [B]; randomness is a function of (key, row, step) alone."""
    if sampling.temperature == 0:
        return argmax(logits)
    key = jax.random.fold_in(key, step)
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, filtered(logits, sampling)).astype(jnp.int32)


@partial(jax.jit, static_argnames="graph")
def _apart(graph: Any, params: Any) -> tuple[Any, Any]:
    return nnx.split(unstack(nnx.merge(graph, params)))


def ready(graph: Any, params: Any) -> tuple[Any, Any]:
    """(graph, params) as decoding reads them fastest: as they are, but a CPU's in bfloat16, which
    are copied once into the form of `apart`."""
    unstacked = prefers_unstacked(nnx.merge(graph, params).compute_dtype)
    return _apart(graph, params) if unstacked else (graph, params)


def _read(model: Decoder, tokens: Any, segments: Any, slots: int, adapter_weights: Any = None):
    """Left-padded prompts [B, P] -> (logits of the next token [B, V], cache of `slots`)."""
    cache = model.empty_cache(tokens.shape[0], slots)
    positions = cache.length + jnp.maximum(jnp.cumsum(segments, 1) - 1, 0)
    out = model.hidden(tokens, segments, positions, cache, adapter_weights=adapter_weights)
    cache = replace(out.cache, length=jnp.int32(out.cache.length))
    return model.logits(out.x[:, -1], adapter_weights), cache


def _next(model: Decoder, cache: Cache, token: jax.Array, adapter_weights: Any = None):
    """One more token [B] of each row -> (logits of the next one [B, V], cache)."""
    positions = jnp.sum(cache.segment_ids != 0, 1, keepdims=True)
    ones = jnp.ones((token.shape[0], 1), jnp.int32)
    out = model.hidden(token[:, None], ones, positions, cache, adapter_weights=adapter_weights)
    return model.logits(out.x[:, 0], adapter_weights), out.cache


@partial(jax.jit, static_argnames=("graph", "slots", "sampling"))
def prefill(
    graph: Any,
    params: Any,
    tokens: jax.Array,
    segments: jax.Array,
    key: jax.Array,
    slots: int,
    sampling: Sampling,
    adapter_weights: jax.Array | None = None,
):
    """Left-padded prompts [B, P] -> (first new token [B], cache of `slots`)."""
    model: Decoder = nnx.merge(graph, params)
    logits, cache = _read(model, tokens, segments, slots, adapter_weights)
    return sample(logits, sampling, key, jnp.int32(0)), cache


@partial(jax.jit, static_argnames=("graph", "count", "sampling"), donate_argnames="cache")
def decode(
    graph: Any,
    params: Any,
    cache: Cache,
    token: jax.Array,
    key: jax.Array,
    step: jax.Array,
    count: int,
    sampling: Sampling,
    adapter_weights: jax.Array | None = None,
):
    """Feeds `token` [B] and `count` - 1 of its successors: (next tokens [B, count], cache)."""
    model: Decoder = nnx.merge(graph, params)

    def one(carry, index):
        cache, token = carry
        logits, cache = _next(model, cache, token, adapter_weights)
        token = sample(logits, sampling, key, step + index)
        return (cache, token), token

    (cache, _), tokens = lax.scan(one, (cache, token), jnp.arange(count))
    return tokens.T, cache


def check_prompts(positions: int, prompts: Sequence[Sequence[int]], sampling: Sampling) -> int:
    """The longest prompt's length. Raises ValueError for what cannot be continued: an empty prompt,
    one that passes the model's positions with its new tokens, a value of `sampling` out of range.
    """
    sampling.check()
    lengths = [len(p) for p in prompts]
    if min(lengths, default=0) == 0:
        raise UserError("a prompt has no tokens; give it some text")
    if max(lengths) + sampling.max_new_tokens > positions:
        raise UserError(
            f"{max(lengths)} prompt tokens and {sampling.max_new_tokens} new ones pass the model's "
            f"{positions} positions; shorten the prompt or make fewer"
        )
    return max(lengths)


def bucketed(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


def left_padded(
    prompts: Sequence[Sequence[int]], rows: int, longest: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segments) int32 [rows, P]: prompts end at the right; P is the bucket of the longest
    of them, or of `longest`."""
    width = bucketed(max(longest, *map(len, prompts)))
    tokens, segments = np.zeros((2, rows, width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        segments[row, width - len(prompt) :] = 1
    return tokens, segments


@dataclass(frozen=True)
class Completions:
    """What a model wrote after prompts, on the host; N is the most tokens there may be."""

    tokens: np.ndarray  # int32 [B, N]
    logps: np.ndarray  # float32 [B, N]: under softmax(logits / temperature), before any filter
    lengths: np.ndarray  # int32 [B]: tokens up to and with the one that ends the row, or N
    truncated: np.ndarray  # bool [B]: no token ended it


@partial(jax.jit, static_argnames=("graph", "slots", "sampling"))
def _complete(
    graph: Any,
    params: Any,
    tokens: jax.Array,
    segments: jax.Array,
    key: jax.Array,
    slots: int,
    sampling: Sampling,
):
    """Left-padded prompts [B, P] -> (tokens [B, N], their log-probabilities [B, N]).

    Ends when every row has: what a row has after its end has no meaning.
    """
    model: Decoder = nnx.merge(graph, params)
    rows, most = tokens.shape[0], sampling.max_new_tokens
    stops = jnp.asarray(sampling.stop_ids or (-1,))

    def draw(logits: jax.Array, step: jax.Array):
        token = sample(logits, sampling, key, step)
        logits = logits / (sampling.temperature or 1.0)
        total = jax.nn.logsumexp(logits, -1, keepdims=True)
        return token, jnp.take_along_axis(logits, token[:, None], 1) - total

    def grown(made, token, logp, step):
        """`made` with one more column; static shapes, so that one program does for all steps."""
        both = zip(made, (token[:, None], logp), strict=True)
        return tuple(lax.dynamic_update_slice(x, y, (0, step)) for x, y in both)

    def going(carry):
        return (carry[0] < most) & ~jnp.all(carry[3])

    def one(carry):
        step, cache, token, ended, made = carry
        logits, cache = _next(model, cache, token)
        token, logp = draw(logits, step)
        ended |= jnp.isin(token, stops)
        return step + 1, cache, token, ended, grown(made, token, logp, step)

    logits, cache = _read(model, tokens, segments, slots)
    token, logp = draw(logits, jnp.int32(0))
    ended = jnp.isin(token, stops) | ~jnp.any(segments, 1)  # rows that fill up the devices
    made = (jnp.zeros((rows, most), jnp.int32), jnp.zeros((rows, most), jnp.float32))
    made = grown(made, token, logp, jnp.int32(0))
    carry = lax.while_loop(going, one, (jnp.int32(1), cache, token, ended, made))
    return carry[4]


def completions(
    graph: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    mesh: Mesh,
    key: jax.Array | None = None,
    longest: int = 0,
) -> Completions:
    """Completions of prompts by the model that nnx.split made graph and params of.

    Rows are divided among the mesh's data and fsdp axes; weights stay where they are (but see
    `ready`), LoRA branches as they are. Draws are a function of (key, row, step), whatever the
    mesh; `key` is by default that of `sampling.seed`. What sampling and width say makes a program,
    compiled once: `longest` is the longest prompt there will be.
    """
    parts = data_parallel(mesh)
    rows = -(-len(prompts) // parts) * parts
    tokens, segments = left_padded(prompts, rows, longest)
    slots = tokens.shape[1] + bucketed(sampling.max_new_tokens)
    key = jax.random.key(sampling.seed) if key is None else key
    with jax.set_mesh(mesh):
        graph, params = ready(graph, params)
        on = put(mesh, {"tokens": tokens, "segments": segments})
        fixed = replace(sampling, seed=0)
        made = _complete(graph, params, on["tokens"], on["segments"], key, slots, fixed)
        new, logps = (np.asarray(x)[: len(prompts)] for x in jax.device_get(made))
    stopped = np.isin(new, sampling.stop_ids)
    first = np.where(stopped.any(1), stopped.argmax(1) + 1, new.shape[1]).astype(np.int32)
    return Completions(new, logps, first, np.logical_not(stopped.any(1)))


def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    chunk: int = 1,
    adapters: Sequence[Choice] = (),
) -> Iterator[np.ndarray]:
    """Yields new tokens int32 [B, n] (n = 1, then up to `chunk`) until max_new_tokens are made.

    adapters: of each row, which of the model's to use (combine.choice_weights); empty: as the
    model does.
    Raises ValueError as `check_prompts` does.
    """
    check_prompts(model.cfg.max_positions - model.peft.length, prompts, sampling)
    tokens, segments = left_padded(prompts, len(prompts))
    width = tokens.shape[1]
    graph, params = ready(*nnx.split(model))
    slots = width + bucketed(sampling.max_new_tokens)
    key = jax.random.key(sampling.seed)
    fixed = replace(sampling, max_new_tokens=1, stop_ids=(), seed=0)  # the rest makes a program
    rows = [choice_weights(model.peft, chosen) for chosen in adapters]
    assert not rows or len(rows) == len(prompts)
    adapter_weights = jnp.asarray(rows, jnp.float32) if rows else None
    token, cache = prefill(graph, params, tokens, segments, key, slots, fixed, adapter_weights)
    yield np.asarray(token)[:, None]
    made = 1
    while made < sampling.max_new_tokens:
        count = min(chunk, slots - width - made + 1)
        new, cache = decode(
            graph, params, cache, token, key, jnp.int32(made), count, fixed, adapter_weights
        )
        token, made = new[:, -1], made + count
        yield np.asarray(new)[:, : count - max(0, made - sampling.max_new_tokens)]


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stopped: Callable[[list[int]], bool] | None = None,
    adapters: Sequence[Choice] = (),
) -> list[list[int]]:
    """New tokens of each prompt, up to and including its first stop id.

    `stopped(new tokens of a row)` ends a row early too; it is asked once a chunk. adapters: which
    of the model's each row uses, as in `stream`.
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


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`text` before the first of the stop strings, and whether there was one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


@dataclass(frozen=True)
class TextModel:
    """A HF directory ready to answer: model, tokenizer and what ends a text."""

    model: Decoder
    tokenizer: Any
    stop_ids: tuple[int, ...]

    @staticmethod
    def load(
        path: str,
        dtype: str = "float32",
        template: str | None = None,
        adapter: Mapping[str, str] | None = None,
    ) -> TextModel:
        """From a HF directory or hub id; `template` as data.template, `adapter` as in load_hf.

        Raises ValueError or FileNotFoundError for what is not there or unfit.
        """
        from jaxllm.data.template import chat_tokenizer
        from jaxllm.files import resolve
        from jaxllm.hf import load_hf
        from jaxllm.peft.files import tokenizer_of
        from jaxllm.tokenizer import check_vocabulary, stop_ids

        tokenizer = chat_tokenizer(tokenizer_of(path), template)
        model = load_hf(path, dtype=dtype, adapter=adapter or None)
        check_vocabulary(tokenizer, model.cfg.vocab_size)
        if model.cfg.scores:
            raise UserError(f"{path} is a reward model; it scores texts and writes none")
        return TextModel(model, tokenizer, tuple(stop_ids(tokenizer, resolve(model.base))))

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Tokens up to where the assistant begins to answer."""
        from jaxllm.data.chat import prompt_tokens
        from jaxllm.data.template import apply_user_template

        return prompt_tokens(self.tokenizer, apply_user_template(self.tokenizer, messages)).tolist()

    def text(self, tokens: Sequence[int]) -> str:
        """Decoded, without the tokens that end it."""
        return self.tokenizer.decode([t for t in tokens if t not in self.stop_ids])


def generate_text(
    model: str,
    prompts: list[str],
    *,
    chat: bool = False,
    system: str | None = None,
    template: str | None = None,
    stop: Sequence[str] = (),
    dtype: str = "float32",
    sampling: Sampling = Sampling(),
    adapter: Mapping[str, str] | None = None,
    use: Sequence[Choice] = (),
) -> list[str]:
    """Continues texts, or answers them as user messages through the chat template.

    adapter: {name: directory} beside the model; use: which of them each prompt gets, or one for
    all.

    Rows end at the model's own stop tokens, those of `sampling`, and before the strings `stop`.
    Raises ValueError as `check_prompts` does.
    """
    loaded = TextModel.load(model, dtype, template, adapter)
    if len(use) not in (0, 1, len(prompts)):
        raise UserError(f"{len(use)} choices of adapters for {len(prompts)} prompts; give one each")
    use = list(use) * len(prompts) if len(use) == 1 else use
    before = [{"role": "system", "content": system}] if system else []
    if chat:
        rows = [loaded.prompt([*before, {"role": "user", "content": p}]) for p in prompts]
    else:
        rows = [loaded.tokenizer(p).input_ids for p in prompts]
    sampling = replace(sampling, stop_ids=(*sampling.stop_ids, *loaded.stop_ids))
    ended = None if not stop else (lambda tokens: cut(loaded.text(tokens), stop)[1])
    outs = generate(loaded.model, rows, sampling, ended, use)
    return [cut(loaded.text(tokens), stop)[0] for tokens in outs]


def write_text(text: str) -> None:
    print(text, end="", flush=True)


def chat_loop(
    model: str,
    *,
    system: str | None = None,
    template: str | None = None,
    stop: Sequence[str] = (),
    dtype: str = "float32",
    sampling: Sampling = Sampling(),
    adapter: Mapping[str, str] | None = None,
    use: Sequence[Choice] = (),
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = write_text,
) -> None:
    """A conversation in the terminal, streamed; ends at end of input or an empty line."""
    loaded = TextModel.load(model, dtype, template, adapter)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            line = read("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if not line.strip():
            return
        messages.append({"role": "user", "content": line})
        tokens: list[int] = []
        shown = ""
        try:
            for new in stream(loaded.model, [loaded.prompt(messages)], sampling, 1, use):
                tokens.append(int(new[0, 0]))
                text, ended = cut(loaded.text(tokens), stop)
                if not text.endswith("\ufffd"):  # half of a character: wait for the rest
                    write(text[len(shown) :])
                    shown = text
                if ended or tokens[-1] in (*sampling.stop_ids, *loaded.stop_ids):
                    break
        except KeyboardInterrupt:
            pass  # ends the answer, not the conversation
        write("\n")
        messages.append({"role": "assistant", "content": shown})
