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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any, NamedTuple

from jaxllm.data.template import ChatTemplate
from jaxllm.errors import UserError
from jaxllm.tokenizer import special_tokens
from jaxllm.untrusted import Exceeded

Span = tuple[int, int]

# A text without the surrounding spaces and <tag>s, which templates may search for and trim.
_TRIMMED = re.compile(r"\s*(?:<[^<>\s]*>\s*(?=\S))?(\S|\S.*?\S)(?:\s*<[^<>\s]*>)?\s*", re.DOTALL)
_QUESTION, _ANSWER = {"role": "user", "content": "?"}, {"role": "assistant", "content": "Quite."}
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
    def tagged(self) -> tuple[list[dict[str, Any]], list[int]]:
        """(the messages with each text between two tags, the index of each text's message).

        Texts are contents, reasoning and the strings of tool calls.
        """
        owners: list[int] = []

        def insert_tags(message: int, key: str, value: Any) -> Any:
            if isinstance(value, dict):
                return {k: insert_tags(message, k, v) for k, v in value.items()}
            if isinstance(value, list):
                return [insert_tags(message, key, item) for item in value]
            if not isinstance(value, str) or key in ("type", "id"):
                return value
            trimmed = _TRIMMED.fullmatch(value)
            if trimmed is None:
                return value
            owners.append(message)
            tag, (start, stop) = f"{self.tag_mark}{len(owners) - 1}", trimmed.span(1)
            return f"{value[:start]}{tag}<{trimmed[1]}{tag}>{value[stop:]}"

        messages = [
            {k: insert_tags(i, k, v) if k in _TEXT_KEYS else v for k, v in message.items()}
            for i, message in enumerate(self.messages)
        ]
        return messages, owners


class _TextOffsets(NamedTuple):
    """The character offsets of texts in a rendering, which may lack either end of a text."""

    owners: list[int]
    """the message of each text"""
    starts: dict[int, int]
    """{text: offset}"""
    ends: dict[int, int]

    def texts_of(self, message: int) -> list[int]:
        return [k for k, owner in enumerate(self.owners) if owner == message]

    def has(self, message: int) -> bool:
        """True if both ends of all texts of a message are rendered."""
        return all(k in self.starts and k in self.ends for k in self.texts_of(message))


class Rendering:
    """The first `count` (default: all) messages of a conversation, rendered.

    Raises UserError if the template rejects them.
    """

    def __init__(
        self,
        template: ChatTemplate,
        chat: TemplateInput,
        count: int | None = None,
        generation_prompt: bool = False,
    ) -> None:
        self.chat, self._template, self._generation_prompt = chat, template, generation_prompt
        self.count = len(chat.messages) if count is None else count
        self.text = self._render(chat.messages)

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return self._template.render(
            messages[: self.count], self.chat.tools, generation_prompt=self._generation_prompt
        )[0]

    @cached_property
    def generation_spans(self) -> list[Span]:
        """The spans of `{% generation %}` blocks; adjacent ones are joined."""
        messages, joined = self.chat.messages[: self.count], []
        _, spans = self._template.render(messages, self.chat.tools, generation_blocks=True)
        for start, end in spans:
            if joined and joined[-1][1] == start:
                joined[-1] = joined[-1][0], end
            elif start < end:
                joined.append((start, end))
        return joined

    @cached_property
    def text_offsets(self) -> _TextOffsets | None:
        """The offsets of the messages' texts; None if tags change the rendering."""
        messages, owners = self.chat.tagged
        tags, removed = re.compile(rf"{self.chat.tag_mark}(\d+)([<>])"), 0
        offsets = _TextOffsets(owners, {}, {})
        try:
            text = self._render(messages)
        except ValueError:
            return None
        for tag in tags.finditer(text):
            k, offset = int(tag[1]), tag.start() - removed
            removed += len(tag[0])
            if tag[2] == "<":
                offsets.starts.setdefault(k, offset)
            else:
                offsets.ends[k] = offset
        return offsets if tags.sub("", text) == self.text else None


class Turns:
    """Finds the assistant's turns in what a template renders for a tokenizer."""

    end_tokens: list[str]
    """special tokens that end an assistant's turn: eos, and the one that follows an answer, which
    can differ between the last turn and earlier ones"""
    non_special_end: str
    """the text that follows a last answer if it contains no special token, else empty"""

    def __init__(self, template: ChatTemplate, tokenizer: Any) -> None:
        self.template = template
        any_special = "|".join(map(re.escape, special_tokens(tokenizer))) or "(?!)"
        self.special_pattern = re.compile(any_special)
        self._closing_pattern = re.compile(rf"\s*({any_special})")
        # Turns never start inside one of these.
        self._tag_pattern = re.compile(rf"{any_special}|<[^<>\s]*>|\[/?[A-Z_]+\]")

        last, earlier = self._answer_suffix(), self._answer_suffix(_QUESTION)
        last_closing, earlier_closing = (
            [token for token, _ in self._closing_tokens(suffix)] for suffix in (last, earlier)
        )
        eos = tokenizer.eos_token
        candidates = (eos, *last_closing[:1], *earlier_closing[:1])
        self.end_tokens = [token for token in dict.fromkeys(candidates) if token]
        self._preferred_end_tokens = [eos] if eos in earlier_closing else []
        self.non_special_end = "" if self.special_pattern.search(last) else last.strip()
        # The text that the template adds for generation after a user message.
        plain, prompted = (self._render_sample([_QUESTION], prompt) for prompt in (False, True))
        has_header = plain and prompted.startswith(plain)
        self._generation_header = prompted[len(plain) :] if has_header else ""

    def _render_sample(self, messages: list[dict[str, Any]], generation_prompt: bool) -> str:
        try:
            messages = self.template.normalize(messages)
            return self.template.render(messages, generation_prompt=generation_prompt)[0]
        except Exceeded:
            raise
        except ValueError:  # reported when a real conversation is rendered
            return ""

    def _answer_suffix(self, *following: dict[str, Any]) -> str:
        """The text after an answer in a small chat."""
        text = self._render_sample([_QUESTION, _ANSWER, *following], False)
        return text.rpartition("Quite.")[2] if "Quite." in text else ""

    # ---- turns in the full conversation

    def spans_in_conversation(self, full: Rendering, turns: list[int]) -> dict[int, list[Span]]:
        """{turn: its spans} of the turns that are rendered as they are generated."""
        if not self.template.has_generation_blocks:
            spans = {turn: self._span_between_prompts(full, turn) for turn in turns}
            return {turn: [span] for turn, span in spans.items() if span is not None}
        marked, offsets = self._marked_spans(full), full.text_offsets
        return {
            turn: marked[turn]
            for turn in turns
            if turn in marked and (offsets is None or offsets.has(turn))
        }

    def _span_between_prompts(self, full: Rendering, turn: int) -> Span | None:
        context = self._generation_context(full.chat, turn)
        if not full.text.startswith(context):
            return None
        start = self._skip_header(full.text, len(context))
        prefix = full.text
        if turn + 1 < full.count:
            try:
                prefix = Rendering(self.template, full.chat, turn + 1).text
            except UserError:
                prefix = ""
        content_end = self._content_end(prefix, start, len(prefix))
        if start <= len(prefix) and full.text.startswith(prefix[:content_end]):
            # Templates may end a last turn differently, so its end is taken from the full text.
            stop = len(prefix) if full.text.startswith(prefix) else content_end
            return start, self._turn_end(full.text, content_end, stop)
        offsets = full.text_offsets
        if offsets is None or not offsets.has(turn):
            return None
        content_end = max((offsets.ends[k] for k in offsets.texts_of(turn)), default=start)
        later = [offset for k, offset in offsets.starts.items() if offsets.owners[k] > turn]
        stop = min(later, default=len(full.text))
        for token in self.special_pattern.finditer(full.text, content_end, stop):
            if token[0] in self.end_tokens:
                return start, self._turn_end(full.text, token.start(), stop)
        return None

    # ---- turns that are rendered separately

    def render_separately(self, chat: TemplateInput, turn: int) -> tuple[str, list[Span]]:
        """(the generation prompt and the turn rendered as the last one, the turn's spans).

        Raises UserError if the template rejects the messages, or has no block for the turn.
        """
        last = Rendering(self.template, chat, turn + 1)
        if self.template.has_generation_blocks:
            marked = self._marked_spans(last)
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
            body = self._turn_start(last)
            if message.get("reasoning_content"):
                start = body  # the prompt ends the reasoning block that this turn starts
            else:
                text, shift = context + text[body:], len(context) - body
        start = self._skip_header(text, start)
        content_end = self._content_end(text, start, len(text))
        offsets = last.text_offsets
        texts = offsets.texts_of(turn) if offsets and offsets.has(turn) else []
        if offsets and texts and not message.get("tool_calls"):
            texts_end = max(offsets.ends[k] for k in texts) + shift
            if closing := self.special_pattern.search(text, texts_end, content_end):
                # Some templates add instructions for the next answer.
                text = text[: self._turn_end(text, closing.start(), len(text))]
                content_end = closing.start()
        return text, [(start, self._turn_end(text, content_end, len(text)))]

    def _turn_start(self, last: Rendering) -> int:
        """The start of a rendering's last turn, if its generation prompt does not precede it.

        The turn follows the longest suffix of the prompt that occurs before its first text, or else
        the longest prefix of the generation header: DeepSeek-R1's prompt ends with <think>, which a
        rendered answer does not have. The search starts after the last text that both the rendering
        and the prompt contain.
        """
        turn, text_start, prompt_start, stop = last.count - 1, 0, 0, len(last.text)
        prompt = Rendering(self.template, last.chat, turn, generation_prompt=True)
        offsets, prompt_offsets = last.text_offsets, prompt.text_offsets
        if offsets and prompt_offsets:
            if common := offsets.ends.keys() & prompt_offsets.ends.keys():
                k = max(common, key=prompt_offsets.ends.__getitem__)
                text_start, prompt_start = offsets.ends[k], prompt_offsets.ends[k]
            starts = offsets.starts
            stop = min((starts[k] for k in offsets.texts_of(turn) if k in starts), default=stop)
        tail, header = prompt.text[prompt_start:], self._generation_header
        for part in (
            *(tail[offset:] for offset in self._boundaries(tail)),
            *(header[:offset] for offset in reversed(self._boundaries(header))),
        ):
            offset = last.text.rfind(part, text_start, stop)
            if offset >= 0 and self._tag_pattern.search(part):
                return offset + len(part)
        text = last.text[text_start:stop]
        common_length = len(commonprefix([text, tail]))
        return text_start + max(b for b in self._boundaries(text) if b <= common_length)

    def _boundaries(self, text: str) -> list[int]:
        """The starts and ends of the text and of its special tokens and tags, ascending."""
        offsets = {offset for tag in self._tag_pattern.finditer(text) for offset in tag.span()}
        return sorted({0, len(text), *offsets})

    # ---- start and end of a turn

    def _generation_context(self, chat: TemplateInput, turn: int) -> str:
        """The text that precedes this turn at generation."""
        if turn:
            try:
                return Rendering(self.template, chat, turn, generation_prompt=True).text
            except ValueError as error:
                raise UserError(
                    f"message {turn + 1}: the messages before it cannot be rendered ({error}), so "
                    "the assistant's text cannot be located; put {% generation %} … "
                    "{% endgeneration %} around it in the template (data.template)"
                ) from None
        # Many templates reject an empty list, so locate the text of the first message.
        first = Rendering(self.template, chat, 1)
        if first.text_offsets and first.text_offsets.starts:
            return first.text[: min(first.text_offsets.starts.values())]
        try:
            return Rendering(self.template, chat, 0, generation_prompt=True).text
        except ValueError:
            raise UserError("message 1: the chat template does not render its content") from None

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

    def _marked_spans(self, rendering: Rendering) -> dict[int, list[Span]]:
        """{turn: the spans of its `{% generation %}` blocks}; {} if their turns are unknown.

        Each span is adjusted to end with the turn's end token. Templates end the block before that
        token, or after the newline that follows it.
        """
        messages = rendering.chat.messages[: rendering.count]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans, offsets, marked = rendering.generation_spans, rendering.text_offsets, {}
        if len(spans) != len(turns):
            if offsets is None:
                return {}
            turns = [_turn_of_block(turns, offsets, end) for _, end in spans]
        for turn, (start, end) in zip(turns, spans, strict=True):
            end = self._marked_end(rendering.text, start, end)
            marked.setdefault(turn, []).append((start, end))
        return marked

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
        for candidates in self._preferred_end_tokens, self.end_tokens:
            for token, end in closing:
                if token in candidates:
                    return end
        return max((end for _, end in closing if end <= stop), default=content_end)

    def _closing_tokens(self, text: str, offset: int = 0) -> Iterator[tuple[str, int]]:
        """The special tokens that follow each other at `offset`, each with its end."""
        while match := self._closing_pattern.match(text, offset):
            offset = match.end()
            yield match[1], offset


def _turn_of_block(turns: list[int], offsets: _TextOffsets, end: int) -> int:
    """The turn of a block that ends at `end`: the last one that starts before it."""

    def start(turn: int) -> int:
        if texts := offsets.texts_of(turn):
            return min(offsets.starts.get(k, end) for k in texts)
        # A turn without text starts after the last earlier text.
        earlier = [offset for k, offset in offsets.ends.items() if offsets.owners[k] < turn]
        return max(earlier, default=0)

    return max((turn for turn in turns if start(turn) < end), default=turns[0])
