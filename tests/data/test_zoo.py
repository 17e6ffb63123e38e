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
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxllm.data.chat import render

FOLDER = Path(os.environ.get("JAXLLM_ZOO") or Path(__file__).parents[2] / ".venv" / "zoo")
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
    names = sorted(set(SPECIAL.findall(source)) | {"<bos_token>", "<eos_token>"})
    if "<|im_" in source:  # ChatML's, which many templates make of parts
        names = sorted({*names, "<|im_start|>", "<|im_end|>"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(names + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos_token>",
        eos_token="<eos_token>",
        extra_special_tokens=[n for n in names if not n.endswith("_token>")],
        chat_template=source,
    )


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


def reference(tokenizer, chat: list[dict], tools, **options) -> str | None:
    """What transformers renders; None where the template refuses."""
    try:
        return tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, **options)
    except Exception:
        return None


def as_object(chat: list[dict]) -> list[dict]:
    """The conversation with the arguments of its calls as objects."""
    return [m | {"tool_calls": [CALL]} if m.get("tool_calls") else m for m in chat]


def outcome(source: str, chat: list[dict], tools) -> tuple[str, str]:
    """(kind, detail): right, refused or wrong, or what the template itself refuses."""
    tokenizer = tokenizer_for(source)
    text = reference(tokenizer, chat, tools)
    try:
        examples = render(tokenizer, chat, tools=tools)
    except ValueError as error:
        return ("no reference" if text is None else "refused"), str(error)
    if text is None:
        return "more than the reference", ""
    answers = {i for i, m in enumerate(chat) if m["role"] == "assistant"}
    learned = [tokenizer.decode(e.tokens[e.learn > 0]) for e in examples]
    for example in examples:
        seen = tokenizer.decode(example.tokens)
        end = seen.removesuffix("<eos_token>")
        whole = seen == text or end == text
        starts = [
            reference(tokenizer, as_object(chat)[:i], tools, add_generation_prompt=True) or "\0"
            for i in answers
            if i
        ]
        starts += [reference(tokenizer, as_object(chat)[: i + 1], tools) or "\0" for i in answers]
        if not whole and not any(seen.startswith(start) for start in starts):
            return "wrong", f"tokens: {seen[-300:]!r}"
    for i in answers:
        content = (chat[i]["content"] or "").rpartition("</think>")[2].strip()
        if content not in "".join(learned):
            return "wrong", f"not learned: {content!r}, learned {learned}"
        thought = chat[i].get("reasoning_content")
        if thought and thought not in "".join(learned):
            return "wrong", f"not learned: {thought!r}, learned {learned}"
    for m in chat:
        if m["role"] in ("user", "system", "tool") and m["content"].strip() in "".join(learned):
            if len(m["content"].strip()) > 3:
                return "wrong", f"learned {m['content']!r}: {learned}"
    return "right", ""
