# SPDX-License-Identifier: Apache-2.0
"""Chat templates: which one a tokenizer has, what it carries, and rendering a conversation with it.

Templates disagree on the form of their input: content as a string or as a list of parts, the
arguments of a tool call as an object or as a string of JSON, no content as "" or null, tools under
other names. `ChatTemplate` finds out once which form its template reads, by rendering a small
conversation in each, and gives it every conversation in that form.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from datetime import date as Date
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import Any

from jaxllm.config import DataSection
from jaxllm.data.conversations import USER_TEMPLATES
from jaxllm.data.messages import REASONING, words
from jaxllm.errors import UserError
from jaxllm.tokenizer import load_tokenizer

TEMPLATES = {file.stem: file for file in sorted(Path(__file__).parent.glob("templates/*.jinja"))}

_USER_TEMPLATE = re.compile(r'^\{%- set user_template = ("(?:[^"\\]|\\.)*") %\}')
# The directives of strftime that name no time of day.
_DIRECTIVES = ("a", "A", "b", "B", "d", "-d", "e", "j", "m", "-m", "U", "w", "W", "x", "y", "Y")


def template_of(tokenizer: Any, template: str | None = None, tools: Any = None) -> str:
    """The Jinja source: a built-in template, a file, or the tokenizer's own.

    Of a tokenizer's several templates it is the one for tools when there are `tools`. Raises
    ValueError when there is none, or the file is not text.
    """
    if template is not None:
        file = TEMPLATES.get(template, Path(template))
        if not file.is_file():
            raise UserError(
                f"the chat template {template!r} is neither a file nor built in "
                f"({', '.join(TEMPLATES)})"
            )
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: the chat template is not UTF-8 text: {error}") from None
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template; set data.template to a file or to one of "
            f"{', '.join(TEMPLATES)}"
        )
    return tokenizer.get_chat_template(tools=tools or None)


def chat_tokenizer(path: str, template: str | None = None) -> Any:
    """The tokenizer of `path`, with `template` (a built-in name or a file) as its chat template."""
    return with_settings(load_tokenizer(path), DataSection(template=template))


def with_settings(tokenizer: Any, data: DataSection) -> Any:
    """The tokenizer with the chat template of a run, so that it renders as the run does wherever it
    is saved: `data.template`, with `data.template_kwargs`, `data.system` and `data.user_template`
    set at its top. A caller's own variables still win. A second time changes nothing.

    Raises ValueError where the template has no place for `data.system`."""
    tokenizer = copy.copy(tokenizer)
    if data.template is not None:
        tokenizer.chat_template = template_of(tokenizer, data.template)
    own, special = tokenizer.chat_template, tokenizer.special_tokens_map
    if isinstance(own, dict):
        sources = {name: _with_settings(one, data, special) for name, one in own.items()}
        tokenizer.chat_template = sources
    elif own:
        tokenizer.chat_template = _with_settings(own, data, special)
    if own and data.system:
        template = ChatTemplate(template_of(tokenizer), tokenizer.special_tokens_map, None)
        user = template.prepared([{"role": "user", "content": "?"}])
        if not template.renders(user, data.system.strip()):
            raise UserError("data.system: the chat template has no place for a system message")
    return tokenizer


def user_template_of(tokenizer: Any) -> str | None:
    """The `data.user_template` that the tokenizer's chat template carries."""
    own = tokenizer.chat_template
    sources = list(own.values()) if isinstance(own, dict) else [own or ""]
    found = next((m for source in sources if (m := _USER_TEMPLATE.match(source))), None)
    return json.loads(found[1]) if found else None


def apply_user_template(tokenizer: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, the last user's in the user_template that the tokenizer's chat template
    carries, where that names no column but {question}."""
    carried = user_template_of(tokenizer)
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if carried is None or not users or fields_of(carried) - {"question"}:
        return messages
    last = messages[users[-1]]
    text = carried.format_map({"question": words(last)})
    return [*messages[: users[-1]], last | {"content": text}, *messages[users[-1] + 1 :]]


def fields_of(user_template: str) -> set[str]:
    """The columns that a `data.user_template` names."""
    names = (name for _, name, _, _ in Formatter().parse(user_template) if name)
    return {re.split(r"[.\[]", name)[0] for name in names}


def _with_settings(source: str, data: DataSection, special_tokens: dict[str, Any]) -> str:
    asked, carried = data.user_template, _USER_TEMPLATE.match(source)
    if carried:
        source = source[carried.end() :]
        asked = asked or json.loads(carried[1])
    head, lines = "", []
    if asked is not None:
        text = json.dumps(USER_TEMPLATES.get(asked, asked), ensure_ascii=False)
        head = f"{{%- set user_template = {text} %}}"
    for name, value in data.template_kwargs.items():
        if not name.isidentifier():
            raise UserError(f"data.template_kwargs: {name!r} cannot be the name of a variable")
        lines.append(f"{{%- set {name} = {name} if {name} is defined else {_literal(value)} %}}")
    if data.system is not None:
        none = "not messages | selectattr('role', 'in', ['system', 'developer']) | list"
        system = {"role": "system", "content": data.system}
        told = _literal(ChatTemplate(source, special_tokens, None).prepared([system]))
        lines.append(f"{{%- if {none} %}}{{%- set messages = {told} + messages %}}{{%- endif %}}")
    given = "".join(lines)
    return _prefixed(head if source.startswith(given) else head + given, source)


def _prefixed(head: str, source: str) -> str:
    """`head`, which ends with a block, before a template; a newline behind a block would go."""
    return head + ("{{- '' }}" if head and source.startswith("\n") else "") + source


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, dict):
        inside = (f"{_literal(str(k))}: {_literal(v)}" for k, v in value.items())
        return f"{{{', '.join(inside)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _dated(source: str, date: str) -> str:
    """The template with `strftime_now` giving `date` (YYYY-MM-DD) instead of today."""
    day = Date.fromisoformat(date)
    filters = "".join(
        f" | replace('%{one}', {_literal(day.strftime(f'%{one}'))})" for one in _DIRECTIVES
    )
    macro = f"{{%- macro strftime_now(format) -%}}{{{{- format{filters} -}}}}{{%- endmacro %}}"
    return _prefixed(macro, source)


class ChatTemplate:
    """A chat template and how it wants its conversations. `date` (YYYY-MM-DD) is what its
    `strftime_now` gives; None is today."""

    def __init__(self, source: str, variables: dict[str, Any], date: str | None) -> None:
        self.source, self.variables = source, variables
        self._dated = _dated(source, date) if date and "strftime_now" in source else source
        self.has_marks = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None = None,
        *,
        generation_prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text and, with `marks`, where in it `{% generation %}` blocks lie.

        Raises ValueError with the template's reason when it refuses the conversation.
        """
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        given = {**self.variables, **self._other_tools(tools)}
        try:
            rendered: Any = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self._dated,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=marks,
                **given,
            )
        except TemplateSyntaxError as error:
            raise UserError(f"the chat template, line {error.lineno}: {error.message}") from None
        except Exception as error:  # a template is a program of the user's: 1/0, endless recursion
            why = error if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise UserError(f"the chat template refuses the conversation: {why}") from None
        texts, spans = rendered
        return texts[0], spans[0] if marks else []

    def _other_tools(self, tools: list[Any] | None) -> dict[str, Any]:
        """Tools under the name that SmolLM3 and its like have for them."""
        names = [n for n in ("xml_tools", "python_tools") if self._names(n)]
        return {names[0]: tools} if tools and names else {}

    def _names(self, word: str) -> bool:
        return re.search(rf"(?<!\w){word}(?!\w)", self.source) is not None

    # ---- the form of a conversation

    def prepared(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages in the form that the template reads, without nulls and weights."""
        return [self._prepared(message) for message in messages]

    def _prepared(self, message: dict[str, Any]) -> dict[str, Any]:
        # As in apply_chat_template, a null is a key that is not there.
        out = {k: v for k, v in message.items() if k != "weight" and v is not None}
        if out["role"] == "developer" and not self._names("developer"):
            out["role"] = "system"
        if (thought := out.get("reasoning_content")) is not None:
            out |= {name: thought for name in REASONING if self._names(name)}
        content = out.get("content")
        if isinstance(content, list) and not self._reads_parts:
            out["content"] = "".join(part["text"] for part in content)
        elif isinstance(content, str) and not self._reads_strings and self._reads_parts:
            out["content"] = [{"type": "text", "text": content}]
        if calls := out.get("tool_calls"):
            as_text, without = self._call_form
            out["tool_calls"] = [_call(call, as_text) for call in calls]
            if without and not out.get("content"):
                out["content"] = None
        return out

    def renders(self, messages: list[dict[str, Any]], *words: str) -> bool:
        """Whether the template renders messages with these words, as text and not as Python."""
        try:
            text, _ = self.render(messages)
        except ValueError:
            return False
        given = "".join(words)  # an object where text was expected is written as Python does
        as_python = any(part in text and part not in given for part in ("{'is'", "{'type'"))
        return all(word in text for word in words) and not as_python

    @cached_property
    def _reads_strings(self) -> bool:
        return self.renders([{"role": "user", "content": "Quite."}], "Quite.")

    @cached_property
    def _reads_parts(self) -> bool:
        part = {"type": "text", "text": "Quite."}
        return self.renders([{"role": "user", "content": [part]}], "Quite.")

    @cached_property
    def _call_form(self) -> tuple[bool, bool]:
        """(arguments are a string of JSON, a call's missing content is null and not "")."""
        user = self._prepared({"role": "user", "content": "?"})
        function = {"name": "quite_so", "arguments": {"is": "it"}}
        call = {"id": "abcdefghi", "type": "function", "function": function}
        said = {"role": "tool", "tool_call_id": "abcdefghi", "name": "quite_so", "content": "!"}
        for as_text, without in (False, False), (True, False), (False, True), (True, True):
            asks = {"role": "assistant", "content": None if without else ""}
            asks["tool_calls"] = [_call(call, as_text)]  # type: ignore[assignment]
            # Some templates want the result behind the call.
            for chat in [user, asks], [user, asks, said]:
                if self.renders(chat, "quite_so", "it"):
                    return as_text, without
        return False, False


def _call(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    """A tool call with its arguments as a string of JSON, or as what the string says."""
    arguments = call["function"].get("arguments")
    if as_text and arguments is not None and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
    return call | {"function": call["function"] | {"arguments": arguments}}


def strings(value: Any) -> Iterator[str]:
    """Every string in nested lists and dicts, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
