# SPDX-License-Identifier: Apache-2.0
"""Chat templates: find a tokenizer's template, embed settings in it, and render conversations.

Templates differ in the input they accept: content as a string or a list of parts, arguments of a
tool call as an object or a JSON string, missing content as "" or null, tools under other names.
`ChatTemplate` finds out which form its template accepts by rendering a small conversation in each,
and converts every conversation to that form.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from datetime import date as Date
from functools import cached_property
from itertools import chain
from pathlib import Path
from string import Formatter
from typing import Any

from jaxllm.config import DataSection
from jaxllm.data.conversations import USER_TEMPLATES
from jaxllm.data.messages import REASONING, message_text
from jaxllm.errors import UserError
from jaxllm.paths import local_path
from jaxllm.untrusted import MAX_TEXT, Exceeded, bounded

TEMPLATES = {file.stem: file for file in sorted(Path(__file__).parent.glob("templates/*.jinja"))}

_USER_TEMPLATE = re.compile(r'^\{%- set user_template = ("(?:[^"\\]|\\.)*") %\}')
# The strftime directives for dates, without those for the time of day.
_DIRECTIVES = ("a", "A", "b", "B", "d", "-d", "e", "j", "m", "-m", "U", "w", "W", "x", "y", "Y")


def template_file(template: str) -> Path:
    """The file of a built-in template or of a path. Raises UserError if there is none."""
    file = TEMPLATES.get(template) or local_path(template)
    if not file.is_file():
        known = ", ".join(TEMPLATES)
        raise UserError(f"the chat template {template!r} is neither a file nor one of {known}")
    return file


def template_source(tokenizer: Any, template: str | None = None, tools: Any = None) -> str:
    """The Jinja source of a built-in template, a file, or the tokenizer's chat template.

    If a tokenizer has several templates, `tools` selects the one for tools. Raises UserError if
    there is no template, or if the file is not text.
    """
    if template is not None:
        file = template_file(template)
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


def with_settings(tokenizer: Any, data: DataSection) -> Any:
    """A copy of the tokenizer whose chat template includes the run's settings.

    The template is `data.template`, and it sets `data.template_kwargs`, `data.system` and
    `data.user_template` at its top, so the saved tokenizer renders as the run does. Variables given
    at rendering take precedence. The function is idempotent. Raises UserError if the template
    cannot render `data.system`.
    """
    tokenizer = copy.copy(tokenizer)
    if data.template is not None:
        tokenizer.chat_template = template_source(tokenizer, data.template)
    source, special = tokenizer.chat_template, tokenizer.special_tokens_map
    if isinstance(source, dict):
        sources = {name: _embed_settings(one, data, special) for name, one in source.items()}
        tokenizer.chat_template = sources
    elif source:
        tokenizer.chat_template = _embed_settings(source, data, special)
    if source and data.system:
        template = ChatTemplate(template_source(tokenizer), special, None)
        user = template.normalize([{"role": "user", "content": "?"}])
        if not template.can_render(user, data.system.strip()):
            raise UserError("data.system: the chat template does not render a system message")
    return tokenizer


def embedded_user_template(tokenizer: Any) -> str | None:
    """The `data.user_template` embedded in the tokenizer's chat template, or None."""
    source = tokenizer.chat_template
    sources = list(source.values()) if isinstance(source, dict) else [source or ""]
    match = next((m for source in sources if (m := _USER_TEMPLATE.match(source))), None)
    return json.loads(match[1]) if match else None


def apply_user_template(tokenizer: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Apply the user_template embedded in the tokenizer's chat template to the last user message.

    The messages stay unchanged if it has a field other than {question}."""
    embedded = embedded_user_template(tokenizer)
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if embedded is None or not users or template_fields(embedded) - {"question"}:
        return messages
    last = messages[users[-1]]
    text = embedded.format_map({"question": message_text(last)})
    return [*messages[: users[-1]], last | {"content": text}, *messages[users[-1] + 1 :]]


def template_fields(user_template: str) -> set[str]:
    """The names of the columns in a `data.user_template`."""
    names = (name for _, name, _, _ in Formatter().parse(user_template) if name)
    return {re.split(r"[.\[]", name)[0] for name in names}


def check_limits(tokenizer: Any) -> None:
    """Raises Exceeded if a chat template of the tokenizer takes too long or too much memory for one
    message: for what then renders it elsewhere, without limits."""
    source = tokenizer.chat_template or {}
    for one in source.values() if isinstance(source, dict) else [source]:
        ChatTemplate(one, tokenizer.special_tokens_map, None).can_render(
            [{"role": "user", "content": "?"}]
        )


def _embed_settings(source: str, data: DataSection, special_tokens: dict[str, Any]) -> str:
    user_template, embedded = data.user_template, _USER_TEMPLATE.match(source)
    if embedded:
        source = source[embedded.end() :]
        user_template = user_template or json.loads(embedded[1])
    head, lines = "", []
    if user_template is not None:
        text = json.dumps(USER_TEMPLATES.get(user_template, user_template), ensure_ascii=False)
        head = f"{{%- set user_template = {text} %}}"
    for name, value in data.template_kwargs.items():
        if not name.isidentifier():
            raise UserError(f"data.template_kwargs: {name!r} is not a valid variable name")
        lines.append(f"{{%- set {name} = {name} if {name} is defined else {_literal(value)} %}}")
    if data.system is not None:
        no_system = "not messages | selectattr('role', 'in', ['system', 'developer']) | list"
        system = {"role": "system", "content": data.system}
        system_literal = _literal(ChatTemplate(source, special_tokens, None).normalize([system]))
        lines.append(f"{{%- if {no_system} %}}{{%- set messages = {system_literal} + messages %}}")
        lines.append("{%- endif %}")
    settings = "".join(lines)
    return _prepend(head if source.startswith(settings) else head + settings, source)


def _prepend(head: str, source: str) -> str:
    """Prepend blocks to a template. Jinja trims a newline after a block, but not after ""."""
    return head + ("{{- '' }}" if head and source.startswith("\n") else "") + source


def _literal(value: Any) -> str:
    """A JSON value as a Jinja literal."""
    if isinstance(value, dict):
        items = (f"{_literal(str(k))}: {_literal(v)}" for k, v in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _dated(source: str, date: str) -> str:
    """The template with `strftime_now` returning `date` (YYYY-MM-DD) instead of today.

    The function is a Jinja macro, since transformers passes no callables to a template.
    """
    day = Date.fromisoformat(date)
    filters = "".join(
        f" | replace('%{one}', {_literal(day.strftime(f'%{one}'))})" for one in _DIRECTIVES
    )
    macro = f"{{%- macro strftime_now(format) -%}}{{{{- format{filters} -}}}}{{%- endmacro %}}"
    return _prepend(macro, source)


class ChatTemplate:
    """A chat template and the form of its input.

    `variables` are those of every rendering. `date` (YYYY-MM-DD) is the result of its
    `strftime_now`; None is today.
    """

    def __init__(self, source: str, variables: dict[str, Any], date: str | None) -> None:
        self.source, self._variables = source, variables
        self._dated = _dated(source, date) if date and "strftime_now" in source else source
        self._is_tried = False
        self.has_generation_blocks = bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source))

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None = None,
        *,
        generation_prompt: bool = False,
        generation_blocks: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """(the text, the spans of its `{% generation %}` blocks if `generation_blocks`).

        Raises UserError with the template's message if it rejects the conversation.
        """
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        # SmolLM3 and similar templates have another variable for the tools.
        names = [n for n in ("xml_tools", "python_tools") if tools and self._mentions(n)]
        settings: dict[str, Any] = self._variables | {name: tools for name in names[:1]}
        try:
            # The first rendering is that of a small conversation, when nothing else runs.
            with bounded("the chat template", strict=not self._is_tried):
                rendered: Any = render_jinja_template(
                    conversations=[messages],
                    tools=tools,
                    chat_template=self._dated,
                    add_generation_prompt=generation_prompt,
                    return_assistant_tokens_mask=generation_blocks,
                    **settings,
                )
        except TemplateSyntaxError as error:
            raise UserError(f"the chat template, line {error.lineno}: {error.message}") from None
        except Exceeded:
            raise
        except Exception as error:  # templates are programs: 1/0, endless recursion
            why = error if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise UserError(f"the chat template rejects the conversation: {why}") from None
        self._is_tried = True
        texts, spans = rendered
        if len(texts[0]) > 4 * MAX_TEXT:
            raise Exceeded(f"the chat template renders more than {4 * MAX_TEXT:,} characters")
        return texts[0], spans[0] if generation_blocks else []

    def _mentions(self, word: str) -> bool:
        return re.search(rf"(?<!\w){word}(?!\w)", self.source) is not None

    # ---- the form of the input

    def normalize(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages in the form that the template accepts, without nulls and loss weights."""
        return [self._normalize_message(message) for message in messages]

    def _normalize_message(self, message: dict[str, Any]) -> dict[str, Any]:
        # As in apply_chat_template, null means absent.
        out = {k: v for k, v in message.items() if k != "weight" and v is not None}
        if out["role"] == "developer" and not self._mentions("developer"):
            out["role"] = "system"
        if (reasoning := out.get("reasoning_content")) is not None:
            out |= {name: reasoning for name in REASONING if self._mentions(name)}
        content = out.get("content")
        if isinstance(content, list) and not self._reads_parts:
            out["content"] = "".join(part["text"] for part in content)
        elif isinstance(content, str) and not self._reads_strings and self._reads_parts:
            out["content"] = [{"type": "text", "text": content}]
        if calls := out.get("tool_calls"):
            as_json, null_content = self._call_form
            out["tool_calls"] = [_call(call, as_json) for call in calls]
            if null_content and not out.get("content"):
                out["content"] = None
        return out

    def can_render(self, messages: list[dict[str, Any]], *words: str) -> bool:
        """True if the template renders the messages with these words, not as Python objects."""
        try:
            text, _ = self.render(messages)
        except Exceeded:
            raise
        except ValueError:
            return False
        # A template that expects text renders an object by its Python repr.
        has_repr = any(r in text and r not in "".join(words) for r in ("{'is'", "{'type'"))
        return all(word in text for word in words) and not has_repr

    @cached_property
    def _reads_strings(self) -> bool:
        return self.can_render([{"role": "user", "content": "Quite."}], "Quite.")

    @cached_property
    def _reads_parts(self) -> bool:
        part = {"type": "text", "text": "Quite."}
        return self.can_render([{"role": "user", "content": [part]}], "Quite.")

    @cached_property
    def _call_form(self) -> tuple[bool, bool]:
        """(True if arguments are a JSON string, True if missing content is null instead of "")."""
        user = self._normalize_message({"role": "user", "content": "?"})
        function = {"name": "quite_so", "arguments": {"is": "it"}}
        call = {"id": "abcdefghi", "type": "function", "function": function}
        result = {"role": "tool", "tool_call_id": "abcdefghi", "name": "quite_so", "content": "!"}
        for as_json, null_content in (False, False), (True, False), (False, True), (True, True):
            answer: dict[str, Any] = {"role": "assistant", "tool_calls": [_call(call, as_json)]}
            answer["content"] = None if null_content else ""
            # Some templates need a result after the call.
            for chat in [user, answer], [user, answer, result]:
                if self.can_render(chat, "quite_so", "it"):
                    return as_json, null_content
        return False, False


def _call(call: dict[str, Any], as_json: bool) -> dict[str, Any]:
    """A tool call with its arguments as a JSON string, or parsed."""
    arguments = call["function"].get("arguments")
    if as_json and arguments is not None and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_json and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
    return call | {"function": call["function"] | {"arguments": arguments}}


def all_strings(value: Any) -> Iterator[str]:
    """All strings in nested lists and dicts, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in chain.from_iterable(value.items()) if isinstance(value, dict) else value:
            yield from all_strings(item)
