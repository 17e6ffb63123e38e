# SPDX-License-Identifier: Apache-2.0
"""Messages, tools and calls as other programs write them -> the form that chat templates read.

A message becomes {"role", "content", …}: its role is one of system, developer, user, assistant and
tool; its content a string, or a list of {"type": "text", "text": …}; its reasoning, tool calls and
loss weight stand under `reasoning_content`, `tool_calls` and `weight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxllm.config import DataSection
from jaxllm.data.sources import loads, short
from jaxllm.errors import UserError

# Roles in use elsewhere, in lower case and with "_" for "-"; data.roles names further ones.
ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "ai", "bot", "chatbot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "tool_response", "function", "function_response"), "tool"),
    **dict.fromkeys(("observation", "ipython"), "tool"),
    "developer": "developer",
}
CALLS = ("function_call", "tool_call")  # roles whose content is the JSON of calls
# Keys that say whether, or how much, a message is learned.
WEIGHTS = ("weight", "loss", "loss_weight", "loss_scale", "loss_mask")
WEIGHTS += ("train", "training", "trainable")
# Keys that say so in another way than one number for the message, or that tools disagree about.
UNREAD_WEIGHTS = ("train_detail", "training_detail", "mask", "masked")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
REASONING = ("reasoning_content", "thinking", "reasoning")
_TEXT_PARTS = ("text", "input_text", "output_text")
# What chat templates read of a message beside what is brought into one form here.
_KNOWN = {"role", "content", "name", "tool_calls", "tool_call_id", "tool_plan"}
_KNOWN |= {"reasoning_content", "weight"}


@dataclass(frozen=True)
class Reading:
    """What the messages of a record are read with, and what is to be told about them."""

    data: DataSection
    at: str
    """FILE:LINE"""
    tools: list[Any] | None = None
    """as `tools_of` returns them: they say which arguments may be null"""
    notes: list[str] = field(default_factory=list)

    def error(self, what: str) -> ValueError:
        return UserError(f"{self.at}: {what}")

    def note(self, what: str) -> None:
        if what not in self.notes:
            self.notes.append(what)


def brief(value: Any) -> str:
    """What a value is, for a message of one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def words(message: dict[str, Any]) -> str:
    """The text of a message, whether its content is a string or parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def holds(value: Any) -> bool:
    """Whether a value is something: not null, and no empty string, list or dict."""
    return not (value is None or (isinstance(value, str | list | dict) and not value))


def without_nulls(value: Any) -> Any:
    """`value` without the keys of dicts that are null: a table writes them for absent keys."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def message_of(turn: Any, reading: Reading) -> dict[str, Any]:
    """A turn of any accepted layout as a message. Raises ValueError for what cannot be read."""
    if not isinstance(turn, dict):
        raise reading.error(f"a message is an object with role and content; saw {short(str(turn))}")
    drop = reading.data.drop_columns
    turn = {k: v for k, v in turn.items() if v is not None and k not in drop}
    said = turn.pop("role", turn.pop("from", None))
    role, is_call = _role(said, reading)
    content = turn.pop("content", turn.pop("value", None))
    for name in MEDIA:
        if holds(turn.get(name)):
            raise reading.error(
                f"a message has {name}, which is not read; leave it out, or train on the text "
                f"alone with data.drop_columns: [{name}]"
            )
    message: dict[str, Any] = {"role": role, "content": content}
    if is_call and isinstance(content, str):
        what = f"the content of a {said} is not JSON"
        content = loads(content, reading.at, f"{what} (accepted is a call's name and arguments)")
    calls = _calls(turn, content if is_call else None, reading)
    if is_call:
        message["content"] = content = ""
    thoughts = []
    if isinstance(content, list):
        message["content"], thoughts = _parts(content, reading)
    message |= _reasoning(turn, thoughts, reading) | _weight(turn, reading)
    message |= without_nulls(turn)
    if calls:
        message["tool_calls"] = calls
    return _checked(message, reading)


def tools_of(value: Any, name: str, at: str) -> list[Any] | None:
    """A record's tools, given under `name`, each {"type": "function", "function": schema}."""
    tools = loads(value, at, f"{name} is not JSON") if isinstance(value, str) else value
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{at}: {name} is a list of JSON schemas; saw {short(str(tools))}")
    return [_function(_schema(tool)) for tool in tools] or None


# ---- parts of a message


def _role(said: Any, reading: Reading) -> tuple[str, bool]:
    """(the role in our words, whether the content is a call)."""
    if isinstance(said, str):
        if said in reading.data.roles:
            return reading.data.roles[said], False
        name = said.lower().replace("-", "_")
        if name in ROLES:
            return ROLES[name], name in CALLS
    raise reading.error(
        f"a message has the role {brief(said)}; accepted are {', '.join(ROLES)} (name others with "
        "data.roles: {THEIRS: assistant})"
    )


def _parts(content: list, reading: Reading) -> tuple[list[dict] | str, list[str]]:
    """(the parts of text, what is thought in the others)."""
    parts, thoughts = [], []
    for part in content:
        kind = part.get("type") or "text" if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) else None
        if kind in _TEXT_PARTS and isinstance(text, str):
            parts.append({"type": "text", "text": text})
        elif kind in ("thinking", "reasoning"):
            given = part.get(kind)
            thoughts.append(_thought(text if given is None else given, kind, reading))
        else:
            raise reading.error(
                f"a content part is not text: its type is {brief(kind)}; saw {short(str(part))}"
            )
    return parts or "", thoughts


def _thought(value: Any, name: str, reading: Reading) -> str:
    if isinstance(value, list):
        return words({"content": _parts(value, reading)[0]})
    if isinstance(value, str):
        return value
    raise reading.error(f"a message's {name} is {type(value).__name__}, not a string")


def _reasoning(turn: dict, thoughts: list[str], reading: Reading) -> dict[str, str]:
    """{"reasoning_content": …} of what a turn says it thought, or {}; takes its keys out."""
    given = {name: _thought(turn.pop(name), name, reading) for name in REASONING if name in turn}
    if thoughts:
        given["content"] = "".join(thoughts)
    given = {name: text for name, text in given.items() if text}
    if len(set(given.values())) > 1:
        raise reading.error(f"a message has different reasoning in {' and '.join(given)}; keep one")
    return {"reasoning_content": next(iter(given.values()))} if given else {}


def weight_from(value: Any, name: str, reading: Reading) -> float:
    """A loss weight: true, false or a number from 0 on."""
    if isinstance(value, bool | int | float) and 0 <= value < 3e38:  # a float32
        return float(value)
    what = f"a message's {name} is {brief(value)}"
    raise reading.error(f"{what}; it is true, false or a number from 0 on")


def _weight(turn: dict, reading: Reading) -> dict[str, float]:
    """{"weight": …} of what a turn says about its being learned, or {}; takes its keys out."""
    for name in UNREAD_WEIGHTS:
        if holds(turn.get(name)):
            raise reading.error(
                f"a message has {name}, which is not read; say by weight (from 0 on) how much the "
                f"message is learned, or leave it unread with data.drop_columns: [{name}]"
            )
    given = {n: weight_from(turn.pop(n), n, reading) for n in WEIGHTS if n in turn}
    if len(set(given.values())) > 1:
        said = ", ".join(f"{name} {value:g}" for name, value in given.items())
        raise reading.error(f"a message's keys contradict each other: {said}; keep one")
    return {"weight": next(iter(given.values()))} if given else {}


def _checked(message: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """The message, when it says something; notes what nothing reads."""
    role, content = message["role"], message["content"]
    unknown = sorted(k for k, v in message.items() if k not in _KNOWN and holds(v))
    says = message.get("tool_calls") or message.get("reasoning_content")
    if content is None and (role == "assistant" or says):
        message["content"] = content = ""
    if not isinstance(content, str | list):
        keys = f"; its other keys are {', '.join(unknown)}" if unknown else ""
        kind = type(content).__name__
        raise reading.error(f"a message's content is {kind}, not a string{keys}")
    if role == "assistant" and not (says or words(message).strip()) and message.get("weight") != 0:
        if unknown:
            raise reading.error(
                f"an assistant's message is empty but for {', '.join(unknown)}, which is not read; "
                "what it says goes into content, and its calls into tool_calls"
            )
        reading.note("an assistant's message is empty")
    if role != "assistant" and message.get("weight"):
        reading.note(
            f"a {role} message has a loss weight, which is not read; data.train_on_prompt learns "
            "what is not the assistant's"
        )
    for key in unknown:
        reading.note(f"a message has the key {key!r}, which only a chat template can read")
    return message


# ---- tools and calls


def _calls(turn: dict, said: Any, reading: Reading) -> list[dict]:
    """The calls of a turn, under `tool_calls` or `function_call` or `said` by its content; takes
    these keys out."""
    given = {name: turn.pop(name) for name in ("tool_calls", *CALLS[:1]) if name in turn}
    given = {n: value for n, value in (given | {"content": said}).items() if holds(value)}
    if len(given) > 1:
        raise reading.error(f"a message has calls in {' and '.join(given)}; keep one")
    calls = next(iter(given.values()), [])
    if isinstance(calls, str):
        try:
            calls = loads(calls, "")
        except ValueError:
            pass  # told below
    calls = [_function(call) for call in (calls if isinstance(calls, list) else [calls])]
    if not all(map(_is_call, calls)):
        raise reading.error(f"a tool call has name and arguments; saw {short(str(calls))}")
    return [_call(call, reading) for call in calls]


def _function(item: Any) -> Any:
    """A tool or call in the form that chat templates read: {"type": "function", "function": …}."""
    if isinstance(item, dict) and item.get("function") is None and "name" in item:
        inner = {k: v for k, v in item.items() if k not in ("id", "type", "function")}
        outer = {"id": item["id"]} if item.get("id") is not None else {}
        return outer | {"type": "function", "function": inner}
    return item


def _is_call(item: Any) -> bool:
    function = item.get("function") if isinstance(item, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _call(call: dict, reading: Reading) -> dict:
    """A call without the nulls that its tool does not know. Arguments given as a string of JSON
    stay that string where it has no such null, since some templates write it as it stands; no
    arguments are an empty object."""
    call = {k: v for k, v in call.items() if v is not None}
    function = {k: v for k, v in call["function"].items() if v is not None}
    given = arguments = function.get("arguments")
    if given is None or isinstance(given, str) and not given.strip():
        given = arguments = {}
    elif isinstance(given, str):
        try:
            arguments = loads(given, "")
        except ValueError:
            return call | {"function": function}
    if not isinstance(arguments, dict):
        raise reading.error(f"the arguments of a call are {short(str(given))}, not an object")
    schema: Any = {}
    for tool in reading.tools or ():
        described = tool.get("function", tool)
        if isinstance(described, dict) and described.get("name") == function["name"]:
            schema = described.get("parameters", {})
    kept = _argument(arguments, schema, schema)
    function["arguments"] = given if kept == arguments else kept
    return call | {"function": function}


# ---- nulls
#
# A table (Parquet, Arrow, or JSON made from one) has a value for every key that any row has: null
# where a schema or a call has no such key. Those are dropped; a null that a schema names is meant.

_MAPS = ("properties", "patternProperties", "$defs", "definitions")  # of names to schemas
_TYPES = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}


def _schema(value: Any) -> Any:
    """A JSON schema without the nulls that stand for absent keys.

    `default` and `const` may be null where the schema allows null, or any value.
    """
    if isinstance(value, list):
        return [_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        if item is None:
            other = value.keys() & (_TYPES - {key})
            if key in ("default", "const") and (not other or _nullable(value)):
                kept[key] = None
        elif key in _MAPS and isinstance(item, dict):
            kept[key] = {name: _schema(each) for name, each in item.items() if each is not None}
        else:
            kept[key] = _schema(item)
    return kept


def _nullable(schema: Any) -> bool:
    """Whether a schema names null among its values."""
    if not isinstance(schema, dict):
        return False
    kinds = schema.get("type")
    null_type = "null" in kinds if isinstance(kinds, list) else kinds == "null"
    null_value = any(value is None for value in _listed(schema, "enum"))
    either = (*_listed(schema, "anyOf"), *_listed(schema, "oneOf"))
    return null_type or null_value or schema.get("nullable") is True or any(map(_nullable, either))


def _listed(schema: dict, name: str) -> list:
    return value if isinstance(value := schema.get(name), list) else []


def _argument(value: Any, schema: Any, root: Any) -> Any:
    """A call's argument without nulls, but for those that its (cleaned) schema names."""
    if isinstance(value, list):
        items = [s["items"] for s in _branches(schema, root) if isinstance(s.get("items"), dict)]
        return [_argument(item, {"anyOf": items}, root) for item in value]
    if not isinstance(value, dict):
        return value
    known: dict[str, list] = {}
    for branch in _branches(schema, root):
        properties = branch.get("properties")
        for name, each in properties.items() if isinstance(properties, dict) else ():
            known.setdefault(name, []).append(each)

    def stays(name: str) -> bool:
        branches = [b for s in known.get(name, ()) for b in _branches(s, root)]
        named = ("default", "const")
        return any(_nullable(b) or any(b.get(n, b) is None for n in named) for b in branches)

    return {
        name: _argument(item, {"anyOf": known.get(name, [])}, root)
        for name, item in value.items()
        if item is not None or stays(name)
    }


def _branches(schema: Any, root: Any, seen: tuple[str, ...] = ()) -> Iterator[dict]:
    """A schema and those that it is made of."""
    if not isinstance(schema, dict):
        return
    yield schema
    for name in ("anyOf", "oneOf", "allOf"):
        for each in _listed(schema, name):
            yield from _branches(each, root, seen)
    place = schema.get("$ref")
    if isinstance(place, str) and place not in seen and isinstance(root, dict):
        for name in ("$defs", "definitions"):
            found = root.get(name)
            if isinstance(found, dict) and place.startswith(f"#/{name}/"):
                yield from _branches(found.get(place.rpartition("/")[2]), root, (*seen, place))
