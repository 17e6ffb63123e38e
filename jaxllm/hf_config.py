# SPDX-License-Identifier: Apache-2.0
"""config.json and generation_config.json of a HuggingFace directory: read, override, update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxllm import fp8
from jaxllm.data.chat import stop_ids
from jaxllm.errors import UserError, nearest, seen
from jaxllm.files import INDEX, SINGLE, local_dir, read_json, tensor_files
from jaxllm.model.families import CAUSAL, TOKEN_IDS, as_reward, is_reward, normalised
from jaxllm.model.families.rope import old_rope, rope_keys
from jaxllm.model.families.table import FAMILIES, SAME_AS
from jaxllm.model.families.tensors import embed_name, module_name
from jaxllm.model.families.wrappers import (
    WRAPPER,
    family_of,
    head_of,
    is_text,
    rewrapped,
    unwrapped,
    wrapper_of,
)
from jaxllm.paths import as_path
from jaxllm.run_folder import check_is_model, is_run_config, not_a_model
from jaxllm.tokenizer import generation_stop_ids

# Key of a model's hf_config that holds the content of generation_config.json.
GENERATION = "generation_config"
CHUNK = 1 << 22  # elements of the embedding and the head that are compared at a time


def read_config(path: str) -> dict[str, Any]:
    """Reads config.json of a directory or hub id, or the JSON file that `path` names."""
    file = as_path(path)
    if not file.is_file():
        file = local_dir(path) / "config.json"
    if not file.is_file():
        check_is_model(file.parent)
        raise UserError(
            f"{file.parent} has no config.json, so it is not a HuggingFace model directory"
        )
    config = read_json(file)
    config.pop(WRAPPER, None)  # only `unwrapped` gives this one
    if is_run_config(config):
        raise not_a_model(file.parent)
    for kind, same in SAME_AS.items():
        names = [FAMILIES[same].name + CAUSAL]
        if config.get("model_type") == kind and config.get("architectures") == names:
            config["model_type"] = same
    return config


def source_config(
    path: str, overrides: dict[str, Any], *, scores: bool = False, weights: bool = True
) -> tuple[dict[str, Any], fp8.Fp8 | None]:
    """(HF config of the model at `path` with `overrides`, how its FP8 weights are stored).

    path: a directory, a hub id or a config.json; of a wrapper, the config of its language model is
    returned (families.wrappers). scores: return the config of a reward model. weights: the weights
    of the directory will be loaded; with False they are randomly initialized, so their quantization
    does not matter. Raises UserError for an unknown key in `overrides` and
    for weights in a quantized format that cannot be read.
    """
    config = read_config(path)
    folder = None if as_path(path).is_file() else local_dir(path)
    if folder and weights:
        config, scheme = fp8.split_quantization(config, folder)
    else:
        config, scheme = {k: v for k, v in config.items() if k not in fp8.CONFIG_KEYS}, None
    config = _override(unwrapped(config), overrides)
    config = as_reward(config) if scores else config
    if folder is None:
        return config, None
    tie_by_weights = weights and "tie_word_embeddings" not in overrides
    if tie_by_weights and _has_untied_head(config, folder, scheme):
        config["tie_word_embeddings"] = False
    if (file := folder / "generation_config.json").is_file():
        config[GENERATION] = read_json(file)
        generation_stop_ids(folder)  # raises
    return config, scheme


def _override(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`config` with `overrides`. Raises UserError for a key that this model type does not have."""
    merged = config | overrides
    kind = normalised(merged)["model_type"]
    # Spellings before transformers 5, which reads them and writes others.
    old_keys = (*old_rope(kind), "torch_dtype", "sliding_window_pattern")
    valid = {*config, *normalised({"model_type": kind}), *old_keys}
    for key in overrides:
        if key not in valid:
            near = nearest(key, valid)
            hint = f"; did you mean {near}?" if near else ""
            raise UserError(f"model.overrides.{key} is not a key of a {kind} config{hint}")
    if "rope_parameters" in overrides or overrides.keys() & {*old_rope(kind)}:
        # transformers mixes the two spellings of RoPE when a file has both, so write only one.
        both = rope_keys(normalised(config))
        other = "rope_scaling" if "rope_parameters" in overrides else "rope_parameters"
        rope = {key: both[key] for key in (*old_rope(kind), "rope_parameters") if key in both}
        merged = {k: v for k, v in (config | rope).items() if k != other} | overrides
    return merged


def _has_untied_head(config: dict[str, Any], folder: Path, scheme: fp8.Fp8 | None) -> bool:
    """True if the config ties the embeddings but the files contain a head with other values.

    The weights then take precedence over the config, as in transformers 5.
    """
    has_weights = (folder / SINGLE).is_file() or (folder / INDEX).is_file()
    if not has_weights or is_reward(config) or not normalised(config)["tie_word_embeddings"]:
        return False
    family, wrapper = family_of(config), wrapper_of(config)
    locations = text_tensors(folder, family, wrapper, scheme)
    embed, head = embed_name(family, wrapper), head_of(wrapper)
    if embed not in locations or head not in locations:
        return False
    with fp8.opened(locations, scheme) as tensor:
        table, head = tensor(embed), tensor(head)
        if len(table.get_shape()) != 2:
            return False  # refused when it is read
        rows, *width = table.get_shape()
        if head.get_shape() != [rows, *width]:
            return True
        step = max(1, CHUNK // max(1, *width))
        parts = ((slice(i, min(i + step, rows)), slice(None)) for i in range(0, rows, step))
        return any((np.float32(1) * table[part] != head[part]).any() for part in parts)


def text_tensors(
    folder: Path, family: str, wrapper: str, scheme: fp8.Fp8 | None = None
) -> dict[str, tuple[Path, str]]:
    """Where the tensors of the language model are (fp8.located), by their names in transformers'
    modules, which differ from those in the files of some wrappers."""
    stored = fp8.located(tensor_files(folder), scheme)
    named = {module_name(name, family, wrapper): place for name, place in stored.items()}
    return {name: place for name, place in named.items() if is_text(name, wrapper)}


def _ids(value: Any) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(one) is int for one in ids):
        raise UserError(f"the token id {seen(value)} is neither an integer nor a list of integers")
    return ids


def updated_configs(
    config: dict[str, Any], dtype: str, vocab_size: int, tokenizer: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json, generation_config.json) to save with a model, from those it was loaded with.

    RoPE is written in the old and the new spelling (`rope_keys`). bos, eos and pad are the
    tokenizer's. The eos ids of the generation config are those of the old generation config, of the
    config and of the tokenizer (eos and end of turn), in that order. If the tokenizer's eos is new
    to the model, the old ids are dropped, because they mean other tokens.
    """
    generation = config.pop(GENERATION, {})
    for key in ("auto_map", "_name_or_path"):  # code that is not copied; a local path
        config.pop(key, None)
    if not (is_reward(config) or WRAPPER in config):
        config["architectures"] = [FAMILIES[config["model_type"]].name + CAUSAL]
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    filled = normalised(config)
    config |= rope_keys(filled)

    # Written explicitly: the default of the config class may exceed a small vocabulary.
    ids = {k: filled.get(k) for k in TOKEN_IDS}
    source_eos = generation.get("eos_token_id")
    ends = [*_ids(source_eos), *_ids(ids["eos_token_id"])]
    if tokenizer is not None:
        eos = tokenizer.eos_token_id
        if eos not in ends:
            ends, source_eos = [], None
        if eos not in _ids(ids["eos_token_id"]):
            ids["eos_token_id"] = eos
        ends += [eos, *stop_ids(tokenizer)]
        ids |= {k: v for k in TOKEN_IDS[::2] if (v := getattr(tokenizer, k)) is not None}
    ids = {k: v if all(i < vocab_size for i in _ids(v)) else None for k, v in ids.items()}
    ends = [i for i in dict.fromkeys(ends) if i < vocab_size]
    single = len(ends) == 1 and not isinstance(source_eos, list)
    generation |= {k: v for k, v in ids.items() if v is not None}
    generation |= {"eos_token_id": ends[0] if single else ends} if ends else {}
    return rewrapped(config | ids), generation
