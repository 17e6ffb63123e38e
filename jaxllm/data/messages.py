# SPDX-License-Identifier: Apache-2.0
"""Convert messages, tools and tool calls of many layouts to the one that chat templates read.

A message becomes {"role", "content", …}. The role is system, developer, user, assistant or tool.
The content is a string or a list of {"type": "text", "text": …}. Reasoning, tool calls and the loss
weight have the keys `reasoning_content`, `tool_calls` and `weight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from jaxllm.config import DataSection
from jaxllm.errors import UserError, seen
from jaxllm.untrusted import parse_json

# Names of roles in common datasets, in lower case and with "_" for "-"; data.roles adds to them.
ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "ai", "bot", "chatbot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "tool_response", "function", "function_response"), "tool"),
    **dict.fromkeys(("observation", "ipython"), "tool"),
    "developer": "developer",
}
CALLS = ("function_call", "tool_call")  # roles whose content is tool calls as JSON
# Keys for a message's loss weight.
WEIGHTS = ("weight", "loss", "loss_weight", "loss_scale", "loss_mask")
WEIGHTS += ("train", "training", "trainable")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
# Keys that are not supported, with the remedy. The second group are loss weights that are not one
# number per message, or have no agreed meaning.
_REMEDIES = dict.fromkeys(MEDIA, "remove it, or train on the text only with") | dict.fromkeys(
    ("train_detail", "training_detail", "mask", "masked"),
    "give it a loss weight (weight, a number >= 0), or ignore the key with",
)
REASONING = ("reasoning_content", "thinking", "reasoning")
_TEXT_PARTS = ("text", "input_text", "output_text")
# Keys of a parsed message that chat templates or this package read.
_READ_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "tool_plan"}
_READ_KEYS |= {"reasoning_content", "weight"}


@dataclass
class ParseContext:
    """What parsing the messages of a record depends on, and the notes that it collects."""

    data: DataSection
    location: str
    """FILE:LINE"""
    tools: list[Any] | None = None
    """as returned by `parse_tools`; their schemas say which arguments may be null"""
    notes: list[str] = field(default_factory=list)

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.location}: {problem}")

    def note(self, problem: str) -> None:
        if problem not in self.notes:
            self.notes.append(problem)


def message_text(message: dict[str, Any]) -> str:
    """The text of a message, whether its content is a string or parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def is_present(value: Any) -> bool:
    """True unless the value is None or an empty string, list or dict."""
    return value not in (None, "", [], {})


def without_nulls(value: Any) -> Any:
    """`value` without dict keys that are None, which is how tables store absent keys."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def parse_message(turn: Any, context: ParseContext) -> dict[str, Any]:
    """Convert a turn of any accepted layout to a message. Raises UserError for any other."""
    if not isinstance(turn, dict):
        saw = seen(turn)
        raise context.error(f"a message must be an object with role and content; saw {saw}")
    drop = context.data.drop_columns
    turn = {k: v for k, v in turn.items() if v is not None and k not in drop}
    role_name = turn.pop("role", turn.pop("from", None))
    role, is_call = _parse_role(role_name, context)
    content = turn.pop("content", turn.pop("value", None))
    for name, remedy in _REMEDIES.items():
        if is_present(turn.get(name)):
            remedy = f"{remedy} data.drop_columns: [{name}]"
            raise context.error(f"a message has {name}, which is not supported; {remedy}")
    if is_call and isinstance(content, str):
        problem = f"the content of a {role_name} is not JSON"
        accepted = "accepted are a call's name and arguments"
        content = parse_json(content, context.location, f"{problem} ({accepted})")
    calls = _tool_calls(turn, content if is_call else None, context)
    content, reasoning_parts = "" if is_call else content, []
    if isinstance(content, list):
        content, reasoning_parts = _text_parts(content, context)
    message: dict[str, Any] = {"role": role, "content": content}
    message |= _reasoning(turn, reasoning_parts, context) | _message_weight(turn, context)
    message |= without_nulls(turn)
    if calls:
        message["tool_calls"] = calls
    _check_message(message, context)
    return message


def parse_nested(value: Any, name: str, location: str) -> Any:
    """A nested column, which some datasets store as a JSON string."""
    return parse_json(value, location, f"{name} is not JSON") if isinstance(value, str) else value


def parse_tools(value: Any, name: str, location: str) -> list[Any] | None:
    """The tools in a record's column `name`, each {"type": "function", "function": schema}."""
    tools = parse_nested(value, name, location)
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{location}: {name} must be a list of JSON schemas; saw {seen(tools)}")
    return [_wrap_function(_clean_schema(tool)) for tool in tools] or None


# ---- parts of a message


def _parse_role(value: Any, context: ParseContext) -> tuple[str, bool]:
    """(the role, whether the content is a tool call)."""
    if isinstance(value, str):
        if value in context.data.roles:
            return context.data.roles[value], False
        name = value.lower().replace("-", "_")
        if name in ROLES:
            return ROLES[name], name in CALLS
    raise context.error(
        f"a message has the role {seen(value)}; accepted are {', '.join(ROLES)} (map others "
        "with data.roles: {ROLE: assistant})"
    )


def _text_parts(content: list, context: ParseContext) -> tuple[list[dict] | str, list[str]]:
    """(the text parts, the texts of the reasoning parts)."""
    parts, reasoning_parts = [], []
    for part in content:
        kind = part.get("type") or "text" if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) else None
        if kind in _TEXT_PARTS and isinstance(text, str):
            parts.append({"type": "text", "text": text})
        elif kind in ("thinking", "reasoning"):
            found = part.get(kind)
            reasoning_parts.append(_reasoning_text(text if found is None else found, kind, context))
        else:
            raise context.error(
                f"a content part has the type {seen(kind)}, not text; saw {seen(part)}"
            )
    return parts or "", reasoning_parts


def _reasoning_text(value: Any, name: str, context: ParseContext) -> str:
    if isinstance(value, list):
        return message_text({"content": _text_parts(value, context)[0]})
    if isinstance(value, str):
        return value
    raise context.error(f"a message's {name} is {type(value).__name__}, not a string")


def _reasoning(turn: dict, reasoning_parts: list[str], context: ParseContext) -> dict[str, str]:
    """{"reasoning_content": …} or {}; removes the keys for it from `turn`."""
    names = [name for name in REASONING if name in turn]
    found = {name: _reasoning_text(turn.pop(name), name, context) for name in names}
    if reasoning_parts:
        found["content"] = "".join(reasoning_parts)
    found = {name: text for name, text in found.items() if text}
    if len(set(found.values())) > 1:
        raise context.error(f"a message has different reasoning in {' and '.join(found)}; keep one")
    return {"reasoning_content": next(iter(found.values()))} if found else {}


def parse_weight(value: Any, name: str, context: ParseContext) -> float:
    """A loss weight: true, false or a number >= 0."""
    if isinstance(value, bool | int | float) and 0 <= value < 3e38:  # a float32
        return float(value)
    raise context.error(f"a message's {name} is {seen(value)}; use true, false or a number >= 0")


def _message_weight(turn: dict, context: ParseContext) -> dict[str, float]:
    """{"weight": …} or {}; removes the keys for it from `turn`."""
    found = {n: parse_weight(turn.pop(n), n, context) for n in WEIGHTS if n in turn}
    if len(set(found.values())) > 1:
        weights = ", ".join(f"{name} {value:g}" for name, value in found.items())
        raise context.error(f"a message has different loss weights: {weights}; keep one")
    return {"weight": next(iter(found.values()))} if found else {}


def _check_message(message: dict[str, Any], context: ParseContext) -> None:
    """Raise UserError if the content is missing, or set it to ""; note keys that are ignored."""
    role, content = message["role"], message["content"]
    unknown = sorted(k for k, v in message.items() if k not in _READ_KEYS and is_present(v))
    has_other_content = message.get("tool_calls") or message.get("reasoning_content")
    if content is None and (role == "assistant" or has_other_content):
        message["content"] = content = ""
    if not isinstance(content, str | list):
        keys = f"; its other keys are {', '.join(unknown)}" if unknown else ""
        kind = type(content).__name__
        raise context.error(f"a message's content is {kind}, not a string{keys}")
    is_empty = not (has_other_content or message_text(message).strip())
    if role == "assistant" and is_empty and message.get("weight") != 0:
        if unknown:
            raise context.error(
                f"an assistant message has only {', '.join(unknown)}, which is ignored; put its "
                "text into content and its tool calls into tool_calls"
            )
        context.note("an assistant message is empty")
    if role != "assistant" and message.get("weight"):
        context.note(
            f"a {role} message has a loss weight, which is ignored; data.train_on_prompt trains on "
            "all messages"
        )
    for key in unknown:
        context.note(f"a message has the key {key!r}, which only chat templates use")


# ---- tools and calls


def _tool_calls(turn: dict, content: Any, context: ParseContext) -> list[dict]:
    """The calls in `tool_calls`, `function_call` or `content`; removes the keys from `turn`."""
    found = {n: turn.pop(n) for n in ("tool_calls", "function_call") if n in turn}
    found = {n: calls for n, calls in (found | {"content": content}).items() if is_present(calls)}
    if len(found) > 1:
        raise context.error(f"a message has calls in {' and '.join(found)}; keep one")
    calls = next(iter(found.values()), [])
    if isinstance(calls, str):
        with suppress(UserError):  # reported below
            calls = parse_json(calls, "")
    calls = [_wrap_function(call) for call in (calls if isinstance(calls, list) else [calls])]
    if not all(map(_is_call, calls)):
        raise context.error(f"a tool call must have a name and arguments; saw {seen(calls)}")
    return [_clean_call(call, context) for call in calls]


def _wrap_function(item: Any) -> Any:
    """A tool or call in the form that chat templates read: {"type": "function", "function": …}."""
    if isinstance(item, dict) and item.get("function") is None and "name" in item:
        inner = {k: v for k, v in item.items() if k not in ("id", "type", "function")}
        outer = {"id": item["id"]} if item.get("id") is not None else {}
        return outer | {"type": "function", "function": inner}
    return item


def _is_call(item: Any) -> bool:
    function = item.get("function") if isinstance(item, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _clean_call(call: dict, context: ParseContext) -> dict:
    """The call without the null arguments that its tool's schema does not allow.

    Arguments in a JSON string without such nulls stay that string, since some templates write it
    verbatim. Missing arguments become {}."""
    call = {k: v for k, v in call.items() if v is not None}
    function = {k: v for k, v in call["function"].items() if v is not None}
    call["function"] = function
    given = function.get("arguments", {})
    if isinstance(given, str) and not given.strip():
        given = {}
    arguments = given
    if isinstance(given, str):
        try:
            arguments = parse_json(given, "")
        except ValueError:
            return call
    if not isinstance(arguments, dict):
        raise context.error(f"the arguments of a tool call are {seen(given)}, not an object")
    schema: Any = {}
    for tool in context.tools or ():
        described = tool.get("function", tool)
        if isinstance(described, dict) and described.get("name") == function["name"]:
            schema = described.get("parameters", {})
    cleaned = _clean_argument(arguments, schema, schema)
    function["arguments"] = given if cleaned == arguments else cleaned
    return call


# ---- nulls
#
# A table (Parquet, Arrow, or JSON made from one) stores null for every key that a row lacks and
# another row has. These nulls are dropped, and nulls that a schema allows are kept.

_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")  # {name: schema}
_TYPE_KEYS = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}


def _clean_schema(value: Any) -> Any:
    """A JSON schema without the nulls of absent keys.

    `default` and `const` stay null if the schema allows null or any value.
    """
    if isinstance(value, list):
        return [_clean_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    cleaned = {}
    for key, item in value.items():
        if item is None:
            other = value.keys() & (_TYPE_KEYS - {key})
            if key in ("default", "const") and (
                not other or any(map(_names_null, _subschemas(value)))
            ):
                cleaned[key] = None
        elif key in _SCHEMA_MAPS and isinstance(item, dict):
            cleaned[key] = {k: _clean_schema(v) for k, v in item.items() if v is not None}
        else:
            cleaned[key] = _clean_schema(item)
    return cleaned


def _names_null(schema: dict) -> bool:
    """True if the schema itself allows null explicitly."""
    is_null_type = schema.get("type") == "null" or "null" in _list_at(schema, "type")
    return is_null_type or None in _list_at(schema, "enum") or schema.get("nullable") is True


def _list_at(schema: dict, name: str) -> list:
    return value if isinstance(value := schema.get(name), list) else []


def _clean_argument(value: Any, schema: Any, root: Any) -> Any:
    """A call's argument without the nulls that its (cleaned) schema does not allow."""
    if isinstance(value, list):
        items = [s["items"] for s in _subschemas(schema, root) if isinstance(s.get("items"), dict)]
        return [_clean_argument(item, {"anyOf": items}, root) for item in value]
    if not isinstance(value, dict):
        return value
    schemas: dict[str, list] = {}
    for branch in _subschemas(schema, root):
        properties = branch.get("properties")
        for name, inner in properties.items() if isinstance(properties, dict) else ():
            schemas.setdefault(name, []).append(inner)
    cleaned = {}
    for name, item in value.items():
        inner = {"anyOf": schemas.get(name, [])}
        if item is not None or any(
            _names_null(s) or None in (s.get("default", ""), s.get("const", ""))
            for s in _subschemas(inner, root)
        ):
            cleaned[name] = _clean_argument(item, inner, root)
    return cleaned


def _subschemas(schema: Any, root: Any = None, above: tuple[str, ...] = ()) -> Iterator[dict]:
    """A schema and the schemas that it combines or refers to in `root`."""
    if not isinstance(schema, dict):
        return
    yield schema
    for name in ("anyOf", "oneOf", "allOf"):
        for inner_schema in _list_at(schema, name):
            yield from _subschemas(inner_schema, root, above)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in above:
        target = root
        for key in reference.removeprefix("#/").split("/"):
            target = target.get(key) if isinstance(target, dict) else None
        yield from _subschemas(target, root, (*above, reference))
