# SPDX-License-Identifier: Apache-2.0
"""The queue of requests and the loop that answers them.

The loop runs in the main thread, where chat templates have limits of time and memory
(`jaxllm.untrusted.bounded`). It takes one step of each request in turn, so that several are
streamed at once, and no request changes another's tokens.
"""

from __future__ import annotations

import queue
import secrets
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any

import jax.numpy as jnp

from jaxllm.chat import Streamed, TextModel
from jaxllm.config import DataSection
from jaxllm.data.messages import ParseContext, parse_message
from jaxllm.errors import UserError, is_panic, mistake
from jaxllm.peft.combine import Choice, choice_weights
from jaxllm.sampling import PromptTooLong, Sampling, check_prompts
from jaxllm.serve.decoding import Logprobs, Text, Texts
from jaxllm.serve.protocol import ApiError, Piece, Request, TokenLogprob, Usage
from jaxllm.tokenizer import token_bytes

ACTIVE, WAITING = 8, 64  # requests that are answered at once, each with a cache; that may wait

Event = Piece | Usage | ApiError  # a Usage or an ApiError is the last one


class Job:
    """A request that is being answered. emit: receives its events, in the engine's thread."""

    def __init__(self, request: Any, model: str, emit: Callable[[Event], None]) -> None:
        self.request: Any = request
        self.model, self.emit, self.usage = model, emit, Usage()
        self.cancelled = False  # by its client

    def cancel(self) -> None:
        self.cancelled = True


class Engine:
    """Answers requests to a model, and to each of its adapters under the adapter's name.

    max_new_tokens: the most tokens of an answer to a chat that gives no limit.
    """

    def __init__(
        self,
        loaded: TextModel,
        name: str,
        *,
        use: Sequence[Choice] = (),
        max_new_tokens: int = 1024,
    ) -> None:
        self.loaded, self.name, self.max_new_tokens = loaded, name, max_new_tokens
        self._texts, peft = Texts(loaded.model), loaded.model.peft
        self._positions = loaded.model.cfg.max_positions - peft.length
        self._jobs: queue.Queue[Job] = queue.Queue(2 * WAITING)  # some may have been cancelled
        self._closed = False

        def weights(choice: Choice) -> Any:
            return jnp.asarray([choice_weights(peft, choice)], jnp.float32)

        self._weights = {name: weights(use[0]) if use else None}
        if len(peft.names) > 1:
            self._weights |= {adapter: weights(adapter) for adapter in peft.names}

    @property
    def names(self) -> list[str]:
        """Of the models that a request may ask for."""
        return list(self._weights)

    def known(self, model: str) -> str:
        """The name of a model. Raises ApiError for an unknown one."""
        if model not in self._weights:
            known = ", ".join(self.names)
            message = f"there is no model {model[:200]!r}; known: {known}"
            raise ApiError(404, message, "model", "model_not_found")
        return model

    def submit(self, request: Request, emit: Callable[[Event], None]) -> Job:
        """Raises ApiError for an unknown model, and if too many requests wait."""
        model = self.name if request.model is None else self.known(request.model)
        job = Job(request, model, emit)
        with self._jobs.mutex:
            waiting = sum(not job.cancelled for job in self._jobs.queue)
        try:
            if waiting >= WAITING:
                raise queue.Full
            # A request whose client has left stays in the queue, and in memory, until its turn.
            self._jobs.put_nowait(job)
        except queue.Full:
            raise ApiError(429, f"{WAITING} requests wait; try again later") from None
        return job

    # ---- the loop

    def warm_up(self) -> None:
        """Compiles the programs of short texts."""
        text = self._texts.begin([0], next(iter(self._weights.values())))
        self._texts.advance(text, 0, next(iter(self._weights.values())))

    def run(self) -> None:
        """Answers requests until `close`."""
        active: deque[tuple[Job, Iterator[None]]] = deque()
        try:
            while not self._closed:
                while len(active) < ACTIVE and not (active and self._jobs.empty()):
                    if (job := self._next()) is None:
                        return
                    if not job.cancelled:
                        active.append((job, self._answer(job)))
                if next(active[0][1], "done") == "done":
                    active.popleft()
                active.rotate(-1)
        finally:
            unanswered = [job for job, _ in active]
            while not self._jobs.empty():
                unanswered.append(self._jobs.get())
            for job in unanswered:
                job.emit(ApiError(503, "the server stops"))

    def _next(self) -> Job | None:
        """Waits for a request; None once the engine is closed."""
        while not self._closed:
            # A signal that comes just before a wait does not interrupt it.
            with suppress(queue.Empty):
                return self._jobs.get(timeout=0.2)
        return None

    def close(self) -> None:
        """Ends `run` after the current step. A signal handler may call it."""
        self._closed = True

    def _answer(self, job: Job) -> Iterator[None]:
        """Answers a request, step by step."""
        began = time.perf_counter()
        try:
            for piece in self._pieces(job):
                if job.cancelled:
                    break
                if piece is not None:
                    job.emit(piece)
                yield
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except ApiError as error:
            job.emit(error)
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, UserError) or is_panic(error):
                job.emit(ApiError(400, mistake(error) or ""))
                return
            traceback.print_exc()
            job.emit(ApiError(500, f"{type(error).__name__}; the server's log has more"))
        else:
            usage, seconds = job.usage, time.perf_counter() - began
            ended = ", cancelled" if job.cancelled else ""  # a client may leave once it has all
            job.emit(usage)
            said = f"{job.request.kind}: {usage.prompt} prompt tokens, {usage.completion} new"
            rate = usage.completion / max(seconds, 1e-9)
            print(f"{said}, {seconds:.1f} s, {rate:.0f} tokens/s{ended}", file=sys.stderr)

    # ---- a request

    def _pieces(self, job: Job) -> Iterator[Piece | None]:
        """The parts of a request's choices; None between two steps without one."""
        request, weights = job.request, self._weights[job.model]
        prompts = self._prompts(request)
        sampling = self._sampling(request, max(map(len, prompts)))
        try:
            check_prompts(self._positions, prompts, sampling)
        except PromptTooLong as error:
            raise ApiError(400, str(error), code="context_length_exceeded") from None
        job.usage.prompt = sum(map(len, prompts))
        for place, prompt in enumerate(prompts):
            echo = Piece(0)
            if request.kind == "text" and request.echo:
                echo = self._echo(request.prompts[place], prompt, request.tops, weights)
            base = self._texts.begin(prompt, weights) if request.max_tokens != 0 else None
            yield None
            for choice in range(request.n):
                index = place * request.n + choice
                if echo.text or echo.tokens or base is None:
                    finish = "length" if base is None else None
                    yield Piece(index, echo.text, list(echo.tokens), finish)
                if base is not None:
                    text, start = base.copy(), len(echo.text)
                    yield from self._choice(job, index, text, sampling, start, choice)

    def _prompts(self, request: Any) -> list[list[int]]:
        """Tokens of the prompts. Raises ApiError or UserError for one that cannot be used."""
        tokenizer = self.loaded.tokenizer
        if request.kind == "chat":
            if not tokenizer.chat_template:
                raise ApiError(
                    400,
                    "the model has no chat template; use /v1/completions, or start the server "
                    "with --template",
                )
            messages = [
                parse_message(message, ParseContext(DataSection(), f"messages[{i}]"))
                for i, message in enumerate(request.messages)
            ]
            return [self.loaded.prompt(messages)]
        size = self.loaded.model.cfg.vocab_size
        prompts = [tokenizer(p).input_ids if isinstance(p, str) else p for p in request.prompts]
        if any(token >= size for prompt in prompts for token in prompt):
            raise ApiError(400, f"prompt: a token is not below {size}, the vocabulary", "prompt")
        return prompts

    def _sampling(self, request: Any, longest: int) -> Sampling:
        limit = request.max_tokens
        if request.kind == "chat":
            limit = limit or request.max_completion_tokens
            limit = limit or max(min(self.max_new_tokens, self._positions - longest), 1)
        seed = secrets.randbelow(2**31) if request.seed is None else request.seed % 2**63
        return Sampling(
            max(limit, 1), temperature=request.temperature, top_p=request.top_p, seed=seed
        )

    def _choice(
        self, job: Job, index: int, text: Text, sampling: Sampling, start: int, row: int
    ) -> Iterator[Piece | None]:
        """The parts of one choice. start: characters of the prompt before it; row: which of the
        prompt's choices it is."""
        request, weights = job.request, self._weights[job.model]
        shown, piece = Streamed(self.loaded.text, request.stops, self.loaded.settled), Piece(index)
        new: list[int] = []
        for step in range(sampling.max_new_tokens):
            token = self._texts.next_token(text, sampling, step, row)
            stopped = token in self.loaded.stop_ids
            if request.tops is not None and not stopped:
                found = self._texts.logprobs(text, token, request.tops)
                piece.tokens.append(self._token(token, found, start + len(shown.shown)))
            new.append(token)
            job.usage.completion += 1
            piece.text = shown.add(new, stopped or len(new) == sampling.max_new_tokens)
            if stopped or shown.ended:
                end = start + len(shown.shown)
                piece.tokens = [t for t in piece.tokens if t.offset < end or not shown.ended]
                piece.finish = "stop"
            elif len(new) == sampling.max_new_tokens:
                piece.finish = "length"
            if piece.finish:
                yield piece
                return
            if piece.text:
                yield piece
                piece = Piece(index)
            else:
                yield None
            self._texts.advance(text, token, weights)

    def _echo(self, given: Any, prompt: list[int], tops: int | None, weights: Any) -> Piece:
        """A prompt as the beginning of its choices."""
        text = given if isinstance(given, str) else self.loaded.tokenizer.decode(prompt)
        if tops is None:
            return Piece(0, text)
        found = [None, *self._texts.prompt_logprobs(prompt, tops, weights)]
        names = [token_bytes(self.loaded.tokenizer, token) for token in prompt]
        characters = [sum(byte & 0xC0 != 0x80 for byte in name) for name in names]
        offsets = accumulate(characters, initial=0)
        tokens = [self._token(t, p, at) for t, p, at in zip(prompt, found, offsets, strict=False)]
        return Piece(0, text, tokens)

    def _token(self, token: int, found: Logprobs | None, offset: int) -> TokenLogprob:
        name = token_bytes(self.loaded.tokenizer, token)
        if found is None:
            return TokenLogprob(name, None, (), offset)
        tops = tuple((token_bytes(self.loaded.tokenizer, t), p) for t, p in found.tops)
        return TokenLogprob(name, found.token, tops, offset)
