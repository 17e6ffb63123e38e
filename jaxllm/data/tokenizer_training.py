# SPDX-License-Identifier: Apache-2.0
"""Train a byte-level BPE tokenizer on text files, data files or strings."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from jaxllm.config import DataSection, Source
from jaxllm.data.conversations import parse_conversation, parse_text
from jaxllm.data.formats import format_of, open_file
from jaxllm.data.messages import MEDIA, message_text
from jaxllm.data.sources import locate, read, records
from jaxllm.data.template import template_source
from jaxllm.errors import MissingFile, UserError
from jaxllm.paths import local_path
from jaxllm.tokenizer import save_tokenizer

END, PAD, TURN, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"

_LONGEST = 1 << 20  # characters that the library gets at once; it takes 20 bytes for each
# The files of a tokenizer. Nothing is written to a directory that has any other file.
_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}

# Contractions; a word with the character before it; one digit; punctuation with the newlines after
# it; newlines with their indentation; other spaces. So each digit is a token, and no token mixes
# letters, digits and punctuation.
_PIECES = (
    r"'(?i:s|t|d|m|re|ve|ll)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    files: Iterable[str | Path],
    out: str | Path,
    vocab_size: int = 32_000,
    *,
    texts: Iterable[str] = (),
    special_tokens: Sequence[str] = (TURN, TURN_END),
    template: str = "chatml",
) -> Any:
    """Train a byte-level BPE and write it to `out` as a HF directory with a chat template.

    `files` are text files, or data files (JSON, JSONL, Parquet, Arrow), of which the text or the
    messages are used; `texts` follow them. Training is deterministic, and any text is decoded
    unchanged from its tokens. Ids 0 and 1 are end of text (eos and bos) and padding;
    `special_tokens` follow, then the 256 bytes. `template` is the name of a built-in chat template
    or a file. Small inputs give fewer than `vocab_size` tokens. An existing tokenizer in `out` is
    replaced.

    Returns the tokenizer. Raises FileNotFoundError for a missing file, and UserError for a file
    that is not text, if there is no text, if vocab_size is too small for the bytes and special
    tokens, and if `out` has files that are not a tokenizer's.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    _check_target(local_path(out))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = list(dict.fromkeys([END, PAD, *special_tokens]))
    if vocab_size < len(alphabet) + len(names):
        raise UserError(
            f"vocab_size {vocab_size} is too small for {len(alphabet)} bytes and {len(names)} "
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
    sizes = {"vocab_size": vocab_size, "special_tokens": names, "initial_alphabet": alphabet}
    trainer = trainers.BpeTrainer(show_progress=False, **sizes)
    backend.train_from_iterator(_require_text(chain(_texts(map(Path, files)), texts)), trainer)
    special = {"bos_token": END, "eos_token": END, "pad_token": PAD}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
    )
    tokenizer.chat_template = template_source(tokenizer, template)
    save_tokenizer(tokenizer, out)
    return tokenizer


def _check_target(out: Path) -> None:
    """Raise UserError unless `out` is new, empty, or has only a tokenizer's files."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another directory")
    if out.is_dir() and (others := sorted({e.name for e in out.iterdir()} - _FILES)):
        raise UserError(
            f"{out} contains {others[0]}, so no tokenizer is written to it; choose another "
            "directory"
        )


def _require_text(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts, long ones in parts. Raise UserError at the end if all were empty."""
    has_text = False
    for text in texts:
        has_text = has_text or bool(text)
        for start in range(0, len(text), _LONGEST):
            yield text[start : start + _LONGEST]
    if not has_text:
        raise UserError("there is no text to train a tokenizer on")


def _texts(files: Iterable[Path], size: int = 1 << 20) -> Iterator[str]:
    """Texts of files, in chunks of about `size` characters that end at a line break."""
    files = list(files)
    for file in files:
        if file.is_dir():
            raise UserError(f"{file} is a directory; give its files, such as {file}/*.txt")
        if not file.is_file():
            raise MissingFile(f"{file}: no such file")
    for file in files:
        if (format_of(file) or "text") != "text":
            yield from _record_texts(file)
            continue
        with open_file(file) as stream:
            lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            try:
                while text := lines.read(size) + lines.readline():
                    yield text
            except UnicodeDecodeError as error:
                raise UserError(f"{file}: not UTF-8 text: {error.reason}") from None


def _record_texts(file: Path) -> Iterator[str]:
    """The text of each document, or of each message, in a data file."""
    with tempfile.TemporaryDirectory() as folder:
        source, text_only = Source(str(file)), DataSection(drop_columns=MEDIA)
        table = read(locate(source), Path(folder))
        for start in range(0, len(table), 1000):
            indices = range(start, min(start + 1000, len(table)))
            for location, record in records(table[indices], indices, str(file)):
                present = {name for name, value in record.items() if value is not None}
                if "text" in present:
                    yield parse_text(record, {}, location)
                elif present or "text" not in record:
                    chat = parse_conversation(record, source, text_only, location)
                    yield from map(message_text, chat["messages"])
