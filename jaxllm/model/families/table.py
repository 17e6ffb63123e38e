# SPDX-License-Identifier: Apache-2.0
"""The families: how each model type differs from plain Llama.

A family is a row of FAMILIES, made of options that name ModelConfig fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jaxllm.model.families import names
from jaxllm.model.families.options import (
    ATTENTION_BIAS,
    ATTENTION_SOFTCAP,
    DEEPSEEK_EXPERTS,
    DEEPSEEK_V2_EXPERTS,
    DELTA,
    GEMMA,
    GEMMA2,
    GEMMA4,
    GEMMA4_DENSE,
    GRANITE,
    GRANITE_EXPERTS,
    INTERLEAVED,
    LATENT,
    LFM2,
    LFM2_MOE,
    LLAMA4_EXPERTS,
    MAMBA,
    MINICPM3,
    MLP_BIAS,
    NEMOTRON_H,
    QWEN_EXPERTS,
    QWEN_SHARED,
    RENORMALISED,
    SHARED,
    Option,
    biases,
    experts,
    positive,
    qk_norm,
    same_for_all_layers,
    shared_experts,
)


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` differ from plain Llama.

    name: prefix of transformers' class names; scores_as: that of reward models, if it differs, None
      where transformers has none. transformers' own tables of these names need torch.
    fixed: ModelConfig fields with the same value in every model of the family.
    options: fields that the config sets, besides SHARED.
    window: which layers have `sliding_window`: none, all, or those that `layer_types` names
      ("typed"); or those with "chunked_attention" there, and `attention_chunk_size`. switched: only
      if `use_sliding_window` says so too.
    mixer: of the layers without attention, which `layer_types` names: a delta net or a state space
      ("linear_attention"), or a short convolution ("conv").
    alone: a layer is a mixer, an MLP ("mlp") or experts ("moe"), which `layers_block_type` names.
    dense: which layers have an MLP in place of experts: none, the `first_k_dense_replace` first,
      the `num_dense_layers` first ("leading"), those that `decoder_sparse_step` and
      `mlp_only_layers` leave out ("steps"), those outside `moe_layer_interval` ("interval"), those
      that `mlp_layer_types` names ("typed"), or those that `moe_layers` does not list ("unlisted").
    nope: which layers have no rotary positions: none, those that `no_rope_layers` lists, those
      that see all keys while others have a window ("full"), all unless
      `position_embedding_type` is "rope", or "always" all.
    rope_by_type: `rope_parameters` holds one entry for each kind of `layer_types`.
    shapes_by_layer: layers have sizes of their own (`per_layer_config`), take the values of full
      layers from their keys (`attention_k_eq_v`), and the last `num_kv_shared_layers` use the keys
      and values of the last layer of their type before them.
    partial_rope: `partial_rotary_factor` may rotate only the first part of each head.
    static_ntk: `alpha` of `rope_parameters` stretches the base of type "dynamic" once and for all.
    scaled_queries: `llama_4_scaling_beta` of `rope_parameters` scales queries by their position.
    scaled_nope: `attn_scale` does so in layers without rotary positions.
    fused: "qkv" if q, k and v are concatenated in one tensor, "gate_up" if gate and up are,
      "experts" if those of all experts are one tensor, columns of gate and up in turn,
      "expert_halves" if all columns of gate come first, "expert_rows" if these are rows;
      "expert_halves_turned" if transformers 5 saves that with the last two dims swapped.
    modules: HF names of modules that are named otherwise than in Llama; "mlp" of all in it.
    root: what the names of tensors in files begin with, where those of modules do with "model.".
    mtp: where checkpoints have weights of multi-token prediction: in "layers" after the last one
      (`num_nextn_predict_layers`), or in tensors whose names begin so; "" = nowhere. mtp_trained:
      False where they are not modules as in model/mtp.py, as those of ernie4_5_moe, which read
      hidden states before the final norm.
    refused: HF keys that must be empty, each with the reason.
    """

    name: str
    fixed: dict[str, Any] = field(default_factory=dict)
    options: tuple[Option, ...] = ()
    window: Literal["none", "all", "typed", "chunked"] = "none"
    switched: bool = False
    mixer: Literal["", "delta", "conv", "mamba"] = ""
    alone: bool = False
    dense: Literal["none", "first", "leading", "steps", "interval", "typed", "unlisted"] = "none"
    nope: Literal["none", "listed", "full", "all", "always"] = "none"
    rope_by_type: bool = False
    shapes_by_layer: bool = False
    partial_rope: bool = False
    static_ntk: bool = False
    scaled_queries: bool = False
    scaled_nope: bool = False
    fused: tuple[str, ...] = ()
    modules: dict[str, str] = field(default_factory=dict)
    root: str = "model."
    mtp: str = ""
    mtp_trained: bool = True
    refused: dict[str, str] = field(default_factory=dict)
    scores_as: str | None = ""

    def every_option(self) -> tuple[Option, ...]:
        """The options of the family, and the shared ones of fields that it does not set itself."""
        own = {option.field for option in self.options} | self.fixed.keys()
        return tuple(o for o in SHARED if o.field not in own) + self.options


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
_SIGMOID = {"experts.score": "sigmoid", "experts.has_bias": True}
_HYBRID = {"norm_offset": 1.0, "qk_norm": "head", "output_gate": True}
_SANDWICH = {"norm_offset": 1.0, "norm_placement": "sandwich"}

FAMILIES: dict[str, Family] = {
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
    "gemma4_text": Family("Gemma4", _GEMMA4 | {"experts.branch": True}, GEMMA4, **_GEMMA4_LAYERS),
    "gemma4_unified_text": Family("Gemma4Unified", _GEMMA4, GEMMA4_DENSE, **_GEMMA4_LAYERS),
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
    "phi3": Family("Phi3", window="all", partial_rope=True, fused=("qkv", "gate_up")),
    "smollm3": Family(
        "SmolLM3", options=ATTENTION_BIAS + MLP_BIAS, window="typed", switched=True, nope="listed"
    ),
    "seed_oss": Family(
        "SeedOss",
        options=biases("attention_bias", "qkv") + biases("attention_out_bias", "o") + MLP_BIAS,
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
    "cohere2": Family(
        "Cohere2",
        {"norm": "layer", "norm_placement": "parallel", "rope_pairs": "neighbours"},
        (
            Option("norm_eps", "layer_norm_eps"),
            Option("logit_scale", "logit_scale"),
            *ATTENTION_BIAS,
        ),
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
    "arcee": Family("Arcee", {"gated_mlp": False}, ATTENTION_BIAS + MLP_BIAS),
    "nemotron": Family(
        "Nemotron",
        {"norm": "layer", "norm_bias": True, "norm_offset": 1.0, "gated_mlp": False},
        (Option("norm_eps", "norm_eps"), *ATTENTION_BIAS, *MLP_BIAS),
        partial_rope=True,
    ),
    "minicpm3": Family("MiniCPM3", options=LATENT + MLP_BIAS + MINICPM3),
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
        _SIGMOID,
        (*LATENT, INTERLEAVED, *DEEPSEEK_EXPERTS),
        dense="first",
        modules=names.DEEPSEEK,
        mtp="layers",
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLite",
        _SIGMOID,
        (*LATENT, INTERLEAVED, *DEEPSEEK_EXPERTS),
        dense="typed",
        modules=names.DEEPSEEK,
        mtp="layers",
        scores_as=None,
    ),
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
        (
            *experts("num_experts", "intermediate_size"),
            RENORMALISED,
            *ATTENTION_BIAS,
        ),
        refused={"clip_qkv": "clipped queries, keys and values are not supported"},
        scores_as=None,
    ),
    "glm4_moe": Family(
        "Glm4Moe",
        _SIGMOID,
        (
            *DEEPSEEK_EXPERTS,
            *biases("attention_bias", "qkv"),
            qk_norm("use_qk_norm", "head"),
        ),
        dense="first",
        partial_rope=True,
        modules=names.DEEPSEEK,
        mtp="layers",
        scores_as=None,
    ),
    "dots1": Family(
        "Dots1",
        _SIGMOID | {"qk_norm": "head"},
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
    "hunyuan_v1_dense": Family(
        "HunYuanDenseV1",
        {"qk_norm": "rotated"},
        ATTENTION_BIAS,
        static_ntk=True,
        modules=names.HUNYUAN,
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
        {"qk_norm": "full", "experts.score": "sigmoid", "experts.has_bias": True},
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
        (*LLAMA4_EXPERTS, qk_norm("use_qk_norm", "unit"), *ATTENTION_BIAS),
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
    "granitemoehybrid": Family(
        "GraniteMoeHybrid",
        options=(*ATTENTION_BIAS, *GRANITE, *GRANITE_EXPERTS, *MAMBA),
        mixer="mamba",
        nope="all",
        fused=("gate_up", "expert_rows"),
        modules=names.GRANITE_HYBRID,
        scores_as=None,
    ),
    "nemotron_h": Family(
        "NemotronH",
        _SIGMOID | {"gated_mlp": False, "tie_embeddings": False},
        NEMOTRON_H,
        mixer="mamba",
        alone=True,
        nope="always",
        modules=names.NEMOTRON_H,
        root="backbone.",
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
}

# Model types of code on the hub, and transformers' name of the same architecture.
SAME_AS = {"kimi_k2": "deepseek_v3"}

# Features that the decoder lacks, and the model types that need them.
MISSING = {
    "delta-net layers with a gate of each feature": ("kimi_linear",),
    "state-space layers of another form": (
        *("mamba", "mamba2", "bamba", "jamba", "falcon_h1"),
        *("zamba", "zamba2", "falcon_mamba"),
    ),
    "alternating updates of several residual streams": ("gemma3n_text",),
    "learned positions": ("gpt2", "gpt_bigcode", "opt"),
}
