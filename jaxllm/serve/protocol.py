# SPDX-License-Identifier: Apache-2.0
"""OpenAI's chat and text completions as JSON: requests, responses, chunks of a stream, errors."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxllm.errors import nearest, seen
from jaxllm.serve.decoding import MOST_TOPS

# Fields without a counterpart here -> values with which they change nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}
# Fields that concern accounts, caches and logs of a provider.
IGNORED = {"metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention"}
IGNORED |= {"safety_identifier", "service_tier", "store", "user", "verbosity"}
MOST_CHOICES = 128
LEAST_LOGPROB = -9999.0  # stands for minus infinity, which is not JSON

Stop = Annotated[str, Field(max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# A list ends at its first mistake, since each costs a kilobyte and a body may have millions.
Texts = Annotated[list[str], Field(fail_fast=True)]
Tokens = Annotated[list[TokenId], Field(fail_fast=True)]


class ApiError(Exception):
    """A request that is answered with an error. param: the field that is wrong."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body = {"error": error}


class StreamOptions(BaseModel):
    include_usage: bool | None = Field(False, strict=True)


class Request(BaseModel):
    """The fields that both kinds of requests have; null is the default."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Annotated[Stop, Field(min_length=1)]], Field(max_length=16)] = []
    kind: ClassVar[Literal["chat", "text"]]

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) and self.stop else list(self.stop)

    @property
    def tops(self) -> int | None:
        """How many of the most likely tokens are reported; None without log-probabilities."""
        raise NotImplementedError

    @classmethod
    def read(cls, body: Any) -> Any:
        """Raises ApiError, which names the field, unless `body` is such a request."""
        if not isinstance(body, dict):
            raise ApiError(400, f"the body must be a JSON object, seen {seen(body)}")
        for name, neutral in UNSUPPORTED.items():
            if body.get(name) is not None and body[name] not in neutral:
                raise ApiError(400, f"{name} is not supported; remove it", name)
        without = UNSUPPORTED.keys() | IGNORED
        given = {k: v for k, v in body.items() if k not in without and v is not None}
        if (unknown := next((k for k in given if k not in cls.model_fields), None)) is not None:
            near = nearest(unknown, [*cls.model_fields, *UNSUPPORTED])
            hint = f"; did you mean {near}?" if near else "; remove it"
            raise ApiError(400, f"{seen(unknown)} is not a field of this request{hint}", unknown)
        try:
            request = cls.model_validate(given)
        except ValidationError as error:
            raise _first(error) from None
        request.check()
        return request

    def check(self) -> None:
        """Raises ApiError for fields that contradict each other."""


class ChatRequest(Request):
    kind: ClassVar[Literal["chat", "text"]] = "chat"
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_TOPS)

    @property
    def tops(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def check(self) -> None:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs requires logprobs: true", "top_logprobs")
        if self.max_tokens and self.max_completion_tokens:
            raise ApiError(400, "give max_tokens or max_completion_tokens, not both", "max_tokens")


class TextRequest(Request):
    kind: ClassVar[Literal["chat", "text"]] = "text"
    prompt: str | Texts | Tokens | Annotated[list[Tokens], Field(fail_fast=True)]
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOPS)
    echo: bool = False

    @property
    def tops(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[Any]:
        """Texts or lists of tokens."""
        is_one = isinstance(self.prompt, str) or isinstance(next(iter(self.prompt), 0), int)
        return [self.prompt] if is_one else list(self.prompt)

    def check(self) -> None:
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens: 0 requires echo: true", "max_tokens")
        if len(self.prompts) * self.n > MOST_CHOICES:
            raise ApiError(400, f"prompts x n must be at most {MOST_CHOICES}", "n")


def _first(error: ValidationError) -> ApiError:
    """The first mistake that pydantic found; of a value that may have several types, the one that
    is deepest in it."""
    errors = error.errors(include_url=False, include_context=False)
    same = [one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]]
    first = max(same, key=lambda one: len(one["loc"]))
    name = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "missing":
        return ApiError(400, f"{name} is missing", name)
    return ApiError(400, f"{name}: {first['msg']}; seen {seen(first['input'])}", name)


# ---- what a request is answered with


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer with its log-probability; None for the first token of a prompt."""

    token: bytes
    logprob: float | None
    tops: tuple[tuple[bytes, float], ...]
    offset: int
    """characters before it in the choice's text"""


@dataclass
class Piece:
    """A part of a choice's text, with its tokens if log-probabilities are asked for."""

    index: int
    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None

    def add(self, other: Piece) -> None:
        self.text += other.text
        self.tokens += other.tokens
        self.finish = other.finish


@dataclass
class Usage:
    """Tokens of a request so far."""

    prompt: int = 0
    completion: int = 0

    def body(self) -> dict[str, int]:
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        values = (self.prompt, self.completion, self.prompt + self.completion)
        return dict(zip(names, values, strict=True))


class Response:
    """The JSON of the answer to a request. model: its name."""

    def __init__(self, request: Request, model: str) -> None:
        self.request, self.is_chat = request, request.kind == "chat"
        self._begun: set[int] = set()
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        self.head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self.is_chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, pieces: list[Piece], usage: Usage) -> dict[str, Any]:
        choices: dict[int, Piece] = {}
        for piece in pieces:
            choices.setdefault(piece.index, Piece(piece.index)).add(piece)
        return self.head | {
            "choices": [self._choice(choices[index], "message") for index in sorted(choices)],
            "usage": usage.body(),
        }

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A part of a stream."""
        return self._chunk([self._choice(piece, "delta")])

    def usage_chunk(self, usage: Usage) -> dict[str, Any] | None:
        """The last part of a stream, if it is asked for."""
        options = self.request.stream_options
        if options is None or not options.include_usage:
            return None
        return self._chunk([]) | {"usage": usage.body()}

    def _chunk(self, choices: list[Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return self.head | {"object": kind, "choices": choices}

    def _choice(self, piece: Piece, part: str) -> dict[str, Any]:
        has_logprobs = self.request.tops is not None
        end = {"index": piece.index, "finish_reason": piece.finish}
        if not self.is_chat:
            logprobs = _text_logprobs(piece.tokens) if has_logprobs else None
            return end | {"text": piece.text, "logprobs": logprobs}
        message = {"content": piece.text}
        if piece.index not in self._begun:
            message = {"role": "assistant", **message}
            self._begun.add(piece.index)
        logprobs = {"content": _chat_logprobs(piece.tokens), "refusal": None}
        return end | {part: message, "logprobs": logprobs if has_logprobs else None}


def _chat_logprobs(tokens: list[TokenLogprob]) -> list[dict[str, Any]]:
    def one(token: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": _text(token), "logprob": _finite(logprob), "bytes": list(token)}

    return [
        one(t.token, t.logprob) | {"top_logprobs": [one(*top) for top in t.tops]} for t in tokens
    ]


def _text_logprobs(tokens: list[TokenLogprob]) -> dict[str, Any]:
    def tops(token: TokenLogprob) -> dict[str, float | None] | None:
        if token.logprob is None:
            return None
        # Of tokens with the same text, which are parts of characters, the likelier one stays.
        return {_text(name): _finite(logprob) for name, logprob in reversed(token.tops)}

    return {
        "tokens": [_text(t.token) for t in tokens],
        "token_logprobs": [_finite(t.logprob) for t in tokens],
        "top_logprobs": [tops(t) for t in tokens],
        "text_offset": [t.offset for t in tokens],
    }


def _text(token: bytes) -> str:
    return token.decode(errors="replace")


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is None or math.isfinite(logprob) else LEAST_LOGPROB


def models(names: Iterable[str], chat: bool, created: int) -> dict[str, dict[str, Any]]:
    """{name: what /v1/models says of the model}. chat: True if they have a chat template."""
    common = {"object": "model", "created": created, "owned_by": "jaxllm", "chat": chat}
    return {name: {"id": name, **common} for name in names}
