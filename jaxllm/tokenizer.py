# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: loading one, training one, and what ends a text."""

from __future__ import annotations

import copy
import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from jaxllm.errors import MissingFile, UserError
from jaxllm.files import hub_id

END, PAD, TURN, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"

# Any of these holds a vocabulary; a directory without one can still "load", as an empty tokenizer.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")

# What save_tokenizer writes; a directory with anything else in it is not written to.
_OWN_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}

# Contractions; a word with the character before it; one digit; punctuation with the newlines after
# it; newlines with their indentation; other spaces. So numbers are read digit by digit, and a
# token never reaches over a border between letters, digits and signs.
_PIECES = (
    r"'(?i:s|t|d|m|re|ve|ll)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(path: str | Path) -> Any:
    """The fast tokenizer of a HF directory (or a file in it) or hub id; none of its code is run.

    Returns a transformers PreTrainedTokenizerFast. Raises FileNotFoundError for a path that is not
    there, ValueError when there is no tokenizer, or none of the fast kind with an end of text.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place = Path(path).expanduser()
    place = place.parent if place.is_file() else place
    if place.is_dir():
        _check_holds_one(place, path)
    elif not hub_id(str(path)):
        raise MissingFile(f"{path}: no such directory (nor a hub id like OWNER/NAME)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(place if place.is_dir() else path), trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises bare Exceptions for broken files
        reason = str(error).strip().split("\n")[0]
        where = "" if place.is_dir() else "no such directory, and the hub's "
        raise UserError(f"{path}: {where}tokenizer cannot be loaded: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{path}: {type(tokenizer).__name__} is a slow tokenizer; convert it to one with a "
            "tokenizer.json, for only that kind says which characters a token was made of"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{path}: the tokenizer names no token for the end of a text; "
            "set eos_token in tokenizer_config.json"
        )
    return tokenizer


def _check_holds_one(folder: Path, path: str | Path) -> None:
    """Raises ValueError for a directory without a tokenizer, which was found by `path`."""
    if any((folder / name).is_file() for name in _VOCABULARIES):
        return
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    own = isinstance(config, dict) and {"objective", "optim", "data"} <= config.keys()
    if own or (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} is a run folder; its model is {folder / 'final'}")
    is_file = Path(path).expanduser().is_file()
    lacks = "is a file, and beside it is no tokenizer" if is_file else "holds no tokenizer"
    raise UserError(
        f"{path}: {lacks} ({', '.join(_VOCABULARIES[:2])}); name a directory that has one"
    )


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raises ValueError when the tokenizer can make an id that the model has no row for."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer's ids go up to {highest}, but the model's vocab_size is {vocab_size}; "
            "use the model's own tokenizer, or a model with a larger vocab_size"
        )


def special_tokens(tokenizer: Any) -> list[str]:
    """Strings that the tokenizer reads as one special token, longest first.

    Added tokens that are not special, like Qwen's <think> and <tool_call>, are words that a user
    and an assistant may say.
    """
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=lambda name: (-len(name), name))


def stop_ids(tokenizer: Any, model: str | Path | None = None) -> tuple[int, ...]:
    """Ids that end a generated text, ascending.

    They are eos, what the tokenizer's chat template ends a turn with, and those of the
    generation_config.json in the directory `model`. Raises ValueError for such a file that is
    malformed.
    """
    from jaxllm.data.chat import end_tokens

    names = {tokenizer.eos_token} - {None}
    if tokenizer.chat_template:
        names |= set(end_tokens(tokenizer))
    ids = set(tokenizer.convert_tokens_to_ids(sorted(names)))
    file = Path(model, "generation_config.json") if model else None
    if file and file.is_file():
        ids |= _model_ends(file)
    return tuple(sorted(ids))


def padded(tokenizer: Any) -> Any:
    """The tokenizer with a pad token that ends no text, where it has any special token to spare.

    transformers reads a reward model's score at the last token that is not the pad token, so a
    text that ends with one would be scored before its end.
    """
    ends = {*stop_ids(tokenizer), tokenizer.bos_token_id}
    if tokenizer.pad_token_id in (None, *ends):
        spare = [t for t in (tokenizer.unk_token, *sorted(special_tokens(tokenizer))) if t]
        free = [t for t in spare if tokenizer.convert_tokens_to_ids(t) not in ends]
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = (free or [tokenizer.eos_token])[0]
    return tokenizer


def _model_ends(file: Path) -> set[int]:
    """The eos_token_id of a generation_config.json."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    eos = config.get("eos_token_id") if isinstance(config, dict) else config
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(one) is int for one in ids):
        raise UserError(f"{file}: eos_token_id is {eos!r}; it is a number or a list of numbers")
    return set(ids)


def train_tokenizer(
    files: Iterable[str | Path],
    out: str | Path,
    vocab_size: int = 32_000,
    *,
    texts: Iterable[str] = (),
    special_tokens: Sequence[str] = (TURN, TURN_END),
    template: str = "chatml",
) -> Any:
    """Trains a byte-level BPE and writes it to `out` as a HF directory, ready for chats.

    files: text files, or data files whose text or messages are read (JSON, JSONL, Parquet, Arrow);
    `texts` are read after them. The same input gives the same tokenizer, and any text, seen here
    or not, comes back unchanged from its tokens. Ids 0 and 1 are the end of text (eos, and bos
    where one is asked for) and padding, which is a token of its own; `special_tokens` follow, then
    the 256 bytes. `template` is a built-in chat template or a file. Text that is too small for
    `vocab_size` gives fewer. A tokenizer that `out` holds is replaced.

    Returns the tokenizer. Raises FileNotFoundError for a missing file and ValueError for one that
    is not text, for no text at all, for a vocab_size with no room for the bytes, or when `out`
    holds anything but a tokenizer.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from jaxllm.data.template import template_of

    _check_target(Path(out))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = list(dict.fromkeys([END, PAD, *special_tokens]))
    if vocab_size < len(alphabet) + len(names):
        raise UserError(
            f"vocab_size {vocab_size} has no room for {len(alphabet)} bytes and {len(names)} "
            "special tokens"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(_counted(chain(_texts(map(Path, files)), texts)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template_of(tokenizer, template)
    save_tokenizer(tokenizer, out)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Writes a tokenizer's files, so that transformers 4 and what is built on it read them too."""
    tokenizer.save_pretrained(str(folder))
    config = Path(folder, "tokenizer_config.json")
    values = json.loads(config.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == "TokenizersBackend":  # the name since transformers 5
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        text = json.dumps(values, indent=2, ensure_ascii=False)
        config.write_text(text + "\n", encoding="utf-8")


def _check_target(out: Path) -> None:
    """Raises ValueError unless `out` is new, empty, or holds nothing but a tokenizer of ours."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another place")
    if out.is_dir() and (strange := sorted({e.name for e in out.iterdir()} - _OWN_FILES)):
        raise UserError(
            f"{out} holds {strange[0]}, so no tokenizer is written into it; choose another place"
        )


def _counted(texts: Iterable[str]) -> Iterator[str]:
    """The texts, and an error when they were all empty."""
    seen = False
    for text in texts:
        seen = seen or bool(text)
        yield text
    if not seen:
        raise UserError("there is no text to train a tokenizer on")


def _texts(files: Iterable[Path], size: int = 1 << 20) -> Iterator[str]:
    """Texts of files, in pieces of about `size` characters that end with a line."""
    from jaxllm.data.formats import format_of, opened

    files = list(files)
    if folders := [file for file in files if file.is_dir()]:
        raise UserError(f"{folders[0]} is a directory; name its files, as {folders[0]}/*.txt does")
    if missing := [file for file in files if not file.is_file()]:
        raise MissingFile(f"{missing[0]}: no such file")
    for file in files:
        if (format_of(file) or "text") != "text":
            yield from _records(file)
            continue
        with opened(file) as stream:
            lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            try:
                while text := lines.read(size) + lines.readline():
                    yield text
            except UnicodeDecodeError as error:
                raise UserError(f"{file}: is not UTF-8 text: {error.reason}") from None


def _records(file: Path) -> Iterator[str]:
    """The text of each document, or of each message, in a data file."""
    from jaxllm.config import DataSection, Source
    from jaxllm.data.conversations import conversation_of, text_of
    from jaxllm.data.messages import MEDIA, words
    from jaxllm.data.sources import locate, read, records

    with tempfile.TemporaryDirectory() as folder:
        source, text_alone = Source(str(file)), DataSection(drop_columns=MEDIA)
        rows = read(locate(source), Path(folder))
        for batch_start in range(0, len(rows), 1000):
            batch = rows[batch_start : batch_start + 1000]
            numbers = list(range(batch_start, batch_start + len(next(iter(batch.values())))))
            for at, record in records(batch, numbers, str(file)):
                given = {name for name, value in record.items() if value is not None}
                if "text" in given:
                    yield text_of(record, {}, at)
                elif given or "text" not in record:
                    yield from map(
                        words, conversation_of(record, source, text_alone, at)["messages"]
                    )
