# SPDX-License-Identifier: Apache-2.0
"""The kinds of a model's layers: windows, and which RoPE each layer has."""

from __future__ import annotations

from typing import Any

from jaxllm.errors import UserError
from jaxllm.model.config import LayerKind, ModelConfig
from jaxllm.model.families.rope import read_rope, write_rope
from jaxllm.model.families.table import FAMILIES


def read_layers(c: dict[str, Any]) -> dict[str, Any]:
    """`ropes`, the distinct `kinds` of layer, and `layer_kinds`: the index of each layer's kind."""
    family, count = FAMILIES[c["model_type"]], c["num_hidden_layers"]
    window = c.get("sliding_window")
    types = ["sliding_attention" if family.window == "all" else "full_attention"] * count
    if family.window == "typed":
        types = c["layer_types"]
    if strange := set(types) - {"full_attention", "sliding_attention"}:
        raise UserError(f"layer_types {', '.join(sorted(strange))} are not supported")
    rope = c["rope_parameters"]
    names = list(dict.fromkeys(types)) if family.rope_by_type else ["full_attention"]
    ropes = tuple(read_rope(rope[n] if family.rope_by_type else rope, c) for n in names)
    rotated = [True] * count
    if family.nope == "listed":
        rotated = c["no_rope_layers"][:count]
    elif family.nope == "full" and window is not None:
        rotated = [kind == "sliding_attention" for kind in types]
    layers = [
        LayerKind(
            rope=(names.index(kind) if family.rope_by_type else 0) if uses_rope else None,
            window=window if kind == "sliding_attention" else None,
        )
        for kind, uses_rope in zip(types, rotated, strict=True)
    ]
    kinds = tuple(dict.fromkeys(layers))
    index = tuple(map(kinds.index, layers)) if len(kinds) > 1 else ()
    return {"ropes": ropes, "kinds": kinds, "layer_kinds": index}


def write_layers(cfg: ModelConfig) -> dict[str, Any]:
    family = FAMILIES[cfg.family]
    layers = [cfg.kinds[k] for k in cfg.layer_kinds or (0,) * cfg.num_layers]
    types = ["full_attention" if kind.window is None else "sliding_attention" for kind in layers]
    window = next((kind.window for kind in layers if kind.window is not None), None)
    config: dict[str, Any] = {}
    if family.window == "all":
        config["sliding_window"] = window
    elif family.window != "none":
        # A length even where no layer uses it: transformers builds gemma's mask from it. But where
        # full layers lack RoPE if there are windows, none means that they have it.
        unused = (
            None if family.nope == "full" and cfg.kinds[0].rope is not None else cfg.max_positions
        )
        config |= {"layer_types": types, "sliding_window": window or unused}
    if family.switched:
        config["use_sliding_window"] = window is not None
    if family.nope == "listed":
        config["no_rope_layers"] = [int(kind.rope is not None) for kind in layers]
    if family.rope_by_type:
        by_type = {n: cfg.ropes[kind.rope or 0] for n, kind in zip(types, layers, strict=True)}
        config["rope_parameters"] = {n: write_rope(rope, family) for n, rope in by_type.items()}
    else:
        config["rope_parameters"] = write_rope(cfg.ropes[0], family)
    if cfg.ropes[0].kind == "longrope":  # phi3 gives this one precedence over rope_parameters
        config["original_max_position_embeddings"] = cfg.ropes[0].original_length
    return config
