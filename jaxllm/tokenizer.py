# SPDX-License-Identifier: Apache-2.0
"""Load and save tokenizers, and answer questions about their tokens."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxllm.errors import UserError, seen
from jaxllm.files import TEMPLATES, read_json, write_json
from jaxllm.paths import (
    as_path,
    check_tokenizer,
    copy,
    files_in,
    is_bucket,
)
from jaxllm.run_folder import check_is_model
from jaxllm.untrusted import check_regular, rust

# A directory with none of these can still "load", as an empty tokenizer.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
TRIAL = "a é\n\U0010ffff"  # tokenized when a tokenizer is loaded: some fail only then
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # a token of ByteFallback
_SUFFIXES = (".json", ".jinja", ".model", ".txt")  # of the files that a tokenizer is read from


def load_tokenizer(path: str | Path) -> Any:
    """Load the fast tokenizer of a HF directory, a file in one, or a hub id.

    No code of the directory is run. Returns a transformers PreTrainedTokenizerFast. Raises
    FileNotFoundError if the path does not exist, and UserError if there is no tokenizer, if it is
    a slow one, or if it has no end-of-text token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = as_path(path)
    folder = folder.parent if folder.is_file() else folder
    is_local = folder.is_dir()
    if is_local:
        _check_has_tokenizer(folder, path)
    else:
        check_tokenizer(str(path))
    try:
        with _on_disk(folder if is_local else path) as source, rust("it panics"):
            tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
            tokenizer.decode(tokenizer(TRIAL)["input_ids"])
    except Exception as error:  # tokenizers raises bare Exceptions for damaged files
        reason = str(error).strip().split("\n")[0]
        what = "the tokenizer" if is_local else "no such directory, and the hub's tokenizer"
        raise UserError(f"{path}: {what} cannot be loaded: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{path}: {type(tokenizer).__name__} is a slow tokenizer, which has no character "
            "offsets; convert it to a fast one (a directory with tokenizer.json)"
        )
    template = tokenizer.chat_template
    for text in template.values() if isinstance(template, dict) else [template or ""]:
        if not isinstance(text, str):
            raise UserError(f"{path}: the chat_template must be text, seen {seen(text)}")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{path}: the tokenizer has no end-of-text token; set eos_token in "
            "tokenizer_config.json"
        )
    return tokenizer


@contextmanager
def _on_disk(source: Any) -> Iterator[Any]:
    """The directory or hub id `source`, or a local copy of the small files of one in a bucket."""
    if not is_bucket(source):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="jaxllm-") as folder:
        Path(folder, TEMPLATES).mkdir()
        for file in files_in(source):
            name = file.relative_to(source).as_posix()
            if file.suffix in _SUFFIXES and name in (file.name, f"{TEMPLATES}/{file.name}"):
                copy(file, Path(folder, name))
        yield folder


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Write a tokenizer's files in the form that transformers 4 and its dependents also read."""
    if is_bucket(folder):
        with tempfile.TemporaryDirectory(prefix="jaxllm-") as part:
            save_tokenizer(tokenizer, part)
            for file in files_in(Path(part)):
                copy(file, as_path(folder) / file.relative_to(part).as_posix())
        return
    tokenizer.save_pretrained(str(folder))
    config = Path(folder, "tokenizer_config.json")
    values = read_json(config)
    if values.get("tokenizer_class") == "TokenizersBackend":  # the name since transformers 5
        write_json(config, values | {"tokenizer_class": "PreTrainedTokenizerFast"})


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raise UserError if the tokenizer has an id that is not below the model's vocab_size."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer's largest id is {highest}, but the model's vocab_size is {vocab_size}; "
            "use the model's own tokenizer, or a model with a larger vocab_size"
        )


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """The UTF-8 bytes of a token, which may be part of a character; b"" for an id without one."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    added = tokenizer.added_tokens_decoder.get(token_id)
    name = added.content if added else tokenizer.convert_ids_to_tokens(token_id) or ""
    if added is None and "ByteLevel" in str(tokenizer.backend_tokenizer.decoder):
        by_character = {character: byte for byte, character in bytes_to_unicode().items()}
        return bytes(by_character[c] for c in name if c in by_character)
    if byte := _BYTE.fullmatch(name):
        return bytes.fromhex(byte[1])
    return name.replace("\u2581", " ").encode()  # a space of SentencePiece


def is_settled(tokenizer: Any, token_id: int) -> bool:
    """True if no later token changes the text before or of this one, unless that text ends within a
    character. ByteFallback decodes a run of bytes as a whole. False if the decoder is not known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # those in Python have none
    if backend is None or tokenizer.clean_up_tokenization_spaces:
        return False
    kind = str(backend.decoder)
    name = tokenizer.convert_ids_to_tokens(token_id) or ""
    return "ByteLevel" in kind or ("ByteFallback" in kind and not _BYTE.fullmatch(name))


def special_tokens(tokenizer: Any) -> list[str]:
    """Strings that the tokenizer encodes as one special token, longest first.

    Added tokens that are not marked as special, such as Qwen's <think> and <tool_call>, are left
    out: users and assistants may write them.
    """
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    named = (added | set(tokenizer.all_special_tokens)) - {""}  # of a damaged file
    return sorted(named, key=lambda name: (-len(name), name))


def generation_stop_ids(model: str | Path) -> set[int]:
    """The eos_token_id of a model directory's generation_config.json; empty if there is none.

    Raises UserError for a malformed file.
    """
    file = as_path(model) / "generation_config.json"
    if not file.is_file():
        return set()
    eos = read_json(file).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token_id) is int and 0 <= token_id < 2**31 for token_id in ids):
        wanted = "an integer or a list of integers"
        raise UserError(f"{file}: eos_token_id is {seen(eos)}; use {wanted}")
    return set(ids)


def _check_has_tokenizer(folder: Path, path: str | Path) -> None:
    """Raise UserError if `folder`, which the user gave as `path`, has no tokenizer."""
    check_regular(folder, _SUFFIXES)
    if any((folder / name).is_file() for name in _VOCABULARIES):
        return
    check_is_model(folder)
    is_file = as_path(path).is_file()
    problem = "is a file in a directory without a tokenizer" if is_file else "has no tokenizer"
    raise UserError(
        f"{path}: {problem} ({', '.join(_VOCABULARIES[:2])}); give a directory that has one"
    )
