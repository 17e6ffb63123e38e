# SPDX-License-Identifier: Apache-2.0
"""Conversations -> tokens and which of them are learned, by the tokenizer's own chat template.

A conversation is rendered whole and its text tokenised in one go, so training sees exactly what
`apply_chat_template` gives at generation. What is learned is found in the text, as spans of
characters: in each assistant turn the words and the token that ends them, nothing else. A template
says where they are by `{% generation %}` marks, or else by rendering the beginnings of the
conversation, which a template must therefore render as it renders the whole.

transformers can mark the assistant's words (`return_assistant_tokens_mask`), and can keep special
tokens' names in messages as text (`sanitize_control_tokens`), but not both at once: hence this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxllm.tokenizer import load_tokenizer, special_tokens

TEMPLATES = {file.stem: file for file in sorted(Path(__file__).parent.glob("templates/*.jinja"))}

# Put behind the first character of a special token's name inside a message, so that neither the
# template nor the tokenizer takes it for the token; the first of these that no message contains.
_MARKS = [chr(code) for code in range(0xE000, 0xF900)]

_ASK_FOR_MARKS = (
    "so the assistant's words cannot be told from the rest; put {% generation %} … "
    "{% endgeneration %} around them in the template (data.template), or learn the last turn only "
    "(data.learn: last)"
)


def render(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    tools: list[Any] | None = None,
    template: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
    learn: Literal["all", "last"] = "all",
    train_on_prompt: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """A conversation as (tokens int32 [n], learn float32 [n]); learn[j] weighs predicting token j.

    Learned is what the assistant says in each turn (its tool calls too) and the token that ends
    it, times the message's `weight` (default 1); with `learn` last only the last such turn. All
    else has weight 0, or 1 with `train_on_prompt`. A token that lies across the border is learned
    when it holds a learned character, unless it is a special token of the turn's header.

    `template` is a built-in name or a file (default: the tokenizer's own template) and
    `template_kwargs` its further variables. Special tokens' names inside messages and tools stay
    text. Raises ValueError for a template that is missing, has no place for tools, refuses the
    conversation, or does not let the assistant's words be told from the rest.
    """
    if learn not in ("all", "last"):
        raise ValueError(f"learn is {learn!r}; it can be all or last")
    renderer = _renderer(tokenizer, template, template_kwargs, tools)
    conversation = renderer.conversation(messages, tools)
    rest = float(train_on_prompt)
    weights = {i: _weight(m) for i, m in enumerate(messages) if m["role"] == "assistant"}
    if learn == "last":
        weights = {i: w if i == max(weights) else rest for i, w in weights.items()}
    if renderer.has_marks:
        text, spans = renderer.marked_spans(conversation, weights)
    else:
        text = renderer.text(conversation)
        wanted = [i for i, weight in weights.items() if weight != rest]
        spans = {renderer.prefix_span(conversation, i, text): weights[i] for i in wanted}
    encoded = renderer.encode(text, conversation.mark)
    learned = np.full(len(encoded.tokens), rest, np.float32)
    for (start, end), weight in spans.items():
        learned[renderer.inside(encoded, start, end)] = weight
    return encoded.tokens, learned


def prompt_tokens(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    tools: list[Any] | None = None,
    template: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> np.ndarray:
    """A conversation and the header of the answer to come, int32 [n], rendered as for training.

    Arguments and errors are those of `render`.
    """
    renderer = _renderer(tokenizer, template, template_kwargs, tools)
    conversation = renderer.conversation(messages, tools)
    text = renderer.text(conversation, generation_prompt=True)
    return renderer.encode(text, conversation.mark).tokens


def end_tokens(tokenizer: Any, template: str | None = None) -> list[str]:
    """The special tokens that end an assistant's turn: eos and what the template puts there.

    Raises ValueError when there is no template.
    """
    return _renderer(tokenizer, template, None, None).ends


def chat_tokenizer(path: str, template: str | None = None) -> Any:
    """The tokenizer of `path` with `template` as its own, so that what is saved carries it too."""
    tokenizer = load_tokenizer(path)
    if template is not None:
        tokenizer.chat_template = template_of(tokenizer, template)
    return tokenizer


def template_of(tokenizer: Any, template: str | None = None, tools: Any = None) -> str:
    """The Jinja source: a built-in template, a file, or the tokenizer's own.

    Of a tokenizer's several templates it is the one for tools when there are `tools`. Raises
    ValueError when there is none, or the file is not text.
    """
    if template is not None:
        file = TEMPLATES.get(template, Path(template))
        if not file.is_file():
            raise ValueError(
                f"the chat template {template!r} is neither a file nor built in "
                f"({', '.join(TEMPLATES)})"
            )
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: the chat template is not UTF-8 text: {error}") from None
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template; set data.template to a file or to one of "
            f"{', '.join(TEMPLATES)}"
        )
    return tokenizer.get_chat_template(tools=tools or None)


def _weight(message: dict[str, Any]) -> float:
    weight = message.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, (int, float)) and 0 <= weight <= float(np.finfo(np.float32).max):
        return float(weight)
    raise ValueError(f"a message's weight is {weight!r}; it is a number from 0 on")


def _renderer(
    tokenizer: Any, template: str | None, kwargs: dict[str, Any] | None, tools: Any
) -> _Renderer:
    source = template_of(tokenizer, template, tools)
    variables = json.dumps({**tokenizer.special_tokens_map, **(kwargs or {})}, default=str)
    return _cached_renderer(tokenizer, len(tokenizer), source, variables)


@lru_cache(maxsize=16)
def _cached_renderer(tokenizer: Any, size: int, source: str, variables: str) -> _Renderer:
    """`size` tells a tokenizer from the same one with tokens added since."""
    return _Renderer(tokenizer, source, json.loads(variables))


@dataclass(frozen=True)
class _Conversation:
    """What a template is given. `mark` lies inside each special token's name in these."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    mark: str


@dataclass(frozen=True)
class _Encoded:
    """Tokens int32 [n], and the characters [starts, ends) that each was made of."""

    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __getitem__(self, part: slice) -> _Encoded:
        return _Encoded(self.tokens[part], self.starts[part], self.ends[part])


class _Renderer:
    """A tokenizer with a template and the template's variables."""

    def __init__(self, tokenizer: Any, source: str, variables: dict[str, Any]) -> None:
        self.tokenizer, self.source, self.variables = tokenizer, source, variables
        names = special_tokens(tokenizer)
        self.special_ids = set(tokenizer.convert_tokens_to_ids(names))
        either = "|".join(map(re.escape, names)) or "(?!)"
        self.special = re.compile(either)
        self.closing = re.compile(rf"\s*({either})")
        self.has_marks = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None

    # ---- text

    def conversation(self, messages: list[dict[str, Any]], tools: Any) -> _Conversation:
        """Checks what is to be rendered, and marks the special tokens' names in it."""
        if not messages or not all(isinstance(m, dict) and m.get("role") for m in messages):
            raise ValueError("a conversation is a list of messages, at least one, each with a role")
        for name, given in ("tools", tools), ("tool_calls", any(map(_calls, messages))):
            if given and name not in self.source:
                raise ValueError(
                    f"the conversation has {name}, for which the chat template has no place; set "
                    "data.template to one that has, such as chatml"
                )
        # As in apply_chat_template, a null is a key that is not there.
        plain = [{k: v for k, v in m.items() if k != "weight" and v is not None} for m in messages]
        strings = list(_strings([plain, tools]))
        mark = next(m for m in _MARKS if not any(m in string for string in strings))
        if any(map(self.special.search, strings)):
            plain, tools = self._hide([plain, tools], mark)
        return _Conversation(plain, tools or None, mark)

    def _hide(self, value: Any, mark: str) -> Any:
        """`value` with the mark in every special token's name, behind the first character."""
        if isinstance(value, str):
            return self.special.sub(lambda m: m[0][0] + mark + m[0][1:], value)
        if isinstance(value, dict):
            return {self._hide(k, mark): self._hide(v, mark) for k, v in value.items()}
        return [self._hide(v, mark) for v in value] if isinstance(value, list) else value

    def text(
        self,
        conversation: _Conversation,
        *,
        upto: int | None = None,
        generation_prompt: bool = False,
    ) -> str:
        """The first `upto` messages, rendered."""
        return self._render(conversation, upto, generation_prompt, False)[0]

    def _render(
        self, conversation: _Conversation, upto: int | None, generation_prompt: bool, marks: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[conversation.messages[:upto]],
                tools=conversation.tools,
                chat_template=self.source,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=marks,
                **self.variables,
            )
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template, line {error.lineno}: {error.message}") from None
        except Exception as error:  # a template is a program of the user's: 1/0, endless recursion
            why = error if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"the chat template refuses the conversation: {why}") from None
        texts, spans = rendered
        return texts[0], spans[0] if marks else []

    # ---- spans

    def marked_spans(
        self, conversation: _Conversation, weights: dict[int, float]
    ) -> tuple[str, dict[tuple[int, int], float]]:
        """The text, and the weight of each span that `{% generation %}` marks in it.

        A mark is brought to end with the turn's end token, whether the template closed it before
        that, or after the newline that follows.
        """
        text, marks = self._render(conversation, None, False, True)
        marks = [(start, end) for start, end in marks if start < end]
        each = list(weights.values())
        if len(marks) > len(each) > 0 and len(set(each)) == 1:  # turns marked in parts
            each = each[:1] * len(marks)
        if len(marks) != len(each):
            raise ValueError(
                f"the chat template marks {len(marks)} assistant turns of {len(each)}; all that "
                "the assistant says in a turn goes into one {% generation %} … {% endgeneration %}"
            )
        spans = {
            (start, self._turn_end(text, self._words_end(text, start, end), end)): weight
            for (start, end), weight in zip(marks, each, strict=True)
        }
        return text, spans

    def prefix_span(self, conversation: _Conversation, turn: int, text: str) -> tuple[int, int]:
        """Where the words of an assistant's turn and its end token lie in `text`, the whole.

        The turn begins where the rendering of what comes before it ends, generation prompt and
        all. Its words end before the special tokens that close a conversation cut off after it.
        Those may differ in the whole (some templates close a last turn in another way), so the
        end token is read there.
        """
        try:
            before = self._before(conversation, turn)
            last = turn == len(conversation.messages) - 1
            upto = text if last else self.text(conversation, upto=turn + 1)
        except ValueError as error:
            raise ValueError(
                f"message {turn + 1}: the conversation up to here cannot be rendered alone "
                f"({error}), {_ASK_FOR_MARKS}"
            ) from None
        words_end = self._words_end(upto, len(before), len(upto))
        if not (upto.startswith(before) and text.startswith(upto[:words_end])):
            raise ValueError(
                f"message {turn + 1}: the chat template does not render the conversation up to "
                f"here as it does the beginning of the whole, {_ASK_FOR_MARKS}"
            )
        stop = len(upto) if text.startswith(upto) else words_end
        return len(before), self._turn_end(text, words_end, stop)

    def _before(self, conversation: _Conversation, turn: int) -> str:
        """What the model has seen when it begins to say this turn."""
        if turn:
            return self.text(conversation, upto=turn, generation_prompt=True)
        # Many templates cannot render no messages: see where the first one's words come to lie.
        mark = 2 * conversation.mark
        first = conversation.messages[0]
        first = first | {"content": mark + str(first.get("content", ""))}
        before, found, _ = self.text(replace(conversation, messages=[first])).partition(mark)
        if not found:
            raise ValueError("the chat template leaves out its content")
        return before

    def _words_end(self, text: str, start: int, stop: int) -> int:
        """Where text[start:stop] ends without the special tokens and spaces that close it."""
        specials = list(self.special.finditer(text, start, stop))
        while True:
            stop = start + len(text[start:stop].rstrip())
            if not specials or specials[-1].end() != stop:
                return stop
            stop = specials.pop().start()

    def _turn_end(self, text: str, words_end: int, stop: int) -> int:
        """Where the turn whose words end at `words_end` ends: after its end token.

        That is the first of the closing tokens that is known to end turns; failing that, the last
        one before `stop`; failing that, there is none.
        """
        place = end = words_end
        while found := self.closing.match(text, place):
            place = found.end()
            if found[1] in self.ends:
                return place
            if place <= stop:
                end = place
        return end

    @cached_property
    def ends(self) -> list[str]:
        """Special tokens that end an assistant's turn: eos, and what follows it in a small chat.

        What follows a turn that is not the last counts too: it can be another token.
        """
        user, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "Quite."}
        found = [self.tokenizer.eos_token] if self.tokenizer.eos_token else []
        for chat in [user, answer], [user, answer, user]:
            try:
                _, said, rest = self.text(_Conversation(chat, None, "")).rpartition("Quite.")
            except ValueError:  # such a template is refused where it is to render a real chat
                continue
            if said and (closing := self.closing.match(rest)):
                found.append(closing[1])
        return list(dict.fromkeys(found))

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
        real = [i for i, name in enumerate(names) if self.special.fullmatch(name)]
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

    def inside(self, encoded: _Encoded, start: int, end: int) -> np.ndarray:
        """bool [n]: tokens of the characters [start, end), with those across the start.

        A special token belongs to where it begins, though it may take spaces that follow.
        """
        inside = (encoded.starts >= start) & (encoded.starts < end)
        for i in np.flatnonzero((encoded.starts < start) & (encoded.ends > start)):
            inside[i] = encoded.tokens[i] not in self.special_ids
        return inside


def _calls(message: dict[str, Any]) -> Any:
    return message.get("tool_calls")


def _strings(value: Any) -> Iterator[str]:
    """Every string in nested lists and dicts, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
