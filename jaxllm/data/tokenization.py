# SPDX-License-Identifier: Apache-2.0
"""Tokenize records: one encoder for each kind of data that a verb reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jaxllm.config import DataSection, Source, TrainConfig
from jaxllm.data.chat import SEPARATE_EXAMPLE, prompt_tokens, render
from jaxllm.data.conversations import (
    Pair,
    parse_conversation,
    parse_judged,
    parse_pair,
    parse_prompt,
    parse_text,
)
from jaxllm.data.template import embedded_user_template, template_fields
from jaxllm.errors import UserError

USER_TEMPLATE_SKIPPED = "the model's user_template is not applied, because columns are missing"

# The outcome of an example.
COMPLETE, TRUNCATED, TOO_LONG, NOTHING_TO_LEARN, NO_PREFERENCE = range(5)
DROPPED = {TOO_LONG, NOTHING_TO_LEARN}  # outcomes of an answer or a conversation without tokens

_NO_TOKENS = np.zeros(0, np.int32)
_NO_WEIGHTS = np.zeros(0, np.float32)


class Encoded(NamedTuple):
    """A tokenized example: a row of `examples.FEATURES`, which documents the fields."""

    tokens: np.ndarray = _NO_TOKENS
    loss_weights: np.ndarray = _NO_WEIGHTS
    learned: int = 0
    outcome: int = COMPLETE
    boundary: int = 0
    value: float = 0.0
    record: str = ""
    part: int = 0
    notes: str = ""


def _encode_documents(
    records, source: Source, cfg: TrainConfig, tokenizer: Any
) -> Iterator[Encoded]:
    """Documents, each with exactly one eos at its end, and bos if the tokenizer adds it."""
    texts = [parse_text(record, source.columns, location) for location, record in records]
    encoded = tokenizer(
        texts,
        split_special_tokens=True,  # "<eos>" in a text is five characters
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    eos = tokenizer.eos_token_id
    for text, ids in zip(texts, encoded, strict=True):
        if not ids or ids[-1] != eos:
            ids.append(eos)
        if not text or len(ids) < 2:
            yield Encoded(outcome=NOTHING_TO_LEARN)
        else:
            yield Encoded(np.array(ids, np.int32), learned=len(ids) - 1)


def _with_user_template(
    record: dict[str, Any], source: Source, cfg: TrainConfig, tokenizer: Any
) -> tuple[DataSection, tuple[str, ...]]:
    """(the data section to parse a record with, notes).

    The section has the user_template embedded in the model's chat template, unless the run sets
    one, or the record lacks a column of it.
    """
    data, embedded = cfg.data, embedded_user_template(tokenizer)
    if data.user_template is not None or embedded is None:
        return data, ()
    columns = {name for name, value in record.items() if value is not None}
    columns |= {name for name, column in source.columns.items() if column in columns}
    if template_fields(embedded) - {"question", *columns}:
        return data, (USER_TEMPLATE_SKIPPED,)
    return replace(data, user_template=embedded), ()


def _render_examples(
    chat: dict[str, Any], cfg: TrainConfig, tokenizer: Any, location: str, learn: str | None = None
) -> list[Encoded]:
    """The examples of a conversation, truncated to max_length at the end.

    learn: "last" or "all" for one answer, which is a separate example anyway, so this is not noted;
    None is `data.learn`.
    """
    data = cfg.data
    options: dict[str, Any] = {"learn": learn or data.learn, "date": data.date}
    with _at(location):
        messages = _apply_reasoning(chat["messages"], data)
        examples = render(
            tokenizer,
            messages,
            tools=chat["tools"],
            train_on_prompt=data.train_on_prompt,
            **options,
        )
    ignored = {SEPARATE_EXAMPLE} if learn else set()
    return [
        _truncate(e.tokens, e.loss_weights, cfg, [n for n in e.notes if n not in ignored])
        for e in examples
    ]


def _apply_reasoning(messages: list[dict[str, Any]], data: DataSection) -> list[dict[str, Any]]:
    """The messages, without reasoning if `data.reasoning` is drop."""
    if data.reasoning == "learn":
        return messages
    return [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]


@contextmanager
def _at(location: str) -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise UserError(f"{location}: the record is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{location}: {error}") from error


def _truncate(
    tokens: np.ndarray, loss_weights: np.ndarray, cfg: TrainConfig, notes: Iterable[str] = ()
) -> Encoded:
    """An example of at most max_length tokens, or of none if it is dropped."""
    outcome = COMPLETE
    if len(tokens) > cfg.data.max_length:
        tokens, loss_weights = tokens[: cfg.data.max_length], loss_weights[: cfg.data.max_length]
        outcome = TRUNCATED if cfg.data.too_long == "truncate" else TOO_LONG
    learned = int(np.count_nonzero(loss_weights[1:]))
    if not learned:
        outcome = NOTHING_TO_LEARN if outcome == COMPLETE else TOO_LONG
    if outcome in DROPPED:
        return Encoded(outcome=outcome, notes="\n".join(notes))
    return Encoded(tokens, loss_weights, learned, outcome, notes="\n".join(notes))


def _with_notes(example: Encoded, notes: Iterable[str], **fields: Any) -> Encoded:
    return example._replace(notes="\n".join([*example.notes.splitlines(), *notes]), **fields)


def _encode_conversations(
    records, source: Source, cfg: TrainConfig, tokenizer: Any
) -> Iterator[Encoded]:
    """Conversations, each as one or several examples."""
    for location, record in records:
        data, source_notes = _with_user_template(record, source, cfg, tokenizer)
        chat = parse_conversation(record, source, data, location)
        for part, example in enumerate(_render_examples(chat, cfg, tokenizer, location)):
            yield _with_notes(example, () if part else (*source_notes, *chat["notes"]), part=part)


def _encode_pairs(records, source: Source, cfg: TrainConfig, tokenizer: Any) -> Iterator[Encoded]:
    """Pairs: the chosen answer, then the rejected one, each after the prompt."""
    for location, record in records:
        data, source_notes = _with_user_template(record, source, cfg, tokenizer)
        pair = parse_pair(record, source, data, location)
        source_notes = (*source_notes, *pair.notes)
        if not pair.has_preference:
            yield Encoded(outcome=NO_PREFERENCE, notes="\n".join(source_notes))
            continue
        if pair.prompt is None:
            answers = _tokenize_texts(pair, cfg, tokenizer)
        else:
            answers = [
                _render_answer(pair, answer, cfg, tokenizer, location)
                for answer in (pair.chosen, pair.rejected)
            ]
        chosen, rejected = answers
        own_notes = sorted({*chosen.notes.splitlines(), *rejected.notes.splitlines()})
        notes = "\n".join((*source_notes, *own_notes))
        dropped = {answer.outcome for answer in answers} & DROPPED
        if not dropped and np.array_equal(chosen.tokens, rejected.tokens):
            dropped = {TOO_LONG}  # equal after truncation
        if dropped:
            yield Encoded(outcome=min(dropped), notes=notes)
            continue
        yield Encoded(
            np.concatenate([chosen.tokens, rejected.tokens]),
            np.concatenate([chosen.loss_weights, rejected.loss_weights]),
            chosen.learned + rejected.learned,
            max(chosen.outcome, rejected.outcome),
            len(chosen.tokens),
            pair.margin,
            notes=notes,
        )


def _render_answer(
    pair: Pair, answer: list[dict[str, Any]], cfg: TrainConfig, tokenizer: Any, location: str
) -> Encoded:
    """A pair's prompt and one of its answers, with a loss on the answer only."""
    prompt: list[dict[str, Any]] = [message | {"weight": 0.0} for message in pair.prompt or ()]
    chat = {"messages": prompt + answer, "tools": pair.tools}
    examples = _render_examples(chat, cfg, tokenizer, location, learn="all")
    if len(examples) > 1:
        raise UserError(
            f"{location}: an answer has several assistant turns, which the chat template renders "
            "differently if messages follow; move all but the last turn to the prompt, or set "
            "data.template to a prefix-preserving template"
        )
    return examples[0]


def _tokenize_texts(pair: Pair, cfg: TrainConfig, tokenizer: Any) -> list[Any]:
    """A pair of complete texts, whose common prefix is the prompt."""
    answers = tokenizer([pair.chosen, pair.rejected], split_special_tokens=True)["input_ids"]
    eos = tokenizer.eos_token_id
    answers = [ids if ids and ids[-1] == eos else [*ids, eos] for ids in answers]
    answers = [np.array(ids, np.int32) for ids in answers]
    equal = answers[0][: len(answers[1])] == answers[1][: len(answers[0])]
    start = len(equal) if equal.all() else int((~equal).argmax())
    weights = [(np.arange(len(ids)) >= start).astype(np.float32) for ids in answers]
    return [_truncate(*answer, cfg) for answer in zip(answers, weights, strict=True)]


def _encode_judged(records, source: Source, cfg: TrainConfig, tokenizer: Any) -> Iterator[Encoded]:
    """Conversations with a judgment of the last answer."""
    for location, record in records:
        data, source_notes = _with_user_template(record, source, cfg, tokenizer)
        chat, good = parse_judged(record, source, data, location)
        (example,) = _render_examples(chat, cfg, tokenizer, location, learn="last")
        example = _with_notes(example, (*source_notes, *chat["notes"]))
        if example.outcome not in DROPPED:
            boundary = int(np.argmax(example.loss_weights[1:] > 0)) + 1
            example = example._replace(boundary=boundary, value=1.0 if good else -1.0)
        yield example


def _encode_prompts(records, source: Source, cfg: TrainConfig, tokenizer: Any) -> Iterator[Encoded]:
    """Prompts with the generation prompt, and the record for reward functions.

    Long ones are dropped, since the question is at the end.
    """
    for location, record in records:
        data, source_notes = _with_user_template(record, source, cfg, tokenizer)
        prompt = parse_prompt(record, source, data, location)
        notes = "\n".join((*source_notes, *prompt.notes))
        messages = _apply_reasoning(prompt.messages, data)
        with _at(location):
            tokens = prompt_tokens(tokenizer, messages, tools=prompt.tools, date=data.date)
        if len(tokens) > data.max_length:
            yield Encoded(outcome=TOO_LONG, notes=notes)
            continue
        fields = {"at": location, "said": prompt.text, "columns": prompt.columns}
        fields["messages"] = prompt.messages
        yield Encoded(tokens, record=json.dumps(fields, default=str), notes=notes)


ENCODERS: dict[str, Callable[..., Iterator[Encoded]]] = {
    "text": _encode_documents,
    "chat": _encode_conversations,
    "pairs": _encode_pairs,
    "judged": _encode_judged,
    "prompts": _encode_prompts,
}
"""by `Verb.data`"""
