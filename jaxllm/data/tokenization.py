# SPDX-License-Identifier: Apache-2.0
"""Tokenize records: one encoder for each kind of data that a command reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxllm.config import DataSection, Source, TrainConfig
from jaxllm.data.chat import SEPARATE_EXAMPLE, prompt_tokens, render
from jaxllm.data.conversations import (
    Pair,
    Prompt,
    parse_conversation,
    parse_judged,
    parse_pair,
    parse_prompt,
    parse_text,
)
from jaxllm.data.template import embedded_user_template, template_fields
from jaxllm.errors import UserError
from jaxllm.untrusted import MAX_TEXT, rust

USER_TEMPLATE_SKIPPED = "the model's user_template is not applied, because columns are missing"

# The outcome of an example.
COMPLETE, TRUNCATED, TOO_LONG, NOTHING_TO_LEARN, NO_PREFERENCE = range(5)
DROPPED = {TOO_LONG, NOTHING_TO_LEARN}  # outcomes of an answer or a conversation without tokens

# A longer document is tokenized in pieces, since the tokenizer's memory is 50 times the text's: in
# characters, and what consecutive pieces have in common.
PIECE, OVERLAP = 1 << 20, 1 << 10

_NO_TOKENS = np.zeros(0, np.int32)
_NO_WEIGHTS = np.zeros(0, np.float32)


class Encoded(NamedTuple):
    """A tokenized example: a row of `examples.FEATURES`, which documents the fields."""

    tokens: np.ndarray = _NO_TOKENS
    loss_weights: np.ndarray = _NO_WEIGHTS
    learned: int = 0
    outcome: int = COMPLETE
    first: int = 0
    value: float = 0.0
    record: str = ""
    part: int = 0
    notes: tuple[str, ...] = ()


Noted = tuple[list[Encoded], list[str]]  # the examples of a record, and notes from its parser


def _encode_documents(records, source: Source, cfg: TrainConfig, tokenizer) -> Iterator[Encoded]:
    """Documents, each with exactly one eos at its end, and bos if the tokenizer adds it."""
    texts = [parse_text(record, source.columns, location) for location, record in records]
    encoded = tokenizer(
        [text[:PIECE] for text in texts],
        split_special_tokens=True,  # "<eos>" in a text is five characters
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    eos = tokenizer.eos_token_id
    for text, ids in zip(texts, encoded, strict=True):
        parts = [np.array(ids, np.int32)]
        if len(text) > PIECE:
            parts = _long_document(text, parts[0], tokenizer)
        if not len(parts[-1]) or parts[-1][-1] != eos:
            parts.append(np.array([eos], np.int32))
        tokens = np.concatenate(parts)
        if not text or len(tokens) < 2:
            yield Encoded(outcome=NOTHING_TO_LEARN)
        else:
            yield Encoded(tokens, learned=len(tokens) - 1)


def _long_document(text: str, first: np.ndarray, tokenizer) -> list[np.ndarray]:
    """The tokens of a text of more than PIECE characters, in parts. first: those of its first
    PIECE, with what the tokenizer adds to a text.

    Consecutive pieces overlap. They are joined between two words of the overlap where both have
    the same tokens on either side, as the complete text then has.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True

    def encode(start: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, the character each starts at) of the piece from `start`."""
        encoding = backend.encode(text[start : start + PIECE], add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        del encoding  # malloc cannot reuse its memory if arrays that outlive it lie behind it
        starts = np.fromiter((pair[0] for pair in offsets), np.int64, len(ids))
        return np.array(ids, np.int32), starts + start

    start, (tokens, places) = 0, encode(0)
    same = (i for i in range(len(first)) if np.array_equal(first[i : i + 9], tokens[:9]))
    lead = next(same, 0)
    tail = first[lead + len(tokens) :]
    parts = [first[:lead]]
    while start + PIECE < len(text):
        start += PIECE - OVERLAP
        more, later = encode(start)
        middle = start + OVERLAP // 2
        cut = _meeting(tokens, places, more, later, middle)
        if cut is None:  # a word longer than the overlap, which is cut at one of its tokens
            start = cut = int(min(places[places >= middle], default=middle))
            more, later = encode(start)
        parts.append(tokens[places < cut])
        tokens, places = more[later >= cut], later[later >= cut]
    return [*parts, np.concatenate([tokens, tail])]


def _meeting(
    tokens: np.ndarray, places: np.ndarray, more: np.ndarray, later: np.ndarray, middle: int
) -> int | None:
    """A character near `middle` at which a token starts in two overlapping pieces, between equal
    tokens; None if there is none. places, later: the character that each token starts at."""
    near = {int(at): i for i, at in enumerate(places) if at >= middle - OVERLAP // 4}
    for j in np.flatnonzero((later >= middle) & (later < middle + OVERLAP // 4)).tolist():
        i = near.get(int(later[j]), 0)
        if i >= 8 <= j and np.array_equal(tokens[i - 8 : i + 8], more[j - 8 : j + 8]):
            return int(later[j])
    return None


def _encode_parsed(
    parse, encode, records, source: Source, cfg: TrainConfig, tokenizer
) -> Iterator[Encoded]:
    """Parse each record, and encode it as one or several examples.

    encode: (parsed record, location, cfg, tokenizer) -> Noted. Its errors need no location.
    """
    for location, record in records:
        data, notes = _with_user_template(record, source, cfg, tokenizer)
        parsed = parse(record, source, data, location)
        try:
            with rust("the tokenizer cannot handle it"):
                examples, record_notes = encode(parsed, location, cfg, tokenizer)
        except RecursionError as error:
            raise UserError(f"{location}: the record is nested too deeply") from error
        except ValueError as error:
            raise UserError(f"{location}: {error}") from error
        for part, example in enumerate(examples):
            more = () if part else (*notes, *record_notes)
            yield example._replace(part=part, notes=example.notes + more)


def _with_user_template(
    record: dict[str, Any], source: Source, cfg: TrainConfig, tokenizer
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


def _encode_conversation(chat: dict[str, Any], _, cfg: TrainConfig, tokenizer) -> Noted:
    return _render_examples(chat["messages"], chat["tools"], cfg, tokenizer), chat["notes"]


def _encode_pair(pair: Pair, _, cfg: TrainConfig, tokenizer) -> Noted:
    """The chosen answer, then the rejected one, each after the prompt."""
    if not pair.has_preference:
        return [Encoded(outcome=NO_PREFERENCE)], pair.notes
    if pair.prompt is None:
        chosen, rejected = _tokenize_texts(pair, cfg, tokenizer)
    else:
        chosen = _render_answer(pair, pair.chosen, cfg, tokenizer)
        rejected = _render_answer(pair, pair.rejected, cfg, tokenizer)
    notes = tuple(sorted({*chosen.notes, *rejected.notes}))
    dropped = {chosen.outcome, rejected.outcome} & DROPPED
    if not dropped and np.array_equal(chosen.tokens, rejected.tokens):
        dropped = {TOO_LONG}  # equal after truncation
    if dropped:
        return [Encoded(outcome=min(dropped), notes=notes)], pair.notes
    example = Encoded(
        np.concatenate([chosen.tokens, rejected.tokens]),
        np.concatenate([chosen.loss_weights, rejected.loss_weights]),
        chosen.learned + rejected.learned,
        max(chosen.outcome, rejected.outcome),
        len(chosen.tokens),
        pair.margin,
        notes=notes,
    )
    return [example], pair.notes


def _tokenize_texts(pair: Pair, cfg: TrainConfig, tokenizer) -> list[Encoded]:
    """A pair of complete texts, whose common prefix is the prompt."""
    if max(len(pair.chosen), len(pair.rejected)) > MAX_TEXT:
        raise UserError(f"a text has more than {MAX_TEXT:,} characters; shorten or split it")
    answers = tokenizer([pair.chosen, pair.rejected], split_special_tokens=True)["input_ids"]
    eos = tokenizer.eos_token_id
    answers = [np.array(ids if ids[-1:] == [eos] else [*ids, eos], np.int32) for ids in answers]
    equal = answers[0][: len(answers[1])] == answers[1][: len(answers[0])]
    start = len(equal) if equal.all() else int((~equal).argmax())
    return [
        _truncate(ids, (np.arange(len(ids)) >= start).astype(np.float32), cfg) for ids in answers
    ]


def _render_answer(pair: Pair, answer: list[dict], cfg: TrainConfig, tokenizer) -> Encoded:
    """A pair's prompt and one of its answers, with a loss on the answer only."""
    prompt = [message | {"weight": 0.0} for message in pair.prompt or ()]
    examples = _render_examples([*prompt, *answer], pair.tools, cfg, tokenizer, learn="all")
    if len(examples) > 1:
        raise UserError(
            "an answer has several assistant turns, which the chat template renders differently if "
            "messages follow; move all but the last turn to the prompt, or set data.template to a "
            "prefix-preserving template"
        )
    return examples[0]


def _encode_judged(judged: tuple[dict, bool], _, cfg: TrainConfig, tokenizer) -> Noted:
    """A conversation with a judgment of its last answer."""
    chat, good = judged
    (example,) = _render_examples(chat["messages"], chat["tools"], cfg, tokenizer, learn="last")
    if example.outcome not in DROPPED:
        first = int(np.argmax(example.loss_weights[1:] > 0)) + 1
        example = example._replace(first=first, value=1.0 if good else -1.0)
    return [example], chat["notes"]


def _encode_prompt(prompt: Prompt, location: str, cfg: TrainConfig, tokenizer) -> Noted:
    """A prompt with the generation prompt, and the record for reward functions.

    A long one is dropped, since the question is at the end.
    """
    data = cfg.data
    messages = _apply_reasoning(prompt.messages, data)
    tokens = prompt_tokens(tokenizer, messages, tools=prompt.tools, date=data.date)
    if len(tokens) > data.length:
        return [Encoded(outcome=TOO_LONG)], prompt.notes
    record = {"at": location, "said": prompt.text, "columns": prompt.columns}
    record |= {"messages": prompt.messages, "tools": prompt.tools}
    text = json.dumps(record, default=str)
    return [Encoded(tokens, record=text)], prompt.notes


def _render_examples(
    messages: list[dict[str, Any]], tools: Any, cfg: TrainConfig, tokenizer, learn: Any = None
) -> list[Encoded]:
    """The examples of a conversation, truncated to max_length at the end.

    learn: "last" or "all" for one answer, which is a separate example anyway, so this is not noted;
    None is `data.learn`.
    """
    data = cfg.data
    examples = render(
        tokenizer,
        _apply_reasoning(messages, data),
        tools=tools,
        learn=learn or data.learn,
        train_on_prompt=data.train_on_prompt,
        date=data.date,
    )
    ignored = {SEPARATE_EXAMPLE} if learn else set()
    return [
        _truncate(e.tokens, e.loss_weights, cfg, tuple(n for n in e.notes if n not in ignored))
        for e in examples
    ]


def _apply_reasoning(messages: list[dict[str, Any]], data: DataSection) -> list[dict[str, Any]]:
    """The messages, without reasoning if `data.reasoning` is drop."""
    if data.reasoning == "learn":
        return messages
    return [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]


def _truncate(
    tokens: np.ndarray, loss_weights: np.ndarray, cfg: TrainConfig, notes: tuple[str, ...] = ()
) -> Encoded:
    """An example of at most max_length tokens, or of none if it is dropped."""
    outcome = COMPLETE
    if len(tokens) > cfg.data.length:
        tokens, loss_weights = tokens[: cfg.data.length], loss_weights[: cfg.data.length]
        outcome = TRUNCATED if cfg.data.too_long == "truncate" else TOO_LONG
    learned = int(np.count_nonzero(loss_weights[1:]))
    if not learned:
        outcome = NOTHING_TO_LEARN if outcome == COMPLETE else TOO_LONG
    if outcome in DROPPED:
        return Encoded(outcome=outcome, notes=notes)
    return Encoded(tokens, loss_weights, learned, outcome, notes=notes)


ENCODERS: dict[str, Callable[..., Iterator[Encoded]]] = {
    "text": _encode_documents,
    "chat": partial(_encode_parsed, parse_conversation, _encode_conversation),
    "pairs": partial(_encode_parsed, parse_pair, _encode_pair),
    "judged": partial(_encode_parsed, parse_judged, _encode_judged),
    "prompts": partial(_encode_parsed, parse_prompt, _encode_prompt),
}
"""by `Verb.data`"""
