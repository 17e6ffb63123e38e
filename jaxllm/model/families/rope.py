# SPDX-License-Identifier: Apache-2.0
"""RoPE of a config: HF's `rope_parameters`, and its spelling before transformers 5."""

from __future__ import annotations

import math
from typing import Any

from jaxllm.errors import UserError, seen
from jaxllm.model.config import Rope
from jaxllm.model.families.family import Family
from jaxllm.model.families.table import FAMILIES

# Rope field -> HF key, by kind. `theta` and `partial` belong to all.
ROPE_KEYS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "proportional": {"factor": "factor", "partial": "partial_rotary_factor"},
    "dynamic": {"factor": "factor"},
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
        "mscale_all_dim": "mscale_all_dim",
    },
    "longrope": {
        "original_length": "original_max_position_embeddings",
        "mscale": "attention_factor",
        "long_factor": "long_factor",
        "short_factor": "short_factor",
    },
}


def renamed(p: Any) -> Any:
    """RoPE's parameters with the name of longrope in place of "su", Phi-3's first one, for which
    transformers 5 does not find the original length."""
    if not isinstance(p, dict):
        return p
    return {k: "longrope" if k in ("type", "rope_type") and v == "su" else v for k, v in p.items()}


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


def read_rope(p: dict[str, Any], c: dict[str, Any]) -> Rope:
    """One set of `rope_parameters` in transformers' full spelling; `c` is the model's config."""
    kind, family = p["rope_type"], FAMILIES[c["model_type"]]
    if kind not in ROPE_KEYS:
        raise UserError(f"rope_type {seen(kind)} is not supported; known: {', '.join(ROPE_KEYS)}")
    partial = p.get("partial_rotary_factor")
    absent = family.partial if kind == "default" else 1.0
    partial = absent if partial is None else float(partial)
    if partial != 1.0 and not (family.partial_rope or kind == "proportional"):
        raise UserError(f"partial_rotary_factor {partial} is not supported for {c['model_type']}")
    p = dict(p)
    if kind in ("yarn", "longrope") and p.get("attention_factor") is None:
        p["attention_factor"] = _stretch_scale(p, c["max_position_embeddings"])
    if kind == "yarn" and p.get("factor") is None:
        p["factor"] = c["max_position_embeddings"] / p["original_max_position_embeddings"]
    values: dict[str, Any] = {"partial": partial}
    if family.static_ntk and kind == "dynamic" and (alpha := p.get("alpha")):
        # A fixed stretch of the base, whatever the length of a text.
        dim = c["head_dim"]
        return Rope(theta=float(p["rope_theta"] * alpha ** (dim / (dim - 2))), partial=partial)
    if kind == "dynamic":
        values["original_length"] = c["max_position_embeddings"]
    if family.scaled_queries:
        values["query_beta"] = p["llama_4_scaling_beta"]
        values["original_length"] = p["original_max_position_embeddings"]
    for name, key in ROPE_KEYS[kind].items():
        value = p.get(key)
        if value is not None:  # absent or null: Rope's default is transformers'
            values[name] = tuple(map(float, value)) if isinstance(value, list) else value
    return Rope(theta=float(p["rope_theta"]), kind=kind, **values)


def read_nope(c: dict[str, Any]) -> Rope:
    """The Rope of layers without rotary positions."""
    if not (FAMILIES[c["model_type"]].scaled_nope and c["attn_temperature_tuning"]):
        return Rope(kind="none")
    scale, length = float(c["attn_scale"]), c["floor_scale"]
    return Rope(kind="none", query_beta=scale, query_shift=1, original_length=length)


def write_nope(rope: Rope) -> dict[str, Any]:
    """The keys of `read_nope`; rope: the last one of a model."""
    if not rope.query_shift:
        return {"attn_temperature_tuning": False}
    keys = {"attn_scale": rope.query_beta, "floor_scale": rope.original_length}
    return keys | {"attn_temperature_tuning": True}


def write_rope(rope: Rope, family: Family) -> dict[str, Any]:
    p: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if family.partial_rope:
        p["partial_rotary_factor"] = rope.partial
    if family.scaled_queries:
        p["llama_4_scaling_beta"] = rope.query_beta
        p["original_max_position_embeddings"] = rope.original_length
    for name, key in ROPE_KEYS[rope.kind].items():
        value = getattr(rope, name)
        p[key] = list(value) if isinstance(value, tuple) else value
    if rope.kind == "proportional" and rope.factor == 1:
        del p["factor"]  # of which transformers warns
    return p


# The keys of RoPE before transformers 5.
OLD_ROPE = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
# Names of their own that families have for such keys.
NAMED = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
# Families of transformers 5, which reads their RoPE in `rope_parameters` alone.
NEW_SPELLING = ("mellum", "lfm3", "mimo_v2_flash", "gemma4_text", "gemma4_unified_text")


def old_rope(kind: str) -> tuple[str, ...]:
    """The keys of RoPE before transformers 5 in a config of a family."""
    names = NAMED.get(kind, {})
    return () if kind in NEW_SPELLING else tuple(names.get(key, key) for key in OLD_ROPE)


def rope_keys(c: dict[str, Any]) -> dict[str, Any]:
    """RoPE of a `normalised` config in both spellings: `rope_parameters`, and the keys that
    transformers 4 reads. It would use its own defaults for missing keys."""
    family = FAMILIES[c["model_type"]]
    if family.nope == "always":
        return {}
    nested = c["rope_parameters"]
    nested = nested if family.rope_by_type else {"full_attention": nested}
    nested = {n: {k: v for k, v in p.items() if k != "type"} for n, p in nested.items()}
    if c["model_type"] in NEW_SPELLING:
        return {"rope_parameters": nested}
    p = nested["full_attention"]
    keys = {"rope_parameters": nested if family.rope_by_type else p, "rope_theta": p["rope_theta"]}
    if c["model_type"] == "gemma3_text":
        keys["rope_local_base_freq"] = nested["sliding_attention"]["rope_theta"]
    if family.partial_rope:
        keys["partial_rotary_factor"] = p.get("partial_rotary_factor", 1.0)
    kind, longest = p["rope_type"], c["max_position_embeddings"]
    scaling = {k: v for k, v in p.items() if k not in OLD_ROPE and v is not None}
    if kind == "longrope":
        keys["original_max_position_embeddings"] = p["original_max_position_embeddings"]
        if c["model_type"] != "phi3":  # which computes it, and accepts no key in transformers 4
            scaling.setdefault("attention_factor", _stretch_scale(p, longest))
    if kind == "yarn":
        scaling.setdefault("factor", longest / p["original_max_position_embeddings"])
    if c["model_type"] == "phi3":  # transformers 4 accepts three keys and rejects any other
        scaling = {"type": scaling.pop("rope_type")} | scaling
        scaling.pop("original_max_position_embeddings", None)
    plain = kind == "default" and "mrope_section" not in p  # which transformers 4 reads there
    keys["rope_scaling"] = None if plain else scaling
    names = NAMED.get(c["model_type"], {})
    return {names.get(key, key): value for key, value in keys.items()}
