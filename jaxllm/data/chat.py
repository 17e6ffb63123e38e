# SPDX-License-Identifier: Apache-2.0
"""Tokenize conversations with the tokenizer's chat template, with a loss weight per token.

A conversation is rendered and tokenized in one piece, so training sees exactly the output of
`apply_chat_template`. The loss covers character spans: the text and the end token of each assistant
turn. A turn for which the template is not prefix-preserving becomes a separate example: the
generation prompt, then the turn rendered as the last one (turns.py).

transformers can mask the assistant's text (`return_assistant_tokens_mask`) and can keep the names
of special tokens in messages as text (`sanitize_control_tokens`), but not both together.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxllm.config import DataSection, TrainConfig, tokenizer_path
from jaxllm.data.template import ChatTemplate, all_strings, template_source, with_settings
from jaxllm.data.turns import Rendering, Span, TemplateInput, Turns
from jaxllm.errors import UserError
from jaxllm.tokenizer import (
    check_vocabulary,
    generation_stop_ids,
    load_tokenizer,
    special_tokens,
)
from jaxllm.untrusted import MAX_TEXT

# Private-use characters; those that no message contains become the marks of a TemplateInput.
_MARKS = [chr(code) for code in range(0xE000, 0xF900)]

SEPARATE_EXAMPLE = (
    "the chat template renders an assistant turn differently later, so it is a separate example"
)
EOS_APPENDED = "the chat template does not end the last turn, so eos is appended"
CONTENT_DROPPED = "the chat template drops part of an assistant message"


def chat_tokenizer(path: str, template: str | None = None) -> Any:
    """Load the tokenizer of `path`, with a built-in template or a file as its chat template."""
    return with_settings(load_tokenizer(path), DataSection(template=template))


@dataclass(frozen=True)
class Example:
    """tokens int32 [n]; loss_weights float32 [n], the weight of predicting each token; notes, which
    are reported once per source."""

    tokens: np.ndarray
    loss_weights: np.ndarray
    notes: tuple[str, ...] = ()


def render(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    tools: list[Any] | None = None,
    learn: Literal["all", "last", "each"] = "all",
    train_on_prompt: bool = False,
    date: str | None = None,
) -> list[Example]:
    """Tokenize a conversation as one or more examples, in the order of their assistant turns.

    The text of an assistant turn (with reasoning and tool calls) and its end token have the loss
    weight `weight` of the message (default 1). With `learn="last"` only the last turn has; with
    `learn="each"` every turn is a separate example. All other tokens have weight 0, or 1 with
    `train_on_prompt`. A token that crosses the start of a turn belongs to it, unless it is a
    special token of the header.

    `date` (YYYY-MM-DD, default today) is the result of `strftime_now`. Names of special tokens in
    messages and tools stay text. Raises UserError if there is no template, or if it rejects the
    conversation, drops a message's content, or ends an answer without a special token.
    """
    if learn not in ("all", "last", "each"):
        raise UserError(f"learn is {learn!r}; use all, last or each")
    if learn == "each" and train_on_prompt:
        raise UserError("data.learn: each cannot be combined with data.train_on_prompt; drop one")
    renderer = _renderer(tokenizer, tools, date)
    chat = renderer.prepare(messages, tools)
    default_weight = float(train_on_prompt)
    weights = {i: _message_weight(m) for i, m in enumerate(messages) if m["role"] == "assistant"}
    if learn == "last":
        last = max(weights, default=0)
        weights = {i: w if i == last else min(w, default_weight) for i, w in weights.items()}
    # A turn with reasoning is always located, since the template may drop its reasoning.
    weights = {
        i: w for i, w in weights.items() if w != default_weight or w and _reasoning(messages[i])
    }
    return renderer.examples(chat, weights, default_weight, each=learn == "each")


def prompt_tokens(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    tools: list[Any] | None = None,
    date: str | None = None,
) -> np.ndarray:
    """The tokens of a conversation with the generation prompt, int32 [n].

    Arguments and errors are those of `render`.
    """
    renderer = _renderer(tokenizer, tools, date)
    chat = renderer.prepare(messages, tools)
    text = Rendering(renderer.turns.template, chat, generation_prompt=True).text
    renderer.check_complete(chat, text, len(messages))
    return renderer.encode(text, chat.escape_mark).tokens


def end_tokens(tokenizer: Any) -> list[str]:
    """The special tokens that end an assistant's turn: eos and the chat template's end token.

    Raises UserError if there is no template.
    """
    return _renderer(tokenizer, None, None).turns.end_tokens


def stop_ids(tokenizer: Any, model: str | Path | None = None) -> tuple[int, ...]:
    """Token ids that end generation, ascending.

    They are eos, the end tokens of the chat template, and eos_token_id in generation_config.json of
    the directory `model`. Raises UserError if that file is malformed.
    """
    names = {tokenizer.eos_token} - {None}
    if tokenizer.chat_template:
        names |= set(end_tokens(tokenizer))
    ids = set(tokenizer.convert_tokens_to_ids(sorted(names)))
    return tuple(sorted(ids | (generation_stop_ids(model) if model else set())))


def padded(tokenizer: Any) -> Any:
    """A copy of the tokenizer whose pad token does not end a text, if it has such a special token.

    transformers reads a reward model's score at the last token that is not the pad token, so a text
    that ends with the pad token would be scored at the wrong position.
    """
    ends = {*stop_ids(tokenizer), tokenizer.bos_token_id}
    if tokenizer.pad_token_id in (None, *ends):
        names = [t for t in (tokenizer.unk_token, *sorted(special_tokens(tokenizer))) if t]
        unused = [t for t in names if tokenizer.convert_tokens_to_ids(t) not in ends]
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = (unused or [tokenizer.eos_token])[0]
    return tokenizer


def run_tokenizer(cfg: TrainConfig, vocab_size: int | None = None) -> Any:
    """The tokenizer of a run, with the chat template's settings of its config.

    Raises UserError if it has more tokens than the `vocab_size` of the model.
    """
    tokenizer = with_settings(load_tokenizer(tokenizer_path(cfg)), cfg.data)
    tokenizer = padded(tokenizer) if cfg.verb.head == "score" else tokenizer
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size)
    return tokenizer


def _message_weight(message: dict[str, Any]) -> float:
    weight = message.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, (int, float)) and 0 <= weight <= float(np.finfo(np.float32).max):
        return float(weight)
    raise UserError(f"a message's weight is {weight!r}; use a number >= 0")


def _renderer(tokenizer: Any, tools: Any, date: str | None) -> _Renderer:
    source = template_source(tokenizer, tools=tools)
    variables = json.dumps(tokenizer.special_tokens_map, default=str)
    return _cached_renderer(tokenizer, len(tokenizer), source, variables, date)


@lru_cache(maxsize=16)
def _cached_renderer(
    tokenizer: Any, size: int, source: str, variables: str, date: str | None
) -> _Renderer:
    """`size` changes when tokens are added to the tokenizer, which keeps its identity."""
    return _Renderer(tokenizer, ChatTemplate(source, json.loads(variables), date))


class _Encoded(NamedTuple):
    """Tokens int32 [n], and the character span [starts, ends) of each."""

    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class _Renderer:
    """A tokenizer with a chat template."""

    def __init__(self, tokenizer: Any, template: ChatTemplate) -> None:
        self.tokenizer, self.turns = tokenizer, Turns(template, tokenizer)
        self.special_ids = set(tokenizer.convert_tokens_to_ids(special_tokens(tokenizer)))

    # ---- a conversation and its examples

    def prepare(self, messages: list[dict[str, Any]], tools: Any) -> TemplateInput:
        """Validate the template's input and escape the names of special tokens in it."""
        if not messages or not all(isinstance(m, dict) and m.get("role") for m in messages):
            raise UserError("a conversation must be a non-empty list of messages, each with a role")
        template = self.turns.template
        calls = any(message.get("tool_calls") for message in messages)
        for name, given in ("tools", tools), ("tool_calls", calls):
            if given and name not in template.source:
                raise UserError(_not_rendered(name))
        plain = template.normalize(messages)
        text_parts = list(all_strings([plain, tools]))
        if sum(map(len, text_parts)) > MAX_TEXT:
            raise UserError(
                f"the conversation has more than {MAX_TEXT:,} characters; shorten or split it"
            )
        unused = (c for c in _MARKS if not any(c in text for text in text_parts))
        escape_mark, tag_mark = next(unused), next(unused)
        if any(map(self.turns.special_pattern.search, text_parts)):
            plain, tools = self._escape([plain, tools], escape_mark)
        return TemplateInput(plain, tools or None, escape_mark, tag_mark)

    def _escape(self, value: Any, mark: str) -> Any:
        """Insert the mark after the first character of every special token's name."""
        if isinstance(value, str):
            return self.turns.special_pattern.sub(lambda m: m[0][0] + mark + m[0][1:], value)
        if isinstance(value, dict):
            return {self._escape(k, mark): self._escape(v, mark) for k, v in value.items()}
        return [self._escape(v, mark) for v in value] if isinstance(value, list) else value

    def examples(
        self, chat: TemplateInput, weights: dict[int, float], default_weight: float, *, each: bool
    ) -> list[Example]:
        """The full conversation with the turns found in it, and separate examples of the others.

        weights: {assistant turn: its loss weight}, without turns of weight `default_weight`.
        """
        if weights and (unknown := self.turns.non_special_end):
            raise UserError(
                f"the chat template ends an answer with {unknown!r}, which is not a special token "
                "of the tokenizer; add it to the tokenizer, or set data.template to a template for "
                "this tokenizer"
            )
        full = Rendering(self.turns.template, chat)
        in_full = {} if each else self.turns.spans_in_conversation(full, list(weights))
        separate = [turn for turn in weights if turn not in in_full]
        if separate and default_weight:
            raise UserError(
                f"message {separate[0] + 1}: the chat template renders it differently if messages "
                "follow, so data.train_on_prompt cannot train on the conversation as one text; "
                "remove train_on_prompt, or set data.reasoning to drop"
            )

        def example(text, spans_of, count, notes, exempt=()) -> Example:
            """The example of a text with the first `count` messages; spans_of: {turn: spans}."""
            for turn, spans in spans_of.items():
                notes = notes | self._dropped_content(chat, turn, text, spans)
            self.check_complete(chat, text, count, exempt)
            ends_with_answer = spans_of and chat.messages[count - 1]["role"] == "assistant"
            by_span = {span: weights[turn] for turn, spans in spans_of.items() for span in spans}
            if ends_with_answer and self.tokenizer.eos_token and self._is_open(text, max(by_span)):
                text, notes = text + self.tokenizer.eos_token, notes | {EOS_APPENDED}
                last = max(by_span)
                by_span[last[0], len(text)] = by_span.pop(last)
            encoded = self.encode(text, chat.escape_mark)
            loss_weights = np.full(len(encoded.tokens), default_weight, np.float32)
            for (start, end), weight in by_span.items():
                loss_weights[self._tokens_in(encoded, start, end)] = weight
            return Example(encoded.tokens, loss_weights, tuple(sorted(notes)))

        examples: list[tuple[int, Example]] = []
        for turn in separate:
            text, spans = self.turns.render_separately(chat, turn)
            notes = set() if each else {SEPARATE_EXAMPLE}
            examples.append((turn, example(text, {turn: spans}, turn + 1, notes)))
        if in_full or not separate:
            first = min(in_full, default=full.count)
            examples.append((first, example(full.text, in_full, full.count, set(), separate)))
        return [one for _, one in sorted(examples, key=lambda pair: pair[0])]

    def _is_open(self, text: str, last: Span) -> bool:
        """True if the text ends with its last turn, which has no end token."""
        return not text[last[1] :].strip() and not self.turns.ends_with_special(text, last)

    # ---- checks that nothing is dropped

    def check_complete(
        self, chat: TemplateInput, text: str, count: int, separate: Iterable[int] = ()
    ) -> None:
        """Raise UserError if a rendering drops a message's content, tool calls or the tools.

        The turns `separate`, which have separate examples, are not checked.
        """
        for i, message in enumerate(chat.messages[:count]):
            if i in separate:
                continue
            words = _content_words(message, text)
            if words and not any(word in text for word in words):
                raise UserError(
                    f"message {i + 1}: the chat template drops the content of the "
                    f"{message['role']} message; set data.template to one that renders it"
                )
            if not all(
                call["function"]["name"] in text for call in message.get("tool_calls") or ()
            ):
                raise UserError(_not_rendered("tool_calls"))
        functions = [tool.get("function", tool) for tool in chat.tools or ()]
        named = [f.get("name") for f in functions if isinstance(f, dict)]
        names = [name for name in named if isinstance(name, str)]
        if names and not any(name in text for name in names):
            raise UserError(_not_rendered("tools"))

    def _dropped_content(
        self, chat: TemplateInput, turn: int, text: str, spans: list[Span]
    ) -> set[str]:
        """The note on an assistant message of which the rendering has only a part, or {}.

        Raises UserError if its reasoning is dropped.
        """
        message = chat.messages[turn]
        rendered = "".join(text[start:end] for start, end in spans)
        if (reasoning := _reasoning(message)) and reasoning.strip() not in rendered:
            raise UserError(
                f"message {turn + 1} has reasoning_content, which the chat template does not "
                "render; set data.reasoning to drop, or data.template to one that renders it"
            )
        words = _content_words(message, rendered)
        return set() if all(word in rendered for word in words) else {CONTENT_DROPPED}

    # ---- tokens

    def encode(self, text: str, mark: str) -> _Encoded:
        """Tokenize a rendered text in one piece if it has no `mark`.

        Otherwise each segment between two special tokens that has marks, i.e. escaped names of
        special tokens, is tokenized as plain text without them. Character offsets refer to `text`
        with the marks.
        """
        full = self._tokenize(text, split_special_tokens=False)
        if mark not in text:
            return full
        offsets = zip(full.starts.tolist(), full.ends.tolist(), strict=True)
        names = [text[start:end].strip() for start, end in offsets]
        special = [i for i, name in enumerate(names) if self.turns.special_pattern.fullmatch(name)]
        parts: list[Sequence[np.ndarray]] = []
        for before, after in pairwise([-1, *special, len(full.tokens)]):
            start = int(full.ends[before]) if before >= 0 else 0
            stop = int(full.starts[after]) if after < len(full.tokens) else len(text)
            if mark in text[start:stop]:
                unmarked = [i for i in range(start, stop) if text[i] != mark]
                original = np.array([*unmarked, stop])  # offsets in `text`
                segment = text[start:stop].replace(mark, "")
                plain = self._tokenize(segment, split_special_tokens=True)
                parts.append(_Encoded(plain.tokens, original[plain.starts], original[plain.ends]))
            else:
                parts.append([column[before + 1 : after] for column in full])
            parts.append([column[after : after + 1] for column in full])
        return _Encoded(*map(np.concatenate, zip(*parts, strict=True)))

    def _tokenize(self, text: str, *, split_special_tokens: bool) -> _Encoded:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # an earlier call of the tokenizer may have set these
        backend.no_padding()
        backend.encode_special_tokens = split_special_tokens
        # The template includes bos.
        encoding = backend.encode(text, add_special_tokens=False)
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int64).reshape(-1, 2)
        return _Encoded(np.array(encoding.ids, np.int32), offsets[:, 0], offsets[:, 1])

    def _tokens_in(self, encoded: _Encoded, start: int, end: int) -> np.ndarray:
        """bool [n]: tokens that start in [start, end), and ordinary tokens that cross `start`.

        A special token that crosses `start` includes spaces after it, and belongs before `start`.
        """
        selected = (encoded.starts >= start) & (encoded.starts < end)
        for i in np.flatnonzero((encoded.starts < start) & (encoded.ends > start)):
            selected[i] = encoded.tokens[i] not in self.special_ids
        return selected


def _reasoning(message: dict[str, Any]) -> str:
    reasoning = message.get("reasoning_content")
    return reasoning if isinstance(reasoning, str) else ""


def _content_words(message: dict[str, Any], text: str) -> list[str]:
    """The words of a message's content; [] if the text contains the complete content."""
    content = " ".join(all_strings(message.get("content"))).strip()
    return [] if content in text else re.findall(r"\w+", content)


def _not_rendered(name: str) -> str:
    return (
        f"the conversation has {name}, which the chat template does not render; set "
        "data.template to one that does, such as chatml"
    )
