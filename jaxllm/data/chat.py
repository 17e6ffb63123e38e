# SPDX-License-Identifier: Apache-2.0
"""Conversations -> tokens and which of them are learned, by the tokenizer's own chat template.

A conversation is rendered whole and its text tokenised in one go, so training sees exactly what
`apply_chat_template` gives. What is learned are spans of characters: in each assistant turn its
text and the token that ends it, nothing else. A turn that the template renders differently once
the conversation goes on is an example of its own: generation's prompt, then the turn as the
template renders it last (turns.py).

transformers can mark the assistant's text (`return_assistant_tokens_mask`), and can keep special
tokens' names in messages as text (`sanitize_control_tokens`), but not both at once: hence this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any, Literal

import numpy as np

from jaxllm.data.template import ChatTemplate, chat_tokenizer, strings, template_of
from jaxllm.data.turns import Conversation, Span, Turns
from jaxllm.errors import UserError
from jaxllm.tokenizer import special_tokens

__all__ = ["Example", "chat_tokenizer", "end_tokens", "prompt_tokens", "render"]

# Characters that no message contains serve as marks in what a template is given (Conversation).
_PRIVATE = [chr(code) for code in range(0xE000, 0xF900)]

OWN_EXAMPLE = (
    "an assistant turn that the chat template renders differently later is its own example"
)
OPEN_END = "the chat template does not close the last turn, so eos is appended"
LEFT_OUT = "the chat template drops a part of an assistant message"


@dataclass(frozen=True)
class Example:
    """tokens int32 [n]; learn float32 [n], the weight of predicting each token; notes, which are
    told once per source."""

    tokens: np.ndarray
    learn: np.ndarray
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
    """A conversation as one or more examples, in the order of the turns that they learn.

    Learned is what the assistant says in each turn (its reasoning and tool calls too) and the token
    that ends it, times the message's `weight` (default 1); with `learn` last only the last such
    turn; with each every turn is an example of its own. All else has weight 0, or 1 with
    `train_on_prompt`. A token that lies across the border is learned when it holds a learned
    character, unless it is a special token of the turn's header.

    `date` (YYYY-MM-DD, default today) is what `strftime_now` gives. Special tokens' names inside
    messages and tools stay text. Raises ValueError for a template that is missing, refuses the
    conversation, leaves out what a message says, or ends an answer with what is no special token.
    """
    if learn not in ("all", "last", "each"):
        raise UserError(f"learn is {learn!r}; it can be all, last or each")
    if learn == "each" and train_on_prompt:
        raise UserError("data.learn each learns one turn an example; data.train_on_prompt all")
    renderer = _renderer(tokenizer, tools, date)
    chat = renderer.conversation(messages, tools)
    rest = float(train_on_prompt)
    weights = {i: _weight(m) for i, m in enumerate(messages) if m["role"] == "assistant"}
    if learn == "last":
        weights = {i: w if i == max(weights) else min(w, rest) for i, w in weights.items()}
    # Reasoning may be missing from the whole, so it is looked for though all else is learned.
    wanted = {i: w for i, w in weights.items() if w != rest or w and _thought(messages[i])}
    return renderer.examples(chat, wanted, rest, each=learn == "each")


def prompt_tokens(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    tools: list[Any] | None = None,
    date: str | None = None,
) -> np.ndarray:
    """A conversation and the header of the answer to come, int32 [n], rendered as for training.

    Arguments and errors are those of `render`.
    """
    renderer = _renderer(tokenizer, tools, date)
    chat = renderer.conversation(messages, tools)
    text = renderer.turns.rendering(chat, generation_prompt=True).text
    renderer.check_said(chat, text, len(messages))
    return renderer.encode(text, chat.hide).tokens


def end_tokens(tokenizer: Any) -> list[str]:
    """The special tokens that end an assistant's turn: eos and what the template puts there.

    Raises ValueError when there is no template.
    """
    return _renderer(tokenizer, None, None).turns.ends


def _weight(message: dict[str, Any]) -> float:
    weight = message.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, (int, float)) and 0 <= weight <= float(np.finfo(np.float32).max):
        return float(weight)
    raise UserError(f"a message's weight is {weight!r}; it is a number from 0 on")


def _renderer(tokenizer: Any, tools: Any, date: str | None) -> _Renderer:
    source = template_of(tokenizer, tools=tools)
    variables = json.dumps(tokenizer.special_tokens_map, default=str)
    return _cached_renderer(tokenizer, len(tokenizer), source, variables, date)


@lru_cache(maxsize=16)
def _cached_renderer(
    tokenizer: Any, size: int, source: str, variables: str, date: str | None
) -> _Renderer:
    """`size` tells a tokenizer from the same one with tokens added since."""
    return _Renderer(tokenizer, ChatTemplate(source, json.loads(variables), date))


@dataclass(frozen=True)
class _Encoded:
    """Tokens int32 [n], and the characters [starts, ends) that each was made of."""

    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __getitem__(self, part: slice) -> _Encoded:
        return _Encoded(self.tokens[part], self.starts[part], self.ends[part])


class _Renderer:
    """A tokenizer with a chat template."""

    def __init__(self, tokenizer: Any, template: ChatTemplate) -> None:
        self.tokenizer, self.turns = tokenizer, Turns(template, tokenizer)
        self.special_ids = set(tokenizer.convert_tokens_to_ids(special_tokens(tokenizer)))

    # ---- a conversation and its examples

    def conversation(self, messages: list[dict[str, Any]], tools: Any) -> Conversation:
        """Checks what is to be rendered, and hides the special tokens' names in it."""
        if not messages or not all(isinstance(m, dict) and m.get("role") for m in messages):
            raise UserError("a conversation is a list of messages, at least one, each with a role")
        template = self.turns.template
        for name, given in ("tools", tools), ("tool_calls", any(map(_calls, messages))):
            if given and name not in template.source:
                raise UserError(_no_place(name))
        plain = template.prepared(messages)
        said = list(strings([plain, tools]))
        unused = (c for c in _PRIVATE if not any(c in text for text in said))
        hide, border = next(unused), next(unused)
        if any(map(self.turns.special.search, said)):
            plain, tools = self._hide([plain, tools], hide)
        return Conversation(plain, tools or None, hide, border)

    def _hide(self, value: Any, mark: str) -> Any:
        """`value` with the mark in every special token's name, behind the first character."""
        if isinstance(value, str):
            return self.turns.special.sub(lambda m: m[0][0] + mark + m[0][1:], value)
        if isinstance(value, dict):
            return {self._hide(k, mark): self._hide(v, mark) for k, v in value.items()}
        return [self._hide(v, mark) for v in value] if isinstance(value, list) else value

    def examples(
        self, chat: Conversation, wanted: dict[int, float], rest: float, *, each: bool
    ) -> list[Example]:
        """The whole conversation with the turns that can be learned in it, and the others apart.

        wanted: {assistant turn: its weight}, where that is not the weight of the `rest`.
        """
        if wanted and (unknown := self.turns.unknown_end):
            raise UserError(
                f"the chat template ends an answer with {unknown!r}, which is neither the "
                "tokenizer's eos nor a special token of it; add it to the tokenizer, or set "
                "data.template to a template of this tokenizer"
            )
        whole = self.turns.rendering(chat)
        inside = {} if each else self.turns.inside(chat, whole, list(wanted))
        found: list[tuple[int, Example]] = []
        left_out: set[str] = set()
        for turn, weight in wanted.items():
            if turn in inside:
                left_out |= self._left_out(chat, turn, whole.text, inside[turn])
                continue
            if rest:
                raise UserError(
                    f"message {turn + 1}: the chat template renders it differently once the "
                    "conversation goes on, so data.train_on_prompt cannot learn the conversation "
                    "as one text; leave train_on_prompt out, or set data.reasoning to drop"
                )
            text, spans = self.turns.apart(chat, turn)
            notes = self._left_out(chat, turn, text, spans) | (set() if each else {OWN_EXAMPLE})
            weights = dict.fromkeys(spans, weight)
            found.append((turn, self._example(chat, text, weights, rest, turn + 1, notes)))
        if inside or not found:
            spans = {span: wanted[turn] for turn, parts in inside.items() for span in parts}
            upto = len(chat.messages)
            apart = [turn for turn, _ in found]
            example = self._example(chat, whole.text, spans, rest, upto, left_out, apart)
            found.append((min(inside, default=upto), example))
        return [example for _, example in sorted(found, key=lambda one: one[0])]

    def _example(
        self,
        chat: Conversation,
        text: str,
        spans: dict[Span, float],
        rest: float,
        upto: int,
        notes: set[str],
        elsewhere: Iterable[int] = (),
    ) -> Example:
        """A text as tokens; eos is appended where the template does not close its last turn."""
        self.check_said(chat, text, upto, elsewhere)
        eos, last = self.tokenizer.eos_token, max(spans, default=(0, 0))
        is_answer = spans and chat.messages[upto - 1]["role"] == "assistant"
        is_open = not text[last[1] :].strip() and not self.turns.closed(text, last)
        if eos and is_answer and is_open:
            text, notes = text + eos, notes | {OPEN_END}
            spans = {s if s != last else (last[0], len(text)): w for s, w in spans.items()}
        encoded = self.encode(text, chat.hide)
        learned = np.full(len(encoded.tokens), rest, np.float32)
        for (start, end), weight in spans.items():
            learned[self._tokens_of(encoded, start, end)] = weight
        return Example(encoded.tokens, learned, tuple(sorted(notes)))

    # ---- nothing is left out

    def check_said(
        self, chat: Conversation, text: str, upto: int, elsewhere: Iterable[int] = ()
    ) -> None:
        """Raises ValueError where a rendering leaves out all that a message says, or the tools.

        What turns `elsewhere` say, which have examples of their own, may be missing.
        """
        for i, message in enumerate(chat.messages[:upto]):
            if i in elsewhere:
                continue
            said = " ".join(strings(message.get("content"))).strip()
            words = re.findall(r"\w+", said)
            if words and said not in text and not any(word in text for word in words):
                raise UserError(
                    f"message {i + 1}: the chat template leaves out what the {message['role']} "
                    "says; set data.template to one that has a place for it"
                )
            if not all(call["function"]["name"] in text for call in _calls(message) or ()):
                raise UserError(_no_place("tool_calls"))
        functions = [tool.get("function", tool) for tool in chat.tools or ()]
        names = [one["name"] for one in functions if isinstance(one.get("name"), str)]
        if names and not any(name in text for name in names):
            raise UserError(_no_place("tools"))

    def _left_out(self, chat: Conversation, turn: int, text: str, spans: list[Span]) -> set[str]:
        """What to tell of an answer of which a rendering has only a part.

        Raises ValueError when its reasoning is what is missing.
        """
        message = chat.messages[turn]
        learned = "".join(text[start:end] for start, end in spans)
        if (thought := _thought(message)) and thought.strip() not in learned:
            raise UserError(
                f"message {turn + 1} has reasoning_content, for which the chat template has no "
                "place; set data.reasoning to drop to leave it out, or data.template to one that "
                "has"
            )
        said = " ".join(strings(message.get("content")))
        words = [] if said.strip() in learned else re.findall(r"\w+", said)
        return set() if all(word in learned for word in words) else {LEFT_OUT}

    # ---- tokens

    def encode(self, text: str, mark: str) -> _Encoded:
        """Tokenises a rendered text, as a whole; where names of special tokens are hidden by
        `mark`, the stretch between two real special tokens is tokenised with them as plain text.

        The characters' places are those in `text`, marks included.
        """
        whole = self._tokenize(text, split_special_tokens=False)
        if mark not in text:
            return whole
        places = zip(whole.starts.tolist(), whole.ends.tolist(), strict=True)
        names = [text[start:end].strip() for start, end in places]
        real = [i for i, name in enumerate(names) if self.turns.special.fullmatch(name)]
        parts = []
        for i, j in pairwise([-1, *real, len(whole.tokens)]):
            start = int(whole.ends[i]) if i >= 0 else 0
            stop = int(whole.starts[j]) if j < len(whole.tokens) else len(text)
            if mark in text[start:stop]:
                kept = [place for place in range(start, stop) if text[place] != mark]
                kept = np.array([*kept, stop])
                said = text[start:stop].replace(mark, "")
                plain = self._tokenize(said, split_special_tokens=True)
                parts.append(_Encoded(plain.tokens, kept[plain.starts], kept[plain.ends]))
            else:
                parts.append(whole[i + 1 : j])
            parts.append(whole[j : j + 1])
        columns = zip(*map(astuple, parts), strict=True)
        return _Encoded(*map(np.concatenate, columns))

    def _tokenize(self, text: str, *, split_special_tokens: bool) -> _Encoded:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # the tokenizer's latest call may have left these on
        backend.no_padding()
        backend.encode_special_tokens = split_special_tokens
        # The template writes bos itself.
        encoding = backend.encode(text, add_special_tokens=False)
        places = np.fromiter(chain.from_iterable(encoding.offsets), np.int64).reshape(-1, 2)
        return _Encoded(np.array(encoding.ids, np.int32), places[:, 0], places[:, 1])

    def _tokens_of(self, encoded: _Encoded, start: int, end: int) -> np.ndarray:
        """bool [n]: tokens of the characters [start, end), with those across the start.

        A special token belongs to where it begins, though it may take spaces that follow.
        """
        inside = (encoded.starts >= start) & (encoded.starts < end)
        for i in np.flatnonzero((encoded.starts < start) & (encoded.ends > start)):
            inside[i] = encoded.tokens[i] not in self.special_ids
        return inside


def _calls(message: dict[str, Any]) -> Any:
    return message.get("tool_calls")


def _thought(message: dict[str, Any]) -> str:
    thought = message.get("reasoning_content")
    return thought if isinstance(thought, str) else ""


def _no_place(name: str) -> str:
    return (
        f"the conversation has {name}, for which the chat template has no place; set "
        "data.template to one that has, such as chatml"
    )
