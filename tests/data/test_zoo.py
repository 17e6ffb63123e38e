# SPDX-License-Identifier: Apache-2.0
"""Real chat templates: those that the distributions of trl, axolotl and llama.cpp carry.

The archives are read where `make` put them (JAXLLM_ZOO names another folder); without them the
tests are skipped. What transformers renders is the reference; what is learned is compared with
TRL's own templates for training, which mark it.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import zipfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxllm.data.chat import render

FOLDER = Path(os.environ.get("JAXLLM_ZOO") or Path(__file__).parents[2] / ".venv" / "zoo")
EOS = "<eos_token>"
SPECIAL = re.compile(
    r"<\|[^|<>\s'\"{}]+\|>|<｜[^｜<>\s]+｜>|</?s>|<(?:bos|eos|end_of_turn|start_of_turn|sep|pad)>"
    r"|<(?:turn\||\|turn|channel\||\|channel|\|tool_call|tool_call\||\|think\|)>"
    r"|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|SYSTEM_PROMPT|THINK|ARGS|CALL_ID|"
    r"TOOL_CONTENT)\]|\[(?:gMASK|SEP)\]|\[e~\[|\]~b\]|\]~!b\[|<(?:sop|eop)>|\[\|[\w-]+\|\]"
    r"|</?assistant>|</?user>|<(?:end_of_utterance|(?:end|beginning)_of_sentence|seed:[a-z_]+)>"
    r"|<SPECIAL_\d+>|</?SPECIAL_\d+>|<sp>|<role>|</role>|<extra_id_\d>|<role_end>|<message_sep>"
)


@cache
def templates() -> dict[str, str]:
    """{archive/name: Jinja source} of every template in the archives."""
    found = {}
    for file in sorted(FOLDER.glob("*.whl")):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith(".jinja"):
                    key = f"{file.name.split('-')[0]}/{Path(name).stem}"
                    found[key] = archive.read(name).decode()
    for file in sorted(FOLDER.glob("*.tar.gz")):
        with tarfile.open(file) as archive:
            for member in archive:
                if member.name.endswith(".jinja"):
                    content = archive.extractfile(member)
                    assert content is not None
                    found[f"llama.cpp/{Path(member.name).stem}"] = content.read().decode()
    return found


def tokenizer_for(source: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes that knows the special tokens that a template writes."""
    names = sorted(set(SPECIAL.findall(source)) | {"<bos_token>", EOS})
    if "<|im_" in source:  # ChatML's, which many templates make of parts
        names = sorted({*names, "<|im_start|>", "<|im_end|>"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(names + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos_token>",
        eos_token=EOS,
        extra_special_tokens=[n for n in names if not n.endswith("_token>")],
        chat_template=source,
    )
    # A model's eos is what its template writes last, where that is a special token.
    text = (reference(tokenizer, in_parts(TURNS[:2]), None) or "").rstrip()
    text = (reference(tokenizer, TURNS[:2], None) or text).rstrip()
    last = max((n for n in names if text.endswith(n)), key=len, default=EOS)
    tokenizer.eos_token = last
    return tokenizer


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str | None, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Oslo"}},
}
CALL_TEXT = CALL | {"function": {"name": "weather", "arguments": json.dumps({"city": "Oslo"})}}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "minus three"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
            "required": ["city"],
        },
    },
}
SYSTEM = {"role": "system", "content": "Answer in brief."}
TURNS = [user("Is it cold?"), says("Quite so."), user("And tomorrow?"), says("Rather warm.")]
THINKS = [
    user("Is it cold?"),
    says("Quite so.", reasoning_content="Oslo lies north."),
    user("And tomorrow?"),
    says("Rather warm.", reasoning_content="Winds turn."),
]
CALLS = [user("Is it cold?"), says("", tool_calls=[CALL]), RESULT, says("It is freezing.")]
CHATS: dict[str, tuple[list[dict], list[dict] | None]] = {
    "one turn": (TURNS[:2], None),
    "system": ([SYSTEM, *TURNS[:2]], None),
    "two turns": (TURNS, None),
    "system, two turns": ([SYSTEM, *TURNS], None),
    "reasoning": (THINKS[:2], None),
    "reasoning, two turns": (THINKS, None),
    "reasoning in the text": (
        [TURNS[0], says("<think>\nOslo lies north.\n</think>\n\nQuite so.")],
        None,
    ),
    "tools": (CALLS, [TOOL]),
    "tools, arguments as text": (
        [CALLS[0], says(None, tool_calls=[CALL_TEXT]), *CALLS[2:]],
        [TOOL],
    ),
    "tools not called": (TURNS, [TOOL]),
    "unanswered": (TURNS[:3], None),
    "spaces": ([user("  a "), says(" 12 + 30 is 42.\n\nAsk «more»! "), *TURNS[2:]], None),
}


def reference(tokenizer, chat: list[dict], tools, **options) -> Any:
    """What transformers renders; None where the template refuses."""
    try:
        return tokenizer.apply_chat_template(chat, tools=tools, **{"tokenize": False} | options)
    except Exception:
        return None


def as_object(chat: list[dict]) -> list[dict]:
    """The conversation with the arguments of its calls as objects."""
    return [m | {"tool_calls": [CALL]} if m.get("tool_calls") else m for m in chat]


def as_text(chat: list[dict]) -> list[dict]:
    """The conversation with the arguments of its calls as text, and no content beside them."""
    call = {"tool_calls": [CALL_TEXT], "content": None}
    return [m | call if m.get("tool_calls") else m for m in chat]


def named(chat: list[dict]) -> list[dict]:
    """The conversation with its reasoning under the name that transformers does not fill."""
    name = "reasoning_content"
    return [m | {"reasoning": m[name]} if name in m else m for m in chat]


def in_parts(chat: list[dict]) -> list[dict]:
    """The conversation with its contents as parts, as templates of multimodal models read them."""
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in chat]


BORDER = re.compile(rf"(?:{SPECIAL.pattern}|<[^<>\s]*>|\\[/?[A-Z_]+\\])")


def is_own_example(text: str, turns: set[tuple[str, str]]) -> bool:
    """Whether a text is generation's prompt and then an end of the turn's rendering as the last
    one, which begins where a token or a tag does or its text; turns: (that prompt, that rendering).
    """
    for prompt, last in turns:
        if text == last:
            return True
        answer = text.removeprefix(prompt)
        if text.startswith(prompt) and answer and last.endswith(answer):
            at = len(last) - len(answer)
            if not any(m.start() < at < m.end() for m in BORDER.finditer(last)):
                return True
        if text.startswith(prompt) and answer and answer.rstrip() in last:
            return True  # the template goes on behind the answer
    return False


def acceptable(tokenizer, chat: list[dict], tools) -> tuple[set[str], set[tuple[str, str]]]:
    """(renderings of the whole; of each turn generation's prompt and the rendering up to it)."""
    forms = [chat, as_object(chat), as_text(chat), named(chat)]
    if all(m["content"] for m in chat):
        forms.append(in_parts(chat))
    wholes = {reference(tokenizer, form, tools) for form in forms}
    answers = [i for i, m in enumerate(chat) if m["role"] == "assistant"]
    begins = {
        (
            reference(tokenizer, form[:i], tools, add_generation_prompt=True) or "\0",
            reference(tokenizer, form[: i + 1], tools) or "\0",
        )
        for form in forms
        for i in answers
    }
    return wholes - {None}, begins


def outcome(tokenizer, chat: list[dict], tools) -> tuple[str, str]:
    """(right, refused, wrong or no reference, why)."""
    wholes, begins = acceptable(tokenizer, chat, tools)
    try:
        examples = render(tokenizer, chat, tools=tools)
    except ValueError as error:
        return ("refused" if wholes else "no reference"), str(error)
    for example in examples:
        seen = tokenizer.decode(example.tokens)
        ways = {seen, seen.removesuffix(tokenizer.eos_token)} - {""}
        if not (ways & wholes or any(map(is_own_example, ways, [begins] * 2))):
            return "wrong", f"tokens: {seen[-300:]!r}"
    learned = "".join(tokenizer.decode(e.tokens[e.loss_weights > 0]) for e in examples)
    for message in chat:
        said = (message["content"] or "").rpartition("</think>")[2].strip()
        if message["role"] == "assistant":
            for words in (said, message.get("reasoning_content", "")):
                if words not in learned:
                    return "wrong", f"{words!r} is not learned: {learned!r}"
        elif len(said) > 3 and said in learned:
            return "wrong", f"{said!r} is learned: {learned!r}"
    eos, asked = tokenizer.eos_token, reference(tokenizer, TURNS[:3], None) or ""
    closes = eos in asked.partition("Quite so.")[2].partition("And tomorrow?")[0]
    plain = not any(m.get("tool_calls") or "reasoning_content" in m for m in chat)
    if closes and plain and learned.count(eos) != sum(m["role"] == "assistant" for m in chat):
        return "wrong", f"eos {eos!r} is not learned in each turn: {learned!r}"
    return "right", ""


# What a template lacks is said, and no fault of the renderer's.
LACKS = re.compile(r"has (reasoning_content|tools|tool_calls), which the chat template does not")


@pytest.fixture(scope="module", params=range(3))
def zoo(request) -> dict[str, PreTrainedTokenizerFast]:
    """A third of the templates."""
    third = sorted(templates().items())[request.param :: 3]
    found = {name: tokenizer_for(source) for name, source in third}
    if not found:
        pytest.skip(f"no archives with chat templates in {FOLDER} (make zoo)")
    return found


@pytest.fixture(scope="module")
def outcomes(zoo) -> dict[tuple[str, str], tuple[str, str]]:
    found = {
        (name, key): outcome(tokenizer, chat, tools)
        for name, tokenizer in zoo.items()
        for key, (chat, tools) in CHATS.items()
    }
    print(len(zoo), "templates:", Counter(kind for kind, _ in found.values()))
    return found


def test_real_templates_render_as_in_transformers_and_none_is_refused(outcomes):
    assert not {at: why for at, (kind, why) in outcomes.items() if kind == "wrong"}
    refused = {at: why for at, (kind, why) in outcomes.items() if kind == "refused"}
    assert not {at: why for at, why in refused.items() if not LACKS.search(why)}


def test_what_a_template_is_said_to_lack_is_not_in_its_rendering(zoo, outcomes):
    lacking = {at: why for at, (kind, why) in outcomes.items() if kind == "refused"}
    for (name, key), why in lacking.items():
        (chat, tools), lack = CHATS[key], LACKS.search(why)
        assert lack
        # An answer's reasoning, as its last turn has it; the tools' description; an argument.
        turn = int(why.split()[1]) if lack[1] == "reasoning_content" else len(chat)
        text = reference(zoo[name], as_object(chat[:turn]), tools) or ""
        words = {"tools": "The weather in a city.", "tool_calls": "Oslo"}
        assert words.get(lack[1], chat[turn - 1].get("reasoning_content")) not in text, (
            name,
            key,
        )


def test_what_is_learned_is_what_trls_training_templates_mark(zoo, outcomes):
    """Up to the spaces behind a turn's end token, which generation never comes to."""
    compared = 0
    for (name, key), (kind, _) in outcomes.items():
        if kind != "right" or not name.endswith("_training"):
            continue
        tokenizer, (chat, tools) = zoo[name], CHATS[key]
        chat = as_object(chat)
        examples = render(tokenizer, chat, tools=tools)
        asks = {"return_dict": True, "return_assistant_tokens_mask": True, "tokenize": True}
        marked: Any = reference(tokenizer, chat, tools, **asks)
        if marked is None:
            continue  # it reads contents in parts
        ids, ours = marked["input_ids"], examples[0]
        if len(examples) > 1 or ours.tokens[: len(ids)].tolist() != ids:
            continue  # several examples, or contents and arguments in another form
        for token, learn, mark in zip(
            ids, ours.loss_weights, marked["assistant_masks"], strict=False
        ):
            assert bool(learn) == bool(mark) or not tokenizer.decode([token]).strip(), (name, key)
        compared += 1
    assert compared > 60
