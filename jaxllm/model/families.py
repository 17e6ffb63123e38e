# SPDX-License-Identifier: Apache-2.0
"""Model families as tables: HF config <-> ModelConfig, and the name of every weight.

transformers' own config classes first fill in defaults and translate old spellings (`rope_scaling`,
`rope_theta`, `type`), so a config.json of any age reads the same. A model computes
the same as transformers does from its config. A config that this decoder cannot compute is refused
with UserError.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from jaxllm.errors import UserError, seen
from jaxllm.model.config import LayerKind, ModelConfig, Rope, check_numbers
from jaxllm.untrusted import odd_values

ACTIVATIONS = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}

# How transformers' names of a language model and of a reward model end.
CAUSAL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
# Limits of counts, by which tables are made before the weights are compared.
LIMITS = {"num_hidden_layers": 10_000}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _same(value: Any) -> Any:
    return value


def _activation(name: str) -> str:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UserError(
            f"activation {seen(name)} is not supported; known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


@dataclass(frozen=True)
class Option:
    """A ModelConfig field and the HF key it is kept under, with the change of value each way."""

    field: str
    key: str
    read: Callable[[Any], Any] = _same
    write: Callable[[Any], Any] = _same


def _activation_under(key: str) -> Option:
    back = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return Option("activation", key, _activation, back.__getitem__)


def _softcap(field: str, key: str) -> Option:
    return Option(field, key, lambda cap: cap or 0.0, lambda cap: cap or None)


SHARED = (
    Option("vocab_size", "vocab_size"),
    Option("hidden_size", "hidden_size"),
    Option("intermediate_size", "intermediate_size"),
    Option("num_layers", "num_hidden_layers"),
    Option("num_heads", "num_attention_heads"),
    Option("num_kv_heads", "num_key_value_heads"),
    Option("head_dim", "head_dim"),
    Option("max_positions", "max_position_embeddings"),
    Option("norm_eps", "rms_norm_eps"),
    Option("tie_embeddings", "tie_word_embeddings", bool),
    Option("initializer_range", "initializer_range"),
)
ACTIVATION = (_activation_under("hidden_act"),)
ATTENTION_BIAS = (
    Option("qkv_bias", "attention_bias", bool),
    Option("o_bias", "attention_bias", bool),
)
MLP_BIAS = (Option("mlp_bias", "mlp_bias", bool),)
GEMMA = (
    _activation_under("hidden_activation"),
    *ATTENTION_BIAS,
    Option("embed_scale", "hidden_size", math.sqrt, lambda scale: round(scale**2)),
    Option(
        "query_scale",
        "query_pre_attn_scalar",
        lambda width: width**-0.5,
        lambda scale: round(scale**-2),
    ),
    _softcap("logit_softcap", "final_logit_softcapping"),
)
ATTENTION_SOFTCAP = (_softcap("attention_softcap", "attn_logit_softcapping"),)


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` differ from plain Llama.

    name: prefix of transformers' class names; scores_as: that of reward models, if it differs.
      transformers' own tables of these names need torch.
    fixed: ModelConfig fields with the same value in every model of the family.
    options: fields that the config sets, besides SHARED.
    window: which layers have `sliding_window`: none, all, those that `layer_types` names, or those
      when `use_sliding_window` says so too ("switched").
    nope: `no_rope_layers` names layers without rotary positions.
    rope_by_type: `rope_parameters` holds one entry for each kind of `layer_types`.
    partial_rope: `partial_rotary_factor` may rotate only the first part of each head.
    fused: q, k and v are concatenated in one tensor, and so are gate and up.
    refused: HF keys that must be empty, each with the reason.
    """

    name: str
    fixed: dict[str, Any] = field(default_factory=dict)
    options: tuple[Option, ...] = ACTIVATION
    window: Literal["none", "all", "typed", "switched"] = "none"
    nope: bool = False
    rope_by_type: bool = False
    partial_rope: bool = False
    fused: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    scores_as: str = ""


_BIDIRECTIONAL = {"use_bidirectional_attention": "only causal attention is supported"}

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", options=ACTIVATION + ATTENTION_BIAS + MLP_BIAS),
    "mistral": Family(
        "Mistral",
        window="all",
        refused={"layer_types": "transformers ignores it for mistral; set it to null"},
    ),
    "qwen2": Family("Qwen2", fixed={"qkv_bias": True}, window="switched"),
    "qwen3": Family(
        "Qwen3",
        fixed={"qk_norm": "head"},
        options=ACTIVATION + ATTENTION_BIAS,
        window="switched",
    ),
    "gemma2": Family(
        "Gemma2",
        fixed={"norm_offset": 1.0, "norm_placement": "sandwich"},
        options=GEMMA + ATTENTION_SOFTCAP,
        window="typed",
        refused=_BIDIRECTIONAL,
    ),
    "gemma3_text": Family(
        "Gemma3",
        scores_as="Gemma3Text",
        fixed={"norm_offset": 1.0, "norm_placement": "sandwich", "qk_norm": "head"},
        options=GEMMA,
        window="typed",
        rope_by_type=True,
        refused=_BIDIRECTIONAL
        | {"attn_logit_softcapping": "transformers ignores it for gemma3_text; set it to null"},
    ),
    "olmo2": Family(
        "Olmo2",
        fixed={"norm_placement": "post", "qk_norm": "full"},
        options=ACTIVATION + ATTENTION_BIAS,
    ),
    "phi3": Family("Phi3", window="all", partial_rope=True, fused=True),
    "smollm3": Family(
        "SmolLM3", options=ACTIVATION + ATTENTION_BIAS + MLP_BIAS, window="switched", nope=True
    ),
}

# Rope field -> HF key, by kind. `theta` and `partial` belong to all.
ROPE_KEYS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_length": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_length": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "mscale": "attention_factor",
    },
    "longrope": {
        "original_length": "original_max_position_embeddings",
        "mscale": "attention_factor",
        "long_factor": "long_factor",
        "short_factor": "short_factor",
    },
}


def _stretch_scale(p: dict[str, Any], max_positions: int) -> float:
    """What yarn and longrope multiply cos and sin by if there is no `attention_factor`."""
    factor, original = p.get("factor"), p["original_max_position_embeddings"]
    factor = max_positions / original if factor is None else factor
    if factor <= 1:
        return 1.0
    if p["rope_type"] == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    m, whole = p.get("mscale"), p.get("mscale_all_dim")
    return scale(m) / scale(whole) if m and whole else scale(1.0)


def _read_rope(p: dict[str, Any], c: dict[str, Any]) -> Rope:
    """One set of `rope_parameters` in transformers' full spelling; `c` is the model's config."""
    kind = p["rope_type"]
    if kind not in ROPE_KEYS:
        raise UserError(f"rope_type {seen(kind)} is not supported; known: {', '.join(ROPE_KEYS)}")
    partial = p.get("partial_rotary_factor")
    partial = 1.0 if partial is None else float(partial)
    if partial != 1.0 and not FAMILIES[c["model_type"]].partial_rope:
        raise UserError(f"partial_rotary_factor {partial} is not supported for {c['model_type']}")
    p = dict(p)
    if kind in ("yarn", "longrope") and p.get("attention_factor") is None:
        p["attention_factor"] = _stretch_scale(p, c["max_position_embeddings"])
    if kind == "yarn" and p.get("factor") is None:
        p["factor"] = c["max_position_embeddings"] / p["original_max_position_embeddings"]
    values: dict[str, Any] = {}
    for name, key in ROPE_KEYS[kind].items():
        value = p.get(key)
        if value is not None:  # absent or null: Rope's default is transformers'
            values[name] = tuple(map(float, value)) if isinstance(value, list) else value
    return Rope(theta=float(p["rope_theta"]), kind=kind, partial=partial, **values)


def _write_rope(rope: Rope, family: Family) -> dict[str, Any]:
    p: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if family.partial_rope:
        p["partial_rotary_factor"] = rope.partial
    for name, key in ROPE_KEYS[rope.kind].items():
        value = getattr(rope, name)
        p[key] = list(value) if isinstance(value, tuple) else value
    return p


# The keys of RoPE before transformers 5.
OLD_ROPE = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")


def rope_keys(c: dict[str, Any]) -> dict[str, Any]:
    """RoPE of a `normalised` config in both spellings: `rope_parameters`, and the keys that
    transformers 4 reads. It would use its own defaults for missing keys."""
    family, nested = FAMILIES[c["model_type"]], c["rope_parameters"]
    nested = nested if family.rope_by_type else {"full_attention": nested}
    nested = {n: {k: v for k, v in p.items() if k != "type"} for n, p in nested.items()}
    p = nested["full_attention"]
    keys = {"rope_parameters": nested if family.rope_by_type else p, "rope_theta": p["rope_theta"]}
    if family.rope_by_type:
        keys["rope_local_base_freq"] = nested["sliding_attention"]["rope_theta"]
    if family.partial_rope:
        keys["partial_rotary_factor"] = p.get("partial_rotary_factor", 1.0)
    kind, longest = p["rope_type"], c["max_position_embeddings"]
    scaling = {k: v for k, v in p.items() if k not in OLD_ROPE and v is not None}
    if kind == "longrope":
        keys["original_max_position_embeddings"] = p["original_max_position_embeddings"]
        if not family.partial_rope:  # phi3 computes it, and transformers 4 accepts no key
            scaling.setdefault("attention_factor", _stretch_scale(p, longest))
    if kind == "yarn":
        scaling.setdefault("factor", longest / p["original_max_position_embeddings"])
    if family.partial_rope:  # transformers 4 accepts three keys for phi3 and rejects any other
        scaling = {"type": scaling.pop("rope_type")} | scaling
        scaling.pop("original_max_position_embeddings", None)
    return keys | {"rope_scaling": None if kind == "default" else scaling}


def _read_layers(c: dict[str, Any]) -> dict[str, Any]:
    """`ropes`, the distinct `kinds` of layer, and `layer_kinds`: the index of each layer's kind."""
    family, count = FAMILIES[c["model_type"]], c["num_hidden_layers"]
    window = c.get("sliding_window")
    types = ["sliding_attention" if family.window == "all" else "full_attention"] * count
    if family.window in ("typed", "switched"):
        types = c["layer_types"]
    if strange := set(types) - {"full_attention", "sliding_attention"}:
        raise UserError(f"layer_types {', '.join(sorted(strange))} are not supported")
    rope = c["rope_parameters"]
    names = list(dict.fromkeys(types)) if family.rope_by_type else ["full_attention"]
    ropes = tuple(_read_rope(rope[n] if family.rope_by_type else rope, c) for n in names)
    rotated = c["no_rope_layers"][:count] if family.nope else [True] * count
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


def _write_layers(cfg: ModelConfig) -> dict[str, Any]:
    family = FAMILIES[cfg.family]
    layers = [cfg.kinds[k] for k in cfg.layer_kinds or (0,) * cfg.num_layers]
    types = ["full_attention" if kind.window is None else "sliding_attention" for kind in layers]
    window = next((kind.window for kind in layers if kind.window is not None), None)
    config: dict[str, Any] = {}
    if family.window == "all":
        config["sliding_window"] = window
    elif family.window != "none":
        # A length even where no layer uses it: transformers builds gemma's mask from it.
        config |= {"layer_types": types, "sliding_window": window or cfg.max_positions}
        if family.window == "switched":
            config["use_sliding_window"] = window is not None
    if family.nope:
        config["no_rope_layers"] = [int(kind.rope is not None) for kind in layers]
    if family.rope_by_type:
        by_type = {n: cfg.ropes[kind.rope or 0] for n, kind in zip(types, layers, strict=True)}
        config["rope_parameters"] = {n: _write_rope(rope, family) for n, rope in by_type.items()}
    else:
        config["rope_parameters"] = _write_rope(cfg.ropes[0], family)
    if cfg.ropes[0].kind == "longrope":  # phi3 gives this one precedence over rope_parameters
        config["original_max_position_embeddings"] = cfg.ropes[0].original_length
    return config


def _family(config: dict[str, Any]) -> Family:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"model_type {seen(kind)} is not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def normalised(config: dict[str, Any]) -> dict[str, Any]:
    """The config in transformers' newest spelling with every default filled in; a new dict.

    Raises ValueError for an unknown family, quantized weights, and what transformers finds wrong.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    family = _family(config)
    if config.get("quantization_config"):
        raise UserError("the weights are quantized (quantization_config); load_hf dequantizes some")
    if config.get("is_causal") is False:
        raise UserError("is_causal is false; only causal attention is supported")
    keep = copy.deepcopy(config)  # transformers writes into nested dicts
    kind = keep.pop("model_type")
    for key, most in LIMITS.items():  # before transformers makes lists of that length
        if type(value := keep.get(key, 1)) is not int or not 1 <= value <= most:
            raise UserError(f"{key} is {seen(value)}; it must be an integer from 1 to {most:,}")
    with odd_values(f"config of a {kind} model", StrictDataclassError):
        c = AutoConfig.for_model(kind, **keep).to_dict()
        c["head_dim"] = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    for key, reason in family.refused.items():
        if c.get(key):
            raise UserError(f"{key} is {seen(c[key])}: {reason}")
    return c


def is_reward(config: dict[str, Any]) -> bool:
    """True for the config.json of a reward model."""
    names = config.get("architectures")
    return any(str(n).endswith(CLASSIFIER) for n in (names if isinstance(names, list) else ()))


def as_reward(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a reward model of that shape."""
    family = _family(config)
    name = (family.scores_as or family.name) + CLASSIFIER
    one = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config | {"architectures": [name]} | one


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """The decoder that a HF config.json describes; keys that do not affect it are ignored.

    Raises ValueError for a family, activation, rope type or option that is not supported.
    """
    family, c = _family(config), normalised(config)
    with odd_values(f"config of a {c['model_type']} model"):
        values = {o.field: o.read(c[o.key]) for o in SHARED + family.options}
        kind = {"family": c["model_type"], "scores": is_reward(config)}
        if kind["scores"] and len(c.get("id2label") or (0,)) != 1:
            raise UserError(f"num_labels is {len(c['id2label'])}; a reward model gives one score")
        cfg = ModelConfig(**kind, **values, **family.fixed, **_read_layers(c))
    check_numbers(cfg, {o.field: o.key for o in SHARED + family.options})
    if cfg.num_heads % cfg.num_kv_heads:
        raise UserError(
            f"num_attention_heads {cfg.num_heads} is no multiple of "
            f"num_key_value_heads {cfg.num_kv_heads}"
        )
    return cfg


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The HF config.json of a decoder: `from_hf(to_hf(cfg)) == cfg`.

    Raises ValueError naming the fields when the family cannot express `cfg`.
    """
    family = _family({"model_type": cfg.family})
    config = {o.key: o.write(getattr(cfg, o.field)) for o in SHARED + family.options}
    config |= {"model_type": cfg.family, "architectures": [family.name + CAUSAL]}
    config |= _write_layers(cfg)
    config = as_reward(config) if cfg.scores else config
    back = from_hf(config | dict.fromkeys(TOKEN_IDS))  # defaults may be outside the vocabulary
    if lost := [f.name for f in fields(cfg) if getattr(back, f.name) != getattr(cfg, f.name)]:
        raise UserError(f"a {cfg.family} config cannot express this model's {', '.join(lost)}")
    return config


# Indices that a tensor's name may have, and the ModelConfig field with the size of each.
INDICES = {"layer": "num_layers"}


def _indices(name: str) -> list[str]:
    return re.findall(r"{(\w+)}", name)


def tensor_names(cfg: ModelConfig, name: str) -> list[str]:
    """The HF names that `name` stands for: one for each layer, if it has `{layer}`."""
    indices = _indices(name)
    grid = np.ndindex(*(getattr(cfg, INDICES[index]) for index in indices))
    return [name.format(**dict(zip(indices, at, strict=True))) for at in grid]


@dataclass(frozen=True)
class Key:
    """A weight of the decoder and the HF tensors that store it.

    path: of the weight, dotted. name: of the tensors; each index in it (`{layer}`) is a
    leading dim of the weight. transpose: the tensor is […, out, in], the weight […, in, out].
    rows: the weight is this range of a fused tensor's out dim.
    """

    path: str
    name: str
    transpose: bool = False
    rows: tuple[int, int] | None = None

    @property
    def stacked(self) -> int:
        """Leading dims of the weight, which are not dims of a tensor."""
        return len(_indices(self.name))


NORMS: dict[str, dict[str, str]] = {
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
}


def key_table(cfg: ModelConfig) -> list[Key]:
    """Every weight of the decoder once. Parts of a fused tensor follow one another in its order."""
    Q, KV, F = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim, cfg.intermediate_size
    layer = "model.layers.{layer}."
    keys = [Key("embed.embedding", EMBED)]

    def linear(path: str, name: str, bias: bool, rows: tuple[int, int] | None = None) -> None:
        keys.append(Key(f"layers.{path}.kernel", f"{layer}{name}.weight", True, rows))
        if bias:
            keys.append(Key(f"layers.{path}.bias", f"{layer}{name}.bias", False, rows))

    if FAMILIES[cfg.family].fused:
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
        for part in ("q_norm", "k_norm"):
            keys.append(Key(f"layers.attn.{part}.scale", f"{layer}self_attn.{part}.weight"))
    for ours, name in NORMS[cfg.norm_placement].items():
        keys.append(Key(f"layers.{ours}.scale", f"{layer}{name}.weight"))
    keys.append(Key("norm.scale", "model.norm.weight"))
    if cfg.scores:
        keys.append(Key("score.kernel", "score.weight", True))
    elif not cfg.tie_embeddings:
        keys.append(Key("head.kernel", HEAD, True))
    return keys
