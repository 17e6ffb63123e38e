# SPDX-License-Identifier: Apache-2.0
"""config.json and generation_config.json of a HuggingFace directory: read, changed, written."""

from __future__ import annotations

import difflib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm import fp8
from jaxllm.data.chat import stop_ids
from jaxllm.errors import UserError
from jaxllm.files import INDEX, SINGLE, opened, read_json, resolve, tensor_files
from jaxllm.model.families import (
    CAUSAL,
    EMBED,
    FAMILIES,
    HEAD,
    OLD_ROPE,
    TOKEN_IDS,
    as_reward,
    is_reward,
    normalised,
    rope_keys,
)

# Inside a model's hf_config: what generation_config.json said.
GENERATION = "generation_config"
PART = 1 << 22  # numbers of the token table and the head that are compared at a time


def read_config(path: str) -> dict[str, Any]:
    """The config.json of a directory or hub id, or the JSON file itself."""
    file = Path(path).expanduser()
    if not file.is_file():
        file = resolve(path) / "config.json"
    if not file.is_file():
        raise UserError(f"{file.parent} has no config.json; it is no HuggingFace model directory")
    config = read_json(file)
    if {"objective", "optim", "data"} <= config.keys():
        raise UserError(f"{file.parent} is a run folder; its model is {file.parent / 'final'}")
    return config


def source_config(
    path: str, overrides: dict[str, Any], *, scores: bool = False, weights: bool = True
) -> tuple[dict[str, Any], fp8.Fp8 | None]:
    """(the HF config of the model at `path` with `overrides`, how its weights are quantised).

    path: a directory or hub id, or a config.json alone. scores: as that of a reward model. weights:
    whether those of the directory are read; else they are drawn, and its own do not matter. Raises
    ValueError for a config that no model can be made of, and for quantised weights that are not
    read here.
    """
    config = read_config(path)
    folder = None if Path(path).expanduser().is_file() else resolve(path)
    if folder and weights:
        config, scheme = fp8.scheme_of(config, folder)
    else:
        config, scheme = {k: v for k, v in config.items() if k not in fp8.CONFIGS}, None
    config = _changed(config, overrides)
    config = as_reward(config) if scores else config
    if folder is None:
        return config, None
    own = weights and "tie_word_embeddings" not in overrides
    if own and _has_another_head(config, folder, scheme):
        config["tie_word_embeddings"] = False
    if (folder / "generation_config.json").is_file():
        config[GENERATION] = read_json(folder / "generation_config.json")
    return config, scheme


def _changed(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`config` with `overrides`. Raises ValueError for a key that such a model does not have."""
    merged = config | overrides
    kind = normalised(merged)["model_type"]
    # As files before transformers 5 do; it takes them in, and writes others.
    spelled = (*OLD_ROPE, "torch_dtype", "sliding_window_pattern")
    known = {*config, *normalised({"model_type": kind}), *spelled}
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"model.overrides.{key} is no key of a {kind} config{hint}")
    if "rope_parameters" in overrides or overrides.keys() & set(OLD_ROPE):
        # Of two spellings in a file transformers reads some keys of one and some of the other.
        both = rope_keys(normalised(config))
        other = "rope_scaling" if "rope_parameters" in overrides else "rope_parameters"
        kept = {key: both[key] for key in (*OLD_ROPE, "rope_parameters") if key in both}
        merged = {k: v for k, v in (config | kept).items() if k != other} | overrides
    return merged


def _has_another_head(config: dict[str, Any], folder: Path, scheme: fp8.Fp8 | None) -> bool:
    """Whether the files of a tied language model hold a head that is not its token table: then, as
    in transformers 5, the weights decide and not the config."""
    there = (folder / SINGLE).is_file() or (folder / INDEX).is_file()
    if not there or is_reward(config) or not normalised(config)["tie_word_embeddings"]:
        return False
    found = tensor_files(folder)
    if EMBED not in found or HEAD not in found:
        return False
    where = {name: (file, name) for name, file in found.items()}
    with ExitStack() as stack:
        files = {f: stack.enter_context(opened(f)) for f in {found[EMBED], found[HEAD]}}
        table, head = (fp8.tensor(files, where, name, scheme) for name in (EMBED, HEAD))
        rows, *width = table.get_shape()
        if head.get_shape() != [rows, *width]:
            return True
        step = max(1, PART // max(1, *width))
        starts = range(0, rows, step)
        parts = ((slice(i, min(i + step, rows)), slice(None)) for i in starts)
        return any((np.float32(1) * table[part] != head[part]).any() for part in parts)


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def written_configs(
    config: dict[str, Any], dtype: str, vocab_size: int, tokenizer: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json, generation_config.json) of a model: those of its source, brought up to date.

    RoPE is spelled for readers of either age (families.rope_keys). The tokenizer decides bos, eos
    and pad. Every id that ends a text (the source's for generation, the config's, the end of a
    turn) is in the generation config, in that order, unless the tokenizer's eos is new to the
    model: then the old ids mean something else.
    """
    generation = config.pop(GENERATION, {})
    for key in ("auto_map", "_name_or_path"):  # code that is not copied; a place on this machine
        config.pop(key, None)
    if not is_reward(config):
        config["architectures"] = [FAMILIES[config["model_type"]].name + CAUSAL]
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    filled = normalised(config)
    config |= rope_keys(filled)

    # Explicit, since a class default may lie outside a small vocabulary.
    ids = {k: filled.get(k) for k in TOKEN_IDS}
    theirs = generation.get("eos_token_id")
    ends = [*_ids(theirs), *_ids(ids["eos_token_id"])]
    if tokenizer is not None:
        eos = tokenizer.eos_token_id
        if eos not in ends:
            ends, theirs = [], None
        if eos not in _ids(ids["eos_token_id"]):
            ids["eos_token_id"] = eos
        ends += [eos, *stop_ids(tokenizer)]
        ids |= {k: v for k in TOKEN_IDS[::2] if (v := getattr(tokenizer, k)) is not None}
    ids = {k: v if all(i < vocab_size for i in _ids(v)) else None for k, v in ids.items()}
    ends = [i for i in dict.fromkeys(ends) if i < vocab_size]
    one = len(ends) == 1 and not isinstance(theirs, list)
    generation |= {k: v for k, v in ids.items() if v is not None}
    generation |= {"eos_token_id": ends[0] if one else ends} if ends else {}
    return config | ids, generation
