# SPDX-License-Identifier: Apache-2.0
"""Parse records into texts, conversations, preference pairs, judged answers and prompts.

Each function converts a record of any accepted layout to one canonical form. It raises UserError
with the record's location and columns if no layout fits. Remarks that the user should see once per
source are returned as `notes`: short texts, identical for the same remark.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

from jaxllm.config import DataSection, Source
from jaxllm.data.formats import excerpt, parse_json
from jaxllm.data.messages import (
    MEDIA,
    WEIGHTS,
    ParseContext,
    is_present,
    message_text,
    parse_message,
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
from jaxllm.errors import UserError

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

_Read = TypeVar("_Read")


def parse_text(record: dict, columns: Mapping[str, str], location: str) -> str:
    """The unchanged document of a record; "" if it is null."""
    record = _rename_columns(record, columns, location)
    if "text" not in record:
        raise UserError(
            f"{location}: found the columns {', '.join(record) or 'none'}; pretraining needs a "
            "column text (map another with columns: {text: NAME})"
        )
    return "" if record["text"] is None else _string(record, "text", location)


def _report_deep_nesting(read: Callable[..., _Read]) -> Callable[..., _Read]:
    @wraps(read)
    def wrapper(record: dict, source: Source, data: DataSection, location: str) -> _Read:
        try:
            return read(record, source, data, location)
        except RecursionError:
            raise UserError(f"{location}: the record is nested too deeply") from None

    return wrapper


@_report_deep_nesting
def parse_conversation(
    record: dict, source: Source, data: DataSection, location: str
) -> dict[str, Any]:
    """{"messages": [{"role", "content", …}], "tools": list | None, "notes": list} of a record.

    Messages and tools have the form of `parse_message` and `parse_tools`. `data.user_template` (a
    format string or a name of USER_TEMPLATES) rewrites the last user message from the record's
    columns.
    """
    columns, context = _parse_columns(record, source, data, location)
    prompt_length = 0  # number of leading messages that are a prompt and get no loss
    name = next((n for n in ("messages", "conversations") if n in columns), None)
    if name is not None:
        messages = _messages(_parse_nested(columns[name], name, location), context)
    elif "prompt" in columns and "completion" in columns:
        messages, prompt_length = _prompt_and_completion(columns, context)
    elif "instruction" in columns and "output" in columns:
        turns = _instruction_turns(columns, location) + _as_turns("assistant", columns["output"])
        messages = _messages(turns, context)
    elif "question" in columns and "answer" in columns:
        turns = _as_turns("user", columns["question"]) + _as_turns("assistant", columns["answer"])
        messages = _messages(turns, context)
    else:
        raise _missing(columns, f"{location}:", f"a conversation needs {CONVERSATION_FORMS}")
    _apply_weight_list(messages, columns, context)
    for message in messages[:prompt_length]:
        if message["role"] == "assistant":
            message.setdefault("weight", 0.0)
    messages = _finish(messages, columns, context)
    return {"messages": messages, "tools": context.tools, "notes": context.notes}


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


@_report_deep_nesting
def parse_pair(record: dict, source: Source, data: DataSection, location: str) -> Pair:
    """The pair in the columns `chosen`, `rejected` and, optionally, `margin` and the prompt.

    An answer is a string, a message or a list of messages. The prompt has a layout of PROMPT_FORMS,
    or is the common prefix of the answers, or both, in which case it is not repeated. Two strings
    without a prompt are complete texts. Raises UserError if an answer is missing, no layout fits,
    or two columns have different prompts.
    """
    columns, context = _parse_columns(record, source, data, location)
    for answer in ("chosen", "rejected"):
        if answer not in columns:
            where = f"{location}: {answer} is missing;"
            raise _missing(columns, where, "a pair needs chosen and rejected", "chosen")
    margin = _parse_cell(columns.get("margin", 0.0))
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) < 3e38:
        raise UserError(f"{location}: margin is {excerpt(margin)}; it must be a number")
    answers = [columns["chosen"], columns["rejected"]]
    prompt = _prompt_turns(columns, location)
    if prompt is None and all(isinstance(answer, str) for answer in answers):
        return Pair(None, answers[0], answers[1], None, float(margin), context.notes)
    prompt = _messages(prompt, context) if prompt is not None else []
    chosen, rejected = (_messages(_as_turns("assistant", answer), context) for answer in answers)
    prompt, chosen, rejected = split_pair(prompt, chosen, rejected, context)
    prompt = _finish(prompt, columns, context)
    return Pair(prompt, chosen, rejected, context.tools, float(margin), context.notes)


@_report_deep_nesting
def parse_judged(
    record: dict, source: Source, data: DataSection, location: str
) -> tuple[dict[str, Any], bool]:
    """(the conversation as `parse_conversation` returns it, True if its last answer is good).

    The latter is the column `label` (or `kto_tag`). Raises UserError if it is not true or false.
    """
    columns, _ = _parse_columns(record, source, data, location)
    label = _parse_cell(columns.get("label", columns.get("kto_tag")))
    if label not in (True, False):
        raise UserError(f"{location}: label is {excerpt(label)}; it must be true or false")
    chat = parse_conversation(record, source, data, location)
    if chat["messages"][-1]["role"] != "assistant":
        raise UserError(f"{location}: the last message is judged, so it must be the assistant's")
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


@_report_deep_nesting
def parse_prompt(record: dict, source: Source, data: DataSection, location: str) -> Prompt:
    """The prompt of a record in a layout of PROMPT_FORMS, without an answer at its end."""
    columns, context = _parse_columns(record, source, data, location)
    prompt = _prompt_turns(columns, location)
    if prompt is None:
        raise _missing(columns, f"{location}:", f"a prompt needs {PROMPT_FORMS}")
    messages = _messages(prompt, context)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise UserError(f"{location}: the prompt has only assistant messages; add a user message")
    messages = _finish(messages, columns, context)
    texts = [columns[n] for n in ("prompt", "question") if isinstance(columns.get(n), str)]
    text = texts[0] if texts else messages
    columns = _selected_columns(record, source, data, location)
    columns.pop("prompt", None)
    return Prompt(messages, context.tools, text, columns, context.notes)


# ---- a record and its columns


def _parse_columns(
    record: dict, source: Source, data: DataSection, location: str
) -> tuple[dict[str, Any], ParseContext]:
    """The record's columns that are not null, and the context to parse its messages in."""
    selected = _selected_columns(record, source, data, location)
    columns = {k: v for k, v in selected.items() if v is not None}
    for name in MEDIA:
        if is_present(columns.get(name)):
            raise UserError(
                f"{location}: the column {name} is not empty, but only text is supported; train on "
                f"the text only with data.drop_columns: [{name}], or remove such records"
            )
    name = "tools" if is_present(columns.get("tools")) else "functions"
    tools = parse_tools(columns[name], name, location) if is_present(columns.get(name)) else None
    return columns, ParseContext(data, location, tools)


def _missing(columns: dict, where: str, needs: str, name: str = "prompt") -> UserError:
    return UserError(
        f"{where} found the columns {', '.join(columns) or 'none'}; {needs} (map others with "
        f"columns: {{{name}: NAME, …}})"
    )


def _selected_columns(
    record: dict, source: Source, data: DataSection, location: str
) -> dict[str, Any]:
    """The record's columns without dropped ones, with the names that the parsers expect."""
    selected = {k: v for k, v in record.items() if k not in data.drop_columns}
    return _rename_columns(selected, source.columns, location)


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
    raise UserError(f"{location}: {name} is {kind}, not a string: {excerpt(value)}")


def _parse_nested(value: Any, name: str, location: str) -> Any:
    """A nested column, which some datasets store as a JSON string."""
    return parse_json(value, location, f"{name} is not JSON") if isinstance(value, str) else value


# ---- turns


def _prompt_turns(columns: dict[str, Any], location: str) -> list | None:
    """The turns before the answer; None if no column has them."""
    for name in ("prompt", "question"):
        if name in columns:
            return list(_as_turns("user", columns[name]))
    for name in ("messages", "conversations"):
        if name in columns:
            return _parse_nested(columns[name], name, location)
    return _instruction_turns(columns, location) if "instruction" in columns else None


def _instruction_turns(columns: dict[str, Any], location: str) -> list:
    prompt = [t for name in ("instruction", "input") if (t := _string(columns, name, location))]
    pairs = _parse_nested(columns.get("history") or [], "history", location)
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise UserError(
            f"{location}: history must be a list of [question, answer]; saw {excerpt(pairs)}"
        )
    history = [t for q, a in pairs for t in (*_as_turns("user", q), *_as_turns("assistant", a))]
    return history + _as_turns("user", "\n".join(prompt))


def _as_turns(role: str, value: Any) -> list:
    """Convert a prompt or an answer (a string, a message or messages) to a list of turns."""
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _messages(turns: Any, context: ParseContext) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not turns:
        raise context.error(f"a conversation must be a list of messages; saw {excerpt(turns)}")
    return [parse_message(turn, context) for turn in turns]


def _prompt_and_completion(columns: dict, context: ParseContext) -> tuple[list[dict], int]:
    """(the messages of a prompt and its completion, the number of them in the prompt)."""
    prompt = _messages(_as_turns("user", columns["prompt"]), context)
    answer = _messages(_as_turns("assistant", columns["completion"]), context)
    count = prompt_message_count(answer)
    prompt = merge_prompt(prompt, answer[:count], "completion", context)
    return prompt + answer[count:], len(prompt)


def _apply_weight_list(messages: list[dict], columns: dict, context: ParseContext) -> None:
    """Set the loss weights of assistant messages from a record's list of weights.

    The list has a weight per assistant message or per message.
    """
    answers = [m for m in messages if m["role"] == "assistant"]
    for name in _WEIGHT_LISTS:
        values = columns.get(name)
        if isinstance(values, str) and values.startswith("["):  # a CSV cell
            values = _parse_nested(values, name, context.location)
        if isinstance(values, list) and values:
            if len(values) not in (len(answers), len(messages)):
                raise context.error(
                    f"{name} has {len(values)} values, but there are {len(messages)} messages, "
                    f"{len(answers)} of them the assistant's; give one value per message or per "
                    f"assistant message, or ignore the column with data.drop_columns: [{name}]"
                )
            to = answers if len(values) == len(answers) else messages
            for message, value in zip(to, values, strict=True):
                if message["role"] != "assistant" or value is None:
                    continue
                weight = parse_weight(value, name, context)
                if message.setdefault("weight", weight) != weight:
                    raise context.error(
                        f"a message has the loss weight {weight:g} in {name} and "
                        f"{message['weight']:g} elsewhere; keep one"
                    )
        elif is_present(values):
            context.note(
                f"the column {name} is a single value, which is ignored; use a list with a value "
                "per assistant message"
            )


def _finish(messages: list[dict], columns: dict, context: ParseContext) -> list[dict]:
    """The messages with the record's system message in front and `data.user_template` applied."""
    data = context.data
    first = messages[0]
    system = _string(columns, "system", context.location)
    if first["role"] in ("system", "developer"):
        if system and message_text(first).strip() != system.strip():
            raise context.error(
                f"the column system is {excerpt(system)}, but the messages begin with "
                f"{excerpt(message_text(first))}; keep one (data.drop_columns: [system])"
            )
    elif system:
        messages = [{"role": "system", "content": system}, *messages]
    if data.user_template:
        _rewrite_last_user(messages, data.user_template, columns, context.location)
    return messages


def _rewrite_last_user(messages: list[dict], template: str, columns: dict, location: str) -> None:
    template = USER_TEMPLATES.get(template, template)
    user = next((m for m in reversed(messages) if m["role"] == "user"), None)
    if user is None:
        raise UserError(f"{location}: there is no user message for user_template to rewrite")
    values = {"question": message_text(user)} | columns
    for name, value in columns.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            values[name] = "\n\n".join(value)
    try:
        user["content"] = template.format_map(values)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{location}: user_template {excerpt(template)} cannot be filled in: {error!r}; "
            f"the columns are {', '.join(columns)}"
        ) from None
