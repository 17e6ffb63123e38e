# SPDX-License-Identifier: Apache-2.0
"""Families whose layers have attention, and all or some of them a mixture of experts."""

from __future__ import annotations

import math
from typing import Any

from jaxllm.model.families import names
from jaxllm.model.families.expert_options import (
    COHERE_EXPERTS,
    DEEPSEEK_EXPERTS,
    DEEPSEEK_V2_EXPERTS,
    GRANITE_MOE,
    GRANITE_MOE_SHARED,
    GROUPED_EXPERTS,
    LLAMA4_EXPERTS,
    QWEN_EXPERTS,
    QWEN_SHARED,
    RENORMALISED,
    SIGMOID,
    experts,
    shared_experts,
)
from jaxllm.model.families.family import Family
from jaxllm.model.families.options import (
    ATTENTION_BIAS,
    CLIPPED,
    INDEXER,
    INTERLEAVED,
    LATENT,
    MLP_BIAS,
    Option,
    biases,
    either,
    positive,
    same_for_all_layers,
)

_OLMO = (*experts("num_experts", "intermediate_size"), RENORMALISED, *ATTENTION_BIAS)
_GRANITE: dict[str, Any] = {
    "fused": ("gate_up", "expert_rows"),
    "modules": names.GRANITE,
    "scores_as": None,
}


def _indexed(name: str, pairs: str) -> Family:
    """Latent attention to the keys that an indexer chooses, which rotates `pairs`."""
    return Family(
        name,
        SIGMOID | {"rope_pairs": "neighbours", "indexer.pairs": pairs},
        (*LATENT, *INDEXER, *DEEPSEEK_EXPERTS),
        dense="typed",
        modules=names.DEEPSEEK,
        mtp="layers",
        scores_as=None,
    )


EXPERTS: dict[str, Family] = {
    "deepseek_v2": Family(
        "DeepseekV2",
        {"experts.renormalised": False, "rope_pairs": "neighbours"},
        (*LATENT, *DEEPSEEK_V2_EXPERTS, *MLP_BIAS),
        dense="first",
        modules=names.DEEPSEEK,
        refused={"norm_topk_prob": "transformers ignores it for deepseek_v2; set it to false"},
    ),
    "deepseek_v3": Family(
        "DeepseekV3",
        SIGMOID,
        (*LATENT, INTERLEAVED, *DEEPSEEK_EXPERTS),
        dense="first",
        modules=names.DEEPSEEK,
        mtp="layers",
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLite",
        SIGMOID,
        (*LATENT, INTERLEAVED, *DEEPSEEK_EXPERTS),
        dense="typed",
        modules=names.DEEPSEEK,
        mtp="layers",
        scores_as=None,
    ),
    "deepseek_v32": _indexed("DeepseekV32", "halves"),
    "glm_moe_dsa": _indexed("GlmMoeDsa", "neighbours"),
    "mixtral": Family(
        "Mixtral",
        options=experts("num_local_experts", "intermediate_size"),
        window="all",
        modules=names.MIXTRAL,
    ),
    "qwen2_moe": Family(
        "Qwen2Moe",
        {"experts.shared_gate": True},
        (
            *QWEN_EXPERTS,
            *biases("qkv_bias", "qkv"),
            QWEN_SHARED,
        ),
        window="typed",
        switched=True,
        dense="steps",
    ),
    "qwen3_moe": Family(
        "Qwen3Moe",
        {"qk_norm": "head"},
        QWEN_EXPERTS + ATTENTION_BIAS,
        window="all",
        switched=True,
        dense="steps",
    ),
    "olmoe": Family(
        "Olmoe",
        {"qk_norm": "full"},
        (*_OLMO, CLIPPED),
        scores_as=None,
    ),
    "flex_olmo": Family(
        "FlexOlmo",
        {"norm_placement": "post", "qk_norm": "full"},
        _OLMO,
        scores_as=None,
    ),
    "granitemoe": Family(
        "GraniteMoe", options=GRANITE_MOE, stored=names.GRANITE_STORED, **_GRANITE
    ),
    "granitemoeshared": Family(
        "GraniteMoeShared", options=GRANITE_MOE_SHARED, stored=names.GRANITE_STORED, **_GRANITE
    ),
    "granitemoe_swa": Family(
        "GraniteMoeSWA",
        {"sinks": True},
        GRANITE_MOE_SHARED,
        window="typed",
        theta_listed=True,
        **_GRANITE,
    ),
    "glm4_moe": Family(
        "Glm4Moe",
        SIGMOID,
        (
            *DEEPSEEK_EXPERTS,
            *biases("attention_bias", "qkv"),
            either("qk_norm", "use_qk_norm", "head", "none"),
        ),
        dense="first",
        partial_rope=True,
        modules=names.DEEPSEEK,
        mtp="layers",
        scores_as=None,
    ),
    "solar_open": Family(
        "SolarOpen",
        SIGMOID,
        (
            *DEEPSEEK_EXPERTS,
            Option("intermediate_size", "moe_intermediate_size"),  # no layer has an MLP
            *biases("attention_bias", "qkv"),
        ),
        modules=names.DEEPSEEK,
        scores_as=None,
    ),
    "exaone_moe": Family(
        "ExaoneMoe",
        SIGMOID | {"qk_norm": "head"},
        (*experts("num_experts"), shared_experts("num_shared_experts"), *GROUPED_EXPERTS),
        window="typed",
        dense="typed",
        nope="full",
        modules=names.DEEPSEEK,
        stored=((".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),),
        mtp="mtp.",
        mtp_trained=False,
        scores_as=None,
    ),
    "hy_v3": Family(
        "HYV3",
        SIGMOID | {"qk_norm": "head"},
        (
            *experts("num_experts"),
            shared_experts("num_shared_experts"),
            Option("experts.scale", "router_scaling_factor"),
            *ATTENTION_BIAS,
            *MLP_BIAS,
        ),
        dense="typed",
        modules=names.DEEPSEEK | {"mlp.choice_bias": "mlp.e_score_correction_bias"},
        stored=(
            (".mlp.router.gate.", ".mlp.gate."),
            (".mlp.expert_bias", ".mlp.e_score_correction_bias"),
            (".mlp.shared_mlp.", ".mlp.shared_experts."),
        ),
        mtp="layers",
        mtp_trained=False,
        scores_as=None,
    ),
    "afmoe": Family(
        "Afmoe",
        SIGMOID
        | {
            "norm_placement": "sandwich",
            "qk_norm": "head",
            "output_gate": "feature",
        },
        (
            *experts("num_experts"),
            shared_experts("num_shared_experts"),
            Option("experts.scale", "route_scale"),
            *ATTENTION_BIAS,
            Option(
                "embed_scale",
                "mup_enabled",
                lambda scales, size: math.sqrt(size) if scales else 1.0,
                lambda scale, _: scale != 1.0,
                beside="hidden_size",
            ),
        ),
        window="typed",
        dense="leading",
        nope="full",
        modules=names.DEEPSEEK | names.AFMOE,
        scores_as=None,
    ),
    "mimo_v2_flash": Family(
        "MiMoV2Flash",
        SIGMOID,
        (
            *experts("n_routed_experts"),
            *GROUPED_EXPERTS,
            *biases("attention_bias", "qkv"),
            Option("value_dim", "v_head_dim"),
            Option("value_scale", "attention_value_scale", lambda n: 1.0 if n is None else n),
        ),
        window="typed",
        dense="typed",
        rope_by_type=True,
        doubled_windows=True,
        partial_rope=True,
        partial=0.334,
        modules=names.DEEPSEEK,
        stored=((".attention_sink_bias", ".sinks"),),
        mtp="model.mtp.",
        mtp_trained=False,
        scores_as=None,
    ),
    "dots1": Family(
        "Dots1",
        SIGMOID | {"qk_norm": "head"},
        DEEPSEEK_EXPERTS + ATTENTION_BIAS,
        window="typed",
        dense="first",
        modules=names.DEEPSEEK,
        scores_as=None,
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_Moe",
        {"experts.has_bias": True, "rope_pairs": "neighbours"},
        (*experts("moe_num_experts"), shared_experts("moe_num_shared_experts")),
        dense="interval",
        modules=names.DEEPSEEK | {"mlp.choice_bias": "mlp.moe_statics.e_score_correction_bias"},
        mtp="model.mtp_",
        mtp_trained=False,
        refused={"use_bias": "a head with a bias is not supported"},
        scores_as=None,
    ),
    "mellum": Family(
        "Mellum",
        {"qk_norm": "head"},
        QWEN_EXPERTS + ATTENTION_BIAS,
        window="typed",
        rope_by_type=True,
        dense="typed",
        scores_as=None,
    ),
    "cohere2_moe": Family(
        "Cohere2Moe",
        {"norm_placement": "parallel", "rope_pairs": "neighbours"},
        COHERE_EXPERTS,
        window="typed",
        dense="typed",
        nope="full",
        rotates_dense=True,
        modules=names.DEEPSEEK,
        scores_as=None,
    ),
    "hunyuan_v1_moe": Family(
        "HunYuanMoEV1",
        {"qk_norm": "rotated"},
        (
            Option("experts.count", "num_experts"),
            Option("experts.top_k", "moe_topk", same_for_all_layers),
            Option("experts.size", "intermediate_size"),
            Option("experts.shared_size", "intermediate_size"),
            *ATTENTION_BIAS,
        ),
        static_ntk=True,
        modules=names.HUNYUAN,
    ),
    "minimax_m2": Family(
        "MiniMaxM2",
        SIGMOID | {"qk_norm": "full"},
        experts("num_local_experts", "intermediate_size"),
        partial_rope=True,
        modules=names.MIXTRAL,
        scores_as=None,
    ),
    "llama4_text": Family(
        "Llama4",
        {
            "rope_pairs": "neighbours",
            "chunked": True,
            "experts.score": "sigmoid",
            "experts.renormalised": False,
            "experts.on_input": True,
        },
        (*LLAMA4_EXPERTS, either("qk_norm", "use_qk_norm", "unit", "none"), *ATTENTION_BIAS),
        window="chunked",
        dense="unlisted",
        nope="listed",
        scaled_nope=True,
        fused=("expert_halves",),
        modules={"mlp": "feed_forward", "mlp.router": "feed_forward.router"},
        scores_as=None,
    ),
    # Its softmax over the chosen experts' logits is that over all, renormalised.
    "gpt_oss": Family(
        "GptOss",
        {"sinks": True, "experts.bias": True},
        (
            *experts("num_local_experts", "intermediate_size"),
            Option("experts.limit", "swiglu_limit", positive),
            Option("experts.alpha", "swiglu_alpha"),
            *ATTENTION_BIAS,
        ),
        window="typed",
        fused=("experts",),
        modules={"mlp.router": "mlp.router"},
    ),
}
