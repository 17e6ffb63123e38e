# SPDX-License-Identifier: Apache-2.0
"""Families with layers that have a delta net, a state space or a convolution for attention."""

from __future__ import annotations

from jaxllm.model.families import names
from jaxllm.model.families.expert_options import (
    GRANITE_EXPERTS,
    LFM2_MOE,
    QWEN_EXPERTS,
    QWEN_SHARED,
    SIGMOID,
    experts,
)
from jaxllm.model.families.family import Family
from jaxllm.model.families.options import (
    ATTENTION_BIAS,
    DELTA,
    GRANITE,
    LFM2,
    LFM3,
    MAMBA,
    MLP_BIAS,
    NEMOTRON_H,
    OLMO_HYBRID,
    Option,
)

_HYBRID = {"norm_offset": 1.0, "qk_norm": "head", "output_gate": "query"}

HYBRID: dict[str, Family] = {
    "lfm2": Family(
        "Lfm2", {"qk_norm": "head"}, LFM2, mixer="conv", modules=names.LFM2, scores_as=None
    ),
    "lfm2_moe": Family(
        "Lfm2Moe",
        {
            "qk_norm": "head",
            "activation": "silu",
            "experts.score": "sigmoid",
            "experts.sum_eps": 1e-6,
        },
        LFM2_MOE,
        mixer="conv",
        dense="leading",
        modules=names.LFM2_MOE,
        scores_as=None,
    ),
    "lfm3": Family(
        "Lfm3",
        {"qk_norm": "head", "activation": "silu"},
        LFM3,
        mixer="conv",
        window="typed",
        rope_by_type=True,
        modules=names.LFM3,
        stored=((".self_attn.gate_proj.", ".self_attn.g_proj."),),
        scores_as=None,
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybrid",
        options=(*ATTENTION_BIAS, *GRANITE, *GRANITE_EXPERTS, *MAMBA),
        mixer="mamba",
        nope="all",
        fused=("gate_up", "expert_rows"),
        modules=names.GRANITE,
        stored=names.GRANITE_STORED,
        scores_as=None,
    ),
    "bamba": Family(
        "Bamba",
        options=(*ATTENTION_BIAS, *MLP_BIAS, *MAMBA),
        mixer="mamba",
        attention_listed=True,
        partial_rope=True,
        modules=names.BAMBA,
        scores_as=None,
    ),
    "nemotron_h": Family(
        "NemotronH",
        SIGMOID | {"gated_mlp": False, "tie_embeddings": False},
        NEMOTRON_H,
        mixer="mamba",
        alone=True,
        nope="always",
        modules=names.NEMOTRON_H,
        stored=(("backbone.", "model."),),
        mtp="mtp.",
        mtp_trained=False,
        refused=dict.fromkeys(
            ("attention_bias", "mamba_proj_bias", "tie_word_embeddings"),
            "transformers ignores it for nemotron_h; set it to false",
        ),
        scores_as=None,
    ),
    "qwen3_next": Family(
        "Qwen3Next",
        _HYBRID | {"delta.grouped": True, "experts.shared_gate": True},
        (*QWEN_EXPERTS, QWEN_SHARED, *ATTENTION_BIAS, *DELTA),
        mixer="delta",
        dense="steps",
        partial_rope=True,
        mtp="mtp.",
    ),
    "qwen3_5_text": Family(
        "Qwen3_5",
        _HYBRID,
        (*ATTENTION_BIAS, *DELTA),
        mixer="delta",
        partial_rope=True,
        mtp="mtp.",
        scores_as="Qwen3_5Text",
    ),
    "qwen3_5_moe_text": Family(
        "Qwen3_5Moe",
        _HYBRID | {"experts.shared_gate": True},
        (
            *experts("num_experts"),
            Option("intermediate_size", "moe_intermediate_size"),  # no layer has an MLP
            QWEN_SHARED,
            *ATTENTION_BIAS,
            *DELTA,
        ),
        mixer="delta",
        partial_rope=True,
        mtp="mtp.",
        scores_as=None,
    ),
    "olmo_hybrid": Family(
        "OlmoHybrid",
        {"norm_placement": "post", "qk_norm": "full", "delta.norm_eps": 1e-5},
        OLMO_HYBRID,
        mixer="delta",
        norms_of_mixer="pre",
        nope="baseless",
        modules=names.OLMO_HYBRID,
        read=(
            (".attention_layer_norm.", ".input_layernorm."),
            (".feedforward_layer_norm.", ".post_attention_layernorm."),
        ),
        scores_as=None,
    ),
}
