# SPDX-License-Identifier: Apache-2.0
"""Families in which every layer has attention and an MLP; gemma4 may have experts beside it."""

from __future__ import annotations

from typing import Any

from jaxllm.model.families import names
from jaxllm.model.families.family import Family
from jaxllm.model.families.options import (
    ATTENTION_BIAS,
    ATTENTION_SOFTCAP,
    CLIPPED,
    GELU_NEW,
    GEMMA,
    GEMMA2,
    GEMMA4,
    GEMMA4_DENSE,
    GRANITE,
    INTERLEAVED,
    LATENT,
    LOGIT_SOFTCAP,
    MINICPM3,
    MLP_BIAS,
    MUP,
    XIELU,
    Option,
    biases,
    either,
)

_CAUSAL = {"use_bidirectional_attention": "only causal attention is supported"}
_NO_TYPES = {"layer_types": "transformers ignores it for this model_type; set it to null"}
_GEMMA4 = {
    "norm_placement": "sandwich",
    "qk_norm": "head",
    "value_norm": True,
    "query_scale": 1.0,
    "layer_scale": True,
}
_GEMMA4_LAYERS: dict[str, Any] = {
    "window": "typed",
    "rope_by_type": True,
    "shapes_by_layer": True,
    "fused": ("expert_rows",),
    "modules": {"mlp.router": "router.proj", "mlp.experts": "experts"}
    | {f"mlp.shared.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    "scores_as": None,
}
_COHERE = {"norm": "layer", "norm_placement": "parallel", "rope_pairs": "neighbours"}
_COHERE_OPTIONS = (
    Option("norm_eps", "layer_norm_eps"),
    Option("logit_scale", "logit_scale"),
    *ATTENTION_BIAS,
)
_SANDWICH = {"norm_offset": 1.0, "norm_placement": "sandwich"}

DENSE: dict[str, Family] = {
    "llama": Family("Llama", options=ATTENTION_BIAS + MLP_BIAS),
    "mistral": Family("Mistral", window="all", refused=_NO_TYPES),
    "ministral": Family("Ministral", window="typed"),
    "ministral3": Family("Ministral3", window="all", scaled_queries=True, refused=_NO_TYPES),
    "qwen2": Family("Qwen2", fixed={"qkv_bias": True}, window="typed", switched=True),
    "qwen3": Family("Qwen3", {"qk_norm": "head"}, ATTENTION_BIAS, window="typed", switched=True),
    "gemma": Family("Gemma", {"norm_offset": 1.0}, GEMMA, refused=_CAUSAL),
    "gemma2": Family(
        "Gemma2", _SANDWICH, GEMMA2 + ATTENTION_SOFTCAP, window="typed", refused=_CAUSAL
    ),
    "gemma3_text": Family(
        "Gemma3",
        _SANDWICH | {"qk_norm": "head"},
        GEMMA2,
        scores_as="Gemma3Text",
        window="typed",
        rope_by_type=True,
        refused=_CAUSAL
        | {"attn_logit_softcapping": "transformers ignores it for gemma3_text; set it to null"},
    ),
    "vaultgemma": Family(
        "VaultGemma",
        {"norm_offset": 1.0},
        GEMMA2 + ATTENTION_SOFTCAP,
        window="typed",
        modules={"mlp_norm": "pre_feedforward_layernorm"},
        scores_as=None,
    ),
    "gemma4_text": Family("Gemma4", _GEMMA4 | {"experts.branch": True}, GEMMA4, **_GEMMA4_LAYERS),
    "gemma4_unified_text": Family("Gemma4Unified", _GEMMA4, GEMMA4_DENSE, **_GEMMA4_LAYERS),
    "olmo": Family(
        "Olmo",
        {"norm": "layer", "norm_weight": False, "norm_eps": 1e-5},
        (*ATTENTION_BIAS, CLIPPED),
    ),
    "olmo2": Family("Olmo2", {"norm_placement": "post", "qk_norm": "full"}, ATTENTION_BIAS),
    "olmo3": Family(
        "Olmo3",
        {"norm_placement": "post", "qk_norm": "full"},
        ATTENTION_BIAS,
        window="typed",
        rope_by_type=True,
    ),
    "exaone4": Family(
        "Exaone4", {"norm_placement": "post", "qk_norm": "head"}, window="typed", nope="full"
    ),
    "phi": Family(
        "Phi",
        {"norm": "layer", "norm_bias": True, "norm_placement": "parallel", "gated_mlp": False}
        | dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "head_bias"), True),
        (Option("norm_eps", "layer_norm_eps"), GELU_NEW),
        partial_rope=True,
        modules=names.PHI,
        refused={
            "qk_layernorm": "LayerNorm of queries and keys is not supported",
            "tie_word_embeddings": "a head with a bias cannot be the token table",
        },
    ),
    "phi3": Family("Phi3", window="all", partial_rope=True, fused=("qkv", "gate_up")),
    "smollm3": Family(
        "SmolLM3", options=ATTENTION_BIAS + MLP_BIAS, window="typed", switched=True, nope="listed"
    ),
    "seed_oss": Family(
        "SeedOss",
        options=biases("attention_bias", "qkv") + biases("attention_out_bias", "o") + MLP_BIAS,
    ),
    "iquestcoder": Family("Llama", options=ATTENTION_BIAS + MLP_BIAS, scores_as=None),
    "cwm": Family("Cwm", options=MLP_BIAS, window="typed", scores_as=None),
    "helium": Family(
        "Helium", {"rope_pairs": "neighbours"}, biases("attention_bias", "qkv") + MLP_BIAS
    ),
    "internlm3": Family("Llama", options=ATTENTION_BIAS + MLP_BIAS, scores_as=None),
    "ernie4_5": Family(
        "Ernie4_5",
        {"rope_pairs": "neighbours"},
        biases("use_bias", "qkv", "o", "mlp"),
        scores_as=None,
    ),
    "glm": Family(
        "Glm",
        {"rope_pairs": "neighbours"},
        biases("attention_bias", "qkv"),
        partial_rope=True,
        fused=("gate_up",),
    ),
    "glm4": Family(
        "Glm4",
        {"rope_pairs": "neighbours", "norm_placement": "sandwich"},
        biases("attention_bias", "qkv"),
        partial_rope=True,
        fused=("gate_up",),
        modules={
            "attn_post_norm": "post_self_attn_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "mlp_post_norm": "post_mlp_layernorm",
        },
    ),
    "granite": Family("Granite", options=ATTENTION_BIAS + MLP_BIAS + GRANITE, scores_as=None),
    "granite_swa": Family(
        "GraniteSWA",
        {"sinks": True},
        ATTENTION_BIAS + MLP_BIAS + GRANITE,
        window="typed",
        theta_listed=True,
        scores_as=None,
    ),
    "hyperclovax": Family(
        "HyperCLOVAX",
        options=(
            *ATTENTION_BIAS,
            *MLP_BIAS,
            *MUP,
            Option("logit_scale", "logits_scaling"),
            either("norm_placement", "use_post_norm", "sandwich", "pre"),
        ),
        modules={
            "attn_post_norm": "post_norm1",
            "mlp_norm": "post_attention_layernorm",
            "mlp_post_norm": "post_norm2",
        },
        scores_as=None,
    ),
    "cohere": Family(
        "Cohere",
        _COHERE,
        _COHERE_OPTIONS,
        refused={"use_qk_norm": "norms whose weights differ from head to head are not supported"},
        scores_as=None,
    ),
    "cohere2": Family(
        "Cohere2",
        _COHERE,
        _COHERE_OPTIONS,
        window="typed",
        nope="full",
        scores_as=None,
    ),
    "starcoder2": Family(
        "Starcoder2",
        {"norm": "layer", "norm_bias": True, "gated_mlp": False},
        (Option("norm_eps", "norm_epsilon"), *biases("use_bias", "qkv", "o", "mlp")),
        window="all",
        modules={"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
        refused=_NO_TYPES,
    ),
    "stablelm": Family(
        "StableLm",
        {"norm": "layer", "norm_bias": True},
        (
            Option("norm_eps", "layer_norm_eps"),
            *biases("use_qkv_bias", "qkv"),
            either("norm_placement", "use_parallel_residual", "parallel", "pre"),
        ),
        partial_rope=True,
        refused={"qk_layernorm": "norms whose weights differ from head to head are not supported"},
    ),
    "gpt_neox": Family(
        "GPTNeoX",
        {"norm": "layer", "norm_bias": True, "gated_mlp": False, "mlp_bias": True},
        (
            Option("norm_eps", "layer_norm_eps"),
            Option("num_kv_heads", "num_attention_heads"),
            *ATTENTION_BIAS,
            either("norm_placement", "use_parallel_residual", "parallel_each", "pre"),
        ),
        partial_rope=True,
        root="gpt_neox.",
        fused=("qkv_heads",),
        modules=names.GPT_NEOX,
        stored=(("embed_out.", "lm_head."),),
    ),
    "jais2": Family(
        "Jais2",
        {"norm": "layer", "norm_bias": True, "gated_mlp": False},
        (Option("norm_eps", "layer_norm_eps"), *ATTENTION_BIAS, *MLP_BIAS),
        scores_as=None,
    ),
    "arcee": Family("Arcee", {"gated_mlp": False}, ATTENTION_BIAS + MLP_BIAS),
    "apertus": Family(
        "Apertus",
        {"gated_mlp": False, "qk_norm": "head"},
        (*ATTENTION_BIAS, XIELU),
        modules={"attn_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"},
        scores_as=None,
    ),
    "nemotron": Family(
        "Nemotron",
        {"norm": "layer", "norm_bias": True, "norm_offset": 1.0, "gated_mlp": False},
        (Option("norm_eps", "norm_eps"), *ATTENTION_BIAS, *MLP_BIAS),
        partial_rope=True,
    ),
    "nanochat": Family(
        "NanoChat",
        {
            "norm_weight": False,
            "embed_norm": True,
            "qk_norm": "unit",
            "rope_pairs": "swapped",
            "gated_mlp": False,
        },
        (*ATTENTION_BIAS, LOGIT_SOFTCAP),
        modules={"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
        scores_as=None,
    ),
    "youtu": Family("Youtu", options=(*LATENT, INTERLEAVED), scores_as=None),
    "minicpm3": Family("MiniCPM3", options=LATENT + MLP_BIAS + MINICPM3),
    "hunyuan_v1_dense": Family(
        "HunYuanDenseV1",
        {"qk_norm": "rotated"},
        ATTENTION_BIAS,
        static_ntk=True,
        modules=names.HUNYUAN,
    ),
}
