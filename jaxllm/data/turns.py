# SPDX-License-Identifier: Apache-2.0
"""Where the assistant's turns lie in a rendered conversation, as spans of characters.

A template says so by `{% generation %}` marks. Without marks, a turn begins where generation's
prompt for it ends, and ends behind its end token.

Many templates render a turn differently once the conversation goes on: Qwen3 drops its reasoning,
Mistral moves the system message. Such a turn is not found `inside` the whole conversation; `apart`
gives it a text of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

from jaxllm.data.template import ChatTemplate
from jaxllm.errors import UserError
from jaxllm.tokenizer import special_tokens

Span = tuple[int, int]

# A text without the spaces and the one <tag> at its borders, which templates look for and trim.
_CORE = re.compile(r"\s*(?:<[^<>\s]*>\s*(?=\S))?(\S|\S.*?\S)(?:\s*<[^<>\s]*>)?\s*", re.DOTALL)
_TEXTS = ("content", "reasoning_content", "thinking", "reasoning", "tool_calls")


@dataclass(frozen=True)
class Conversation:
    """What a template is given. No message contains the characters `hide` and `border`."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    hide: str = ""
    """lies in each special token's name in messages and tools, behind its first character"""
    border: str = ""
    """begins the tags that enclose texts, to find them in a rendering"""

    @cached_property
    def tagged(self) -> _Tagged:
        return _Tagged(self)


class _Tagged:
    """The messages with each of their texts between two tags; owners[k] is the k-th text's message.

    Texts are contents, reasoning and the strings of tool calls.
    """

    def __init__(self, chat: Conversation) -> None:
        self.owners: list[int] = []
        self.tag = re.compile(rf"{chat.border}(\d+)([<>])")
        self._border = chat.border
        self.messages = [
            {k: self._tag(i, k, v) if k in _TEXTS else v for k, v in message.items()}
            for i, message in enumerate(chat.messages)
        ]

    def _tag(self, message: int, key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: self._tag(message, k, v) for k, v in value.items()}
        if isinstance(value, list):
            return [self._tag(message, key, item) for item in value]
        if not isinstance(value, str) or key in ("type", "id"):
            return value
        core = _CORE.fullmatch(value)
        if core is None:
            return value
        k, border = len(self.owners), self._border
        self.owners.append(message)
        start, stop = core.span(1)
        return f"{value[:start]}{border}{k}<{core[1]}{border}{k}>{value[stop:]}"

    def of(self, message: int) -> list[int]:
        """The texts of a message."""
        return [k for k, owner in enumerate(self.owners) if owner == message]


class _Places(NamedTuple):
    """{text: the character where it begins, or ends}, of those that a rendering shows."""

    begins: dict[int, int]
    ends: dict[int, int]

    def has(self, texts: Iterable[int]) -> bool:
        return all(k in self.begins and k in self.ends for k in texts)


class Rendering:
    """The first `upto` messages of a conversation, rendered. Raises ValueError where the template
    refuses them."""

    def __init__(
        self,
        template: ChatTemplate,
        chat: Conversation,
        upto: int | None = None,
        *,
        generation_prompt: bool = False,
    ) -> None:
        self._template, self._chat, self._generation_prompt = template, chat, generation_prompt
        self.upto = len(chat.messages) if upto is None else upto
        self.text = self._render(chat.messages)

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return self._template.render(
            messages[: self.upto], self._chat.tools, generation_prompt=self._generation_prompt
        )[0]

    @cached_property
    def marks(self) -> list[Span]:
        """What `{% generation %}` marks; blocks that touch are one."""
        chat, joined = self._chat, []
        _, marks = self._template.render(chat.messages[: self.upto], chat.tools, marks=True)
        for start, end in marks:
            if joined and joined[-1][1] == start:
                joined[-1] = joined[-1][0], end
            elif start < end:
                joined.append((start, end))
        return joined

    @cached_property
    def places(self) -> _Places | None:
        """Where the messages' texts lie; None where the tags change what the template does."""
        tagged, begins, ends, removed = self._chat.tagged, {}, {}, 0
        try:
            text = self._render(tagged.messages)
        except ValueError:
            return None
        for tag in tagged.tag.finditer(text):
            k, place = int(tag[1]), tag.start() - removed
            removed += len(tag[0])
            if tag[2] == "<":
                begins.setdefault(k, place)
            else:
                ends[k] = place
        return _Places(begins, ends) if tagged.tag.sub("", text) == self.text else None


class Turns:
    """The turns of conversations that a template renders for a tokenizer."""

    def __init__(self, template: ChatTemplate, tokenizer: Any) -> None:
        self.template, self._eos = template, tokenizer.eos_token
        either = "|".join(map(re.escape, special_tokens(tokenizer))) or "(?!)"
        self.special = re.compile(either)
        self._closing = re.compile(rf"\s*({either})")
        self._tag = re.compile(rf"{either}|<[^<>\s]*>|\[/?[A-Z_]+\]")  # none is ever cut in two

    def rendering(
        self, chat: Conversation, upto: int | None = None, *, generation_prompt: bool = False
    ) -> Rendering:
        return Rendering(self.template, chat, upto, generation_prompt=generation_prompt)

    # ---- in the whole conversation

    def inside(
        self, chat: Conversation, whole: Rendering, turns: list[int]
    ) -> dict[int, list[Span]]:
        """{turn: what is learned of it}, of those turns that the whole conversation begins and
        keeps as generation would have them."""
        if not self.template.has_marks:
            found = {turn: self._between_prompts(chat, whole, turn) for turn in turns}
            return {turn: [span] for turn, span in found.items() if span is not None}
        marked = self._marked(chat, whole)
        places = whole.places
        return {
            turn: marked[turn]
            for turn in turns
            if turn in marked and (places is None or places.has(chat.tagged.of(turn)))
        }

    def _between_prompts(self, chat: Conversation, whole: Rendering, turn: int) -> Span | None:
        before = self._before(chat, turn)
        if not whole.text.startswith(before):
            return None
        start = self._skip_header(whole.text, len(before))
        last = turn == len(chat.messages) - 1
        upto = whole.text if last else self._text(chat, turn + 1)
        words_end = self._words_end(upto, start, len(upto))
        if start <= len(upto) and whole.text.startswith(upto[:words_end]):
            # Templates may close a last turn in another way, so its end is read in the whole.
            stop = len(upto) if whole.text.startswith(upto) else words_end
            return start, self._turn_end(whole.text, words_end, stop)
        places, texts = whole.places, chat.tagged.of(turn)
        if places is None or not places.has(texts):
            return None
        words_end = max((places.ends[k] for k in texts), default=start)
        owners = chat.tagged.owners
        later = [place for k, place in places.begins.items() if owners[k] > turn]
        stop = min(later, default=len(whole.text))
        closing = self.special.finditer(whole.text, words_end, stop)
        first = next((token.start() for token in closing if token[0] in self.ends), None)
        return None if first is None else (start, self._turn_end(whole.text, first, stop))

    def _text(self, chat: Conversation, upto: int) -> str:
        """The first messages, rendered; "" where the template refuses them alone."""
        try:
            return self.rendering(chat, upto).text
        except ValueError:
            return ""

    # ---- apart

    def apart(self, chat: Conversation, turn: int) -> tuple[str, list[Span]]:
        """Generation's prompt and the turn as the template renders it last, and what is learned.

        Raises ValueError where the template refuses these, or marks nothing of the turn.
        """
        last = self.rendering(chat, turn + 1)
        if self.template.has_marks:
            marked = self._marked(chat, last)
            if turn not in marked:
                raise UserError(
                    f"message {turn + 1}: the chat template puts no {{% generation %}} block "
                    "around what the assistant says there"
                )
            return last.text, marked[turn]
        text, before, message = last.text, self._before(chat, turn), chat.messages[turn]
        start, moved = len(before), 0
        if not text.startswith(before):
            body = self._body(chat, turn, last)
            if message.get("reasoning_content"):
                start = body  # the prompt closes the reasoning that this turn opens
            else:
                text, moved = before + text[body:], len(before) - body
        start = self._skip_header(text, start)
        words_end = self._words_end(text, start, len(text))
        texts = chat.tagged.of(turn)
        if last.places and last.places.has(texts) and texts and not message.get("tool_calls"):
            said = max(last.places.ends[k] for k in texts) + moved
            if closing := self.special.search(text, said, words_end):
                # Some templates go on behind the answer, with instructions for the next one.
                text = text[: self._turn_end(text, closing.start(), len(text))]
                words_end = closing.start()
        return text, [(start, self._turn_end(text, words_end, len(text)))]

    def _body(self, chat: Conversation, turn: int, last: Rendering) -> int:
        """Where a turn begins in a rendering that does not begin with generation's prompt for it.

        That is behind the longest end of the prompt that the rendering has before the turn's first
        text, or else behind the longest beginning of the header: DeepSeek-R1's prompt goes on with
        <think>, which a rendered answer has not. Only what follows the last earlier text that both
        show is looked at.
        """
        prompt = self.rendering(chat, turn, generation_prompt=True)
        here, there, stop = 0, 0, len(last.text)
        if last.places and prompt.places:
            common = last.places.ends.keys() & prompt.places.ends.keys()
            if common:
                k = max(common, key=prompt.places.ends.__getitem__)
                here, there = last.places.ends[k], prompt.places.ends[k]
            begins = last.places.begins
            stop = min((begins[k] for k in chat.tagged.of(turn) if k in begins), default=stop)
        tail, header = prompt.text[there:], self._header
        for part in (
            *(tail[at:] for at in self._borders(tail)),
            *(header[:at] for at in reversed(self._borders(header))),
        ):
            found = last.text.rfind(part, here, stop)
            if found >= 0 and self._tag.search(part):
                return found + len(part)
        text = last.text[here:stop]
        agree = _common_prefix(text, tail)
        return here + max((at for at in self._borders(text) if at <= agree), default=0)

    def _borders(self, text: str) -> list[int]:
        """Where special tokens and tags of a text begin and end, and where it does; ascending."""
        found = {at for tag in self._tag.finditer(text) for at in tag.span()}
        return sorted({0, len(text), *found})

    # ---- borders of a turn

    def _before(self, chat: Conversation, turn: int) -> str:
        """What the model has seen when it begins to say this turn."""
        if turn:
            try:
                return self.rendering(chat, turn, generation_prompt=True).text
            except ValueError as error:
                raise UserError(
                    f"message {turn + 1}: the conversation up to here cannot be rendered alone "
                    f"({error}), so the assistant's words cannot be told from the rest; put "
                    "{% generation %} … {% endgeneration %} around them in the template "
                    "(data.template)"
                ) from None
        # Many templates cannot render no messages: see where the first one's text comes to lie.
        first = self.rendering(chat, 1)
        if first.places and first.places.begins:
            return first.text[: min(first.places.begins.values())]
        try:
            return self.rendering(chat, 0, generation_prompt=True).text
        except ValueError:
            raise UserError("message 1: the chat template does not show what it says") from None

    @cached_property
    def _header(self) -> str:
        """What the template adds for generation behind a user's message."""
        user = Conversation(self.template.prepared([{"role": "user", "content": "?"}]))
        try:
            plain, asked = (self.rendering(user, generation_prompt=g).text for g in (False, True))
        except ValueError:
            return ""
        return asked[len(plain) :] if asked.startswith(plain) else ""

    def _skip_header(self, text: str, start: int) -> int:
        """`start`, or behind the header there: some templates' generation prompt has none behind
        an assistant's message or a tool's result."""
        header = self._header
        token = self.special.search(header)
        # A header may go on with what opens reasoning: its first token is enough to know it.
        head = header[: token.end()] if token else header
        if not head or text[:start].endswith(header) or not text.startswith(head, start):
            return start
        return start + _common_prefix(text[start:], header)

    def _marked(self, chat: Conversation, rendering: Rendering) -> dict[int, list[Span]]:
        """{turn: what `{% generation %}` marks of it}.

        A mark is brought to end with the turn's end token, whether the template closed it before
        that, or after the newline that follows.
        """
        messages = chat.messages[: rendering.upto]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        marks, places, out = rendering.marks, rendering.places, {}
        in_order = len(marks) == len(turns)
        if places is None and not in_order:
            return {}
        for number, (start, end) in enumerate(marks):
            if in_order or places is None:
                turn = turns[number]
            else:
                turn = self._turn_at(chat, turns, places, end)
            out.setdefault(turn, []).append((start, self._mark_end(rendering.text, start, end)))
        return out

    def _turn_at(self, chat: Conversation, turns: list[int], places: _Places, end: int) -> int:
        """The turn that a mark up to the character `end` belongs to: the last one begun."""
        owners = chat.tagged.owners

        def begun(turn: int) -> bool:
            texts = chat.tagged.of(turn)
            if texts:
                return any(places.begins.get(k, end) < end for k in texts)
            # A turn without text begins behind the last text before it.
            return max((at for k, at in places.ends.items() if owners[k] < turn), default=0) < end

        return max(filter(begun, turns), default=turns[0])

    def _mark_end(self, text: str, start: int, end: int) -> int:
        stop = start + len(text[start:end].rstrip())
        if self.closed(text, (start, stop)):
            return stop
        found = self._closing.match(text, stop)
        return found.end() if found and found[1] in self.ends else stop

    def closed(self, text: str, span: Span) -> bool:
        """Whether a span ends with a special token."""
        return any(token.end() == span[1] for token in self.special.finditer(text, *span))

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

        Of the tokens that close it that is eos, if eos closes turns in the middle of a
        conversation; else the first that is known to end turns; failing that, the last one before
        `stop`; failing that, there is none.
        """
        closing, place = [], words_end
        while found := self._closing.match(text, place):
            place = found.end()
            closing.append((found[1], place))
        for wanted in [self._eos] if self._eos_ends_turns else [], self.ends:
            for token, end in closing:
                if token in wanted:
                    return end
        return max((end for _, end in closing if end <= stop), default=words_end)

    # ---- what ends an answer

    def _after_answer(self, *more: dict[str, Any]) -> str | None:
        """What follows an answer in a small chat; None where the template refuses that."""
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Quite."}]
        try:
            text, _ = self.template.render(self.template.prepared([*chat, *more]))
        except ValueError:  # such a template is refused where it is to render a real chat
            return None
        _, said, rest = text.rpartition("Quite.")
        return rest if said else None

    @cached_property
    def ends(self) -> list[str]:
        """Special tokens that end an assistant's turn: eos, and what follows it in a small chat.

        What follows a turn that is not the last counts too: it can be another token.
        """
        found = [self._eos] if self._eos else []
        for more in [], [{"role": "user", "content": "?"}]:
            if closing := self._closing.match(self._after_answer(*more) or ""):
                found.append(closing[1])
        return list(dict.fromkeys(found))

    @cached_property
    def _eos_ends_turns(self) -> bool:
        """Whether eos is among the tokens that close an answer which another question follows."""
        rest, place = self._after_answer({"role": "user", "content": "?"}) or "", 0
        while found := self._closing.match(rest, place):
            if found[1] == self._eos:
                return True
            place = found.end()
        return False

    @cached_property
    def unknown_end(self) -> str:
        """What the template writes behind a last answer, where that has no special token in it."""
        rest = (self._after_answer() or "").strip()
        return "" if self.special.search(rest) else rest


def _common_prefix(one: str, other: str) -> int:
    """How many characters two texts begin alike."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
