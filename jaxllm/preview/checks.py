# SPDX-License-Identifier: Apache-2.0
"""Duplicates, overlap of training and evaluation data, and suspicious examples.

Exact copies are looked for among all examples; what takes more time, only among `limit` examples of
a set, which are drawn with a fixed seed.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import xxhash

from jaxllm.data.rows import Origin
from jaxllm.tokenizer import special_tokens

SHOWN = 3  # examples of a finding
CHARACTERS = 120  # of the text that is shown of an example
# Near duplicates: n-grams of tokens, permutations of MinHash, similarity (Jaccard) from which two
# examples count, and the least number of n-grams that are compared.
NGRAM, PERMUTATIONS, SIMILAR, LEAST = 5, 128, 0.8, 8
# The name of a turn or of its end in a common chat template; as text in an example, it says that
# the template was applied before.
MARKS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>", "<start_of_turn>")
MARKS += ("[INST]", "[/INST]", "<|endoftext|>", "<|assistant|>")
# UTF-8 that was read as Latin-1 or Windows-1252, and the replacement character.
DAMAGED = re.compile(
    "\ufffd(?!\\Z)|â€[\u0153\u2122\u009d\u009c\u0099\u201c\u201d]|Ã[\u00a0-\u00bf]"
)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
REPEATED, LONG = 0.1, 400  # size compressed / size, of a text of so many characters or more


@dataclass(frozen=True)
class Finding:
    """What a check found in a set."""

    name: str
    set: str
    count: int
    of: int
    """examples that were checked"""
    examples: tuple[tuple[Origin, Origin | None, str | None], ...] = ()
    """some of them, each with the one that it repeats, or with the text that was found in it"""
    note: str = ""


class Pool:
    """The examples of a set: those of its sources that are stored, one after the other."""

    def __init__(self, name: str, parts: Iterable[Any]):
        self.name = name
        parts = list(parts)
        self.sources = [part.examples for part in parts]
        self._source = np.repeat(np.arange(len(parts)), [len(part.indices) for part in parts])
        self._index = np.concatenate([part.indices for part in parts])

    def __len__(self) -> int:
        return len(self._index)

    def origin(self, k: int) -> Origin:
        return self.sources[self._source[k]], int(self._index[k])

    def tokens(self, k: int) -> np.ndarray:
        examples, index = self.origin(k)
        return examples.tokens(index)

    def halves(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens before and from `first` on: a pair's answers, a judged prompt and answer."""
        examples, index = self.origin(k)
        tokens, first = examples.tokens(index), examples.first[index]
        return tokens[:first], tokens[first:]

    def prompt(self, k: int) -> np.ndarray:
        """The tokens before the first that is learned."""
        examples, index = self.origin(k)
        tokens, weights = examples.tokens(index), examples.learn(index)
        return tokens[: int((weights[1:] > 0).argmax()) + 1] if len(weights) else tokens

    def values(self) -> np.ndarray:
        """`Examples.value` of each."""
        found = np.empty(len(self), np.float32)
        for number, examples in enumerate(self.sources):
            here = self._source == number
            found[here] = examples.value[self._index[here]]
        return found

    def record(self, k: int) -> tuple[int, int]:
        """(source, record) of an example; several examples may be of one record."""
        examples, index = self.origin(k)
        return int(self._source[k]), int(examples.source_record[index])

    def some(self, limit: int) -> np.ndarray:
        """`limit` of the examples, ascending; 0 = all."""
        if not limit or len(self) <= limit:
            return np.arange(len(self))
        return np.sort(np.random.default_rng(0).choice(len(self), limit, replace=False))


def check_examples(
    train: Pool | None, evals: Sequence[Pool], tokenizer: Any, form: str, limit: int
) -> list[Finding]:
    """What all checks find. form: of the training data (`Verb.data`)."""
    pools = [pool for pool in (train, *evals) if pool is not None]
    hashes = {pool.name: _hashes(map(pool.tokens, range(len(pool))), len(pool)) for pool in pools}
    findings = [_copies(pool, hashes[pool.name]) for pool in pools]
    if form in ("pairs", "judged"):
        findings += [_contradictions(pool, form) for pool in pools]
    for pool in evals:
        if train is None:
            break
        ours, theirs = hashes[pool.name], hashes["train"]
        findings.append(_common("in the training data too", pool, train, ours, theirs))
        if form in ("chat", "pairs", "judged"):
            ours, theirs = (_hashes(map(p.prompt, range(len(p))), len(p)) for p in (pool, train))
            known = np.isin(hashes[pool.name], hashes["train"])
            name = "prompt in the training data, with another answer"
            findings.append(_common(name, pool, train, ours, theirs, known))
    findings += near_duplicates(train, evals, hashes, limit)
    for pool in pools:
        findings += _suspicious(pool, tokenizer, form, limit)
    return findings


# ---- copies


def _hashes(arrays: Iterable[np.ndarray], count: int) -> np.ndarray:
    """uint64 [count]: a hash of each array."""
    return np.fromiter((xxhash.xxh3_64_intdigest(a.tobytes()) for a in arrays), np.uint64, count)


def _copies(pool: Pool, hashes: np.ndarray) -> Finding:
    """Examples whose tokens are those of an earlier one."""
    _, first, group, counts = np.unique(
        hashes, return_index=True, return_inverse=True, return_counts=True
    )
    repeated = np.setdiff1d(np.arange(len(pool)), first)
    often = np.argsort(-counts, kind="stable")[:SHOWN]
    shown = [int(repeated[group[repeated] == g][0]) for g in often if counts[g] > 1]
    pairs = tuple((pool.origin(k), pool.origin(int(first[group[k]])), None) for k in shown)
    most = f"one of them {counts.max():,} times" if counts.max() > 2 else ""
    return Finding("exact copy of another", pool.name, len(repeated), len(pool), pairs, most)


def _common(
    name: str, pool: Pool, train: Pool, ours: np.ndarray, theirs: np.ndarray, known: Any = False
) -> Finding:
    """Examples of `pool` with a hash that an example of `train` has, but those that are `known`."""
    found = np.flatnonzero(np.isin(ours, theirs) & ~np.broadcast_to(known, ours.shape))
    order = np.argsort(theirs, kind="stable")
    places = order[np.searchsorted(theirs[order], ours[found[:SHOWN]])]
    pairs = zip(found[:SHOWN].tolist(), places.tolist(), strict=True)
    shown = tuple((pool.origin(k), train.origin(j), None) for k, j in pairs)
    return Finding(name, pool.name, len(found), len(pool), shown)


def _contradictions(pool: Pool, form: str) -> Finding:
    """Answers that are chosen in one pair and rejected in another, or judged both good and bad."""
    everything = range(len(pool))
    if form == "pairs":
        good, bad = (_hashes((pool.halves(k)[i] for k in everything), len(pool)) for i in (0, 1))
        return _common("chosen answer that another pair rejects", pool, pool, good, bad)
    hashes, is_good = _hashes(map(pool.tokens, everything), len(pool)), pool.values() > 0
    both = np.isin(hashes, hashes[is_good]) & np.isin(hashes, hashes[~is_good])
    found = np.flatnonzero(both)
    shown = tuple((pool.origin(int(k)), None, None) for k in found[:SHOWN])
    return Finding("answer judged both good and bad", pool.name, len(found), len(pool), shown)


# ---- near duplicates


def near_duplicates(
    train: Pool | None, evals: Sequence[Pool], hashes: dict[str, np.ndarray], limit: int
) -> list[Finding]:
    """Examples that share most of their n-grams of tokens with another one, by MinHash.

    Of exact copies only the first is compared. The n-grams that more than half of a source's
    examples have, such as those of a chat template and a system prompt, do not count.
    """
    pools = [pool for pool in (train, *evals) if pool is not None]
    if find_spec("datasketch") is None:
        missing = "not checked: pip install 'jaxllm[preview]'"
        return [Finding("near duplicate", pools[0].name, 0, 0, note=missing)]
    from datasketch import MinHash, MinHashLSH

    findings = []
    index = MinHashLSH(threshold=SIMILAR, num_perm=PERMUTATIONS)
    stored: dict[int, Any] = {}
    for pool in pools:
        within = pool is train or train is None
        name = "near duplicate of another" if within else "near duplicate in the training data"
        if train is None:
            index, stored = MinHashLSH(threshold=SIMILAR, num_perm=PERMUTATIONS), {}
        others = pool if within else train
        assert others is not None
        some = pool.some(limit)
        _, first = np.unique(hashes[pool.name][some], return_index=True)
        some = some[np.sort(first)]
        if not within:
            some = some[~np.isin(hashes[pool.name][some], hashes[others.name])]
        grams = _informative(pool, some)
        sketches = MinHash.generator(
            (grams[k].tolist() for k in grams), num_perm=PERMUTATIONS, hashfunc=int
        )
        found = []
        for k, sketch in zip(grams, sketches, strict=True):
            near: list[int] = [
                j
                for j in map(int, index.query(sketch))  # type: ignore[arg-type]
                if stored[j].jaccard(sketch) >= SIMILAR
                and not (within and pool.record(k) == pool.record(j))
            ]
            if near:
                found.append((k, min(near)))
            elif within:
                index.insert(k, sketch)
                stored[k] = sketch
        shown = tuple((pool.origin(k), others.origin(j), None) for k, j in found[:SHOWN])
        findings.append(Finding(name, pool.name, len(found), len(some), shown))
    return findings


def _informative(pool: Pool, some: np.ndarray) -> dict[int, np.ndarray]:
    """{example: its n-grams as ascending uint32 hashes, without the common ones of its source}, of
    those with at least LEAST."""
    by_source: dict[int, list[int]] = {}
    for k in some.tolist():
        by_source.setdefault(pool.record(k)[0], []).append(k)
    found = {}
    for members in by_source.values():
        grams = {k: _ngrams(pool.tokens(k)) for k in members}
        every = max(len(members) // 1000, 1)  # of a thousand examples, which are enough
        values, counts = np.unique(
            np.concatenate([grams[k] for k in members[::every]]), return_counts=True
        )
        common = values[counts > max(len(members[::every]) / 2, 2)]
        for k in members:
            left = np.setdiff1d(grams[k], common, assume_unique=True)
            if len(left) >= LEAST:
                found[k] = left
    return dict(sorted(found.items()))


_ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
_FACTORS = np.array([*_ODD, *(_ODD[:2] ^ np.uint64(0x5DEECE66D << 1))], np.uint64)


def _ngrams(tokens: np.ndarray) -> np.ndarray:
    """Hashes of the n-grams of a text, uint32 and ascending, each once."""
    if len(tokens) < NGRAM:
        return np.zeros(0, np.uint32)
    windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64) + 1, NGRAM)
    return np.unique(((windows * _FACTORS).sum(1) >> np.uint64(32)).astype(np.uint32))


# ---- suspicious examples


def _suspicious(pool: Pool, tokenizer: Any, form: str, limit: int) -> list[Finding]:
    some = pool.some(limit).tolist()
    own = str(tokenizer.chat_template or "")  # may write marks as plain text, as Llama 2's does
    others = {mark for mark in MARKS if mark not in own}
    names = [name for name in {*special_tokens(tokenizer)} | others if len(name) > 3]
    marks = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id not in ends else None
    tests: dict[str, Callable[[np.ndarray, str], Any]] = {
        "special token or chat mark as plain text": lambda ids, text: marks.search(text),
        "damaged characters (wrong encoding)": lambda ids, text: DAMAGED.search(text),
        "control characters": lambda ids, text: CONTROL.search(text),
        "text that repeats itself": _repeats,
        "unknown tokens": lambda ids, text: unknown is not None and (ids == unknown).any(),
        "two BOS tokens at the beginning": lambda ids, text: (
            len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id
        ),
    }
    empty = {"text": "empty document", "prompts": "empty prompt"}.get(form, "empty answer")
    found: dict[str, list[tuple[int, str | None]]] = {name: [] for name in (empty, *tests)}
    for start in range(0, len(some), 256):
        block = some[start : start + 256]
        for k, text in zip(block, texts_of(tokenizer, map(pool.tokens, block)), strict=True):
            if _is_empty(pool, k, text, tokenizer, form):
                found[empty].append((k, None))
            for name, test in tests.items():
                if result := test(pool.tokens(k), text):
                    is_match = isinstance(result, re.Match)
                    found[name].append((k, _around(result) if is_match else None))
    return [
        Finding(
            name,
            pool.name,
            len(members),
            len(some),
            tuple((pool.origin(k), None, text) for k, text in members[:SHOWN]),
        )
        for name, members in found.items()
    ]


def _around(match: re.Match[str]) -> str:
    """A match with the text around it, as one line."""
    room = (CHARACTERS - len(match[0])) // 2
    start, end = max(match.start() - room, 0), match.end() + room
    text = re.sub(r"\s+", " ", match.string[start:end])
    return f"{'…' * (start > 0)}{text}{'…' * (end < len(match.string))}"


def texts_of(tokenizer: Any, sequences: Iterable[np.ndarray]) -> list[str]:
    """The text of each sequence of token ids, without special tokens."""
    backend = tokenizer.backend_tokenizer
    return backend.decode_batch([ids.tolist() for ids in sequences], skip_special_tokens=True)


def _repeats(ids: np.ndarray, text: str) -> bool:
    data = text.encode(errors="replace")
    return len(text) >= LONG and len(zlib.compress(data, 1)) < REPEATED * len(data)


def _is_empty(pool: Pool, k: int, text: str, tokenizer: Any, form: str) -> bool:
    """True if nothing is learned but white space and special tokens; of a prompt, if it has no
    text."""
    examples, index = pool.origin(k)
    if form == "text":
        return not text.strip()
    if form == "prompts":
        return not str(json.loads(examples.record(index))["said"]).strip()
    weights = examples.learn(index)
    if np.count_nonzero(weights[1:]) > 16:
        return False
    learned = examples.tokens(index)[1:][weights[1:] > 0]
    return not texts_of(tokenizer, [learned])[0].strip()


# ---- examples as text


def snippet(tokenizer: Any, origin: Origin) -> str:
    """An example as one line: the end of what comes before its first learned text, and that; of a
    prompt, its text."""
    examples, index = origin
    if record := examples.record(index):
        return _cut(" ".join(str(json.loads(record)["said"]).split()), CHARACTERS)
    tokens, weights = examples.tokens(index), examples.learn(index)
    start, end = 0, len(tokens)
    if len(weights):
        start = int((weights[1:] > 0).argmax()) + 1
        end = start + int((np.append(weights[start:], 0) <= 0).argmax())
    prompt, answer = texts_of(
        tokenizer, [tokens[max(start - 40, 0) : start], tokens[start : min(start + 60, end)]]
    )
    prompt, answer = (" ".join(text.split()) for text in (prompt, answer))
    half = CHARACTERS // 2
    if not len(weights):
        return _cut(answer, CHARACTERS)
    tail = prompt if len(prompt) <= half else f"…{prompt[-half:]}"
    return f"{tail} → {_cut(answer, half)}"


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[:size]}…"


def all_examples(findings: Sequence[Finding]) -> Iterator[Origin]:
    """The examples that are shown, in order."""
    for finding in findings:
        for example, other, _ in finding.examples:
            yield example
            if other is not None:
                yield other
