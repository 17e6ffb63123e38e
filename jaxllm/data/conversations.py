# SPDX-License-Identifier: Apache-2.0
"""Parse records into texts, conversations, preference pairs, judged answers and prompts.

Each function converts a record of any accepted layout to one canonical form. It raises UserError
with the record's location and columns if no layout fits. Remarks that the user should see once per
source are returned as `notes`: short texts, identical for the same remark.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jaxllm.config import DataSection, Source
from jaxllm.data.messages import (
    MEDIA,
    WEIGHTS,
    ParseContext,
    is_present,
    message_text,
    parse_message,
    parse_nested,
    parse_tools,
    parse_weight,
)
from jaxllm.data.prompts import (
    PROMPT_FORMS,
    is_empty_answer,
    merge_prompt,
    prompt_message_count,
    split_pair,
)
from jaxllm.errors import UserError, seen

CONVERSATION_FORMS = (
    "messages (role, content), conversations (from, value), prompt + completion, "
    "instruction + output (and input, system, history), or question + answer"
)
USER_TEMPLATES = {
    "rag": (
        "Answer the question from the context below. "
        "If the context does not hold the answer, say that you do not know.\n\n"
        "Question: {question}\n\nContext:\n{context}\n\nAnswer:"
    ),
}
_WEIGHT_LISTS = (*WEIGHTS, "weights", "loss_weights", "loss_masks")
# Columns of a conversation, or of a prompt and its answer; the first layout that fits is used.
_CONVERSATION_COLUMNS = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
)
_PROMPT_COLUMNS = ("prompt", "question", "messages", "conversations", "instruction")


def parse_text(record: dict, columns: Mapping[str, str], location: str) -> str:
    """The unchanged document of a record; "" if it is null."""
    record = _rename_columns(record, columns, location)
    if "text" not in record:
        raise _missing(record, f"{location}:", "pretraining needs a column text", "text")
    return "" if record["text"] is None else _string(record, "text", location)


def parse_conversation(
    record: dict, source: Source, data: DataSection, location: str
) -> dict[str, Any]:
    """{"messages": [{"role", "content", …}], "tools": list | None, "notes": list} of a record.

    Messages and tools have the form of `parse_message` and `parse_tools`. `data.user_template` (a
    format string or a name of USER_TEMPLATES) rewrites the last user message from the record's
    columns.
    """
    with _parser(record, source, data, location) as parser:
        fits = (c for c in _CONVERSATION_COLUMNS if all(name in parser.columns for name in c))
        layout = next(fits, None)
        if layout is None:
            raise _missing(
                parser.columns, f"{location}:", f"a conversation needs {CONVERSATION_FORMS}"
            )
        turns, *answer = map(parser.turns, layout)
        prompt = []  # gets no loss
        if layout == ("prompt", "completion"):
            prompt, completion = parser.messages(turns), parser.messages(*answer)
            count = prompt_message_count(completion)
            prompt = merge_prompt(prompt, completion[:count], "completion", parser)
            messages = prompt + completion[count:]
        else:
            messages = parser.messages(turns + answer[0] if answer else turns)
        parser.apply_weight_lists(messages)
        for message in prompt:
            if message["role"] == "assistant":
                message.setdefault("weight", 0.0)
        messages = parser.finish(messages)
        return {"messages": messages, "tools": parser.tools, "notes": parser.notes}


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, as messages; or two complete texts if `prompt` is None."""

    prompt: list[dict[str, Any]] | None
    chosen: Any
    rejected: Any
    tools: list[Any] | None = None
    margin: float = 0.0
    """the least reward difference of chosen and rejected, in units of the reward"""
    notes: list[str] = field(default_factory=list)

    @property
    def has_preference(self) -> bool:
        """True if the answers differ and neither is empty."""
        is_empty = is_empty_answer(self.chosen) or is_empty_answer(self.rejected)
        return self.chosen != self.rejected and not is_empty


def parse_pair(record: dict, source: Source, data: DataSection, location: str) -> Pair:
    """The pair in the columns `chosen`, `rejected` and, optionally, `margin` and the prompt.

    An answer is a string, a message or a list of messages. The prompt has a layout of PROMPT_FORMS,
    or is the common prefix of the answers, or both, in which case it is not repeated. Two strings
    without a prompt are complete texts. Raises UserError if an answer is missing, no layout fits,
    or two columns have different prompts.
    """
    with _parser(record, source, data, location) as parser:
        for name in ("chosen", "rejected"):
            if name not in parser.columns:
                where, needs = f"{location}: {name} is missing;", "a pair needs chosen and rejected"
                raise _missing(parser.columns, where, needs, "chosen")
        margin = _parse_cell(parser.columns.get("margin", 0.0))
        is_number = isinstance(margin, int | float) and not isinstance(margin, bool)
        if not is_number or not abs(margin) < 3e38:
            raise parser.error(f"margin is {seen(margin)}; it must be a number")
        margin = float(margin)
        chosen, rejected = parser.columns["chosen"], parser.columns["rejected"]
        turns = parser.prompt_turns()
        if turns is None and isinstance(chosen, str) and isinstance(rejected, str):
            return Pair(None, chosen, rejected, None, margin, parser.notes)
        prompt = [] if turns is None else parser.messages(turns)
        chosen, rejected = map(parser.messages, map(parser.turns, ("chosen", "rejected")))
        prompt, chosen, rejected = split_pair(prompt, chosen, rejected, parser)
        prompt = parser.finish(prompt)
        return Pair(prompt, chosen, rejected, parser.tools, margin, parser.notes)


def parse_judged(
    record: dict, source: Source, data: DataSection, location: str
) -> tuple[dict[str, Any], bool]:
    """(the conversation as `parse_conversation` returns it, True if its last answer is good).

    The latter is the column `label` (or `kto_tag`). Raises UserError if it is not true or false.
    """
    with _parser(record, source, data, location) as parser:
        label = _parse_cell(parser.columns.get("label", parser.columns.get("kto_tag")))
        if label not in (True, False):
            raise parser.error(f"label is {seen(label)}; it must be true or false")
    chat = parse_conversation(record, source, data, location)
    if chat["messages"][-1]["role"] != "assistant":
        raise parser.error("the last message is judged, so it must be the assistant's")
    return chat, bool(label)


@dataclass(frozen=True)
class Prompt:
    """A prompt for an online run, with the record's columns for reward functions."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    text: Any
    """the prompt for reward functions: a string if the record has one, else messages"""
    columns: dict[str, Any]
    """the record's other columns, including null ones"""
    notes: list[str] = field(default_factory=list)


def parse_prompt(record: dict, source: Source, data: DataSection, location: str) -> Prompt:
    """The prompt of a record in a layout of PROMPT_FORMS, without an answer at its end."""
    with _parser(record, source, data, location) as parser:
        turns = parser.prompt_turns()
        if turns is None:
            raise _missing(parser.columns, f"{location}:", f"a prompt needs {PROMPT_FORMS}")
        messages = parser.messages(turns)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise parser.error("the prompt has only assistant messages; add a user message")
        messages = parser.finish(messages)
        texts = (parser.columns.get(name) for name in ("prompt", "question"))
        text = next((text for text in texts if isinstance(text, str)), messages)
        columns = {k: v for k, v in parser.all_columns.items() if k != "prompt"}
        return Prompt(messages, parser.tools, text, columns, parser.notes)


# ---- a record and its columns


@contextmanager
def _parser(record, source, data, location) -> Iterator[_RecordParser]:
    try:
        yield _RecordParser(record, source, data, location)
    except RecursionError:
        raise UserError(f"{location}: the record is nested too deeply") from None


class _RecordParser(ParseContext):
    """Parses the columns of a record that are not null.

    `turns` are messages in any layout that `parse_message` accepts.
    """

    def __init__(self, record: dict, source: Source, data: DataSection, location: str) -> None:
        super().__init__(data, location)
        selected = {k: v for k, v in record.items() if k not in data.drop_columns}
        self.all_columns = _rename_columns(selected, source.columns, location)
        self.columns = {k: v for k, v in self.all_columns.items() if v is not None}
        for name in MEDIA:
            if is_present(self.columns.get(name)):
                raise self.error(
                    f"the column {name} is not empty, but only text is supported; train on the "
                    f"text only with data.drop_columns: [{name}], or remove such records"
                )
        name = "tools" if is_present(self.columns.get("tools")) else "functions"
        if is_present(self.columns.get(name)):
            self.tools = parse_tools(self.columns[name], name, location)

    def messages(self, turns: Any) -> list[dict[str, Any]]:
        if not isinstance(turns, list) or not turns:
            raise self.error(f"a conversation must be a list of messages; saw {seen(turns)}")
        return [parse_message(turn, self) for turn in turns]

    def turns(self, name: str) -> Any:
        """The turns of a column, which is a string, a turn or a list of turns."""
        if name == "instruction":
            return self._instruction_turns()
        if name in ("messages", "conversations"):
            return parse_nested(self.columns[name], name, self.location)
        return _as_turns("user" if name in _PROMPT_COLUMNS else "assistant", self.columns[name])

    def prompt_turns(self) -> Any:
        """The turns before the answer; None if no column has them."""
        name = next((name for name in _PROMPT_COLUMNS if name in self.columns), None)
        return self.turns(name) if name else None

    def _instruction_turns(self) -> list:
        columns, location = self.columns, self.location
        prompt = [t for name in ("instruction", "input") if (t := _string(columns, name, location))]
        pairs = parse_nested(columns.get("history") or [], "history", location)
        if not isinstance(pairs, list) or not all(
            isinstance(p, list) and len(p) == 2 for p in pairs
        ):
            problem = "history must be a list of [question, answer]"
            raise self.error(f"{problem}; saw {seen(pairs)}")
        history = [t for q, a in pairs for t in (*_as_turns("user", q), *_as_turns("assistant", a))]
        return history + _as_turns("user", "\n".join(prompt))

    def apply_weight_lists(self, messages: list[dict]) -> None:
        """Set the loss weights of assistant messages from lists of weights.

        A list has a weight per assistant message or per message.
        """
        answers = [m for m in messages if m["role"] == "assistant"]
        for name in _WEIGHT_LISTS:
            values = self.columns.get(name)
            if isinstance(values, str) and values.startswith("["):  # a CSV cell
                values = parse_nested(values, name, self.location)
            if not is_present(values):
                continue
            if not isinstance(values, list):
                self.note(
                    f"the column {name} is a single value, which is ignored; use a list with a "
                    "value per assistant message"
                )
                continue
            if len(values) not in (len(answers), len(messages)):
                raise self.error(
                    f"{name} has {len(values)} values, but there are {len(messages)} messages, "
                    f"{len(answers)} of them the assistant's; give one value per message or per "
                    f"assistant message, or ignore the column with data.drop_columns: [{name}]"
                )
            to = answers if len(values) == len(answers) else messages
            for message, value in zip(to, values, strict=True):
                if message["role"] != "assistant" or value is None:
                    continue
                weight = parse_weight(value, name, self)
                if message.setdefault("weight", weight) != weight:
                    raise self.error(
                        f"a message has the loss weight {weight:g} in {name} and "
                        f"{message['weight']:g} elsewhere; keep one"
                    )

    def finish(self, messages: list[dict]) -> list[dict]:
        """The messages with the record's system message and `data.user_template` applied."""
        first, system = messages[0], _string(self.columns, "system", self.location)
        if first["role"] in ("system", "developer"):
            if system and message_text(first).strip() != system.strip():
                raise self.error(
                    f"the column system is {seen(system)}, but the messages begin with "
                    f"{seen(message_text(first))}; keep one (data.drop_columns: [system])"
                )
        elif system:
            messages = [{"role": "system", "content": system}, *messages]
        if self.data.user_template:
            self._rewrite_last_user(messages, self.data.user_template)
        return messages

    def _rewrite_last_user(self, messages: list[dict], template: str) -> None:
        template = USER_TEMPLATES.get(template, template)
        user = next((m for m in reversed(messages) if m["role"] == "user"), None)
        if user is None:
            raise self.error("there is no user message for user_template to rewrite")
        values = {"question": message_text(user)} | self.columns
        for name, value in self.columns.items():
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                values[name] = "\n\n".join(value)
        try:
            user["content"] = template.format_map(values)
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            raise self.error(
                f"user_template {seen(template)} cannot be filled in: {error!r}; "
                f"the columns are {', '.join(self.columns)}"
            ) from None


def _missing(columns: dict, where: str, needs: str, column: str = "prompt") -> UserError:
    return UserError(
        f"{where} found the columns {', '.join(columns) or 'none'}; {needs} (map others with "
        f"columns: {{{column}: NAME, …}})"
    )


def _rename_columns(record: dict, columns: Mapping[str, str], location: str) -> dict:
    for name, column in columns.items():
        if column not in record:
            raise UserError(
                f"{location}: columns maps {name} to {column}, but the record's columns are "
                f"{', '.join(record) or 'none'}"
            )
    return record | {name: record[column] for name, column in columns.items()}


def _parse_cell(value: Any) -> Any:
    """A number, true or false, which CSV stores as text; other values unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value.strip().lower())
    except (ValueError, RecursionError):
        return value


def _string(record: dict, name: str, location: str) -> str:
    """A string column; "" if it is missing."""
    if isinstance(value := record.get(name, ""), str):
        return value
    kind = type(value).__name__
    raise UserError(f"{location}: {name} is {kind}, not a string: {seen(value)}")


def _as_turns(role: str, value: Any) -> list:
    """Convert a string, a turn or a list of turns to a list of turns."""
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else [{"role": role, "content": value}]
