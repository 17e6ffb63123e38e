# SPDX-License-Identifier: Apache-2.0
"""Records -> texts, conversations, pairs of answers, judged answers and prompts.

Each function brings one record, in any of the accepted layouts, into one canonical form, or raises
ValueError with where it came from and what was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from jaxllm.data.sources import loads, short

CONVERSATIONS = (
    "messages (role, content), conversations (from, value), prompt + completion, "
    "instruction + output (and input, system, history), or question + answer"
)
ASKED = "messages, conversations, prompt, question, or instruction (and input, system, history)"
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
USER_TEMPLATES = {
    "rag": (
        "Answer the question from the context below. "
        "If the context does not hold the answer, say that you do not know.\n\n"
        "Question: {question}\n\nContext:\n{context}\n\nAnswer:"
    ),
}


def text_of(record: dict, columns: Mapping[str, str], at: str) -> str:
    """The document of a record, exactly as it stands; "" when it is null."""
    record = _renamed(record, columns, at)
    if "text" not in record:
        raise ValueError(
            f"{at}: found the columns {', '.join(record) or 'none'}; pretraining reads a column "
            "text (name another with columns: {text: NAME})"
        )
    return "" if record["text"] is None else _string(record, "text", at)


def conversation_of(
    record: dict, columns: Mapping[str, str], user_template: str | None, at: str
) -> dict[str, Any]:
    """{"messages": [{"role", "content", …}], "tools": list | None} of a record.

    Roles become system, user, assistant and tool; a function call becomes an assistant message
    with `tool_calls`; a message's `weight` and any further keys stay. `user_template` (a format
    string or a name of USER_TEMPLATES) rewrites the last user message from the record's columns.
    Raises ValueError with what was found when no accepted form fits.
    """
    found = _present(record, columns, at)
    if "messages" in found:
        turns = _parsed(found["messages"], "messages", at)
    elif "conversations" in found:
        turns = _parsed(found["conversations"], "conversations", at)
    elif "prompt" in found and "completion" in found:
        turns = _said("user", found["prompt"]) + _said("assistant", found["completion"])
    elif "instruction" in found and "output" in found:
        turns = _instruction(found, at) + _said("assistant", found["output"])
    elif "question" in found and "answer" in found:
        turns = _said("user", found["question"]) + _said("assistant", found["answer"])
    else:
        raise ValueError(
            f"{at}: found the columns {', '.join(found) or 'none'}; a conversation needs "
            f"{CONVERSATIONS} (name others with columns: {{prompt: NAME, …}})"
        )
    messages = _conversation(turns, found, user_template, at)
    return {"messages": messages, "tools": _tools(found, at)}


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, as messages; or two whole texts, and `prompt` None."""

    prompt: list[dict[str, Any]] | None
    chosen: Any
    rejected: Any
    tools: list[Any] | None = None
    margin: float = 0.0
    """by how much the chosen one is better, in the reward's unit"""

    @property
    def tells(self) -> bool:
        """Whether there is a preference: two answers, neither empty, that differ."""
        return self.chosen != self.rejected and not (_empty(self.chosen) or _empty(self.rejected))


def pair_of(record: dict, columns: Mapping[str, str], user_template: str | None, at: str) -> Pair:
    """The pair of a record: `chosen` and `rejected`, perhaps a `margin`, and what was asked.

    An answer is a string, a message or a list of messages. What was asked is in one of ASKED's
    layouts or, where the answers are whole conversations, what these have in common at their
    beginning. Two strings without anything asked are texts as they stand. Raises ValueError when a
    side is missing or no accepted form fits.
    """
    found = _present(record, columns, at)
    for side in ("chosen", "rejected"):
        if side not in found:
            raise ValueError(
                f"{at}: {side} is missing; found the columns {', '.join(found) or 'none'}, and a "
                "pair needs chosen and rejected (name others with columns: {chosen: NAME, …})"
            )
    margin = found.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not isfinite(margin):
        raise ValueError(f"{at}: margin is {margin!r}; it is a number")
    sides = [found["chosen"], found["rejected"]]
    asked = _asked(found, at)
    if asked is None and all(isinstance(side, str) for side in sides):
        return Pair(None, sides[0], sides[1], None, float(margin))
    turns = [_said("assistant", [side] if isinstance(side, dict) else side) for side in sides]
    chosen, rejected = ([_message(turn, at) for turn in side] for side in turns)
    if asked is None:
        same = [a == b for a, b in zip(chosen, rejected, strict=False)]
        count = (*same, False).index(False)
        if not count or not all(len(side) > count for side in (chosen, rejected)):
            count = min(count, len(chosen) - 1, len(rejected) - 1)
        if count < 1:
            raise ValueError(
                f"{at}: chosen and rejected begin with no common message, and found no prompt; "
                f"it can be {ASKED}"
            )
        found["messages"], chosen, rejected = chosen[:count], chosen[count:], rejected[count:]
        asked = found["messages"]
    prompt = _conversation(asked, found, None, at)
    while len(prompt) > 1 and prompt[-1]["role"] == "assistant":
        prompt.pop()  # some sets keep the whole chosen conversation beside the pair
    chosen, rejected = (
        side[len(prompt) :] if side[: len(prompt)] == prompt else side
        for side in (chosen, rejected)
    )
    if user_template:
        _rewrite_last_user(prompt, USER_TEMPLATES.get(user_template, user_template), found, at)
    return Pair(prompt, chosen, rejected, _tools(found, at), float(margin))


def feedback_of(
    record: dict, columns: Mapping[str, str], user_template: str | None, at: str
) -> tuple[dict[str, Any], bool]:
    """(the conversation as `conversation_of` has it, whether its last answer is a good one).

    The latter is `label` (or `kto_tag`): true or false. Raises ValueError where that is missing.
    """
    found = _present(record, columns, at)
    label = found.get("label", found.get("kto_tag"))
    if label not in (True, False):
        raise ValueError(f"{at}: label is {label!r}; an answer needs a label true or false")
    chat = conversation_of(record, columns, user_template, at)
    if chat["messages"][-1]["role"] != "assistant":
        raise ValueError(f"{at}: the last message is not the assistant's; that is what is judged")
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


def prompt_of(
    record: dict, columns: Mapping[str, str], user_template: str | None, at: str
) -> Prompt:
    """The prompt of a record in one of ASKED's layouts, without the answer at its end if there is
    one. Raises ValueError where none fits."""
    found = _present(record, columns, at)
    asked = _asked(found, at)
    if asked is None:
        raise ValueError(
            f"{at}: found the columns {', '.join(found) or 'none'}; a prompt is {ASKED} "
            "(name others with columns: {prompt: NAME, …})"
        )
    messages = _conversation(asked, found, user_template, at)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise ValueError(f"{at}: the prompt holds nothing but the assistant's words")
    text = next((found[n] for n in ("prompt", "question") if isinstance(found.get(n), str)), None)
    rest = {k: v for k, v in _renamed(record, columns, at).items() if k != "prompt"}
    return Prompt(messages, _tools(found, at), messages if text is None else text, rest)


# ---- parts of them


def _present(record: dict, columns: Mapping[str, str], at: str) -> dict[str, Any]:
    return {k: v for k, v in _renamed(record, columns, at).items() if v is not None}


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


def _conversation(turns: Any, found: dict, user_template: str | None, at: str) -> list[dict]:
    """Turns as messages, with the record's system message before and its template applied."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{at}: a conversation is a list of messages; saw {short(str(turns))}")
    messages = [_message(turn, at) for turn in turns]
    if (system := _string(found, "system", at)) and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if user_template:
        _rewrite_last_user(messages, USER_TEMPLATES.get(user_template, user_template), found, at)
    return messages


def _tools(found: dict, at: str) -> list[Any] | None:
    tools = _parsed(found.get("tools") or [], "tools", at) or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{at}: tools is a list of JSON schemas; saw {short(str(tools))}")
    return [_function(t) for t in tools] or None


def _empty(side: Any) -> bool:
    """Whether an answer says nothing."""
    if isinstance(side, str):
        return not side.strip()
    return not any(turn["content"].strip() or turn.get("tool_calls") for turn in side)


def _renamed(record: dict, columns: Mapping[str, str], at: str) -> dict:
    for name, column in columns.items():
        if column not in record:
            raise ValueError(
                f"{at}: columns maps {name} to {column}, which is not among "
                f"{', '.join(record) or 'no columns'}"
            )
    return record | {name: record[column] for name, column in columns.items()}


def _said(role: str, value: Any) -> list:
    """A prompt or completion: a string, or messages already."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _history(value: Any, at: str) -> list[dict]:
    """The turns before an instruction."""
    pairs = _parsed(value, "history", at)
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise ValueError(f"{at}: history is pairs [question, answer]; saw {short(str(pairs))}")
    return [turn for q, a in pairs for turn in (*_said("user", q), *_said("assistant", a))]


def _string(record: dict, name: str, at: str) -> str:
    """A column that may be missing ("")."""
    if isinstance(value := record.get(name, ""), str):
        return value
    kind = type(value).__name__
    raise ValueError(f"{at}: {name} is {kind}, not a string: {short(str(value))}")


def _parsed(value: Any, what: str, at: str) -> Any:
    """A nested column, which some datasets store as a string of JSON."""
    return loads(value, at, f"{what} is not JSON") if isinstance(value, str) else value


def _message(turn: Any, at: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise ValueError(
            f"{at}: a message is an object with role and content; saw {short(str(turn))}"
        )
    said = turn.get("role", turn.get("from"))
    if not isinstance(said, str) or said not in ROLES:
        raise ValueError(f"{at}: a message has the role {said!r}; accepted are {', '.join(ROLES)}")
    content = turn.get("content", turn.get("value"))
    message = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value")}
    if said == "function_call":
        calls = _parsed(content, "a function_call", at)
        message["tool_calls"], content = calls if isinstance(calls, list) else [calls], ""
    if message.get("tool_calls"):
        calls = message["tool_calls"]
        calls = [_function(call) for call in calls] if isinstance(calls, list) else [calls]
        if not all(map(_is_call, calls)):
            raise ValueError(f"{at}: a tool call has name and arguments; saw {short(str(calls))}")
        message["tool_calls"] = [_with_arguments(call) for call in calls]
    else:
        message.pop("tool_calls", None)
    if isinstance(content, list):
        content = "".join(_part(part, at) for part in content)
    if content is None and "tool_calls" in message:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"{at}: a message's content is {type(content).__name__}, not a string")
    return {"role": ROLES[said], "content": content} | message


def _part(part: Any, at: str) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"{at}: a content part is not text: {short(str(part))}")


def _function(item: Any) -> Any:
    """A tool or call in the form that chat templates read: {"type": "function", "function": …}."""
    if isinstance(item, dict) and "function" not in item and "name" in item:
        return {"type": "function", "function": item}
    return item


def _is_call(item: Any) -> bool:
    function = item.get("function") if isinstance(item, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _with_arguments(call: dict) -> dict:
    """Arguments given as a string of JSON become an object: a template would encode them twice."""
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = loads(arguments, "")
        except ValueError:
            return call
        return call | {"function": call["function"] | {"arguments": arguments}}
    return call


def _rewrite_last_user(messages: list[dict], template: str, found: dict, at: str) -> None:
    user = next((m for m in reversed(messages) if m["role"] == "user"), None)
    if user is None:
        raise ValueError(f"{at}: user_template rewrites the last user message, but there is none")
    values = {"question": user["content"]} | {
        name: "\n\n".join(value) if isinstance(value, list) and _all_text(value) else value
        for name, value in found.items()
    }
    try:
        user["content"] = template.format_map(values)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{at}: user_template {short(template)} does not fit: {error!r}; "
            f"the columns are {', '.join(found)}"
        ) from None


def _all_text(values: list) -> bool:
    return all(isinstance(value, str) for value in values)
