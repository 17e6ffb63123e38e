# SPDX-License-Identifier: Apache-2.0
"""What each family is: its HF config read into a ModelConfig, and one table of tensor names.

transformers' own config classes fill defaults and translate old spellings (`rope_scaling`,
`rope_theta`) first, so a config.json of any age reads the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxllm.model.config import LayerKind, ModelConfig, Rope

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _plain(c: dict[str, Any]) -> dict[str, Any]:
    """Llama, Mistral, Olmo2, Phi3, SmolLM3: biases as the config says."""
    bias = bool(c.get("attention_bias", False))
    return dict(qkv_bias=bias, o_bias=bias, mlp_bias=bool(c.get("mlp_bias", False)))


def _gemma(c: dict[str, Any]) -> dict[str, Any]:
    return _plain(c) | dict(
        norm_offset=1.0,
        norm_placement="sandwich",
        embed_scale=math.sqrt(c["hidden_size"]),
        query_scale=c["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=c.get("attn_logit_softcapping") or 0.0,
        logit_softcap=c.get("final_logit_softcapping") or 0.0,
    )


# model_type -> the ModelConfig fields in which the family differs from Llama.
FAMILIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "llama": _plain,
    "mistral": _plain,
    "qwen2": lambda c: dict(qkv_bias=True),
    "qwen3": lambda c: _plain(c) | dict(qk_norm="head"),
    "gemma2": _gemma,
    "gemma3_text": lambda c: _gemma(c) | dict(qk_norm="head"),
    "olmo2": lambda c: _plain(c) | dict(norm_placement="post", qk_norm="full"),
    "phi3": _plain,
    "smollm3": _plain,
}
# Families whose q, k, v and whose gate, up lie one after another in one tensor.
FUSED = ("phi3",)


def _rope(p: dict[str, Any], max_positions: int, original: int | None) -> Rope:
    kind = p.get("rope_type", "default")
    shared = dict(theta=float(p["rope_theta"]), partial=p.get("partial_rotary_factor") or 1.0)
    if kind == "default":
        return Rope(**shared)
    if kind not in ("linear", "llama3", "yarn", "longrope"):
        raise ValueError(f"rope_type {kind!r} is not supported; known: default, linear, llama3, yarn, longrope")
    factor, scale = p.get("factor"), p.get("attention_factor")
    original = p.get("original_max_position_embeddings") or original or max_positions
    if kind == "yarn" and scale is None:

        def log_scale(m: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

        m, whole = p.get("mscale"), p.get("mscale_all_dim")
        scale = log_scale(m) / log_scale(whole) if m and whole else log_scale(1.0)
    if kind == "longrope":
        factor = max_positions / original if factor is None or p.get("_from_lengths") else factor
        if scale is None:
            scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return Rope(
        **shared,
        kind=kind,
        factor=float(factor),
        original_length=original,
        low_freq_factor=p.get("low_freq_factor", 1.0),
        high_freq_factor=p.get("high_freq_factor", 4.0),
        beta_fast=p.get("beta_fast") or 32.0,
        beta_slow=p.get("beta_slow") or 1.0,
        truncate=p.get("truncate", True),
        mscale=float(scale or 1.0),
        long_factor=tuple(p.get("long_factor") or ()),
        short_factor=tuple(p.get("short_factor") or ()),
    )


def _layers(c: dict[str, Any], ropes: dict[str, int]) -> dict[str, Any]:
    """The distinct kinds of layer and which layer is of which."""
    window = c.get("sliding_window")
    default = "sliding_attention" if window and c["model_type"] in ("mistral", "phi3") else "full_attention"
    types = c.get("layer_types") or [default] * c["num_hidden_layers"]
    rotated = c.get("no_rope_layers") or [1] * len(types)  # 1 = the layer has rotary positions
    layers = [
        LayerKind(
            rope=ropes.get(kind, 0) if uses_rope else None,
            window=window if kind == "sliding_attention" else None,
        )
        for kind, uses_rope in zip(types, rotated, strict=True)
    ]
    kinds = tuple(dict.fromkeys(layers))
    return dict(kinds=kinds, layer_kinds=tuple(kinds.index(k) for k in layers) if len(kinds) > 1 else ())


def normalised(config: dict[str, Any]) -> dict[str, Any]:
    """The config with every default filled in by transformers. Raises ValueError for an unknown family."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type {kind!r} is not known; known: {', '.join(sorted(FAMILIES))}")
    from transformers import AutoConfig

    keep = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config")}
    if config.get("quantization_config"):
        raise ValueError("the weights are quantised (quantization_config); dequantise them first")
    return AutoConfig.for_model(kind, **keep).to_dict()


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """A HF config.json as a ModelConfig.

    Raises ValueError for a family, an activation or a rope type that is not known.
    """
    c = normalised(config)
    act = c.get("hidden_activation") or c.get("hidden_act")
    if act not in ACTIVATIONS:
        raise ValueError(f"activation {act!r} is not known; known: {', '.join(ACTIVATIONS)}")
    lengths = c["max_position_embeddings"], c.get("original_max_position_embeddings")
    rope = c["rope_parameters"]
    names = list(rope) if "rope_theta" not in rope else ["full_attention"]
    if "rope_theta" in rope:
        ropes: tuple[Rope, ...] = (_rope(rope, *lengths),)
    else:  # one base each kind of layer
        ropes = tuple(_rope(rope[name], *lengths) for name in names)
    fields = FAMILIES[c["model_type"]](c)
    return ModelConfig(
        family=c["model_type"],
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        num_kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
        head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        max_positions=c["max_position_embeddings"],
        ropes=ropes,
        **_layers(c, {name: i for i, name in enumerate(names)}),
        norm_eps=c["rms_norm_eps"],
        activation=ACTIVATIONS[act],
        tie_embeddings=bool(c["tie_word_embeddings"]),
        initializer_range=c["initializer_range"],
        **fields,
    )


@dataclass(frozen=True)
class Key:
    """One of our weights and the HF tensor it comes from.

    `path` is dotted; a path under `layers.` is the stack over layers, `{i}` the layer in `name`.
    `transpose`: the tensor is [out, in], ours [in, out]. `rows`: our part of a fused tensor's out dim.
    """

    path: str
    name: str
    transpose: bool = False
    rows: tuple[int, int] | None = None


def key_table(cfg: ModelConfig) -> list[Key]:
    """Every weight of the decoder, once, in the order HF writes them."""
    norms = {
        "pre": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
        "post": {
            "attn_post_norm": "post_attention_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        },
        "sandwich": {
            "attn_norm": "input_layernorm",
            "attn_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        },
    }[cfg.norm_placement]
    Q, KV, F = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim, cfg.intermediate_size
    layer = "model.layers.{i}."
    keys = [Key("embed.embedding", "model.embed_tokens.weight")]

    def linear(path: str, name: str, bias: bool, rows: tuple[int, int] | None = None) -> None:
        keys.append(Key(f"layers.{path}.kernel", f"{layer}{name}.weight", True, rows))
        if bias:
            keys.append(Key(f"layers.{path}.bias", f"{layer}{name}.bias", False, rows))

    if cfg.family in FUSED:
        for part, rows in (("q", (0, Q)), ("k", (Q, Q + KV)), ("v", (Q + KV, Q + 2 * KV))):
            linear(f"attn.{part}", "self_attn.qkv_proj", cfg.qkv_bias, rows)
        for part, rows in (("gate", (0, F)), ("up", (F, 2 * F))):
            linear(f"mlp.{part}", "mlp.gate_up_proj", cfg.mlp_bias, rows)
    else:
        for part in "qkv":
            linear(f"attn.{part}", f"self_attn.{part}_proj", cfg.qkv_bias)
        for part in ("gate", "up"):
            linear(f"mlp.{part}", f"mlp.{part}_proj", cfg.mlp_bias)
    linear("attn.o", "self_attn.o_proj", cfg.o_bias)
    linear("mlp.down", "mlp.down_proj", cfg.mlp_bias)
    if cfg.qk_norm != "none":
        keys += [
            Key(f"layers.attn.{p}_norm.scale", f"{layer}self_attn.{p}_norm.weight") for p in "qk"
        ]
    keys += [Key(f"layers.{ours}.scale", f"{layer}{name}.weight") for ours, name in norms.items()]
    keys.append(Key("norm.scale", "model.norm.weight"))
    if not cfg.tie_embeddings:
        keys.append(Key("head.kernel", "lm_head.weight", True))
    return keys
