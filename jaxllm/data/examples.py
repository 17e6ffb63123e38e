# SPDX-License-Identifier: Apache-2.0
"""Sources -> tokenised examples, made once and kept as memory-mapped Arrow files.

The cache knows an example set by what went in: the bytes of the source, the tokenizer, the
settings that change tokens and the code that applies them. Names, workers and the size of map
batches do not matter.
"""

from __future__ import annotations

import bisect
import json
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date as Date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import xxhash

from jaxllm.config import DataSection, Source, TrainConfig
from jaxllm.data.chat import OWN_EXAMPLE, prompt_tokens, render
from jaxllm.data.conversations import (
    Pair,
    conversation_of,
    feedback_of,
    pair_of,
    prompt_of,
    text_of,
)
from jaxllm.data.sources import Located, content_hash, locate, read, records
from jaxllm.data.template import fields_of, template_of, user_template_of, with_settings
from jaxllm.errors import UserError

# The code that decides about tokens is an input too: a cache must not outlive its rules.
_CODE_FILES = ("formats", "sources", "messages", "conversations", "template", "turns", "chat")
_CODE_FILES += ("examples",)
_CODE = [Path(__file__).with_name(f"{name}.py") for name in _CODE_FILES]
_CODE.append(Path(__file__).parents[1] / "tokenizer.py")  # which tokens are special
_LIBRARIES = ("jinja2", "tokenizers", "transformers")

NOT_ASKED = "the model's user_template is not applied: its columns are missing"

# What became of an example.
KEPT, TRUNCATED, TOO_LONG, NOTHING_TO_LEARN, NO_PREFERENCE = range(5)

_FEATURES = datasets.Features(
    {
        "tokens": datasets.LargeList(datasets.Value("int32")),  # empty when dropped
        "learn": datasets.LargeList(datasets.Value("float32")),  # empty for documents
        "learned": datasets.Value("int32"),  # targets with a weight
        "fate": datasets.Value("int8"),
        "first": datasets.Value("int32"),  # tokens of a pair's chosen side, or of a judged prompt
        "value": datasets.Value("float32"),  # a pair's margin; 1 a good answer, -1 a bad one
        "record": datasets.Value("large_string"),  # JSON of what a reward function is told
        "part": datasets.Value("int32"),  # 0, or which further example of the same record
        "notes": datasets.Value("large_string"),  # what to tell of it, a line each
    }
)


class Examples:
    """Tokenised examples of one source, random access without a copy.

    lengths: int64 [N], 0 for a dropped example. learned: int64 [N], targets with a loss weight.
    fate: int8 [N]. first: int32 [N] and value: float32 [N] as in _FEATURES. source_record: int64
    [N], ascending: the record that each was made of. notes: {what to tell: of how many examples}.
    `name`, `split` (None where there are none), `content` (hash of the bytes read) and
    `fingerprint` (of the cache).
    """

    def __init__(
        self, table: Any, *, name: str, split: str | None, content: str, fingerprint: str
    ) -> None:
        self.name, self.split, self.content, self.fingerprint = name, split, content, fingerprint
        self._tokens = _Lists(table.data.column("tokens"))
        self._learn = _Lists(table.data.column("learn"))
        self.lengths = self._tokens.lengths
        self.learned = table.data.column("learned").to_numpy().astype(np.int64)
        self.fate, self.first, self.value = (
            table.data.column(name).to_numpy() for name in ("fate", "first", "value")
        )
        self._record = table.data.column("record")
        self.source_record = np.cumsum(table.data.column("part").to_numpy() == 0) - 1
        self.notes = _counted(table.data.column("notes"))

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, index: int) -> np.ndarray:
        """int32 [n]; a document's end with eos."""
        return self._tokens[index]

    def learn(self, index: int) -> np.ndarray:
        """float32 [n]: the weight of predicting each token of a conversation."""
        return self._learn[index]

    def record(self, index: int) -> str:
        """A prompt's JSON of what reward functions are told."""
        return self._record[index].as_py()


def _counted(notes: Any) -> dict[str, int]:
    """{line: in how many of the texts it is}."""
    found: Counter[str] = Counter()
    for text, count in ((x["values"], x["counts"]) for x in notes.value_counts().to_pylist()):
        found.update({line: count for line in (text or "").splitlines()})
    return dict(sorted(found.items()))


class _Lists:
    """An Arrow column of lists as numpy views over its chunks."""

    def __init__(self, column: Any) -> None:
        self._firsts: list[int] = []  # index of each chunk's first list
        self._chunks: list[tuple[np.ndarray, np.ndarray]] = []  # offsets, values
        count = 0
        for chunk in column.chunks:
            if len(chunk):
                self._firsts.append(count)
                self._chunks.append((chunk.offsets.to_numpy(), chunk.values.to_numpy()))
                count += len(chunk)
        lengths = [np.diff(offsets) for offsets, _ in self._chunks]
        self.lengths = np.concatenate(lengths or [np.zeros(0)]).astype(np.int64)

    def __getitem__(self, index: int) -> np.ndarray:
        chunk = bisect.bisect_right(self._firsts, index) - 1
        offsets, values = self._chunks[chunk]
        at = index - self._firsts[chunk]
        return values[offsets[at] : offsets[at + 1]]


def tokenize(
    source: Source,
    cfg: TrainConfig,
    tokenizer: Any,
    tokenizer_hash: str,
    *,
    held_out: bool = False,
) -> Examples:
    """The examples of `source`: documents, conversations, pairs, judged answers or prompts, as the
    objective reads them.

    Reads them from the cache when the same bytes were tokenised before with the same tokenizer
    (`tokenizer_hash` is its `fingerprint`) and settings. What is `held_out` must name one of
    several splits. Raises ValueError for an empty source and for records that do not fit.
    """
    if source.streaming:
        raise UserError(
            f"{source.path}: streaming is for data.train of pretrain; what is held out, or of "
            "another objective, is read whole: leave it out"
        )
    tokenizer = with_settings(tokenizer, cfg.data)
    # One day, though midnight passes.
    cfg = replace(cfg, data=replace(cfg.data, date=cfg.data.date or str(Date.today())))
    with _progress_bars(False):
        located = locate(source, held_out=held_out)
    content = content_hash(located.files)
    settings = _settings(cfg, tokenizer) | {
        "content": content,
        "format": located.format,
        "split": located.split,
        "columns": source.columns,
        "max_samples": source.max_samples,
        "tokenizer": tokenizer_hash,
    }
    key, root = cache_key(settings), cache_root(cfg)
    if not (root / key).is_dir():
        with tempfile.TemporaryDirectory(dir=root, prefix="making-") as folder:
            made = tokenized(source, cfg, tokenizer, located, Path(folder))
            with _progress_bars(False):
                made.save_to_disk(str(Path(folder) / "examples"))
            try:
                os.rename(Path(folder) / "examples", root / key)
            except OSError:
                if not (root / key).is_dir():  # otherwise another process was first
                    raise
    with _progress_bars(False):
        table = datasets.load_from_disk(str(root / key))
    return Examples(table, name=source.path, split=located.split, content=content, fingerprint=key)


def tokenized(
    source: Source, cfg: TrainConfig, tokenizer: Any, located: Located, folder: Path
) -> Any:
    """The `datasets.Dataset` of _FEATURES of what was located, in a file of `folder`."""
    with _progress_bars(False):
        raw = read(located, folder, source.max_samples)
    return _map(source, cfg, tokenizer, raw, folder / "tokens.arrow")


def cache_root(cfg: TrainConfig) -> Path:
    """The folder of tokenised data, made where it is missing."""
    try:
        root = Path(cfg.data.cache_dir or "~/.cache/jaxllm").expanduser()
    except RuntimeError:
        raise UserError(
            "there is no home directory for tokenized data; give data.cache_dir"
        ) from None
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"data.cache_dir: {root} is a file, or lies in one") from None
    return root


def cache_key(settings: dict[str, Any]) -> str:
    """Hash of settings and of the code that applies them."""
    versions = {name: metadata.version(name) for name in _LIBRARIES}
    whole = settings | {"code": content_hash(_CODE), "libraries": versions}
    return xxhash.xxh3_128_hexdigest(json.dumps(whole, sort_keys=True).encode())


def fingerprint(tokenizer: Any) -> str:
    """Hash of what a tokenizer does to text."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("truncation", "padding"):
        del state[name]  # left by the latest call, not by the tokenizer's files
    parts = [state, tokenizer.special_tokens_map]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


def _settings(cfg: TrainConfig, tokenizer: Any) -> dict[str, Any]:
    """The settings that change tokens."""
    if cfg.verb.data == "text":
        return {"objective": "pretrain"}
    data = cfg.data
    templates = [template_of(tokenizer, tools=tools) for tools in (None, [{}])]
    asks_date = any("strftime_now" in template for template in templates)
    return {
        "reader": READERS[cfg.objective].__name__,
        "templates": templates,
        "date": data.date if asks_date else None,
        "user_template": data.user_template,
        "reasoning": data.reasoning,
        "roles": data.roles,
        "drop_columns": data.drop_columns,
        "max_length": data.max_length,
        "too_long": data.too_long,
        "learn": data.learn,
        "train_on_prompt": data.train_on_prompt,
    }


def _map(source: Source, cfg: TrainConfig, tokenizer: Any, raw: Any, file: Path) -> Any:
    """The dataset of _FEATURES made from `raw` by `data.workers` processes.

    0 is one a core, and at most as many as have 2,000 examples each, or starting them takes longer.
    """
    if not len(raw):
        raise UserError(f"{source.path}: holds no examples")
    each = READERS[cfg.objective]
    workers = min(cfg.data.workers or min(_cores(), len(raw) // 2000), len(raw))
    with warnings.catch_warnings(), _progress_bars(cfg.log.progress):
        # JAX warns of forks, but the children tokenise and never enter JAX.
        warnings.filterwarnings("ignore", message=".*fork", category=RuntimeWarning)
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        return raw.map(
            partial(_tokenize_batch, each, source, cfg, tokenizer),
            batched=True,
            batch_size=100,
            with_indices=True,
            remove_columns=raw.column_names,
            features=_FEATURES,
            num_proc=workers if workers > 1 else None,
            cache_file_name=str(file),
            load_from_cache_file=False,
            new_fingerprint="unused",  # the key is ours; hashing a closure with a tokenizer is slow
            desc=f"tokenize {Path(source.path).name}",
        )


def _cores() -> int:
    """Cores that this process may use; all of them where the system does not say (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    before = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()


def _tokenize_batch(each, source, cfg, tokenizer, batch, indices) -> dict[str, list]:
    rows = list(each(records(batch, indices, source.path), source, cfg, tokenizer))
    return {name: [row[i] for row in rows] for i, name in enumerate(_FEATURES)}


_NONE = np.zeros(0, np.int32)
_NO_WEIGHTS = np.zeros(0, np.float32)


class _Row(NamedTuple):
    """A row of _FEATURES."""

    tokens: np.ndarray = _NONE
    learn: np.ndarray = _NO_WEIGHTS
    learned: int = 0
    fate: int = KEPT
    first: int = 0
    value: float = 0.0
    record: str = ""
    part: int = 0
    notes: str = ""


def _documents(pairs, source: Source, cfg: TrainConfig, tokenizer: Any) -> Iterator[_Row]:
    """Each document's tokens, ended by exactly one eos; begun by bos if the tokenizer does so."""
    texts = [text_of(record, source.columns, at) for at, record in pairs]
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
            yield _Row(fate=NOTHING_TO_LEARN)
        else:
            yield _Row(np.array(ids, np.int32), learned=len(ids) - 1)


def _asked(
    record: dict[str, Any], source: Source, cfg: TrainConfig, tokenizer: Any
) -> tuple[DataSection, tuple[str, ...]]:
    """How a record is read, and what to tell: with the user_template that the model's chat template
    carries, where the run gives none and the record has its columns."""
    data, carried = cfg.data, user_template_of(tokenizer)
    if data.user_template is not None or carried is None:
        return data, ()
    known = {name for name, value in record.items() if value is not None}
    known |= {name for name, column in source.columns.items() if column in known}
    if fields_of(carried) - {"question", *known}:
        return data, (NOT_ASKED,)
    return replace(data, user_template=carried), ()


class _Cut(NamedTuple):
    """A text of tokens with its weights, no longer than max_length."""

    tokens: np.ndarray
    learn: np.ndarray
    fate: int
    notes: tuple[str, ...] = ()

    @property
    def learned(self) -> int:
        return int(np.count_nonzero(self.learn[1:]))

    @property
    def lost(self) -> bool:
        return self.fate in (TOO_LONG, NOTHING_TO_LEARN)


def _rendered(
    chat: dict[str, Any], cfg: TrainConfig, tokenizer: Any, at: str, **how: Any
) -> list[_Cut]:
    """The examples of a conversation, cut to max_length from the right."""
    data = cfg.data
    options: dict[str, Any] = {"learn": data.learn, "train_on_prompt": data.train_on_prompt} | how
    try:
        messages = _reasoned(chat["messages"], data)
        examples = render(tokenizer, messages, tools=chat["tools"], date=data.date, **options)
    except (ValueError, RecursionError) as error:
        raise _at(at, error) from error
    return [_cut(one.tokens, one.learn, cfg)._replace(notes=one.notes) for one in examples]


def _reasoned(messages: list[dict[str, Any]], data: DataSection) -> list[dict[str, Any]]:
    """The messages as `data.reasoning` wants them."""
    if data.reasoning == "learn":
        return messages
    return [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]


def _at(at: str, error: ValueError | RecursionError) -> ValueError:
    why = error if isinstance(error, ValueError) else "the record is nested too deeply"
    return UserError(f"{at}: {why}")


def _cut(tokens: np.ndarray, learn: np.ndarray, cfg: TrainConfig) -> _Cut:
    fate = KEPT
    if len(tokens) > cfg.data.max_length:
        tokens, learn = tokens[: cfg.data.max_length], learn[: cfg.data.max_length]
        fate = TRUNCATED if cfg.data.too_long == "truncate" else TOO_LONG
    cut = _Cut(tokens, learn, fate)
    return cut if cut.learned else cut._replace(fate=NOTHING_TO_LEARN if fate == KEPT else TOO_LONG)


def _conversations(pairs, source: Source, cfg: TrainConfig, tokenizer: Any) -> Iterator[_Row]:
    """Each conversation's tokens and learning weights, in one example or several."""
    for at, record in pairs:
        data, told = _asked(record, source, cfg, tokenizer)
        chat = conversation_of(record, source, data, at)
        for part, cut in enumerate(_rendered(chat, cfg, tokenizer, at)):
            notes = "\n".join((*cut.notes, *(() if part else (*told, *chat["notes"]))))
            if cut.lost:
                yield _Row(fate=cut.fate, part=part, notes=notes)
            else:
                row = _Row(cut.tokens, cut.learn, cut.learned, cut.fate)
                yield row._replace(part=part, notes=notes)


def _pairs(pairs, source: Source, cfg: TrainConfig, tokenizer: Any) -> Iterator[_Row]:
    """Each pair's chosen side, then its rejected one, each with the prompt before it."""
    for at, record in pairs:
        data, told = _asked(record, source, cfg, tokenizer)
        pair = pair_of(record, source, data, at)
        told = (*told, *pair.notes)
        if not pair.tells:
            yield _Row(fate=NO_PREFERENCE, notes="\n".join(told))
            continue
        if pair.prompt is None:
            sides = _texts(pair, cfg, tokenizer)
        else:
            answers = (pair.chosen, pair.rejected)
            sides = [_answered(pair, answer, cfg, tokenizer, at) for answer in answers]
        chosen, rejected = sides
        notes = "\n".join((*told, *sorted({*chosen.notes, *rejected.notes})))
        lost = {side.fate for side in sides if side.lost}
        if not lost and np.array_equal(chosen.tokens, rejected.tokens):
            lost = {TOO_LONG}  # they differ beyond the cut
        if lost:
            yield _Row(fate=min(lost), notes=notes)
            continue
        yield _Row(
            np.concatenate([chosen.tokens, rejected.tokens]),
            np.concatenate([chosen.learn, rejected.learn]),
            chosen.learned + rejected.learned,
            max(chosen.fate, rejected.fate),
            len(chosen.tokens),
            pair.margin,
            notes=notes,
        )


def _answered(
    pair: Pair, answer: list[dict[str, Any]], cfg: TrainConfig, tokenizer: Any, at: str
) -> _Cut:
    """A pair's prompt and one of its answers, which alone is learned."""
    prompt: list[dict[str, Any]] = [message | {"weight": 0.0} for message in pair.prompt or ()]
    chat = {"messages": prompt + answer, "tools": pair.tools}
    cuts = _rendered(chat, cfg, tokenizer, at, learn="all")
    if len(cuts) > 1:
        raise UserError(
            f"{at}: an answer has several assistant turns, which the chat template renders "
            "differently once the conversation goes on; leave its last turn in the answer and put "
            "the others into the prompt, or set data.template to one that keeps them"
        )
    return _alone(cuts[0])


def _alone(cut: _Cut) -> _Cut:
    """A text that learns one answer: that the answer has an example of its own tells nothing."""
    return cut._replace(notes=tuple(note for note in cut.notes if note != OWN_EXAMPLE))


def _texts(pair: Pair, cfg: TrainConfig, tokenizer: Any) -> list[Any]:
    """The sides of a pair of whole texts; what they have in common at their beginning is asked."""
    sides = tokenizer([pair.chosen, pair.rejected], split_special_tokens=True)["input_ids"]
    eos = tokenizer.eos_token_id
    sides = [np.array(ids if ids and ids[-1] == eos else [*ids, eos], np.int32) for ids in sides]
    same = sides[0][: len(sides[1])] == sides[1][: len(sides[0])]
    start = len(same) if same.all() else int((~same).argmax())
    return [_cut(ids, (np.arange(len(ids)) >= start).astype(np.float32), cfg) for ids in sides]


def _judged(pairs, source: Source, cfg: TrainConfig, tokenizer: Any) -> Iterator[_Row]:
    """Each conversation, whose last answer is judged."""
    for at, record in pairs:
        data, told = _asked(record, source, cfg, tokenizer)
        chat, good = feedback_of(record, source, data, at)
        cut = _alone(*_rendered(chat, cfg, tokenizer, at, learn="last"))
        notes = "\n".join((*cut.notes, *told, *chat["notes"]))
        if cut.lost:
            yield _Row(fate=cut.fate, notes=notes)
            continue
        first, value = int(np.argmax(cut.learn[1:] > 0)) + 1, 1.0 if good else -1.0
        yield _Row(cut.tokens, cut.learn, cut.learned, cut.fate, first, value, notes=notes)


def _prompts(pairs, source: Source, cfg: TrainConfig, tokenizer: Any) -> Iterator[_Row]:
    """Each prompt up to where the answer begins, and what its reward is told; a long one is left
    out, for what it asks stands at its end."""
    for at, record in pairs:
        data, told = _asked(record, source, cfg, tokenizer)
        prompt = prompt_of(record, source, data, at)
        notes = "\n".join((*told, *prompt.notes))
        messages = _reasoned(prompt.messages, data)
        try:
            tokens = prompt_tokens(tokenizer, messages, tools=prompt.tools, date=data.date)
        except (ValueError, RecursionError) as error:
            raise _at(at, error) from error
        if len(tokens) > data.max_length:
            yield _Row(fate=TOO_LONG, notes=notes)
            continue
        known = {"at": at, "said": prompt.said, "columns": prompt.columns}
        known |= {"messages": prompt.messages}
        yield _Row(tokens, record=json.dumps(known, default=str), notes=notes)


READERS: dict[str, Callable[..., Iterator[_Row]]] = {"pretrain": _documents, "sft": _conversations}
READERS |= dict.fromkeys(("reward", "dpo", "orpo", "simpo"), _pairs)
READERS |= {"kto": _judged, "ppo": _prompts, "grpo": _prompts}
