# SPDX-License-Identifier: Apache-2.0
"""Separate prompts from answers, where both repeat messages of the other."""

from __future__ import annotations

from typing import Any

from jaxllm.data.messages import ParseContext, message_text
from jaxllm.errors import seen

PROMPT_FORMS = (
    "messages, conversations, prompt, question, or instruction (and input, system, history)"
)
# Roles of a prompt's messages. An answer begins with another role.
_PROMPT_ROLES = ("system", "developer", "user")
_OTHER_CONTENT = ("tool_calls", "reasoning_content")  # content of a message other than text


def split_pair(
    prompt: list[dict], chosen: list[dict], rejected: list[dict], context: ParseContext
) -> tuple[list[dict], list[dict], list[dict]]:
    """(prompt, chosen, rejected), where only the first has the prompt's messages.

    The common prefix of both answers belongs to the prompt; each answer keeps at least a message.
    """
    equal = [_same_messages([a], [b]) for a, b in zip(chosen[:-1], rejected[:-1], strict=False)]
    count = (*equal, False).index(False)
    shared = chosen[:count]
    answers = {"chosen": chosen[count:], "rejected": rejected[count:]}
    if not prompt and not shared:
        raise context.error(
            "found no prompt, and chosen and rejected begin with different messages; a prompt can "
            f"be {PROMPT_FORMS}"
        )
    question = list(prompt)
    while len(question) > 1 and question[-1]["role"] == "assistant":
        question.pop()
    trailing = prompt[len(question) :]
    if any(_same_messages((shared + answer)[: len(prompt)], prompt) for answer in answers.values()):
        shared = shared or question  # `prompt` is a prefix of a conversation
    else:
        suffixes = [suffix for answer in answers.values() for suffix in (answer, shared + answer)]
        if not any(_same_messages(suffix[: len(trailing)], trailing) for suffix in suffixes):
            context.note(
                "the answer at the end of the prompt is ignored; the pair's answers are used"
            )
        shared = merge_prompt(question, shared, "chosen and rejected", context)
    for name, answer in answers.items():
        overlap = answer[: len(shared)]
        if not _same_messages(overlap, shared):
            overlap = answer[: prompt_message_count(answer)]
        if overlap and (
            len(overlap) == len(answer) or not _same_messages(overlap, shared[-len(overlap) :])
        ):
            raise context.error(
                f"{name} begins with the {overlap[0]['role']} message "
                f"{seen(message_text(overlap[0]))}, but the prompt does not end with it; an "
                "answer must begin with an assistant message"
            )
        answers[name] = answer[len(overlap) :]
    return shared, answers["chosen"], answers["rejected"]


def merge_prompt(
    prompt: list[dict], shared: list[dict], where: str, context: ParseContext
) -> list[dict]:
    """The prompt from the column `prompt` and `shared`, the messages that answers begin with.

    One contains the other, or they overlap at the end of `prompt`. Raises UserError otherwise.
    """
    first_role = shared[0]["role"] if shared else "assistant"
    only_system = all(m["role"] in _PROMPT_ROLES[:2] for m in prompt)
    if first_role not in _PROMPT_ROLES or (only_system and first_role == "user"):
        return prompt + shared
    if any(_same_messages(shared[i : i + len(prompt)], prompt) for i in range(len(shared))):
        return shared
    for count in range(min(len(prompt), len(shared)), 0, -1):
        if _same_messages(prompt[-count:], shared[:count]):
            return prompt[:-count] + shared
    raise context.error(
        f"the prompt ends with {seen(message_text(prompt[-1]))}, but the messages of {where} "
        f"begin with {seen(message_text(shared[0]))}; keep one (data.drop_columns: [prompt])"
    )


def prompt_message_count(messages: list[dict]) -> int:
    """The number of messages before the first assistant or tool message."""
    return next(
        (i for i, m in enumerate(messages) if m["role"] not in _PROMPT_ROLES), len(messages)
    )


def _same_messages(first: list[dict], second: list[dict]) -> bool:
    """True if two lists of messages are equal, apart from white space around the texts."""

    def content(message: dict) -> tuple:
        text = message_text(message).strip()
        return message["role"], text, *map(message.get, _OTHER_CONTENT)

    return list(map(content, first)) == list(map(content, second))


def is_empty_answer(answer: Any) -> bool:
    """True if an answer has no text, tool calls or reasoning."""
    if isinstance(answer, str):
        return not answer.strip()
    return not any(message_text(m).strip() or any(map(m.get, _OTHER_CONTENT)) for m in answer)
