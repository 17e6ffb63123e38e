# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: loading one, training one, and what ends a text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

END, PAD, TURN, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"


def load_tokenizer(path: str) -> Any:
    """The fast tokenizer of a HF directory or hub id; its code is transformers', never the data's.

    Raises ValueError when there is none, or none of the fast kind with an end-of-text token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place = Path(path)
    if place.is_file():
        place = place.parent
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} has no tokenizer that can be read: {reason}; set model.tokenizer") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{path} has a slow tokenizer; save it with a tokenizer.json first")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path}: the tokenizer names no eos_token; set it in tokenizer_config.json")
    return tokenizer


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raises ValueError when the tokenizer can make an id that the model has no row for."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise ValueError(
            f"the tokenizer's ids go up to {highest}, the model has vocab_size {vocab_size}; "
            "use the model's own tokenizer, or give the model a larger vocab_size"
        )


def special_tokens(tokenizer: Any) -> list[str]:
    """Strings that the tokenizer reads as one special token, longest first."""
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)


def stop_ids(tokenizer: Any, model: str | None = None) -> tuple[int, ...]:
    """Ids that end a text: eos, what the chat template ends a turn with, and `model`'s own list."""
    ids = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        from jaxllm.data.chat import end_of_turn

        end = end_of_turn(tokenizer)
        ids |= set() if end is None else {end}
    file = Path(model or "") / "generation_config.json"
    if model and file.is_file():
        eos = json.loads(file.read_text()).get("eos_token_id")
        ids |= set(eos) if isinstance(eos, list) else set() if eos is None else {eos}
    return tuple(sorted(ids))


def _pieces(files: Iterable[str | Path], size: int = 1 << 16) -> Iterator[str]:
    for file in files:
        with Path(file).open(encoding="utf-8", errors="replace", newline="") as opened:
            while text := opened.read(size):
                yield text


def train_tokenizer(files: Iterable[str | Path], out: str | Path, vocab_size: int = 32_000) -> None:
    """Trains a byte-level BPE on text files and writes it as a HF directory.

    Any text comes back unchanged. It has ChatML's special tokens and template, and end of text and
    padding are different tokens. Raises ValueError for a missing file or too small a vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from jaxllm.data.chat import TEMPLATES

    files = [Path(f) for f in files]
    if missing := [f for f in files if not f.is_file()]:
        raise ValueError(f"{missing[0]} is not there")
    specials = [END, PAD, TURN, TURN_END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(specials):
        raise ValueError(f"vocab_size {vocab_size} is below the {len(alphabet) + len(specials)} bytes and marks")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(_pieces(files), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[TURN, TURN_END],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATES["chatml"]
    tokenizer.save_pretrained(str(out))
