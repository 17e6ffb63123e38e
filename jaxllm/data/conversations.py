# SPDX-License-Identifier: Apache-2.0
"""Records -> texts, conversations, pairs of answers, judged answers and prompts.

Each function brings one record, in any of the accepted layouts, into one canonical form, or raises
ValueError with where it came from and what was found. What a user should know of a source, but once
and not for every record, is returned as `notes`: short texts, the same for the same fault.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

from jaxllm.config import DataSection, Source
from jaxllm.data.messages import (
    MEDIA,
    WEIGHTS,
    Reading,
    brief,
    holds,
    message_of,
    tools_of,
    weight_from,
    words,
)
from jaxllm.data.sources import loads, short
from jaxllm.errors import UserError

CONVERSATIONS = (
    "messages (role, content), conversations (from, value), prompt + completion, "
    "instruction + output (and input, system, history), or question + answer"
)
ASKED = "messages, conversations, prompt, question, or instruction (and input, system, history)"
USER_TEMPLATES = {
    "rag": (
        "Answer the question from the context below. "
        "If the context does not hold the answer, say that you do not know.\n\n"
        "Question: {question}\n\nContext:\n{context}\n\nAnswer:"
    ),
}
# Who speaks before the assistant does; an answer begins with none of these.
_ASKERS = ("system", "developer", "user")
_LISTS = (*WEIGHTS, "weights", "loss_weights", "loss_masks")

_Read = TypeVar("_Read")


def text_of(record: dict, columns: Mapping[str, str], at: str) -> str:
    """The document of a record, exactly as it stands; "" when it is null."""
    record = _renamed(record, columns, at)
    if "text" not in record:
        raise UserError(
            f"{at}: found the columns {', '.join(record) or 'none'}; pretraining reads a column "
            "text (name another with columns: {text: NAME})"
        )
    return "" if record["text"] is None else _string(record, "text", at)


def _by_line(read: Callable[..., _Read]) -> Callable[..., _Read]:
    """`read`, so that a record nested too deeply is an error of its line."""

    @wraps(read)
    def guarded(record: dict, source: Source, data: DataSection, at: str) -> _Read:
        try:
            return read(record, source, data, at)
        except RecursionError:
            raise UserError(f"{at}: the record is nested too deeply") from None

    return guarded


@_by_line
def conversation_of(record: dict, source: Source, data: DataSection, at: str) -> dict[str, Any]:
    """{"messages": [{"role", "content", …}], "tools": list | None, "notes": list} of a record.

    Messages and tools are as `message_of` and `tools_of` return them. `data.user_template` (a
    format string or a name of USER_TEMPLATES) rewrites the last user message from the record's
    columns. Raises ValueError with what was found when no accepted form fits.
    """
    found, reading = _opened(record, source, data, at)
    context = 0  # messages at the beginning that are a prompt, where nothing is learned
    if "messages" in found:
        messages = _messages(_parsed(found["messages"], "messages", at), reading)
    elif "conversations" in found:
        messages = _messages(_parsed(found["conversations"], "conversations", at), reading)
    elif "prompt" in found and "completion" in found:
        messages, context = _completed(found, reading)
    elif "instruction" in found and "output" in found:
        turns = _instruction(found, at) + _said("assistant", found["output"])
        messages = _messages(turns, reading)
    elif "question" in found and "answer" in found:
        turns = _said("user", found["question"]) + _said("assistant", found["answer"])
        messages = _messages(turns, reading)
    else:
        raise UserError(
            f"{at}: found the columns {', '.join(found) or 'none'}; a conversation needs "
            f"{CONVERSATIONS} (name others with columns: {{prompt: NAME, …}})"
        )
    _set_weights(messages, found, reading)
    for message in messages[:context]:
        if message["role"] == "assistant":
            message.setdefault("weight", 0.0)
    messages = _conversation(messages, found, reading)
    return {"messages": messages, "tools": reading.tools, "notes": reading.notes}


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, as messages; or two whole texts, and `prompt` None."""

    prompt: list[dict[str, Any]] | None
    chosen: Any
    rejected: Any
    tools: list[Any] | None = None
    margin: float = 0.0
    """by how much the chosen one is better, in the reward's unit"""
    notes: list[str] = field(default_factory=list)

    @property
    def tells(self) -> bool:
        """Whether there is a preference: two answers, neither empty, that differ."""
        return self.chosen != self.rejected and not (_empty(self.chosen) or _empty(self.rejected))


@_by_line
def pair_of(record: dict, source: Source, data: DataSection, at: str) -> Pair:
    """The pair of a record: `chosen` and `rejected`, perhaps a `margin`, and what was asked.

    An answer is a string, a message or a list of messages. What was asked is in one of ASKED's
    layouts, or what the answers have in common at their beginning, or both, where each message is
    read once. Two strings without anything asked are texts as they stand. Raises ValueError when a
    side is missing, no accepted form fits, or one place contradicts another about what was asked.
    """
    found, reading = _opened(record, source, data, at)
    for side in ("chosen", "rejected"):
        if side not in found:
            raise UserError(
                f"{at}: {side} is missing; found the columns {', '.join(found) or 'none'}, and a "
                "pair needs chosen and rejected (name others with columns: {chosen: NAME, …})"
            )
    margin = _cell(found.get("margin", 0.0))
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) < 3e38:
        raise UserError(f"{at}: margin is {brief(margin)}; it is a number")
    sides = [found["chosen"], found["rejected"]]
    asked = _asked(found, at)
    if asked is None and all(isinstance(side, str) for side in sides):
        return Pair(None, sides[0], sides[1], None, float(margin), reading.notes)
    prompt = _messages(asked, reading) if asked is not None else []
    chosen, rejected = (_messages(_said("assistant", side), reading) for side in sides)
    prompt, chosen, rejected = _parted(prompt, chosen, rejected, reading)
    prompt = _conversation(prompt, found, reading)
    return Pair(prompt, chosen, rejected, reading.tools, float(margin), reading.notes)


@_by_line
def feedback_of(
    record: dict, source: Source, data: DataSection, at: str
) -> tuple[dict[str, Any], bool]:
    """(the conversation as `conversation_of` has it, whether its last answer is a good one).

    The latter is `label` (or `kto_tag`): true or false. Raises ValueError where that is missing.
    """
    found, _ = _opened(record, source, data, at)
    label = _cell(found.get("label", found.get("kto_tag")))
    if label not in (True, False):
        raise UserError(f"{at}: label is {brief(label)}; an answer needs a label true or false")
    chat = conversation_of(record, source, data, at)
    if chat["messages"][-1]["role"] != "assistant":
        raise UserError(f"{at}: the last message is not the assistant's; that is what is judged")
    return chat, bool(label)


@dataclass(frozen=True)
class Prompt:
    """What is asked of the model, and what the record knows of it."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    said: Any
    """the prompt as reward functions see it: a string where the record has one, else messages"""
    columns: dict[str, Any]
    """the record's other columns, null ones too"""
    notes: list[str] = field(default_factory=list)


@_by_line
def prompt_of(record: dict, source: Source, data: DataSection, at: str) -> Prompt:
    """The prompt of a record in one of ASKED's layouts, without the answer at its end if there is
    one. Raises ValueError where none fits."""
    found, reading = _opened(record, source, data, at)
    asked = _asked(found, at)
    if asked is None:
        raise UserError(
            f"{at}: found the columns {', '.join(found) or 'none'}; a prompt is {ASKED} "
            "(name others with columns: {prompt: NAME, …})"
        )
    messages = _messages(asked, reading)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise UserError(f"{at}: the prompt holds nothing but the assistant's words")
    messages = _conversation(messages, found, reading)
    text = next((found[n] for n in ("prompt", "question") if isinstance(found.get(n), str)), None)
    columns = _kept(record, source, data, at)
    columns.pop("prompt", None)
    said = messages if text is None else text
    return Prompt(messages, reading.tools, said, columns, reading.notes)


# ---- a record and its columns


def _opened(
    record: dict, source: Source, data: DataSection, at: str
) -> tuple[dict[str, Any], Reading]:
    """The record's columns that hold something, and what its messages are read with."""
    found = {k: v for k, v in _kept(record, source, data, at).items() if v is not None}
    for name in MEDIA:
        if holds(found.get(name)):
            raise UserError(
                f"{at}: the column {name} holds something, and only text is read; train on the "
                f"text alone with data.drop_columns: [{name}], or leave such records out"
            )
    name = "tools" if holds(found.get("tools")) else "functions"
    tools = tools_of(found[name], name, at) if holds(found.get(name)) else None
    return found, Reading(data, at, tools)


def _kept(record: dict, source: Source, data: DataSection, at: str) -> dict[str, Any]:
    """The record's columns under the names expected here."""
    drop = data.drop_columns
    return _renamed({k: v for k, v in record.items() if k not in drop}, source.columns, at)


def _renamed(record: dict, columns: Mapping[str, str], at: str) -> dict:
    for name, column in columns.items():
        if column not in record:
            raise UserError(
                f"{at}: columns maps {name} to {column}, which is not among "
                f"{', '.join(record) or 'no columns'}"
            )
    return record | {name: record[column] for name, column in columns.items()}


def _cell(value: Any) -> Any:
    """A value that CSV holds as text: a number, true or false."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value.strip().lower())
    except (ValueError, RecursionError):
        return value


def _string(record: dict, name: str, at: str) -> str:
    """A column that may be missing ("")."""
    if isinstance(value := record.get(name, ""), str):
        return value
    kind = type(value).__name__
    raise UserError(f"{at}: {name} is {kind}, not a string: {short(str(value))}")


def _parsed(value: Any, what: str, at: str) -> Any:
    """A nested column, which some datasets store as a string of JSON."""
    return loads(value, at, f"{what} is not JSON") if isinstance(value, str) else value


# ---- turns


def _asked(found: dict[str, Any], at: str) -> list | None:
    """The turns before the answer; None where no column has them."""
    for name in ("prompt", "question"):
        if name in found:
            return list(_said("user", found[name]))
    for name in ("messages", "conversations"):
        if name in found:
            return _parsed(found[name], name, at)
    return _instruction(found, at) if "instruction" in found else None


def _instruction(found: dict[str, Any], at: str) -> list:
    asked = [t for name in ("instruction", "input") if (t := _string(found, name, at))]
    return _history(found.get("history") or [], at) + _said("user", "\n".join(asked))


def _history(value: Any, at: str) -> list[dict]:
    """The turns before an instruction."""
    pairs = _parsed(value, "history", at)
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise UserError(f"{at}: history is pairs [question, answer]; saw {short(str(pairs))}")
    return [turn for q, a in pairs for turn in (*_said("user", q), *_said("assistant", a))]


def _said(role: str, value: Any) -> list:
    """A prompt or an answer: a string, a message or messages."""
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _messages(turns: Any, reading: Reading) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not turns:
        raise reading.error(f"a conversation is a list of messages; saw {short(str(turns))}")
    return [message_of(turn, reading) for turn in turns]


def _completed(found: dict[str, Any], reading: Reading) -> tuple[list[dict[str, Any]], int]:
    """(a prompt and its completion, how many messages of it are the prompt)."""
    asked = _messages(_said("user", found["prompt"]), reading)
    answer = _messages(_said("assistant", found["completion"]), reading)
    count = _leading(answer)
    asked = _merged(asked, answer[:count], "completion", reading)
    return asked + answer[count:], len(asked)


def _set_weights(messages: list[dict], found: dict, reading: Reading) -> None:
    """Gives the assistant's messages the weights of a record's list, which has one for each of them
    or for each message."""
    answers = [m for m in messages if m["role"] == "assistant"]
    for name in _LISTS:
        values = found.get(name)
        if isinstance(values, str) and values.startswith("["):  # a cell of a table of texts
            values = _parsed(values, name, reading.at)
        if isinstance(values, list) and values:
            if len(values) not in (len(answers), len(messages)):
                raise reading.error(
                    f"{name} has {len(values)} values for {len(messages)} messages, "
                    f"{len(answers)} of them the assistant's; give one for each of either, or "
                    f"leave it unread with data.drop_columns: [{name}]"
                )
            to = answers if len(values) == len(answers) else messages
            for message, value in zip(to, values, strict=True):
                if message["role"] != "assistant" or value is None:
                    continue
                weight = weight_from(value, name, reading)
                if message.setdefault("weight", weight) != weight:
                    raise reading.error(
                        f"{name} gives a message the weight {weight:g}, and another place "
                        f"{message['weight']:g}; keep one"
                    )
        elif holds(values):
            reading.note(
                f"the column {name} is one value for a record, which is not read; a list has one "
                "for each of the assistant's messages"
            )


def _conversation(messages: list[dict], found: dict, reading: Reading) -> list[dict]:
    """The messages with the record's system message before them, and `data.user_template`
    applied."""
    data = reading.data
    first = messages[0]
    system = _string(found, "system", reading.at)
    if first["role"] in ("system", "developer"):
        if system and words(first).strip() != system.strip():
            raise reading.error(
                f"the column system says {short(system)}, and the messages begin with "
                f"{short(words(first))}; keep one (data.drop_columns: [system])"
            )
    elif system:
        messages = [{"role": "system", "content": system}, *messages]
    if data.user_template:
        template = USER_TEMPLATES.get(data.user_template, data.user_template)
        _rewrite_last_user(messages, template, found, reading.at)
    return messages


# ---- what is asked in two places


def _parted(
    prompt: list[dict], chosen: list[dict], rejected: list[dict], reading: Reading
) -> tuple[list[dict], list[dict], list[dict]]:
    """(prompt, chosen, rejected) where each message that was asked is in the prompt, once.

    What both answers share at their beginning is asked; each of them keeps a message at least.
    """
    same = [_alike([a], [b]) for a, b in zip(chosen[:-1], rejected[:-1], strict=False)]
    count = (*same, False).index(False)
    shared = chosen[:count]
    sides = {"chosen": chosen[count:], "rejected": rejected[count:]}
    if not prompt and not shared:
        raise reading.error(
            "chosen and rejected begin with no common message, and found no prompt; "
            f"it can be {ASKED}"
        )
    asked = list(prompt)
    while len(asked) > 1 and asked[-1]["role"] == "assistant":
        asked.pop()
    rest = prompt[len(asked) :]
    if any(_alike((shared + side)[: len(prompt)], prompt) for side in sides.values()):
        shared = shared or asked  # the prompt is the beginning of a whole conversation
    else:
        answers = [said for side in sides.values() for said in (side, shared + side)]
        if not any(_alike(said[: len(rest)], rest) for said in answers):
            reading.note("the answer at the end of the prompt is not read; a pair has its own")
        shared = _merged(asked, shared, "chosen and rejected", reading)
    for name, side in sides.items():
        own = side[: len(shared)]
        if not _alike(own, shared):
            own = side[: _leading(side)]
        if own and (len(own) == len(side) or not _alike(own, shared[-len(own) :])):
            raise reading.error(
                f"{name} begins with a {own[0]['role']} message, {short(words(own[0]))}, with "
                "which the prompt does not end; an answer begins with the assistant's words"
            )
        sides[name] = side[len(own) :]
    return shared, sides["chosen"], sides["rejected"]


def _merged(asked: list[dict], shared: list[dict], where: str, reading: Reading) -> list[dict]:
    """What was asked, of `asked` and of the messages that answers begin with: each message once.

    Either holds the other, or `shared` goes on where `asked` ends. Raises ValueError otherwise.
    """
    begins = shared[0]["role"] if shared else "assistant"
    only_system = all(m["role"] in _ASKERS[:2] for m in asked)
    if begins not in _ASKERS or (only_system and begins == "user"):
        return asked + shared
    if any(_alike(shared[i : i + len(asked)], asked) for i in range(len(shared))):
        return shared
    for count in range(min(len(asked), len(shared)), 0, -1):
        if _alike(asked[-count:], shared[:count]):
            return asked[:-count] + shared
    raise reading.error(
        f"the prompt ends with {short(words(asked[-1]))}, but {where} begin with "
        f"{short(words(shared[0]))}; keep one (data.drop_columns: [prompt])"
    )


def _leading(messages: list[dict]) -> int:
    """How many messages stand before the first that the assistant or a tool says."""
    return next((i for i, m in enumerate(messages) if m["role"] not in _ASKERS), len(messages))


def _alike(some: list[dict], others: list[dict]) -> bool:
    """Whether two lists of messages say the same, but for white space around it."""

    def said(message: dict) -> tuple:
        further = (message.get(key) for key in ("tool_calls", "reasoning_content"))
        return message["role"], words(message).strip(), *further

    return list(map(said, some)) == list(map(said, others))


def _empty(side: Any) -> bool:
    """Whether an answer says nothing."""
    if isinstance(side, str):
        return not side.strip()
    says = ("tool_calls", "reasoning_content")
    return not any(words(m).strip() or any(m.get(key) for key in says) for m in side)


# ---- user_template


def _rewrite_last_user(messages: list[dict], template: str, found: dict, at: str) -> None:
    user = next((m for m in reversed(messages) if m["role"] == "user"), None)
    if user is None:
        raise UserError(f"{at}: user_template rewrites the last user message, but there is none")
    values = {"question": words(user)} | {
        name: "\n\n".join(value) if isinstance(value, list) and _all_text(value) else value
        for name, value in found.items()
    }
    try:
        user["content"] = template.format_map(values)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{at}: user_template {short(template)} does not fit: {error!r}; "
            f"the columns are {', '.join(found)}"
        ) from None


def _all_text(values: list) -> bool:
    return all(isinstance(value, str) for value in values)
