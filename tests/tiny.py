# SPDX-License-Identifier: Apache-2.0
"""Tiny random torch models of every family, their weights large enough that a mistake shows."""

from __future__ import annotations

import copy
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.core_model_loading import revert_weight_conversion

from jaxllm.config import MeshSection
from jaxllm.mesh import make_mesh
from jaxllm.model.decoder import Decoder
from jaxllm.model.families.tensors import module_name
from jaxllm.model.families.wrappers import WRAPPERS

B, T, V = 2, 24, 131
FULL, SLIDING = "full_attention", "sliding_attention"
SHAPE: dict[str, Any] = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=256)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10_000.0,
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[1.5, 2.0, 4.0, 9.0],
)
GLM4_MOE = dict(
    head_dim=12,
    moe_intermediate_size=20,
    n_routed_experts=8,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    attention_bias=True,
)
GEMMA = dict(head_dim=12, query_pre_attn_scalar=20, sliding_window=5)
GEMMA4: dict[str, Any] = dict(
    rms_norm_eps=1e-2,  # a smaller one magnifies the roundings of small sums
    head_dim=12,
    global_head_dim=16,
    sliding_window=5,
    layer_types=[SLIDING, FULL] * 2,
    hidden_size_per_layer_input=0,
    rope_parameters={
        FULL: dict(rope_type="proportional", rope_theta=500.0, partial_rotary_factor=0.5),
        SLIDING: dict(rope_type="default", rope_theta=100.0),
    },
)
LATENT: dict[str, Any] = dict(
    kv_lora_rank=28,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    num_key_value_heads=4,
)
DEEPSEEK: dict[str, Any] = dict(
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=20,
    n_shared_experts=2,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=1.7,
    first_k_dense_replace=1,
)
# So many heads that no two scores are equal: a score is 0 if relu makes all its terms 0.
INDEXED: dict[str, Any] = (
    LATENT | DEEPSEEK | dict(q_lora_rank=20, index_topk=7, index_n_heads=16, index_head_dim=12)
)

LINEAR = "linear_attention"
DELTA: dict[str, Any] = dict(
    head_dim=12,
    rms_norm_eps=1e-3,  # a smaller one magnifies the roundings of small states
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=10,
    layer_types=[LINEAR, FULL, LINEAR, FULL],
    rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5),
)
DELTA_EXPERTS: dict[str, Any] = dict(
    moe_intermediate_size=20,
    shared_expert_intermediate_size=28,
    num_experts=6,
    num_experts_per_tok=2,
)

GRANITE: dict[str, Any] = dict(
    embedding_multiplier=3.0,
    logits_scaling=0.7,
    residual_multiplier=0.4,
    attention_multiplier=0.2,
)
GRANITE_HYBRID: dict[str, Any] = GRANITE | dict(
    rms_norm_eps=1e-3,  # a smaller one magnifies the roundings of small states
    shared_intermediate_size=28,
    layer_types=[LINEAR, FULL, LINEAR, FULL],
    mamba_n_heads=8,
    mamba_n_groups=2,
    mamba_d_head=8,
    mamba_d_state=10,
)

BAMBA: dict[str, Any] = dict(
    rms_norm_eps=1e-2,  # a smaller one magnifies the roundings of small states
    mamba_n_heads=8,
    mamba_d_state=10,
    rope_parameters=dict(rope_type="default", rope_theta=500.0),
)

NEMOTRON_H: dict[str, Any] = dict(
    layer_norm_epsilon=1e-2,  # a smaller one magnifies the roundings of small states
    head_dim=12,
    mamba_num_heads=8,
    mamba_head_dim=8,
    n_groups=2,
    ssm_state_size=10,
)

OLMO_HYBRID: dict[str, Any] = dict(
    rms_norm_eps=1e-3,  # a smaller one magnifies the roundings of small states
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    # transformers saves the convolution in three equal parts, whatever the widths of q, k and v.
    linear_key_head_dim=20,
    linear_value_head_dim=10,
)
NO_BASE = dict(rope_type="default", rope_theta=None)

# One entry for each family carries the family's name; the others turn its flags.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", dict(head_dim=12)),
    "llama mqa, all biases, tied": (
        "llama",
        dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
    "llama mha, gelu": ("llama", dict(num_key_value_heads=4, hidden_act="gelu")),
    "llama linear": (
        "llama",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=4.0)),
    ),
    "llama linear, old spelling": (
        "llama",
        dict(rope_scaling=dict(type="linear", factor=3.0), rope_theta=300.0),
    ),
    "llama llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "llama yarn": ("llama", dict(head_dim=24, rope_parameters=YARN)),
    "llama yarn, all its options": (
        "llama",
        dict(
            head_dim=24,
            rope_parameters=YARN
            | dict(beta_fast=16.0, beta_slow=2.0, truncate=False, mscale=0.7, mscale_all_dim=0.3),
        ),
    ),
    "llama yarn, attention factor": (
        "llama",
        dict(head_dim=24, rope_parameters=YARN | {"attention_factor": 1.4}),
    ),
    "mistral": ("mistral", dict(head_dim=12, sliding_window=5)),
    "mistral unlimited, tied": ("mistral", dict(sliding_window=None, tie_word_embeddings=True)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2 sliding": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=5, max_window_layers=2, num_key_value_heads=1),
    ),
    "qwen3": ("qwen3", dict(head_dim=12)),
    "qwen3 biases, sliding, tied": (
        "qwen3",
        dict(
            head_dim=8,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=7,
            layer_types=[SLIDING, FULL, FULL, SLIDING],
            tie_word_embeddings=True,
        ),
    ),
    "gemma2": ("gemma2", GEMMA | dict(attn_logit_softcapping=3.0, final_logit_softcapping=8.0)),
    "gemma2 no caps, biases, untied": (
        "gemma2",
        GEMMA
        | dict(
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=True,
            tie_word_embeddings=False,
        ),
    ),
    "gemma3_text": (
        "gemma3_text",
        GEMMA
        | dict(
            layer_types=[SLIDING, FULL, SLIDING, FULL],
            rope_parameters={
                FULL: dict(rope_type="linear", rope_theta=100_000.0, factor=8.0),
                SLIDING: dict(rope_type="default", rope_theta=100.0),
            },
        ),
    ),
    "gemma3_text old spelling, capped": (
        "gemma3_text",
        GEMMA
        | dict(
            sliding_window_pattern=3,
            rope_theta=50_000.0,
            rope_local_base_freq=200.0,
            rope_scaling=dict(rope_type="linear", factor=2.0),
            final_logit_softcapping=6.0,
            attention_bias=True,
        ),
    ),
    "gemma4_text": (
        "gemma4_text",
        GEMMA4
        | dict(
            num_hidden_layers=6,
            layer_types=[SLIDING, SLIDING, FULL] * 2,
            num_kv_shared_layers=3,
            use_double_wide_mlp=True,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=V,
            final_logit_softcapping=8.0,
        ),
    ),
    "gemma4_text values from keys": (
        "gemma4_text",
        GEMMA4 | dict(attention_k_eq_v=True, num_global_key_value_heads=1, attention_bias=True),
    ),
    "gemma4_text experts": (
        "gemma4_text",
        GEMMA4
        | dict(
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            enable_moe_block=True,
            num_experts=6,
            top_k_experts=3,
            moe_intermediate_size=20,
            tie_word_embeddings=False,
        ),
    ),
    "gemma4_unified_text": (
        "gemma4_unified_text",
        {key: value for key, value in GEMMA4.items() if "per_layer_input" not in key}
        | dict(attention_k_eq_v=True, num_global_key_value_heads=1, final_logit_softcapping=8.0),
    ),
    "olmo": ("olmo", dict(clip_qkv=0.8)),  # near the standard deviation, so that it matters
    "olmo not clipped, biases, tied": (
        "olmo",
        dict(head_dim=12, attention_bias=True, tie_word_embeddings=True),
    ),
    "olmo2": ("olmo2", dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))),
    "olmo2 mqa, biases, tied": (
        "olmo2",
        dict(num_key_value_heads=1, attention_bias=True, tie_word_embeddings=True, head_dim=12),
    ),
    "phi": ("phi", dict()),
    "phi mqa, gelu, whole": (
        "phi",
        dict(num_key_value_heads=1, hidden_act="gelu", partial_rotary_factor=1.0),
    ),
    "phi3": ("phi3", dict(original_max_position_embeddings=32, rope_parameters=LONGROPE)),
    "phi3 longrope, long": (
        "phi3",
        dict(original_max_position_embeddings=16, rope_parameters=LONGROPE, sliding_window=9),
    ),
    "phi3 longrope, old spelling": (
        "phi3",
        dict(
            original_max_position_embeddings=16,
            rope_theta=700.0,
            rope_scaling=dict(
                type="longrope", short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 3.0, 4.0]
            ),
        ),
    ),
    "phi3 plain, partial, tied": (
        "phi3",
        dict(partial_rotary_factor=0.5, tie_word_embeddings=True, num_key_value_heads=1),
    ),
    "ministral": (
        "ministral",
        dict(head_dim=12, layer_types=[SLIDING, FULL] * 2, sliding_window=5),
    ),
    "ministral3": (
        "ministral3",
        dict(
            head_dim=24,
            rope_parameters=YARN
            | dict(original_max_position_embeddings=7, llama_4_scaling_beta=0.4, mscale=1.0),
        ),
    ),
    "gemma": ("gemma", dict(head_dim=12, hidden_act="gelu")),
    "olmo3": (
        "olmo3",
        dict(
            sliding_window=5,
            rope_scaling=YARN | dict(rope_theta=500.0),
            head_dim=24,
            layer_types=[SLIDING, FULL] * 2,
        ),
    ),
    "exaone4": ("exaone4", dict(head_dim=12, sliding_window=5, sliding_window_pattern=2)),
    "exaone4 without windows": ("exaone4", dict(sliding_window=None, layer_types=[FULL] * 4)),
    "seed_oss": ("seed_oss", dict(head_dim=12, attention_dropout=0.0, residual_dropout=0.0)),
    "seed_oss other biases": (
        "seed_oss",
        dict(head_dim=8, attention_bias=False, attention_out_bias=True, mlp_bias=True),
    ),
    "internlm3": (
        "internlm3",
        dict(
            head_dim=12,
            attention_bias=True,
            mlp_bias=True,
            max_position_embeddings=16,
            rope_parameters=dict(rope_type="dynamic", rope_theta=100.0, factor=3.0),
        ),
    ),
    "ernie4_5": ("ernie4_5", dict(head_dim=12)),
    "ernie4_5 biases": ("ernie4_5", dict(head_dim=8, use_bias=True)),
    "glm": ("glm", dict(head_dim=12)),
    "glm4": ("glm4", dict(head_dim=12)),
    "glm4 whole, no biases": (
        "glm4",
        dict(head_dim=8, attention_bias=False, partial_rotary_factor=1.0),
    ),
    "granite": (
        "granite",
        dict(
            embedding_multiplier=3.0,
            logits_scaling=0.7,
            residual_multiplier=0.4,
            attention_multiplier=0.2,
        ),
    ),
    "cohere2": (
        "cohere2",
        dict(sliding_window=5, sliding_window_pattern=2, logit_scale=0.7),
    ),
    "cohere2 biases, untied": (
        "cohere2",
        dict(
            sliding_window=6,
            attention_bias=True,
            tie_word_embeddings=False,
            head_dim=12,
            logit_scale=0.5,
        ),
    ),
    "starcoder2": ("starcoder2", dict(sliding_window=5)),
    "starcoder2 no biases, untied": (
        "starcoder2",
        dict(use_bias=False, tie_word_embeddings=False),
    ),
    "arcee": ("arcee", dict(head_dim=12)),
    "iquestcoder": ("iquestcoder", dict(head_dim=12)),
    "cwm": (
        "cwm",
        dict(head_dim=12, sliding_window=5, mlp_bias=True, rope_parameters=LLAMA3)
        | dict(bos_token_id=0),  # which must be a number
    ),
    "helium": ("helium", dict(head_dim=8)),
    "helium biases, tied": (
        "helium",
        dict(head_dim=8, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
    "hyperclovax": (
        "hyperclovax",
        dict(
            embedding_multiplier=3.0,
            logits_scaling=0.7,
            residual_multiplier=0.4,
            attention_multiplier=0.2,
        ),
    ),
    "hyperclovax without norms after, biases, tied": (
        "hyperclovax",
        dict(
            head_dim=12,
            use_post_norm=False,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
        ),
    ),
    "cohere": ("cohere", dict(logit_scale=0.7)),
    "cohere biases, untied": (
        "cohere",
        dict(attention_bias=True, tie_word_embeddings=False, logit_scale=0.5),
    ),
    "stablelm": ("stablelm", dict()),
    "stablelm parallel, biases, whole": (
        "stablelm",
        dict(use_parallel_residual=True, use_qkv_bias=True, partial_rotary_factor=1.0),
    ),
    "gpt_neox": ("gpt_neox", dict()),
    "gpt_neox in sequence, no biases, whole, tied": (
        "gpt_neox",
        dict(
            use_parallel_residual=False,
            attention_bias=False,
            hidden_act="gelu_pytorch_tanh",
            tie_word_embeddings=True,
            rotary_pct=1.0,
            rotary_emb_base=500,
        ),
    ),
    "jais2": ("jais2", dict()),
    "jais2 no biases, tied": (
        "jais2",
        dict(head_dim=12, attention_bias=False, mlp_bias=False, tie_word_embeddings=True),
    ),
    "vaultgemma": (
        "vaultgemma",
        GEMMA | dict(attn_logit_softcapping=3.0, final_logit_softcapping=8.0),
    ),
    "apertus": ("apertus", dict(head_dim=12)),
    "apertus biases, tied": (
        "apertus",
        dict(
            num_key_value_heads=1,
            attention_bias=True,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=500.0),
        ),
    ),
    "nemotron": ("nemotron", dict(attention_bias=True)),
    "nemotron whole": ("nemotron", dict(head_dim=12, mlp_bias=True, partial_rotary_factor=1.0)),
    "nanochat": ("nanochat", dict(final_logit_softcapping=3.0)),
    "nanochat not capped, biases, tied": (
        "nanochat",
        dict(
            head_dim=12,
            num_key_value_heads=1,
            attention_bias=True,
            final_logit_softcapping=None,
            tie_word_embeddings=True,
        ),
    ),
    "smollm3": ("smollm3", dict(no_rope_layers=[1, 0, 1, 0], head_dim=12)),
    "smollm3 sliding, biases, untied": (
        "smollm3",
        dict(
            no_rope_layer_interval=2,
            use_sliding_window=True,
            sliding_window=6,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        ),
    ),
    "deepseek_v2": (
        "deepseek_v2",
        LATENT
        | DEEPSEEK
        | dict(
            q_lora_rank=20,
            topk_method="group_limited_greedy",
            rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=0.7),
        ),
    ),
    "deepseek_v2 greedy, without q_lora, biases": (
        "deepseek_v2",
        LATENT | DEEPSEEK | dict(q_lora_rank=None, attention_bias=True, mlp_bias=True),
    ),
    "deepseek_v3": (
        "deepseek_v3",
        LATENT
        | DEEPSEEK
        | dict(
            q_lora_rank=20,
            rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0),
        ),
    ),
    "deepseek_v3 without q_lora, halves, biases": (
        "deepseek_v3",
        LATENT
        | DEEPSEEK
        | dict(
            q_lora_rank=None,
            rope_interleave=False,
            attention_bias=True,
            norm_topk_prob=False,
            first_k_dense_replace=0,
        ),
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        LATENT | DEEPSEEK | dict(q_lora_rank=20, mlp_layer_types=["dense"] + ["sparse"] * 3),
    ),
    "deepseek_v32": (
        "deepseek_v32",
        INDEXED | dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0)),
    ),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        INDEXED | dict(attention_bias=True, norm_topk_prob=False, first_k_dense_replace=0),
    ),
    "minicpm3": (
        "minicpm3",
        LATENT | dict(scale_emb=3, scale_depth=1.4, dim_model_base=24, q_lora_rank=20),
    ),
    "minicpm3 without q_lora, biases, yarn": (
        "minicpm3",
        LATENT
        | dict(
            attention_bias=True,
            q_lora_rank=None,
            tie_word_embeddings=False,
            rope_parameters=YARN | dict(mscale=0.8, mscale_all_dim=1.3),
        ),
    ),
    "youtu": ("youtu", LATENT | dict(q_lora_rank=20)),
    "youtu without q_lora, halves, biases, untied": (
        "youtu",
        LATENT
        | dict(
            q_lora_rank=None,
            rope_interleave=False,
            attention_bias=True,
            tie_word_embeddings=False,
            rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0),
        ),
    ),
    "mixtral": ("mixtral", dict(num_local_experts=6, sliding_window=5, head_dim=12)),
    "qwen2_moe": (
        "qwen2_moe",
        dict(moe_intermediate_size=20, shared_expert_intermediate_size=28, num_experts=6),
    ),
    "qwen3_moe": (
        "qwen3_moe",
        dict(head_dim=12, moe_intermediate_size=20, num_experts=8, num_experts_per_tok=3),
    ),
    "qwen3_moe renormalised, sliding, biases": (
        "qwen3_moe",
        dict(
            head_dim=8,
            moe_intermediate_size=20,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            use_sliding_window=True,
            sliding_window=5,
            attention_bias=True,
            tie_word_embeddings=True,
        ),
    ),
    "qwen2_moe some dense": (
        "qwen2_moe",
        dict(
            moe_intermediate_size=20,
            shared_expert_intermediate_size=28,
            num_experts=6,
            decoder_sparse_step=2,
        ),
    ),
    "qwen3_moe some dense": (
        "qwen3_moe",
        dict(
            head_dim=12,
            moe_intermediate_size=20,
            num_experts=8,
            num_experts_per_tok=3,
            num_hidden_layers=5,
            mlp_only_layers=[1],
        ),
    ),
    "glm4_moe": ("glm4_moe", GLM4_MOE),
    "glm4_moe groups, norms, no biases": (
        "glm4_moe",
        GLM4_MOE
        | dict(
            use_qk_norm=True,
            attention_bias=False,
            n_group=4,
            topk_group=2,
            num_experts_per_tok=4,
            n_shared_experts=2,
            first_k_dense_replace=2,
            norm_topk_prob=False,
        ),
    ),
    "mimo_v2_flash": (
        "mimo_v2_flash",
        dict(
            head_dim=12,
            v_head_dim=10,
            num_key_value_heads=1,
            moe_intermediate_size=20,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.7,
            sliding_window=5,
            layer_types=[FULL, SLIDING, SLIDING, FULL],
            rope_parameters={
                FULL: dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.334),
                SLIDING: dict(rope_type="default", rope_theta=100.0),
            },
        ),
    ),
    "mimo_v2_flash not renormalised, values wider than keys, biases, tied": (
        "mimo_v2_flash",
        dict(
            head_dim=8,
            v_head_dim=14,
            attention_value_scale=None,
            moe_intermediate_size=20,
            n_routed_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            sliding_window_size=8,
            layer_types=[SLIDING, FULL] * 2,
            mlp_layer_types=["dense", "sparse", "dense", "sparse"],
            attention_bias=True,
            tie_word_embeddings=True,
        ),
    ),
    "dots1": (
        "dots1",
        dict(
            head_dim=12,
            moe_intermediate_size=20,
            n_routed_experts=6,
            num_experts_per_tok=2,
            n_shared_experts=2,
            first_k_dense_replace=1,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            sliding_window=5,
            max_window_layers=2,
        ),
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        dict(moe_intermediate_size=20, moe_num_experts=6, moe_k=3, tie_word_embeddings=False),
    ),
    "ernie4_5_moe intervals, tied": (
        "ernie4_5_moe",
        dict(
            head_dim=12,
            num_hidden_layers=7,
            moe_intermediate_size=20,
            moe_num_experts=6,
            moe_k=3,
            moe_num_shared_experts=1,
            moe_layer_interval=2,
            moe_layer_start_index=2,
            moe_layer_end_index=5,
        ),
    ),
    "mellum": (
        "mellum",
        dict(
            head_dim=12,
            moe_intermediate_size=20,
            num_experts=6,
            num_experts_per_tok=2,
            sliding_window=5,
            layer_types=[SLIDING, FULL] * 2,
            mlp_layer_types=["dense", "sparse", "sparse", "dense"],
            rope_parameters={
                FULL: YARN | dict(attention_factor=1.0),
                SLIDING: dict(rope_type="default", rope_theta=100.0),
            },
        ),
    ),
    "olmoe": ("olmoe", dict(num_experts=8, num_experts_per_tok=3)),
    "olmoe clipped": ("olmoe", dict(num_experts=6, num_experts_per_tok=2, clip_qkv=0.8)),
    "flex_olmo": ("flex_olmo", dict(num_experts=6, num_experts_per_tok=3)),
    "flex_olmo renormalised, biases, tied": (
        "flex_olmo",
        dict(
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            attention_bias=True,
            tie_word_embeddings=True,
        ),
    ),
    "granite_swa": (
        "granite_swa",
        GRANITE
        | dict(head_dim=12, sliding_window=5, layer_types=[FULL, SLIDING] * 2)
        | dict(layer_rope_theta=[0, 100.0, 0, 500.0]),
    ),
    "granite_swa one base, biases, untied": (
        "granite_swa",
        GRANITE
        | dict(
            sliding_window=9,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=700.0),
        ),
    ),
    "granitemoe_swa": (
        "granitemoe_swa",
        GRANITE
        | dict(
            num_local_experts=6,
            num_experts_per_tok=3,
            intermediate_size=20,
            shared_intermediate_size=28,
            sliding_window=5,
            layer_rope_theta=[500.0, 100.0, 100.0, 0],
        ),
    ),
    "granitemoe": (
        "granitemoe",
        GRANITE | dict(num_local_experts=6, num_experts_per_tok=3, intermediate_size=20),
    ),
    "granitemoeshared": (
        "granitemoeshared",
        GRANITE
        | dict(
            num_local_experts=6,
            num_experts_per_tok=2,
            intermediate_size=20,
            shared_intermediate_size=28,
            attention_bias=True,
            tie_word_embeddings=True,
        ),
    ),
    "granitemoeshared without shared experts": (
        "granitemoeshared",
        GRANITE | dict(num_local_experts=6, num_experts_per_tok=2, intermediate_size=20),
    ),
    "solar_open": (
        "solar_open",
        dict(
            head_dim=12,
            moe_intermediate_size=20,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.7,
        ),
    ),
    "solar_open biases, not renormalised": (
        "solar_open",
        dict(
            head_dim=8,
            moe_intermediate_size=20,
            n_routed_experts=6,
            num_experts_per_tok=2,
            n_shared_experts=2,
            norm_topk_prob=False,
            attention_bias=True,
        ),
    ),
    "exaone_moe": (
        "exaone_moe",
        dict(
            head_dim=12,
            moe_intermediate_size=20,
            num_experts=8,
            num_experts_per_tok=3,
            num_shared_experts=2,
            n_group=4,
            topk_group=2,
            sliding_window=5,
            sliding_window_pattern=3,
        ),
    ),
    "afmoe": (
        "afmoe",
        dict(
            head_dim=12,
            moe_intermediate_size=20,
            num_experts=8,
            num_experts_per_tok=3,
            num_shared_experts=2,
            route_scale=1.7,
            sliding_window=5,
            global_attn_every_n_layers=2,
            mup_enabled=True,
        ),
    ),
    "afmoe biases, tied": (
        "afmoe",
        dict(
            head_dim=8,
            moe_intermediate_size=20,
            num_experts=6,
            num_experts_per_tok=2,
            num_shared_experts=1,
            num_dense_layers=2,
            attention_bias=True,
            tie_word_embeddings=True,
        ),
    ),
    "hy_v3": (
        "hy_v3",
        dict(
            head_dim=12,
            moe_intermediate_size=20,
            num_experts=8,
            num_experts_per_tok=3,
            num_shared_experts=2,
        ),
    ),
    "hy_v3 biases, tied": (
        "hy_v3",
        dict(
            head_dim=8,
            moe_intermediate_size=20,
            num_experts=6,
            num_experts_per_tok=2,
            mlp_layer_types=["dense", "sparse", "dense", "sparse"],
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
        ),
    ),
    "hunyuan_v1_dense": (
        "hunyuan_v1_dense",
        dict(
            head_dim=12,
            rope_parameters=dict(rope_type="dynamic", rope_theta=100.0, factor=1.0, alpha=50.0),
        ),
    ),
    "hunyuan_v1_dense biases, tied": (
        "hunyuan_v1_dense",
        dict(head_dim=8, attention_bias=True, tie_word_embeddings=True),
    ),
    "cohere2_moe": (
        "cohere2_moe",
        dict(
            head_dim=12,
            intermediate_size=20,
            num_experts=6,
            num_experts_per_tok=3,
            num_shared_experts=2,
            layer_types=[FULL, SLIDING, SLIDING, FULL],
            mlp_layer_types=["dense"] + ["sparse"] * 3,
            prefix_dense_intermediate_size=44,
            sliding_window=5,
            logit_scale=0.7,
        ),
    ),
    "cohere2_moe sigmoid, summed, rms norms, biases, untied": (
        "cohere2_moe",
        dict(
            head_dim=8,
            num_experts=8,
            num_shared_experts=1,
            shared_expert_combination_strategy="sum",
            expert_selection_fn="sigmoid",
            norm_topk_prob=False,
            first_k_dense_replace=2,
            prefix_dense_sliding_window_pattern=2,
            sliding_window_pattern=2,
            sliding_window=9,
            rms_norm_eps=1e-5,
            attention_bias=True,
            tie_word_embeddings=False,
            logit_scale=0.5,
        ),
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", dict(head_dim=12, num_experts=6, moe_topk=[2] * 4)),
    "minimax_m2": (
        "minimax_m2",
        dict(
            head_dim=12,
            num_local_experts=8,
            num_experts_per_tok=3,
            rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5),
        ),
    ),
    "llama4_text": (
        "llama4_text",
        dict(
            head_dim=12,
            intermediate_size=20,
            intermediate_size_mlp=44,
            num_local_experts=6,
            num_hidden_layers=5,
            moe_layers=[0, 2, 3, 4],
            no_rope_layers=[1, 1, 0, 1, 0],
            attention_chunk_size=9,
            attn_scale=0.4,
            floor_scale=7,
        ),
    ),
    "llama4_text without norms, two experts, biases, tied": (
        "llama4_text",
        dict(
            head_dim=8,
            intermediate_size=20,
            intermediate_size_mlp=44,
            num_local_experts=6,
            num_experts_per_tok=2,
            interleave_moe_layer_step=2,
            attention_chunk_size=5,
            use_qk_norm=False,
            attn_temperature_tuning=False,
            attention_bias=True,
            tie_word_embeddings=True,
            rope_parameters=LLAMA3 | dict(low_freq_factor=1.0, high_freq_factor=1.0),
        ),
    ),
    "gpt_oss": (
        "gpt_oss",
        dict(
            head_dim=24,
            intermediate_size=20,
            num_local_experts=8,
            num_experts_per_tok=3,
            sliding_window=5,
            swiglu_limit=1.5,  # near the standard deviation, so that it matters
            rope_parameters=YARN | dict(truncate=False, original_max_position_embeddings=16),
        ),
    ),
    "gpt_oss no biases, tied": (
        "gpt_oss",
        dict(
            head_dim=8,
            intermediate_size=20,
            num_local_experts=6,
            attention_bias=False,
            tie_word_embeddings=True,
            layer_types=[FULL, SLIDING, SLIDING, FULL],
            sliding_window=9,
            swiglu_limit=0.8,
            swiglu_alpha=1.1,
            rope_parameters=dict(rope_type="default", rope_theta=500.0),
        ),
    ),
    "lfm2": (
        "lfm2",
        dict(
            intermediate_size=60,
            block_multiple_of=12,
            layer_types=["conv", "conv", FULL, "conv", FULL],
            num_hidden_layers=5,
            rope_parameters=dict(rope_type="default", rope_theta=500.0),
        ),
    ),
    "lfm2 biases, untied": (
        "lfm2",
        dict(
            conv_bias=True,
            conv_L_cache=4,
            block_auto_adjust_ff_dim=False,
            full_attn_idxs=[0, 2],
            tie_word_embeddings=False,
        ),
    ),
    "lfm2_moe": (
        "lfm2_moe",
        dict(
            moe_intermediate_size=20,
            num_experts=6,
            num_experts_per_tok=3,
            num_dense_layers=1,
            layer_types=["conv", "conv", FULL, "conv", FULL],
            num_hidden_layers=5,
            rope_parameters=dict(rope_type="default", rope_theta=500.0),
        ),
    ),
    "lfm2_moe no bias of the choice, not renormalised, untied": (
        "lfm2_moe",
        dict(
            moe_intermediate_size=20,
            num_experts=6,
            num_experts_per_tok=2,
            num_dense_layers=2,
            layer_types=["conv", FULL, "conv", "conv"],
            conv_bias=True,
            use_expert_bias=False,
            norm_topk_prob=False,
            routed_scaling_factor=1.7,
            tie_word_embeddings=False,
        ),
    ),
    "lfm3": (
        "lfm3",
        dict(
            head_dim=12,
            layer_types=["conv", FULL, SLIDING, "conv", FULL],
            num_hidden_layers=5,
            sliding_window=5,
            rope_parameters=GEMMA4["rope_parameters"],
        ),
    ),
    "lfm3 without norms after, not gated, biases, untied": (
        "lfm3",
        dict(
            head_dim=8,
            layer_types=["conv", SLIDING, "conv", SLIDING],
            sliding_window=9,
            conv_L_cache=4,
            conv_bias=True,
            use_sandwich_norm=False,
            use_attention_gate=False,
            attention_bias=True,
            tie_word_embeddings=False,
        ),
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        GRANITE_HYBRID | dict(intermediate_size=20, num_local_experts=6, num_experts_per_tok=3),
    ),
    "granitemoehybrid without experts, rotated, biases": (
        "granitemoehybrid",
        GRANITE_HYBRID
        | dict(
            num_local_experts=0,
            position_embedding_type="rope",
            layer_types=["attention", "mamba", "mamba", "attention"],  # of transformers 4
            mamba_conv_bias=False,
            mamba_proj_bias=True,
            mamba_n_groups=4,
            attention_bias=True,
            tie_word_embeddings=True,
            hidden_act="gelu",
            rope_parameters=dict(rope_type="default", rope_theta=500.0),
        ),
    ),
    "bamba": (
        "bamba",
        BAMBA | dict(attn_layer_indices=[1, 3], mamba_n_groups=2),
    ),
    "bamba biases": (
        "bamba",
        BAMBA
        | dict(
            attn_layer_indices=[2],
            mamba_n_groups=4,
            mamba_conv_bias=False,
            mamba_proj_bias=True,
            attention_bias=True,
            mlp_bias=True,
            hidden_act="gelu",
        ),
    ),
    "nemotron_h": (
        "nemotron_h",
        NEMOTRON_H
        | dict(
            num_hidden_layers=6,
            hybrid_override_pattern="MEME*-",
            n_routed_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=20,
            moe_shared_expert_intermediate_size=28,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.7,
        ),
    ),
    "nemotron_h without experts, biases, least steps": (
        "nemotron_h",
        NEMOTRON_H
        | dict(
            layers_block_type=["mlp", "mamba", "attention", "mlp"],  # of transformers 4
            use_bias=True,
            mlp_bias=True,
            use_conv_bias=False,
            n_groups=4,
            time_step_min=0.4,
            mlp_hidden_act="silu",
            mamba_hidden_act="gelu",
        ),
    ),
    "nemotron_h experts of latents, biases": (
        "nemotron_h",
        NEMOTRON_H
        | dict(
            num_hidden_layers=6,
            hybrid_override_pattern="E*MEMM",
            n_routed_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            moe_shared_expert_intermediate_size=28,
            moe_latent_size=16,
            mlp_bias=True,
            norm_topk_prob=False,
        ),
    ),
    "qwen3_next": ("qwen3_next", DELTA | DELTA_EXPERTS | dict(norm_topk_prob=True)),
    "qwen3_next some dense, biases": (
        "qwen3_next",
        DELTA
        | DELTA_EXPERTS
        | dict(
            mlp_only_layers=[0],
            attention_bias=True,
            norm_topk_prob=False,
            linear_num_value_heads=2,
            linear_conv_kernel_dim=3,
            hidden_act="gelu",
            layer_types=[LINEAR, LINEAR, LINEAR, FULL],
        ),
    ),
    "qwen3_5_text": ("qwen3_5_text", DELTA),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", DELTA | DELTA_EXPERTS),
    "olmo_hybrid": (
        "olmo_hybrid",
        OLMO_HYBRID | dict(layer_types=[LINEAR, FULL] * 2, rope_parameters=NO_BASE),
    ),
    "olmo_hybrid rotated, β up to 1, biases, tied": (
        "olmo_hybrid",
        OLMO_HYBRID
        | dict(
            layer_types=[FULL, LINEAR, LINEAR, FULL],
            linear_allow_neg_eigval=False,
            linear_num_value_heads=2,
            linear_value_head_dim=20,
            linear_conv_kernel_dim=3,
            hidden_act="gelu",
            attention_bias=True,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=500.0),
        ),
    ),
}


def hf_config(name: str) -> dict[str, Any]:
    family, changes = CASES[name]
    return SHAPE | changes | {"model_type": family}


# Families that multiply by 1 + the weight of a norm.
OFFSET = "gemma", "vaultgemma", "nemotron", "qwen3_next", "qwen3_5"


def magnified(config: dict[str, Any]) -> Any:
    """A torch model of random weights, none of them near its usual start."""
    kind = config["model_type"]
    values = copy.deepcopy({k: v for k, v in config.items() if k != "model_type"})
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if kind in WRAPPERS else AutoModelForCausalLM
    model = auto.from_config(
        AutoConfig.for_model(kind, **values), attn_implementation="eager"
    ).float()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if "norm" in path:
                offset = kind.startswith(OFFSET) and not kind.startswith(("gemma4", "nemotron_h"))
                around = 0.0 if offset and "linear_attn" not in path else 1.0
                weight.copy_(0.4 * noise + (0.0 if path.endswith("bias") else around))
            elif path.endswith("scale"):
                weight.copy_(1 + 0.4 * noise)
            elif path.endswith("sinks"):
                weight.copy_(2.0 * noise)
            elif path.endswith("bias"):
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(noise * (1.0 if "embed" in path else 1.2 / weight.shape[-1] ** 0.5))
        for path, buffer in model.named_buffers():
            if path.endswith(("correction_bias", "expert_bias")):
                buffer.copy_(0.3 * torch.randn_like(buffer))
            if path.endswith(("act_fn.beta", "act_fn.eps")):
                buffer.copy_(buffer - 0.3 * torch.rand_like(buffer))
            if path.endswith("layer_scalar"):
                buffer.copy_(1 + 0.3 * torch.randn_like(buffer))
    return model.eval()


def as_saved(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensors as transformers saves them: those of experts one by one."""
    if not any(".experts." in n or ".linear_attn.q_" in n for n in tensors):
        return tensors
    saved = revert_weight_conversion(model, tensors)
    kind = model.config.model_type
    return {module_name(name, kind, ""): tensor for name, tensor in saved.items()}


def one_device() -> Any:
    return make_mesh(MeshSection(), jax.devices()[:1])


def some_tokens(rows: int = B, length: int = T) -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, (rows, length)).astype(np.int32)


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


@nnx.jit
def logits_of(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model(tokens)
