# SPDX-License-Identifier: Apache-2.0
"""Conversations -> tokens and which of them are learned, by the tokenizer's own chat template."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.tokenizer import special_tokens

_TURN = "{{ '<|im_start|>' + ROLE + '\\n' + m['content'] + '<|im_end|>\\n' }}"
_LOOP = "{% for m in messages %}BODY{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

# Built-in templates. seed-qwen is the layout of happy-llm's chapter 6: system, human, assistant.
TEMPLATES = {
    "chatml": _LOOP.replace("BODY", _TURN.replace("ROLE", "m['role']")),
    "seed-qwen": _LOOP.replace(
        "BODY", _TURN.replace("ROLE", "('human' if m['role'] == 'user' else m['role'])")
    ),
}
# Put behind the first character of a special token's name inside a user's text, so that neither the
# template's output nor the tokenizer takes it for the token; taken out again before tokenising.
_MARK = "\ue000"


def template_of(tokenizer: Any, template: str | None) -> str:
    """The Jinja source: a built-in name, a file, or the tokenizer's own. Raises ValueError if none."""
    if template is not None:
        if template in TEMPLATES:
            return TEMPLATES[template]
        if not Path(template).is_file():
            raise ValueError(
                f"chat template {template!r} is neither a file nor built in ({', '.join(TEMPLATES)})"
            )
        return Path(template).read_text()
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if not own:
        raise ValueError(
            "the tokenizer has no chat template; set data.template to a file or to one of "
            + ", ".join(TEMPLATES)
        )
    return own


@lru_cache(maxsize=64)
def _pattern(names: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Special tokens in text, and the same with the mark inside."""
    plain = "|".join(re.escape(n) for n in names)
    marked = "|".join(re.escape(n[0] + _MARK + n[1:]) for n in names)
    return re.compile(plain or r"(?!)"), re.compile(marked or r"(?!)")


def _protect(value: Any, pattern: re.Pattern[str]) -> Any:
    """Marks special tokens' names in every string of a message."""
    if isinstance(value, str):
        return pattern.sub(lambda m: m[0][0] + _MARK + m[0][1:], value)
    if isinstance(value, dict):
        return {_protect(k, pattern): _protect(v, pattern) for k, v in value.items()}
    if isinstance(value, list):
        return [_protect(v, pattern) for v in value]
    return value


class _Renderer:
    """A tokenizer with a template and its variables."""

    def __init__(self, tokenizer: Any, template: str | None, kwargs: dict[str, Any] | None, tools: Any):
        self.tokenizer, self.source = tokenizer, template_of(tokenizer, template)
        self.special, self.marked = _pattern(tuple(special_tokens(tokenizer)))
        self.tools = _protect(tools, self.special) if tools else None
        self.variables = dict(tokenizer.special_tokens_map) | dict(kwargs or {})
        self.has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    def __call__(self, messages: list[dict[str, Any]], *, prompt: bool = False, spans: bool = False) -> Any:
        """The rendered text; with `spans` also the (start, end) that {% generation %} marks."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, found = render_jinja_template(
                conversations=[messages],
                tools=self.tools,
                chat_template=self.source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=spans,
                **self.variables,
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from None
        return (texts[0], found[0]) if spans else texts[0]

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [n] and where each begins in `text` [n]; a marked name is split as text."""
        ids: list[int] = []
        starts: list[int] = []
        place = 0
        for found in [*self.marked.finditer(text), None]:
            stop = found.start() if found else len(text)
            self._append(text[place:stop], place, False, ids, starts)
            if found:
                self._append(found[0].replace(_MARK, "", 1), found.start(), True, ids, starts)
                place = found.end()
        return np.array(ids, np.int32), np.array(starts, np.int64)

    def _append(self, text: str, place: int, plain: bool, ids: list[int], starts: list[int]) -> None:
        if text:
            out = self.tokenizer(
                text,
                add_special_tokens=False,
                return_offsets_mapping=True,
                split_special_tokens=plain,
                verbose=False,
            )
            ids += out["input_ids"]
            starts += [place + start for start, _ in out["offset_mapping"]]


def _prefix_spans(render: _Renderer, messages: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
    """Where each assistant turn's words and end token lie in `text`, from renderings of prefixes."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        upto = render(messages[: i + 1])
        if i:
            before = render(messages[:i], prompt=True)
        else:  # nothing to render before: the turn begins where its words do
            before = upto[: max(upto.find(str(message.get("content") or "")), 0)]
        if not (text.startswith(before) and text.startswith(upto)):
            raise ValueError(
                "the chat template does not render a conversation's beginning the same way when more "
                f"follows (turn {i + 1}), so what the assistant said cannot be found; put "
                "{% generation %} … {% endgeneration %} around it in the template, or use learn: last "
                "with a template that keeps earlier turns"
            )
        ends = [m.end() for m in render.special.finditer(upto, len(before))]
        spans.append((len(before), ends[-1] if ends else len(upto.rstrip())))
    return spans


def render(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    tools: list[Any] | None = None,
    template: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
    learn: str = "all",
    train_on_prompt: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """A conversation as (tokens int32 [n], learn float32 [n]); learn[j] weighs predicting token j.

    Learned are each assistant turn's words and its end token (with `learn` last: the last turn's),
    times the message's `weight`; `train_on_prompt` learns the rest too. A special token's name
    inside a message stays text. Raises ValueError for a template that is missing, that refuses the
    conversation, or in whose output the assistant's words cannot be told.
    """
    renderer = _Renderer(tokenizer, template, template_kwargs, tools)
    weights = [float(m.get("weight", 1.0)) for m in messages if m["role"] == "assistant"]
    plain = [{k: v for k, v in m.items() if k != "weight" and v is not None} for m in messages]
    plain = _protect(plain, renderer.special)
    if renderer.has_marks:
        text, spans = renderer(plain, spans=True)
    else:
        text = renderer(plain)
        spans = _prefix_spans(renderer, plain, text)
    if len(spans) != len(weights):
        raise ValueError(
            f"the chat template marks {len(spans)} assistant turns of {len(weights)}; each needs "
            "its {% generation %} block"
        )
    tokens, starts = renderer.encode(text)
    weight = np.full(len(tokens), float(train_on_prompt), np.float32)
    for index, ((start, end), value) in enumerate(zip(spans, weights, strict=True)):
        skipped = learn == "last" and index < len(spans) - 1
        weight[(starts >= start) & (starts < end)] = float(train_on_prompt) if skipped else value
    return tokens, weight


def prompt_tokens(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    tools: list[Any] | None = None,
    template: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> np.ndarray:
    """A conversation and the head of the answer to come, int32 [n], rendered as for training."""
    renderer = _Renderer(tokenizer, template, template_kwargs, tools)
    return renderer.encode(renderer(_protect(messages, renderer.special), prompt=True))[0]


def end_of_turn(tokenizer: Any, template: str | None = None) -> int | None:
    """The special token that the template ends an assistant's turn with, None if it has none."""
    renderer = _Renderer(tokenizer, template, None, None)
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    before, whole = renderer([user], prompt=True), renderer([user, answer])
    ends = list(renderer.special.finditer(whole, len(before)))
    return tokenizer.convert_tokens_to_ids(ends[-1][0]) if ends else None
