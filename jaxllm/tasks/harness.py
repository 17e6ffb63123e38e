# SPDX-License-Identifier: Apache-2.0
"""Our model as lm-eval asks it: log-likelihoods of continuations, and texts up to stop strings.

Requests are sorted by length and computed in batches of a fixed number of rows and of few widths,
so that few programs are compiled. Each process computes the same requests with its part of the
mesh. Encoding, truncation and windows are those of lm-eval's own `hf` model.

Dims: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxllm import dist
from jaxllm.chat import cut
from jaxllm.data.batch import Batch
from jaxllm.data.template import template_source
from jaxllm.errors import UserError
from jaxllm.mesh import data_parallel, local_rows, put
from jaxllm.monitor.progress import track
from jaxllm.objectives.lm import forward
from jaxllm.ops.cross_entropy import Head, token_scores
from jaxllm.paths import first_line
from jaxllm.sampling import CHUNK, Sampling, decode, decoding_layout, left_padded, prefill
from jaxllm.step import Models
from jaxllm.tokenizer import special_tokens

NEW_TOKENS = 256  # of a text whose task gives no number, as in lm-eval
# What a task may set for generation, after `normalize_gen_kwargs`.
GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p"}
HARMLESS = ("num_beams", 1)  # the one other setting that changes nothing
Pair = tuple[list[int], list[int]]  # tokens of (context, continuation)


def width(length: int, multiple: int = 1) -> int:
    """The width of rows of so many tokens: 64, 128, 192, 256, 384, 512, 768, …, at most half of
    which is padding; rounded up to a `multiple`."""
    size = 64
    while size < length:
        size = size * 3 // 2 if size >= 128 and size & (size - 1) == 0 else 2 ** size.bit_length()
    return -(-size // multiple) * multiple


def scores(models: Models, trainable: Any, frozen: Any, batch: Batch) -> tuple[Any, Any]:
    """(Σ log p of a row's weighted targets, how many of them are not the most likely token), each
    float32 [B]."""
    model, _ = models(trainable, frozen)
    head = Head(model.cfg.logit_softcap, blocks=model.loss_blocks)
    terms = model.head_terms(forward(model, batch).x)
    logp_BT, top_BT = token_scores(terms, batch.targets, batch.weights, head)
    return jnp.sum(logp_BT, 1), jnp.sum(batch.weights - top_BT, 1)


class Model(TemplateLM):
    """A model of ours, given as `models(trainable, frozen)`, which `weights` are set for.

    max_length: the longest row in tokens. window: the longest row of a whole text, whose
    log-likelihood is asked for. batch_size: rows of a batch, rounded up to a multiple of the
    data-parallel devices.
    """

    def __init__(
        self,
        models: Models,
        tokenizer: Any,
        stop_ids: Sequence[int],
        *,
        mesh: Mesh,
        max_length: int,
        window: int,
        batch_size: int,
    ):
        super().__init__()
        self.tokenizer, self.stop_ids = tokenizer, tuple(stop_ids)
        self.max_length, self.window = max_length, window
        self.special = special_tokens(tokenizer)
        self.models, self.mesh = models, mesh
        self.size = -(-batch_size // data_parallel(mesh)) * data_parallel(mesh)
        self.weights: tuple[Any, Any] = (None, None)
        """(trainable, frozen), while tasks are evaluated"""
        self.alive: Callable[[], Any] = lambda: None
        """called before each batch"""
        self.progress = True
        """whether to show how many batches are done"""
        self._scores = jax.jit(partial(scores, models))

    def tracked(self, chunks: Sequence[list[int]], label: str) -> Iterable[list[int]]:
        return track(chunks, label, len(chunks)) if self.progress else chunks

    # ---- text and tokens

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Any:
        """Tokens; special ones are added as the tokenizer does, but not to a text that begins with
        the first of them."""
        if add_special_tokens is None:
            begun = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
            return self.tokenizer.encode(string, **({"add_special_tokens": False} if begun else {}))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The rendered messages; without the system message if the template refuses it. Raises
        UserError if it refuses the others."""
        template_source(self.tokenizer)  # raises UserError if there is none
        rendered = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return rendered(chat_history)
        except TemplateError:
            chat_history = [one for one in chat_history if one["role"] != "system"]
        try:
            return rendered(chat_history)
        except TemplateError as error:
            what = "the chat template refuses a prompt of the task"
            raise UserError(f"{what}: {first_line(error)}") from error

    # ---- log-likelihoods

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        return self.scored([(context, more) for _, context, more in requests])

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """log p of whole texts, in windows that share no token."""
        pairs: list[Pair] = []
        counts = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.window, 1)
            before = len(pairs)
            pairs += map(make_disjoint_window, windows)
            counts.append(len(pairs) - before)
        found = iter(self.scored(pairs))
        return [float(sum(next(found)[0] for _ in range(count))) for count in counts]

    def scored(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """(log p of a continuation, whether greedy decoding gives it) of each pair.

        A context is truncated from the left to max_length tokens with all of the continuation but
        its last token. Raises UserError for a longer continuation.
        """
        longest = max((len(more) for _, more in pairs), default=0)
        if longest > self.max_length:
            limit = f"the {self.max_length} tokens of a row (--max_length)"
            raise UserError(f"a continuation of {longest} tokens exceeds {limit}")
        rows = [((context or [self.prefix_token_id]) + more, len(more)) for context, more in pairs]
        rows = [(tokens[-self.max_length - 1 :], count) for tokens, count in rows]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        chunks = [order[i : i + self.size] for i in range(0, len(order), self.size)]
        out: list[Any] = [None] * len(rows)

        def keep(chunk: list[int], computed: Any) -> None:
            for i, total, misses in zip(chunk, *dist.gather(computed), strict=False):
                out[i] = float(total), bool(misses == 0)

        with jax.set_mesh(self.mesh):
            before: tuple[Any, ...] = ()
            for chunk in self.tracked(chunks, "scoring"):
                self.alive()
                computed = self._scores(*self.weights, self.batch([rows[i] for i in chunk]))
                if before:  # read while the next batch is computed
                    keep(*before)
                before = chunk, computed
            if before:
                keep(*before)
        return out

    def batch(self, rows: Sequence[tuple[list[int], int]]) -> Batch:
        """A batch of (tokens, how many of the last ones count), of a fixed number of rows."""
        T = width(len(rows[0][0]) - 1, self.mesh.shape["context"])
        ids, shape = ("tokens", "targets", "segment_ids", "positions"), (self.size, T)
        host: dict[str, Any] = {name: np.zeros(shape, np.int32) for name in ids}
        host["weights"] = np.zeros(shape, np.float32)
        for row, (tokens, count) in enumerate(rows):
            n = len(tokens) - 1
            host["tokens"][row, :n], host["targets"][row, :n] = tokens[:-1], tokens[1:]
            host["segment_ids"][row, :n], host["positions"][row, :n] = 1, np.arange(n)
            host["weights"][row, n - count : n] = 1.0
        local = [*local_rows(self.mesh, self.size)]
        return Batch(**put(self.mesh, {k: v[local] for k, v in host.items()}, self.size))

    # ---- generation

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Texts after contexts, up to a stop string, a stop id or max_gen_toks tokens.

        A context is truncated from the left, so that the new tokens fit into max_length.
        """
        groups: dict[str, list[int]] = {}  # a batch has one setting
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        out = [""] * len(requests)
        with jax.set_mesh(self.mesh):
            layout = decoding_layout(*nnx.split(self.models(*self.weights)[0]))
            for group in groups.values():
                sampling, until = self.settings(requests[group[0]].args[1])
                room = self.max_length - sampling.max_new_tokens
                texts = [requests[i].args[0] for i in group]
                prompts = [self.tok_encode(t)[-room:] or [self.prefix_token_id] for t in texts]
                for place, text in self.texts(layout, prompts, sampling, until):
                    out[group[place]] = text
        return out

    def settings(self, given: dict[str, Any]) -> tuple[Sampling, list[str]]:
        """(how tokens are sampled, the stop strings) of a task's generation_kwargs. Raises
        UserError for those that we do not have."""
        kwargs: dict[str, Any] = {**normalize_gen_kwargs(given, NEW_TOKENS)}
        unknown = {k for k, v in kwargs.items() if k not in GENERATION and (k, v) != HARMLESS}
        if unknown:
            raise UserError(f"generation_kwargs: {', '.join(sorted(unknown))} are not supported")
        new = kwargs["max_gen_toks"]
        if new >= self.max_length:
            limit = f"all {self.max_length} tokens of a row (--max_length)"
            raise UserError(f"generation_kwargs: max_gen_toks {new} leaves no prompt in {limit}")
        kept = {k: v for k in ("top_k", "top_p", "min_p") if (v := kwargs.get(k)) is not None}
        temperature = kwargs.get("temperature", 0.0) if kwargs["do_sample"] else 0.0
        until = [stop for stop in kwargs["until"] if stop]
        # The decoded text has no special tokens, so it would never have these stop strings.
        special = self.tokenizer.convert_tokens_to_ids([*{*until} & {*self.special}])
        stop_ids = tuple(sorted({*self.stop_ids, *special}))
        sampling = Sampling(new, temperature, stop_ids=stop_ids, **kept)
        sampling.check()
        return sampling, until

    def texts(
        self, layout: Any, prompts: Sequence[list[int]], sampling: Sampling, until: list[str]
    ) -> Iterator[tuple[int, str]]:
        """(place, text) of each prompt, in any order."""

        def text(tokens: Sequence[int]) -> str:
            end = next((i for i, token in enumerate(tokens) if token in sampling.stop_ids), None)
            return self.tokenizer.decode(tokens[:end], skip_special_tokens=True)

        def is_done(tokens: Sequence[int]) -> bool:
            return bool({*tokens} & {*sampling.stop_ids}) or cut(text(tokens), until)[1]

        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        chunks = [order[i : i + self.size] for i in range(0, len(order), self.size)]
        for number, chunk in enumerate(self.tracked(chunks, "generating")):
            key = jax.random.fold_in(jax.random.key(sampling.seed), number)
            rows = [prompts[i] for i in chunk]
            self.alive()
            out = self.new_tokens(layout, rows, sampling, key, is_done)
            for i, tokens in zip(chunk, out, strict=True):
                yield i, postprocess_generated_text(text(tokens), until, None)

    def new_tokens(
        self,
        layout: Any,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        key: jax.Array,
        is_done: Callable[[Sequence[int]], bool],
    ) -> list[list[int]]:
        """Tokens after each prompt of a batch. It ends once `is_done` holds for all of them."""
        graph, params = layout
        longest = width(max(map(len, prompts)))
        tokens, segment_ids = left_padded(prompts, self.size, longest)
        batch = put(self.mesh, {"tokens": tokens, "segment_ids": segment_ids})
        given, new = (batch["tokens"], batch["segment_ids"]), sampling.max_new_tokens
        state = prefill(graph, params, *given, key, new, sampling)
        done, waiting = 1, [*range(len(prompts))]
        while True:
            out = dist.gather(state.tokens)[: len(prompts), :done].tolist()
            waiting = [row for row in waiting if not is_done(out[row])]
            if done == new or not waiting:
                return out
            done = min(done + CHUNK, new)
            state = decode(graph, params, state, key, jnp.int32(done), sampling)
