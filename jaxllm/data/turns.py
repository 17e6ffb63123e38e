# SPDX-License-Identifier: Apache-2.0
"""Find the assistant's turns in a rendered conversation, as character spans.

`{% generation %}` blocks mark the turns if the template has them. Otherwise a turn starts after the
generation prompt and ends with its end token.

Many templates are not prefix-preserving: they render a turn differently if messages follow it.
Qwen3 drops its reasoning, Mistral moves the system message. `spans_in_conversation` does not find
such a turn; `render_separately` renders the conversation up to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from os.path import commonprefix
from typing import Any, NamedTuple

from jaxllm.data.template import ChatTemplate
from jaxllm.errors import UserError
from jaxllm.tokenizer import special_tokens

Span = tuple[int, int]

# A text without the surrounding spaces and <tag>s, which templates may search for and trim.
_TRIMMED = re.compile(r"\s*(?:<[^<>\s]*>\s*(?=\S))?(\S|\S.*?\S)(?:\s*<[^<>\s]*>)?\s*", re.DOTALL)
_TEXT_KEYS = ("content", "reasoning_content", "thinking", "reasoning", "tool_calls")


@dataclass(frozen=True)
class TemplateInput:
    """The input of a template. No message contains the characters `escape_mark` and `tag_mark`."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    escape_mark: str = ""
    """inserted after the first character of special tokens in messages and tools"""
    tag_mark: str = ""
    """first character of the tags around texts, which locate them in a rendering"""

    @cached_property
    def tagged(self) -> _TaggedMessages:
        return _TaggedMessages(self)


class _TaggedMessages:
    """The messages with each text enclosed in two tags; owners[k] is the message of text k.

    Texts are contents, reasoning and the strings of tool calls.
    """

    def __init__(self, chat: TemplateInput) -> None:
        self.owners: list[int] = []
        self.tag = re.compile(rf"{chat.tag_mark}(\d+)([<>])")
        self._tag_mark = chat.tag_mark
        self.messages = [
            {k: self._insert_tags(i, k, v) if k in _TEXT_KEYS else v for k, v in message.items()}
            for i, message in enumerate(chat.messages)
        ]

    def _insert_tags(self, message: int, key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: self._insert_tags(message, k, v) for k, v in value.items()}
        if isinstance(value, list):
            return [self._insert_tags(message, key, item) for item in value]
        if not isinstance(value, str) or key in ("type", "id"):
            return value
        trimmed = _TRIMMED.fullmatch(value)
        if trimmed is None:
            return value
        k, tag_mark = len(self.owners), self._tag_mark
        self.owners.append(message)
        start, stop = trimmed.span(1)
        return f"{value[:start]}{tag_mark}{k}<{trimmed[1]}{tag_mark}{k}>{value[stop:]}"

    def texts_of(self, message: int) -> list[int]:
        """The indices of a message's texts."""
        return [k for k, owner in enumerate(self.owners) if owner == message]


class _TextOffsets(NamedTuple):
    """{text index: character offset} of the starts and ends of the texts in a rendering."""

    starts: dict[int, int]
    ends: dict[int, int]

    def has(self, texts: Iterable[int]) -> bool:
        return all(k in self.starts and k in self.ends for k in texts)


class Rendering:
    """The first `count` messages of a conversation, rendered.

    Raises UserError if the template rejects them.
    """

    def __init__(
        self, template: ChatTemplate, chat: TemplateInput, count: int, generation_prompt: bool
    ) -> None:
        self._template, self._chat, self._generation_prompt = template, chat, generation_prompt
        self.count = count
        self.text = self._render(chat.messages)

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return self._template.render(
            messages[: self.count], self._chat.tools, generation_prompt=self._generation_prompt
        )[0]

    @cached_property
    def generation_spans(self) -> list[Span]:
        """The spans of `{% generation %}` blocks; adjacent ones are joined."""
        messages, joined = self._chat.messages[: self.count], []
        _, spans = self._template.render(messages, self._chat.tools, generation_blocks=True)
        for start, end in spans:
            if joined and joined[-1][1] == start:
                joined[-1] = joined[-1][0], end
            elif start < end:
                joined.append((start, end))
        return joined

    @cached_property
    def text_offsets(self) -> _TextOffsets | None:
        """The offsets of the messages' texts; None if tags change the rendering."""
        tagged, starts, ends, removed = self._chat.tagged, {}, {}, 0
        try:
            text = self._render(tagged.messages)
        except ValueError:
            return None
        for tag in tagged.tag.finditer(text):
            k, offset = int(tag[1]), tag.start() - removed
            removed += len(tag[0])
            if tag[2] == "<":
                starts.setdefault(k, offset)
            else:
                ends[k] = offset
        return _TextOffsets(starts, ends) if tagged.tag.sub("", text) == self.text else None


class Turns:
    """Finds the assistant's turns in what a template renders for a tokenizer."""

    def __init__(self, template: ChatTemplate, tokenizer: Any) -> None:
        self.template, self._eos = template, tokenizer.eos_token
        any_special = "|".join(map(re.escape, special_tokens(tokenizer))) or "(?!)"
        self.special_pattern = re.compile(any_special)
        self._closing_pattern = re.compile(rf"\s*({any_special})")
        # Turns never start inside one of these.
        self._tag_pattern = re.compile(rf"{any_special}|<[^<>\s]*>|\[/?[A-Z_]+\]")

    def render(
        self, chat: TemplateInput, count: int | None = None, *, generation_prompt: bool = False
    ) -> Rendering:
        count = len(chat.messages) if count is None else count
        return Rendering(self.template, chat, count, generation_prompt)

    # ---- turns in the full conversation

    def spans_in_conversation(
        self, chat: TemplateInput, full: Rendering, turns: list[int]
    ) -> dict[int, list[Span]]:
        """{turn: its spans} of the turns that are rendered as they are generated."""
        if not self.template.has_generation_blocks:
            found = {turn: self._span_between_prompts(chat, full, turn) for turn in turns}
            return {turn: [span] for turn, span in found.items() if span is not None}
        marked = self._marked_spans(chat, full)
        offsets = full.text_offsets
        return {
            turn: marked[turn]
            for turn in turns
            if turn in marked and (offsets is None or offsets.has(chat.tagged.texts_of(turn)))
        }

    def _span_between_prompts(self, chat: TemplateInput, full: Rendering, turn: int) -> Span | None:
        context = self._generation_context(chat, turn)
        if not full.text.startswith(context):
            return None
        start = self._skip_header(full.text, len(context))
        try:
            prefix = self.render(chat, turn + 1).text if turn + 1 < full.count else full.text
        except UserError:
            prefix = ""
        content_end = self._content_end(prefix, start, len(prefix))
        if start <= len(prefix) and full.text.startswith(prefix[:content_end]):
            # Templates may end a last turn differently, so its end is taken from the full text.
            stop = len(prefix) if full.text.startswith(prefix) else content_end
            return start, self._turn_end(full.text, content_end, stop)
        offsets, texts = full.text_offsets, chat.tagged.texts_of(turn)
        if offsets is None or not offsets.has(texts):
            return None
        content_end = max((offsets.ends[k] for k in texts), default=start)
        owners = chat.tagged.owners
        later = [offset for k, offset in offsets.starts.items() if owners[k] > turn]
        stop = min(later, default=len(full.text))
        closing = self.special_pattern.finditer(full.text, content_end, stop)
        first = next((token.start() for token in closing if token[0] in self.end_tokens), None)
        return None if first is None else (start, self._turn_end(full.text, first, stop))

    # ---- turns that are rendered separately

    def render_separately(self, chat: TemplateInput, turn: int) -> tuple[str, list[Span]]:
        """(the generation prompt and the turn rendered as the last one, the turn's spans).

        Raises UserError if the template rejects the messages, or has no block for the turn.
        """
        last = self.render(chat, turn + 1)
        if self.template.has_generation_blocks:
            marked = self._marked_spans(chat, last)
            if turn not in marked:
                raise UserError(
                    f"message {turn + 1}: the chat template has no {{% generation %}} block for "
                    "this assistant message; set data.template to one that has"
                )
            return last.text, marked[turn]
        text, message = last.text, chat.messages[turn]
        context = self._generation_context(chat, turn)
        start, shift = len(context), 0
        if not text.startswith(context):
            body = self._turn_start(chat, turn, last)
            if message.get("reasoning_content"):
                start = body  # the prompt ends the reasoning block that this turn starts
            else:
                text, shift = context + text[body:], len(context) - body
        start = self._skip_header(text, start)
        content_end = self._content_end(text, start, len(text))
        texts, offsets = chat.tagged.texts_of(turn), last.text_offsets
        if offsets and offsets.has(texts) and texts and not message.get("tool_calls"):
            texts_end = max(offsets.ends[k] for k in texts) + shift
            if closing := self.special_pattern.search(text, texts_end, content_end):
                # Some templates add instructions for the next answer.
                text = text[: self._turn_end(text, closing.start(), len(text))]
                content_end = closing.start()
        return text, [(start, self._turn_end(text, content_end, len(text)))]

    def _turn_start(self, chat: TemplateInput, turn: int, last: Rendering) -> int:
        """The start of a turn in a rendering that does not start with its generation prompt.

        It follows the longest suffix of the prompt that occurs before the turn's first text, or
        else the longest prefix of the generation header: DeepSeek-R1's prompt ends with <think>,
        which a rendered answer does not have. The search starts after the last text that both the
        rendering and the prompt contain.
        """
        prompt = self.render(chat, turn, generation_prompt=True)
        rendering_start, prompt_start, stop = 0, 0, len(last.text)
        if last.text_offsets and prompt.text_offsets:
            ends, prompt_ends = last.text_offsets.ends, prompt.text_offsets.ends
            if common := ends.keys() & prompt_ends.keys():
                k = max(common, key=prompt_ends.__getitem__)
                rendering_start, prompt_start = ends[k], prompt_ends[k]
            starts = last.text_offsets.starts
            stop = min((starts[k] for k in chat.tagged.texts_of(turn) if k in starts), default=stop)
        tail, header = prompt.text[prompt_start:], self._generation_header
        for part in (
            *(tail[offset:] for offset in self._boundaries(tail)),
            *(header[:offset] for offset in reversed(self._boundaries(header))),
        ):
            found = last.text.rfind(part, rendering_start, stop)
            if found >= 0 and self._tag_pattern.search(part):
                return found + len(part)
        text = last.text[rendering_start:stop]
        common_length = len(commonprefix([text, tail]))
        return rendering_start + max(b for b in self._boundaries(text) if b <= common_length)

    def _boundaries(self, text: str) -> list[int]:
        """The starts and ends of the text and of its special tokens and tags, ascending."""
        offsets = {offset for tag in self._tag_pattern.finditer(text) for offset in tag.span()}
        return sorted({0, len(text), *offsets})

    # ---- start and end of a turn

    def _generation_context(self, chat: TemplateInput, turn: int) -> str:
        """The text that precedes this turn at generation."""
        if turn:
            try:
                return self.render(chat, turn, generation_prompt=True).text
            except ValueError as error:
                raise UserError(
                    f"message {turn + 1}: the messages before it cannot be rendered ({error}), so "
                    "the assistant's text cannot be located; put {% generation %} … "
                    "{% endgeneration %} around it in the template (data.template)"
                ) from None
        # Many templates reject an empty list, so locate the text of the first message.
        first = self.render(chat, 1)
        if first.text_offsets and first.text_offsets.starts:
            return first.text[: min(first.text_offsets.starts.values())]
        try:
            return self.render(chat, 0, generation_prompt=True).text
        except ValueError:
            raise UserError("message 1: the chat template does not render its content") from None

    @cached_property
    def _generation_header(self) -> str:
        """The header that the template adds for generation after a user message."""
        user = TemplateInput(self.template.normalize([{"role": "user", "content": "?"}]))
        try:
            plain, prompted = (self.render(user, generation_prompt=g).text for g in (False, True))
        except ValueError:
            return ""
        return prompted[len(plain) :] if prompted.startswith(plain) else ""

    def _skip_header(self, text: str, start: int) -> int:
        """Skip the generation header at `start`, if there is one.

        Some templates' generation prompts lack it after an assistant message or a tool result.
        """
        header = self._generation_header
        token = self.special_pattern.search(header)
        # The header may include the start of reasoning, so only its first token is compared.
        opening = header[: token.end()] if token else header
        if not opening or text[:start].endswith(header) or not text.startswith(opening, start):
            return start
        return start + len(commonprefix([text[start:], header]))

    def _marked_spans(self, chat: TemplateInput, rendering: Rendering) -> dict[int, list[Span]]:
        """{turn: the spans of its `{% generation %}` blocks}.

        Each span is adjusted to end with the turn's end token. Templates end the block before that
        token, or after the newline that follows it.
        """
        messages = chat.messages[: rendering.count]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans, offsets, found = rendering.generation_spans, rendering.text_offsets, {}
        one_per_turn = len(spans) == len(turns)
        if offsets is None and not one_per_turn:
            return {}
        for number, (start, end) in enumerate(spans):
            if one_per_turn or offsets is None:
                turn = turns[number]
            else:
                turn = self._turn_of_span(chat, turns, offsets, end)
            found.setdefault(turn, []).append((start, self._marked_end(rendering.text, start, end)))
        return found

    def _turn_of_span(
        self, chat: TemplateInput, turns: list[int], offsets: _TextOffsets, end: int
    ) -> int:
        """The turn of a block that ends at `end`: the last one that starts before it."""
        owners = chat.tagged.owners

        def has_started(turn: int) -> bool:
            texts = chat.tagged.texts_of(turn)
            if texts:
                return any(offsets.starts.get(k, end) < end for k in texts)
            # A turn without text starts after the last earlier text.
            earlier = [offset for k, offset in offsets.ends.items() if owners[k] < turn]
            return max(earlier, default=0) < end

        return max(filter(has_started, turns), default=turns[0])

    def _marked_end(self, text: str, start: int, end: int) -> int:
        stop = start + len(text[start:end].rstrip())
        if self.ends_with_special(text, (start, stop)):
            return stop
        match = self._closing_pattern.match(text, stop)
        return match.end() if match and match[1] in self.end_tokens else stop

    def ends_with_special(self, text: str, span: Span) -> bool:
        """True if the span ends with a special token."""
        return any(token.end() == span[1] for token in self.special_pattern.finditer(text, *span))

    def _content_end(self, text: str, start: int, stop: int) -> int:
        """The end of text[start:stop] without trailing special tokens and spaces."""
        specials = list(self.special_pattern.finditer(text, start, stop))
        while True:
            stop = start + len(text[start:stop].rstrip())
            if not specials or specials[-1].end() != stop:
                return stop
            stop = specials.pop().start()

    def _turn_end(self, text: str, content_end: int, stop: int) -> int:
        """The end of a turn, after its end token; its content ends at `content_end`.

        The end token is, among the special tokens that follow the content: eos, if eos closes turns
        in the middle of a conversation; else the first of `end_tokens`; else the last one before
        `stop`. If there is none, the turn ends with its content.
        """
        closing = list(self._closing_tokens(text, content_end))
        for candidates in [self._eos] if self._eos_closes_turns else [], self.end_tokens:
            for token, end in closing:
                if token in candidates:
                    return end
        return max((end for _, end in closing if end <= stop), default=content_end)

    # ---- end tokens

    def _closing_tokens(self, text: str, offset: int = 0) -> Iterator[tuple[str, int]]:
        """The special tokens that follow each other at `offset`, each with its end."""
        while match := self._closing_pattern.match(text, offset):
            offset = match.end()
            yield match[1], offset

    def _answer_suffix(self, *following: dict[str, Any]) -> str | None:
        """The text after an answer in a small chat; None if the template rejects the chat."""
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Quite."}]
        try:
            text, _ = self.template.render(self.template.normalize([*chat, *following]))
        except ValueError:  # reported when a real conversation is rendered
            return None
        _, answer, suffix = text.rpartition("Quite.")
        return suffix if answer else None

    @cached_property
    def end_tokens(self) -> list[str]:
        """Special tokens that end an assistant's turn: eos, and the one after it in a small chat.

        The token can differ between the last turn and earlier ones; both are included.
        """
        tokens = [self._eos] if self._eos else []
        for following in [], [{"role": "user", "content": "?"}]:
            closing = self._closing_tokens(self._answer_suffix(*following) or "")
            tokens += [token for token, _ in islice(closing, 1)]
        return list(dict.fromkeys(tokens))

    @cached_property
    def _eos_closes_turns(self) -> bool:
        """True if eos is among the tokens that end an answer before another question."""
        suffix = self._answer_suffix({"role": "user", "content": "?"}) or ""
        return any(token == self._eos for token, _ in self._closing_tokens(suffix))

    @cached_property
    def non_special_end(self) -> str:
        """The text that ends a last answer if it contains no special token, else ""."""
        suffix = (self._answer_suffix() or "").strip()
        return "" if self.special_pattern.search(suffix) else suffix
