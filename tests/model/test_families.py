# SPDX-License-Identifier: Apache-2.0
"""Configs of every family, in the spellings found on the hub, and the names of their weights."""

import copy
import math
from dataclasses import replace
from math import prod

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AbstractMesh
from tiny import as_saved
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from jaxllm.errors import UserError
from jaxllm.hf_config import updated_configs
from jaxllm.mesh import axes_of, param_sharding
from jaxllm.model.config import Delta, Experts, LayerKind, Mamba, ModelConfig, Rope
from jaxllm.model.decoder import Decoder
from jaxllm.model.families import as_reward, from_hf, normalised, to_hf, with_mtp
from jaxllm.model.families.rope import rope_keys, write_rope
from jaxllm.model.families.table import FAMILIES
from jaxllm.model.families.tensors import key_table, tensor_names

# What the published config.json files say (only keys that shape the model), in their own spelling.
LLAMA_3_1_8B = dict(
    model_type="llama",
    attention_bias=False,
    hidden_act="silu",
    hidden_size=4096,
    initializer_range=0.02,
    intermediate_size=14336,
    max_position_embeddings=131072,
    mlp_bias=False,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    pretraining_tp=1,
    rms_norm_eps=1e-5,
    rope_scaling=dict(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
    ),
    rope_theta=500000.0,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.43.0",
    vocab_size=128256,
)
GLM_4_5_AIR = dict(
    model_type="glm4_moe",
    attention_bias=True,
    first_k_dense_replace=1,
    head_dim=128,
    hidden_act="silu",
    hidden_size=4096,
    intermediate_size=10944,
    max_position_embeddings=131072,
    moe_intermediate_size=1408,
    n_group=1,
    n_routed_experts=128,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_attention_heads=96,
    num_experts_per_tok=8,
    num_hidden_layers=46,
    num_key_value_heads=8,
    num_nextn_predict_layers=1,
    partial_rotary_factor=0.5,
    rms_norm_eps=1e-5,
    rope_scaling=None,
    rope_theta=1000000,
    routed_scaling_factor=1.0,
    tie_word_embeddings=False,
    topk_group=1,
    use_qk_norm=False,
    vocab_size=151552,
)
ERNIE_4_5_21B_A3B = dict(
    model_type="ernie4_5_moe",
    hidden_act="silu",
    hidden_size=2560,
    intermediate_size=12288,
    max_position_embeddings=131072,
    moe_intermediate_size=1536,
    moe_k=6,
    moe_layer_interval=1,
    moe_layer_start_index=1,
    moe_num_experts=64,
    moe_num_shared_experts=2,
    num_attention_heads=20,
    num_hidden_layers=28,
    num_key_value_heads=4,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    tie_word_embeddings=True,
    use_bias=False,
    vocab_size=103424,
)
LLAMA_3_1_70B = LLAMA_3_1_8B | dict(
    hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80
)
MISTRAL_7B = dict(
    model_type="mistral",
    hidden_act="silu",
    hidden_size=4096,
    intermediate_size=14336,
    max_position_embeddings=32768,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=4096,
    tie_word_embeddings=False,
    vocab_size=32000,
)
QWEN2_5_7B = dict(
    model_type="qwen2",
    attention_dropout=0.0,
    hidden_act="silu",
    hidden_size=3584,
    intermediate_size=18944,
    max_position_embeddings=32768,
    max_window_layers=28,
    num_attention_heads=28,
    num_hidden_layers=28,
    num_key_value_heads=4,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    sliding_window=131072,
    tie_word_embeddings=False,
    use_sliding_window=False,
    vocab_size=152064,
)
GEMMA_3_1B = dict(
    model_type="gemma3_text",
    attention_bias=False,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=1152,
    intermediate_size=6912,
    max_position_embeddings=32768,
    num_attention_heads=4,
    num_hidden_layers=26,
    num_key_value_heads=1,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-6,
    rope_local_base_freq=10000,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=512,
    sliding_window_pattern=6,
    vocab_size=262144,
)
PHI_3_MINI_128K = dict(
    model_type="phi3",
    hidden_act="silu",
    hidden_size=3072,
    intermediate_size=8192,
    max_position_embeddings=131072,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=32,
    original_max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_scaling=dict(
        long_factor=[1.0 + i / 2 for i in range(48)],
        short_factor=[1.0] * 48,
        type="longrope",
    ),
    rope_theta=10000.0,
    sliding_window=262144,
    tie_word_embeddings=False,
    vocab_size=32064,
)
SMOLLM3_3B = dict(
    model_type="smollm3",
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=11008,
    max_position_embeddings=65536,
    no_rope_layer_interval=4,
    no_rope_layers=[1, 1, 1, 0] * 9,
    num_attention_heads=16,
    num_hidden_layers=36,
    num_key_value_heads=4,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=5000000.0,
    sliding_window=None,
    use_sliding_window=False,
    vocab_size=128256,
)
GEMMA_4_E2B = dict(
    model_type="gemma4_text",
    final_logit_softcapping=30.0,
    global_head_dim=512,
    head_dim=256,
    hidden_size=1536,
    hidden_size_per_layer_input=256,
    intermediate_size=6144,
    layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 7,
    num_attention_heads=8,
    num_hidden_layers=35,
    num_key_value_heads=1,
    num_kv_shared_layers=20,
    sliding_window=512,
    use_double_wide_mlp=True,
    vocab_size=262144,
)
GEMMA_4_31B = dict(
    model_type="gemma4_text",
    attention_k_eq_v=True,
    final_logit_softcapping=30.0,
    global_head_dim=512,
    head_dim=256,
    hidden_size=5376,
    hidden_size_per_layer_input=0,
    intermediate_size=21504,
    num_attention_heads=32,
    num_global_key_value_heads=4,
    num_hidden_layers=60,
    num_key_value_heads=16,
    sliding_window=1024,
    use_bidirectional_attention="vision",
    vocab_size=262144,
)
GEMMA_4_26B_A4B = GEMMA_4_31B | dict(
    enable_moe_block=True,
    hidden_size=2816,
    intermediate_size=2112,
    moe_intermediate_size=704,
    num_attention_heads=16,
    num_experts=128,
    num_global_key_value_heads=2,
    num_hidden_layers=30,
    num_key_value_heads=8,
    top_k_experts=8,
)
QWEN3_30B_A3B = dict(
    model_type="qwen3_moe",
    attention_bias=False,
    decoder_sparse_step=1,
    head_dim=128,
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=6144,
    max_position_embeddings=40960,
    max_window_layers=48,
    mlp_only_layers=[],
    moe_intermediate_size=768,
    norm_topk_prob=True,
    num_attention_heads=32,
    num_experts=128,
    num_experts_per_tok=8,
    num_hidden_layers=48,
    num_key_value_heads=4,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=1000000.0,
    sliding_window=None,
    tie_word_embeddings=False,
    use_sliding_window=False,
    vocab_size=151936,
)
DEEPSEEK_V2_LITE = dict(
    model_type="deepseek_v2",
    attention_bias=False,
    first_k_dense_replace=1,
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=10944,
    kv_lora_rank=512,
    max_position_embeddings=163840,
    moe_intermediate_size=1408,
    n_group=1,
    n_routed_experts=64,
    n_shared_experts=2,
    norm_topk_prob=False,
    num_attention_heads=16,
    num_experts_per_tok=6,
    num_hidden_layers=27,
    num_key_value_heads=16,
    q_lora_rank=None,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    rms_norm_eps=1e-6,
    rope_scaling=dict(
        beta_fast=32,
        beta_slow=1,
        factor=40,
        mscale=0.707,
        mscale_all_dim=0.707,
        original_max_position_embeddings=4096,
        type="yarn",
    ),
    rope_theta=10000,
    routed_scaling_factor=1.0,
    scoring_func="softmax",
    tie_word_embeddings=False,
    topk_group=1,
    topk_method="greedy",
    v_head_dim=128,
    vocab_size=102400,
)
DEEPSEEK_V3 = dict(
    architectures=["DeepseekV3ForCausalLM"],
    model_type="deepseek_v3",
    attention_bias=False,
    ep_size=1,
    first_k_dense_replace=3,
    hidden_act="silu",
    hidden_size=7168,
    initializer_range=0.02,
    intermediate_size=18432,
    kv_lora_rank=512,
    max_position_embeddings=163840,
    moe_intermediate_size=2048,
    moe_layer_freq=1,
    n_group=8,
    n_routed_experts=256,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_attention_heads=128,
    num_experts_per_tok=8,
    num_hidden_layers=61,
    num_key_value_heads=128,
    num_nextn_predict_layers=1,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    rms_norm_eps=1e-6,
    rope_scaling=dict(
        beta_fast=32,
        beta_slow=1,
        factor=40,
        mscale=1.0,
        mscale_all_dim=1.0,
        original_max_position_embeddings=4096,
        type="yarn",
    ),
    rope_theta=10000,
    routed_scaling_factor=2.5,
    scoring_func="sigmoid",
    tie_word_embeddings=False,
    topk_group=4,
    topk_method="noaux_tc",
    v_head_dim=128,
    vocab_size=129280,
)
DEEPSEEK_V3_2 = DEEPSEEK_V3 | dict(
    architectures=["DeepseekV32ForCausalLM"],
    model_type="deepseek_v32",
    index_head_dim=128,
    index_n_heads=64,
    index_topk=2048,
)
GLM_5 = dict(
    architectures=["GlmMoeDsaForCausalLM"],
    model_type="glm_moe_dsa",
    attention_bias=False,
    first_k_dense_replace=3,
    hidden_act="silu",
    hidden_size=6144,
    index_head_dim=128,
    index_n_heads=32,
    index_topk=2048,
    intermediate_size=12288,
    kv_lora_rank=512,
    max_position_embeddings=202752,
    moe_intermediate_size=2048,
    n_group=1,
    n_routed_experts=256,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_attention_heads=64,
    num_experts_per_tok=8,
    num_hidden_layers=78,
    num_key_value_heads=64,
    num_nextn_predict_layers=1,
    q_lora_rank=2048,
    qk_nope_head_dim=192,
    qk_rope_head_dim=64,
    rms_norm_eps=1e-5,
    rope_parameters=dict(rope_theta=1000000, rope_type="default"),
    routed_scaling_factor=2.5,
    scoring_func="sigmoid",
    tie_word_embeddings=False,
    topk_group=1,
    topk_method="noaux_tc",
    v_head_dim=256,
    vocab_size=154880,
)
KIMI_K2 = DEEPSEEK_V3 | dict(
    model_type="kimi_k2",
    first_k_dense_replace=1,
    max_position_embeddings=131072,
    n_group=1,
    n_routed_experts=384,
    num_attention_heads=64,
    num_key_value_heads=64,
    num_nextn_predict_layers=0,
    rope_scaling=DEEPSEEK_V3["rope_scaling"] | dict(beta_fast=1.0, beta_slow=1.0, factor=32.0),
    rope_theta=50000.0,
    routed_scaling_factor=2.827,
    topk_group=1,
    vocab_size=163840,
)
MINICPM3_4B = dict(
    model_type="minicpm3",
    dim_model_base=256,
    hidden_act="silu",
    hidden_size=2560,
    initializer_range=0.1,
    intermediate_size=6400,
    kv_lora_rank=256,
    max_position_embeddings=32768,
    num_attention_heads=40,
    num_hidden_layers=62,
    num_key_value_heads=40,
    q_lora_rank=768,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    rms_norm_eps=1e-5,
    rope_scaling=dict(
        type="longrope",
        long_factor=[1.0 + i / 8 for i in range(16)],
        short_factor=[1.0 + i / 8 for i in range(16)],
        original_max_position_embeddings=32768,
    ),
    scale_depth=1.4,
    scale_emb=12,
    vocab_size=73448,
)
GLM_4_7_FLASH = dict(
    model_type="glm4_moe_lite",
    attention_bias=False,
    first_k_dense_replace=1,
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=10240,
    kv_lora_rank=512,
    max_position_embeddings=202752,
    moe_intermediate_size=1536,
    n_group=1,
    n_routed_experts=64,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_attention_heads=20,
    num_experts_per_tok=4,
    num_hidden_layers=47,
    num_key_value_heads=20,
    num_nextn_predict_layers=1,
    q_lora_rank=768,
    qk_nope_head_dim=192,
    qk_rope_head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=1000000,
    routed_scaling_factor=1.8,
    tie_word_embeddings=False,
    topk_group=1,
    topk_method="noaux_tc",
    v_head_dim=256,
    vocab_size=154880,
)
MIXTRAL_8X7B = dict(
    model_type="mixtral",
    hidden_act="silu",
    hidden_size=4096,
    intermediate_size=14336,
    max_position_embeddings=32768,
    num_attention_heads=32,
    num_experts_per_tok=2,
    num_hidden_layers=32,
    num_key_value_heads=8,
    num_local_experts=8,
    rms_norm_eps=1e-5,
    rope_theta=1000000.0,
    sliding_window=None,
    tie_word_embeddings=False,
    vocab_size=32000,
)
COMMAND_R7B = dict(
    model_type="cohere2",
    attention_bias=False,
    head_dim=128,
    hidden_act="silu",
    hidden_size=4096,
    intermediate_size=14336,
    layer_norm_eps=1e-5,
    logit_scale=0.25,
    max_position_embeddings=8192,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    rope_theta=50000.0,
    sliding_window=4096,
    sliding_window_pattern=4,
    vocab_size=256000,
)
# As published, but for the quantization and the keys of generation.
GPT_OSS_20B = dict(
    model_type="gpt_oss",
    attention_bias=True,
    attention_dropout=0.0,
    experts_per_token=4,
    head_dim=64,
    hidden_act="silu",
    hidden_size=2880,
    initial_context_length=4096,
    initializer_range=0.02,
    intermediate_size=2880,
    layer_types=["sliding_attention", "full_attention"] * 12,
    max_position_embeddings=131072,
    num_attention_heads=64,
    num_experts_per_tok=4,
    num_hidden_layers=24,
    num_key_value_heads=8,
    num_local_experts=32,
    output_router_logits=False,
    rms_norm_eps=1e-05,
    rope_scaling=dict(
        beta_fast=32.0,
        beta_slow=1.0,
        factor=32.0,
        original_max_position_embeddings=4096,
        rope_type="yarn",
        truncate=False,
    ),
    rope_theta=150000,
    router_aux_loss_coef=0.9,
    sliding_window=128,
    swiglu_limit=7.0,
    tie_word_embeddings=False,
    vocab_size=201088,
)
GPT_OSS_120B = GPT_OSS_20B | dict(
    layer_types=["sliding_attention", "full_attention"] * 18,
    num_hidden_layers=36,
    num_local_experts=128,
)
QWEN3_NEXT_80B_A3B = dict(
    model_type="qwen3_next",
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=151643,
    decoder_sparse_step=1,
    eos_token_id=151645,
    full_attention_interval=4,
    head_dim=256,
    hidden_act="silu",
    hidden_size=2048,
    initializer_range=0.02,
    intermediate_size=5120,
    linear_conv_kernel_dim=4,
    linear_key_head_dim=128,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_value_head_dim=128,
    max_position_embeddings=262144,
    mlp_only_layers=[],
    moe_intermediate_size=512,
    norm_topk_prob=True,
    num_attention_heads=16,
    num_experts=512,
    num_experts_per_tok=10,
    num_hidden_layers=48,
    num_key_value_heads=2,
    output_router_logits=False,
    partial_rotary_factor=0.25,
    rms_norm_eps=1e-06,
    rope_scaling=None,
    rope_theta=10000000,
    router_aux_loss_coef=0.001,
    shared_expert_intermediate_size=512,
    tie_word_embeddings=False,
    vocab_size=151936,
)
LFM2_1_2B = dict(
    model_type="lfm2",
    block_auto_adjust_ff_dim=True,
    block_dim=2048,
    block_ff_dim=12288,
    block_ffn_dim_multiplier=1.0,
    block_mlp_init_scale=1.0,
    block_multiple_of=256,
    block_norm_eps=1e-5,
    conv_L_cache=3,
    conv_bias=False,
    conv_dim=2048,
    conv_dim_out=2048,
    full_attn_idxs=[2, 5, 8, 10, 12, 14],
    hidden_size=2048,
    max_position_embeddings=128000,
    norm_eps=1e-5,
    num_attention_heads=32,
    num_hidden_layers=16,
    num_key_value_heads=8,
    rope_theta=1000000.0,
    vocab_size=65536,
)
LFM2_8B_A1B = dict(
    model_type="lfm2_moe",
    conv_L_cache=3,
    conv_bias=False,
    hidden_size=2048,
    initializer_range=0.02,
    intermediate_size=7168,
    layer_types=["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)],
    max_position_embeddings=128000,
    moe_intermediate_size=1792,
    norm_eps=1e-5,
    norm_topk_prob=True,
    num_attention_heads=32,
    num_dense_layers=2,
    num_experts=32,
    num_experts_per_tok=4,
    num_hidden_layers=24,
    num_key_value_heads=8,
    rope_theta=1000000.0,
    routed_scaling_factor=1.0,
    use_expert_bias=True,
    vocab_size=65536,
)
GRANITE_4_H_TINY = dict(
    model_type="granitemoehybrid",
    attention_bias=False,
    attention_multiplier=0.0078125,
    embedding_multiplier=12,
    hidden_act="silu",
    hidden_size=1536,
    init_method="mup",
    initializer_range=0.1,
    intermediate_size=512,
    layer_types=["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
    logits_scaling=6,
    mamba_chunk_size=256,
    mamba_conv_bias=True,
    mamba_d_conv=4,
    mamba_d_head=64,
    mamba_d_state=128,
    mamba_expand=2,
    mamba_n_groups=1,
    mamba_n_heads=48,
    mamba_proj_bias=False,
    max_position_embeddings=131072,
    normalization_function="rmsnorm",
    num_attention_heads=12,
    num_experts_per_tok=6,
    num_hidden_layers=40,
    num_key_value_heads=4,
    num_local_experts=64,
    position_embedding_type="nope",
    residual_multiplier=0.22,
    rms_norm_eps=1e-5,
    rope_theta=10000,
    shared_intermediate_size=1024,
    tie_word_embeddings=True,
    vocab_size=100352,
)
# The keys of the published configs, of which transformers uses neither attention_head_dim nor
# residual_in_fp32 nor those of RoPE.
NEMOTRON_H_8B = dict(
    model_type="nemotron_h",
    attention_bias=False,
    attention_head_dim=128,
    chunk_size=256,
    conv_kernel=4,
    expand=2,
    hidden_size=4096,
    hybrid_override_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    initializer_range=0.02,
    intermediate_size=21504,
    layer_norm_epsilon=1e-5,
    mamba_head_dim=64,
    mamba_hidden_act="silu",
    mamba_num_heads=128,
    mamba_proj_bias=False,
    max_position_embeddings=8192,
    mlp_bias=False,
    mlp_hidden_act="relu2",
    n_groups=8,
    num_attention_heads=32,
    num_hidden_layers=52,
    num_key_value_heads=8,
    num_logits_to_keep=1,
    rescale_prenorm_residual=True,
    residual_in_fp32=True,
    rms_norm_eps=1e-5,
    sliding_window=None,
    ssm_state_size=128,
    tie_word_embeddings=False,
    time_step_floor=0.0001,
    time_step_max=0.1,
    time_step_min=0.001,
    time_step_rank=256,
    use_bias=False,
    use_conv_bias=True,
    use_mamba_kernels=True,
    vocab_size=131072,
)
NEMOTRON_NANO_9B_V2 = NEMOTRON_H_8B | dict(
    head_dim=128,
    hidden_size=4480,
    hybrid_override_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    intermediate_size=15680,
    mamba_head_dim=80,
    max_position_embeddings=131072,
    num_attention_heads=40,
    num_hidden_layers=56,
)
NEMOTRON_3_NANO = dict(
    model_type="nemotron_h",
    attention_bias=False,
    chunk_size=128,
    conv_kernel=4,
    expand=2,
    head_dim=128,
    hidden_size=2688,
    hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    initializer_range=0.02,
    intermediate_size=1856,
    layer_norm_epsilon=1e-5,
    mamba_head_dim=64,
    mamba_hidden_act="silu",
    mamba_num_heads=64,
    mamba_proj_bias=False,
    mamba_ssm_cache_dtype="float32",
    max_position_embeddings=262144,
    mlp_bias=False,
    mlp_hidden_act="relu2",
    moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712,
    n_group=1,
    n_groups=8,
    n_routed_experts=128,
    n_shared_experts=1,
    norm_eps=1e-5,
    norm_topk_prob=True,
    num_attention_heads=32,
    num_experts_per_tok=6,
    num_hidden_layers=52,
    num_key_value_heads=2,
    num_logits_to_keep=1,
    partial_rotary_factor=1.0,
    rescale_prenorm_residual=True,
    residual_in_fp32=False,
    rope_theta=10000,
    routed_scaling_factor=2.5,
    sliding_window=None,
    ssm_state_size=128,
    tie_word_embeddings=False,
    time_step_floor=0.0001,
    time_step_max=0.1,
    time_step_min=0.001,
    topk_group=1,
    use_bias=False,
    use_conv_bias=True,
    use_mamba_kernels=True,
    vocab_size=131072,
)
LLAMA_4_SCOUT = dict(
    model_type="llama4_text",
    attention_bias=False,
    attention_chunk_size=8192,
    attention_dropout=0.0,
    head_dim=128,
    hidden_act="silu",
    hidden_size=5120,
    initializer_range=0.02,
    interleave_moe_layer_step=1,
    intermediate_size=8192,
    intermediate_size_mlp=16384,
    max_position_embeddings=10485760,
    no_rope_layers=[],
    num_attention_heads=40,
    num_experts_per_tok=1,
    num_hidden_layers=48,
    num_key_value_heads=8,
    num_local_experts=16,
    rms_norm_eps=1e-5,
    rope_scaling=dict(
        factor=16.0,
        high_freq_factor=1.0,
        low_freq_factor=1.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
    ),
    rope_theta=500000.0,
    tie_word_embeddings=False,
    use_qk_norm=True,
    vocab_size=202048,
)
LLAMA_4_MAVERICK = LLAMA_4_SCOUT | dict(
    interleave_moe_layer_step=2,
    max_position_embeddings=1048576,
    num_local_experts=128,
    rope_scaling=None,
    use_qk_norm=False,
)
OLMO_1B = dict(
    model_type="olmo",
    attention_bias=False,
    clip_qkv=None,
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=8192,
    max_position_embeddings=2048,
    num_attention_heads=16,
    num_hidden_layers=16,
    num_key_value_heads=16,
    rope_scaling=None,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    vocab_size=50304,
)
STABLELM_2_1_6B = dict(
    model_type="stablelm",
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=5632,
    layer_norm_eps=1e-5,
    max_position_embeddings=4096,
    num_attention_heads=32,
    num_hidden_layers=24,
    num_key_value_heads=32,
    partial_rotary_factor=0.25,
    rope_theta=10000,
    tie_word_embeddings=False,
    use_qkv_bias=True,
    vocab_size=100352,
)
COMMAND_R = dict(
    model_type="cohere",
    attention_bias=False,
    hidden_act="silu",
    hidden_size=8192,
    intermediate_size=22528,
    layer_norm_eps=1e-5,
    logit_scale=0.0625,
    max_position_embeddings=8192,
    num_attention_heads=64,
    num_hidden_layers=40,
    num_key_value_heads=64,
    rope_theta=8000000.0,
    use_qk_norm=False,
    vocab_size=256000,
)
GRANITE_3_1B_A400M = dict(
    model_type="granitemoe",
    attention_bias=False,
    attention_multiplier=0.015625,
    embedding_multiplier=12.0,
    hidden_act="silu",
    hidden_size=1024,
    intermediate_size=512,
    logits_scaling=6.0,
    max_position_embeddings=4096,
    num_attention_heads=16,
    num_experts_per_tok=8,
    num_hidden_layers=24,
    num_key_value_heads=8,
    num_local_experts=32,
    residual_multiplier=0.22,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=10000,
    tie_word_embeddings=True,
    vocab_size=49155,
)
BAMBA_9B = dict(
    model_type="bamba",
    attention_bias=False,
    attn_layer_indices=[9, 18, 27],
    attn_rotary_emb=64,
    hidden_act="silu",
    hidden_size=4096,
    intermediate_size=14336,
    mamba_chunk_size=256,
    mamba_conv_bias=True,
    mamba_d_conv=4,
    mamba_d_head=64,
    mamba_d_state=128,
    mamba_expand=2,
    mamba_n_groups=1,
    mamba_n_heads=128,
    mamba_proj_bias=False,
    max_position_embeddings=262144,
    mlp_bias=False,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    vocab_size=128256,
)
NANOCHAT_D32 = dict(
    model_type="nanochat",
    attention_bias=False,
    final_logit_softcapping=15.0,
    hidden_act="relu2",
    hidden_size=2048,
    intermediate_size=8192,
    max_position_embeddings=2048,
    num_attention_heads=16,
    num_hidden_layers=32,
    num_key_value_heads=16,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    vocab_size=65536,
)
APERTUS_8B = dict(
    model_type="apertus",
    attention_bias=False,
    hidden_act="xielu",
    hidden_size=4096,
    initializer_range=0.02,
    intermediate_size=21504,
    max_position_embeddings=65536,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_scaling=dict(
        factor=8.0,
        high_freq_factor=4.0,
        low_freq_factor=1.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
    ),
    rope_theta=12000000,
    tie_word_embeddings=False,
    vocab_size=131072,
)
PHI_2 = dict(
    model_type="phi",
    hidden_act="gelu_new",
    hidden_size=2560,
    initializer_range=0.02,
    intermediate_size=10240,
    layer_norm_eps=1e-5,
    max_position_embeddings=2048,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=32,
    partial_rotary_factor=0.4,
    qk_layernorm=False,
    rope_scaling=None,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    vocab_size=51200,
)
PYTHIA_1_4B = dict(
    model_type="gpt_neox",
    hidden_act="gelu",
    hidden_size=2048,
    initializer_range=0.02,
    intermediate_size=8192,
    layer_norm_eps=1e-5,
    max_position_embeddings=2048,
    num_attention_heads=16,
    num_hidden_layers=24,
    rotary_emb_base=10000,
    rotary_pct=0.25,
    tie_word_embeddings=False,
    use_cache=True,
    use_parallel_residual=True,
    vocab_size=50304,
)
GPT_NEOX_20B = PYTHIA_1_4B | dict(
    hidden_act="gelu_fast",
    hidden_size=6144,
    intermediate_size=24576,
    num_attention_heads=64,
    num_hidden_layers=44,
    vocab_size=50432,
)
OLMO_HYBRID_7B = dict(
    model_type="olmo_hybrid",
    hidden_size=3840,
    intermediate_size=11008,
    layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 8,
    linear_allow_neg_eigval=True,
    linear_conv_kernel_dim=4,
    linear_key_head_dim=96,
    linear_num_key_heads=30,
    linear_num_value_heads=30,
    linear_value_head_dim=192,
    max_position_embeddings=65536,
    num_attention_heads=30,
    num_hidden_layers=32,
    num_key_value_heads=30,
    rms_norm_eps=1e-6,
    rope_parameters=dict(rope_theta=None, rope_type="default"),
    tie_word_embeddings=False,
    vocab_size=100352,
)
TINY = dict(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=None,
    # dots1 has no defaults for these.
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=1,
    n_group=1,
    topk_group=1,
    # The default of granitemoehybrid divides no hidden size as small.
    mamba_n_heads=4,
    # nemotron_h has four layers by default.
    hybrid_override_pattern="ME",
)


def kinds(cfg: ModelConfig) -> list[LayerKind]:
    return [cfg.kinds[k] for k in cfg.layer_kinds or (0,) * cfg.num_layers]


def test_llama_3_1_is_read_in_the_hubs_spelling():
    cfg = from_hf(LLAMA_3_1_8B)
    rope = Rope(500000.0, "llama3", factor=8.0, original_length=8192)
    assert cfg.ropes == (rope,) and (rope.low_freq_factor, rope.high_freq_factor) == (1.0, 4.0)
    assert (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim) == (32, 8, 128)
    assert kinds(cfg) == [LayerKind(0, None)] * 32 and not cfg.tie_embeddings


def test_old_and_new_rope_spellings_mean_the_same():
    old = {k: v for k, v in LLAMA_3_1_8B.items() if not k.startswith("rope_")}
    new = old | {"rope_parameters": LLAMA_3_1_8B["rope_scaling"] | {"rope_theta": 500000.0}}
    kind = {"type": "linear", "factor": 4.0}
    assert from_hf(new) == from_hf(LLAMA_3_1_8B)
    assert from_hf(old | {"rope_scaling": kind, "rope_theta": 7.0}) == from_hf(
        old | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 7.0}}
    )


def test_windows_follow_each_familys_rule():
    assert kinds(from_hf(MISTRAL_7B)) == [LayerKind(0, 4096)] * 32
    assert kinds(from_hf(QWEN2_5_7B)) == [LayerKind(0, None)] * 28
    some = from_hf(QWEN2_5_7B | dict(use_sliding_window=True, max_window_layers=20))
    assert kinds(some) == [LayerKind(0, None)] * 20 + [LayerKind(0, 131072)] * 8
    gemma2 = from_hf(TINY | dict(model_type="gemma2", sliding_window=9))
    assert [k.window for k in kinds(gemma2)] == [9, None]


def test_gemma3_has_a_rope_for_each_kind_of_layer():
    cfg = from_hf(GEMMA_3_1B)
    local, whole = LayerKind(0, 512), LayerKind(1, None)
    assert kinds(cfg) == ([local] * 5 + [whole]) * 4 + [local] * 2
    assert cfg.ropes == (Rope(10000.0), Rope(1000000.0))
    assert cfg.query_scale == 1 / 16 and cfg.embed_scale == 1152**0.5 and cfg.norm_offset == 1


def test_phi3_longrope_scales_attention_by_the_ratio_of_lengths():
    (rope,) = from_hf(PHI_3_MINI_128K).ropes
    assert rope.kind == "longrope" and rope.original_length == 4096
    assert rope.mscale == pytest.approx(1.1902380714238083)  # sqrt(1 + ln 32 / ln 4096)
    assert len(rope.long_factor) == 48 and rope.long_factor[3] == 2.5


def test_phi3_longrope_may_have_its_first_name():
    old = PHI_3_MINI_128K | {"rope_scaling": PHI_3_MINI_128K["rope_scaling"] | {"type": "su"}}
    assert from_hf(old) == from_hf(PHI_3_MINI_128K)
    written, _ = updated_configs(old, "float32", 32064, None)
    assert written["rope_scaling"]["type"] == "longrope"
    AutoConfig.for_model("phi3", **{k: v for k, v in written.items() if k != "model_type"})


def test_smollm3_leaves_every_fourth_layer_without_positions():
    cfg = from_hf(SMOLLM3_3B)
    assert cfg.ropes[1:] == (Rope(kind="none"),)
    assert [k.rope for k in kinds(cfg)] == [0, 0, 0, 1] * 9


def test_a_config_is_read_without_being_changed():
    scaling = {"type": "linear", "factor": 2.0}
    config = TINY | {"model_type": "llama", "rope_theta": 7.0, "rope_scaling": scaling}
    before = copy.deepcopy(config)
    from_hf(config)
    assert config == before


@pytest.mark.parametrize(
    "config",
    [
        *(LLAMA_3_1_8B, MISTRAL_7B, QWEN2_5_7B, GEMMA_3_1B, PHI_3_MINI_128K, SMOLLM3_3B),
        *(QWEN3_30B_A3B, MIXTRAL_8X7B, COMMAND_R7B, GPT_OSS_20B, GPT_OSS_120B),
        *(DEEPSEEK_V2_LITE, DEEPSEEK_V3, GLM_4_7_FLASH, MINICPM3_4B, DEEPSEEK_V3_2, GLM_5),
        *(LLAMA_4_SCOUT, LLAMA_4_MAVERICK, LFM2_1_2B, LFM2_8B_A1B),
        *(GRANITE_4_H_TINY, NEMOTRON_H_8B, NEMOTRON_NANO_9B_V2, NEMOTRON_3_NANO),
        *(OLMO_1B, STABLELM_2_1_6B, COMMAND_R, GRANITE_3_1B_A400M, BAMBA_9B, OLMO_HYBRID_7B),
        *(NANOCHAT_D32, PYTHIA_1_4B, GPT_NEOX_20B, APERTUS_8B, PHI_2),
    ],
    ids=lambda c: c["model_type"],
)
def test_to_hf_inverts_from_hf(config):
    cfg = from_hf(config)
    assert from_hf(to_hf(cfg)) == cfg


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (MISTRAL_7B, dict(rope_theta=1e4, rope_scaling=None)),
        (LLAMA_3_1_8B, dict(rope_theta=5e5, rope_scaling=LLAMA_3_1_8B["rope_scaling"])),
        (
            PHI_3_MINI_128K,
            dict(
                rope_theta=1e4,
                rope_scaling=PHI_3_MINI_128K["rope_scaling"],
                original_max_position_embeddings=4096,
                partial_rotary_factor=1.0,
            ),
        ),
        (GEMMA_3_1B, dict(rope_theta=1000000, rope_scaling=None, rope_local_base_freq=10000)),
        (PYTHIA_1_4B, dict(rotary_emb_base=10000, rope_scaling=None, rotary_pct=0.25)),
    ],
    ids=lambda c: c.get("model_type", ""),
)
def test_rope_is_spelled_for_readers_before_transformers_5_too(config, want):
    keys = rope_keys(normalised(config))
    assert keys.pop("rope_parameters") and keys == want
    plain = {k: v for k, v in config.items() if "rope" not in k}
    assert (
        from_hf(plain | want) == from_hf(plain | rope_keys(normalised(config))) == from_hf(config)
    )


def test_to_hf_refuses_what_the_family_cannot_express():
    cfg = from_hf(TINY | {"model_type": "llama"})
    values = {f: getattr(cfg, f) for f in cfg.__dataclass_fields__}
    with pytest.raises(ValueError, match="llama config cannot express this model's qk_norm"):
        to_hf(ModelConfig(**values | {"qk_norm": "head"}))
    with pytest.raises(ValueError, match="qkv_bias"):
        to_hf(ModelConfig(**values | {"qkv_bias": True}))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gpt9", {}, "'gpt9' is not supported; known: llama, mistral, ministral"),
        ("mamba", {}, "'mamba' is not supported: it needs state-space layers of another form"),
        ("gpt_oss", {"swiglu_limit": 0.0}, "swiglu_limit is 0.0; it must be positive"),
        (
            "granitemoehybrid",
            {"time_step_limit": [0.0, 2.0]},
            r"time_step_limit is \[0.0, 2.0\]: transformers ignores it while decoding",
        ),
        ("granitemoehybrid", {"mamba_n_groups": 3}, "4 heads of state spaces are no multiple of 3"),
        ("nemotron_h", {"n_groups": 3}, "128 heads of state spaces are no multiple of 3 groups"),
        ("nemotron_h", {"attention_bias": True}, "attention_bias is True: transformers ignores it"),
        (
            "nemotron_h",
            {"tie_word_embeddings": True},
            "tie_word_embeddings is True: transformers ignores it for nemotron_h; set it to false",
        ),
        (
            "nemotron_h",
            {"num_hidden_layers": 3},
            "num_hidden_layers is 3, but layers_block_type or hybrid_override_pattern has 2 layers",
        ),
        (
            "nemotron_h",
            {"layers_block_type": ["mamba", "conv"]},
            "layer_types conv are not supported|conv",
        ),
        ("nemotron_h", {"mlp_hidden_act": "tanh"}, "activation 'tanh' is not supported; known: "),
        (
            "nemotron_h",
            {"time_step_limit": [0.0, 2.0]},
            r"time_step_limit is \[0.0, 2.0\]: transformers ignores it",
        ),
        (
            "aya_vision",
            {"text_config": {"model_type": "cohere2"}},
            "wraps a language model of model_type 'cohere2'; of such models only gemma3, gemma4, ",
        ),
        (
            "gemma3n",
            {"text_config": {"model_type": "gemma3n_text"}},
            "of model_type 'gemma3n_text', which is not supported: it needs alternating updates",
        ),
        ("llava", {"text_config": {"model_type": ["a"]}}, r"model_type \['a'\], which is not supp"),
        ("gemma3", {}, "the config of a gemma3 model has no text_config"),
        (
            "mistral3",
            {"text_config": {"model_type": "llama"}},
            "around a language model of model_type 'llama' is not supported; known: mistral, mini",
        ),
        (
            "gemma3",
            {"text_config": TINY | {"final_logit_softcapping": 30.0}},
            "final_logit_softcapping is 30.0: transformers ignores it for gemma3",
        ),
        (
            "gemma3",
            {"text_config": TINY, "architectures": ["Gemma3ForSequenceClassification"]},
            "reward models of model_type gemma3 are not supported",
        ),
        (
            "qwen3_vl",
            {"text_config": TINY | {"num_hidden_layers": 10**9}},
            "num_hidden_layers is 1000000000; it must be",
        ),
        (
            "opt",
            {},
            "'opt' is not supported: it needs learned positions, which this ",
        ),
        ("apertus", {"hidden_act": "silu"}, "hidden_act 'silu' is not supported; use xielu"),
        ("phi", {"tie_word_embeddings": True}, "a head with a bias cannot be the token table"),
        (None, {}, "the config has no model_type; set it to the family"),
        ("qwen3_moe", {"num_experts_per_tok": 200}, "num_experts_per_tok 200 is more than the 128"),
        ("cohere", {"use_qk_norm": True}, "norms whose weights differ from head to head"),
        ("glm4_moe", {"n_group": 3}, "n_group 3, topk_group 1: 8 experts are not in such groups"),
        ("dots1", {"n_group": 4, "num_experts_per_tok": 3}, "have fewer than 3 to choose"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported"),
        ("deepseek_v2", {"norm_topk_prob": True}, "transformers ignores it for deepseek_v2"),
        (
            "glm_moe_dsa",
            {"index_topk_pattern": "FS"},
            "indexer_types names shared layers: layers that",
        ),
        (
            "glm_moe_dsa",
            {"index_head_dim": 32},
            "index_head_dim 32 is less than qk_rope_head_dim 64",
        ),
        ("deepseek_v32", {"q_lora_rank": 0}, "q_lora_rank is 0, which is not supported with an"),
        ("deepseek_v32", {"index_topk": 0}, "index_topk is 0; it must be an integer from 1"),
        ("minimax_m3_vl_text", {}, "it needs attention to the blocks of keys that an indexer"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias is True: a head with a bias"),
        ("hunyuan_v1_moe", {"num_experts_per_tok": [1, 2]}, "layers with other numbers of experts"),
        ("llama", {"hidden_act": "relu"}, "activation 'relu' is not supported; known: silu"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "axial", "factor": 2.0}},
            "'axial' is not supported; known: default, linear",
        ),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "llama model.*high_freq_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ("llama", {"hidden_size": "wide"}, "config of a llama model"),
        ("llama", {"num_key_value_heads": 3}, "4 is no multiple of num_key_value_heads 3"),
        ("llama", {"quantization_config": {"bits": 4}}, "dequantize"),
        ("llama", {"is_causal": False}, "only causal"),
        ("gemma2", {"use_bidirectional_attention": True}, "only causal attention"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "only causal attention"),
        ("gemma4_text", {"per_layer_config": {"0": {"hidden_size": 8}}}, "of hidden_size is not"),
        (
            "gemma4_text",
            {"num_kv_shared_layers": 2},
            "num_kv_shared_layers leaves no sliding_attention layer its keys and values",
        ),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "transformers ignores it"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "set it to null"),
        (
            "qwen3",
            {"layer_types": ["chunked_attention"] * 2},
            "chunked_attention are not supported",
        ),
        ("qwen3", {"layer_types": ["full_attention"] * 3}, "num_hidden_layers"),
    ],
)
def test_what_cannot_be_computed_is_refused(kind, change, message):
    with pytest.raises(ValueError, match=message):
        from_hf(TINY | {"model_type": kind} | change)


@pytest.mark.parametrize("kind", FAMILIES)
def test_architectures_are_those_of_transformers(kind):
    config = to_hf(from_hf(TINY | {"model_type": kind}))
    reward = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(kind)
    if reward is None:
        with pytest.raises(UserError, match=f"no reward model of model_type {kind}"):
            as_reward(config)
    else:
        assert as_reward(config)["architectures"] == [reward]
    assert config["architectures"] == [modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_key_table_names_every_weight_with_its_shape(kind, tied):
    biases = dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=tied, sliding_window=8)
    biases = {k: v for k, v in biases.items() if k not in FAMILIES[kind].refused}
    config = TINY | biases | {"model_type": kind}
    if kind == "nemotron_h":
        config |= {"num_hidden_layers": 4, "moe_latent_size": 12}
        config |= {"layers_block_type": ["mamba", "moe", "attention", "mlp"]}
    # torch has no default for it, and that of helium does not fit
    if kind in ("ministral", "hunyuan_v1_dense", "hunyuan_v1_moe", "helium"):
        config |= {"head_dim": 4}
    if kind == "olmo_hybrid":  # else transformers does not divide the convolution as files do
        config |= {"linear_value_head_dim": 3}
    if kind == "lfm2_moe":
        config |= {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
    cfg = from_hf(config)
    abstract = nnx.state(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))), nnx.Param)
    ours = {".".join(p): v.get_value().shape for p, v in nnx.to_flat_state(abstract)}
    table = key_table(cfg)
    assert sorted(k.path for k in table) == sorted(ours)

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})
        )
    rotary = [name for name, _ in model.named_buffers() if "rotary" in name]
    theirs = {k: v for k, v in model.state_dict().items() if k not in rotary}
    if cfg.tie_embeddings:
        del theirs["lm_head.weight"]
    theirs = {k: tuple(v.shape) or (1,) for k, v in as_saved(model, theirs).items()}
    outputs: dict[str, set[int]] = {name: set() for name in theirs}
    sizes = {}
    for key in table:
        shape = ours[key.path]
        assert bool(key.stacked) == (key.path.split(".")[0] in cfg.stacks)
        for name in tensor_names(cfg, key.name):
            one = shape[key.stacked :]
            one = (*one[:-2], one[-1], one[-2]) if key.transpose else one
            one = key.with_unit(one, 1) or (1,)
            part = key.part or range(one[key.out_dim])
            assert len(part) == one[key.out_dim] and not outputs[name] & set(part)
            outputs[name] |= set(part)
            assert [*np.delete(one, key.out_dim)] == [*np.delete(theirs[name], key.out_dim)]
            sizes[name] = theirs[name][key.out_dim]
    assert outputs == {name: set(range(sizes[name])) for name in theirs}


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (LLAMA_3_1_70B, 70_553_706_496),
        (QWEN3_30B_A3B, 30_532_122_624),
        (MIXTRAL_8X7B, 46_702_792_704),
        (COMMAND_R7B, 8_028_033_024),
        (GLM_4_5_AIR, 106_852_251_264),
        (ERNIE_4_5_21B_A3B, 21_825_437_888),
        (DEEPSEEK_V2_LITE, 15_706_484_224),
        (DEEPSEEK_V3, 671_026_419_200),
        (KIMI_K2 | {"model_type": "deepseek_v3"}, 1_026_408_232_448),
        (GLM_4_7_FLASH, 29_943_393_920),
        (DEEPSEEK_V3_2, 671_877_944_064),
        (GLM_5, 743_911_218_432),
        (GPT_OSS_20B, 20_914_757_184),
        (GPT_OSS_120B, 116_829_156_672),
        (QWEN3_NEXT_80B_A3B, 79_674_391_296),
        (LLAMA_4_SCOUT, 107_769_861_120),
        (LLAMA_4_MAVERICK, 400_711_848_960),
        (LFM2_1_2B, 1_170_340_608),
        (LFM2_8B_A1B, 8_339_930_560),
        (GRANITE_4_H_TINY, 6_939_037_248),
        (NEMOTRON_H_8B, 8_100_852_736),
        (NEMOTRON_NANO_9B_V2, 8_888_227_328),
        (NEMOTRON_3_NANO, 31_577_940_288),
        (GEMMA_4_E2B, 4_628_569_379),
        (GEMMA_4_31B, 30_697_345_340),
        (GEMMA_4_26B_A4B, 25_233_141_790),
        (OLMO_1B, 1_176_764_416),
        (STABLELM_2_1_6B, 1_644_515_328),
        (COMMAND_R, 34_980_831_232),
        (GRANITE_3_1B_A400M, 1_334_628_352),
        (BAMBA_9B, 9_780_235_392),
        (NANOCHAT_D32, 1_879_048_192),
        (PYTHIA_1_4B, 1_414_647_808),
        (GPT_NEOX_20B, 20_554_567_680),
        (APERTUS_8B, 8_053_338_240),
        (PHI_2, 2_779_683_840),
        (OLMO_HYBRID_7B, 7_430_870_688),
    ],
    ids=lambda c: c["model_type"] if isinstance(c, dict) else "",
)
def test_a_large_model_costs_nothing_to_describe(config, want):
    cfg = from_hf(config)
    abstract = nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(abstract, nnx.Param))
    assert sum(prod(leaf.shape) for leaf in leaves) == want
    with torch.device("meta"):
        values = {k: v for k, v in config.items() if k != "model_type"}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(cfg.family, **values))
    kept = ("correction_bias", "expert_bias", "layer_scalar", "act_fn.beta", "act_fn.eps")
    buffers = [b for name, b in model.named_buffers() if name.endswith(kept)]
    assert sum(p.numel() for p in [*model.parameters(), *buffers]) == want

    # On 64 devices no array of 1 GiB is replicated, and each holds less than twice its share.
    sizes = dict(data=1, expert=8, tensor=1) if cfg.experts else dict(data=1, expert=1)
    sizes = dict(tensor=math.gcd(8, cfg.num_heads)) | sizes  # which divides no head
    sizes |= dict(fsdp=64 // prod(sizes.values()), context=1)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    whole, own = [], 0
    for _, variable in nnx.to_flat_state(nnx.state(abstract, nnx.Param)):
        shape = variable.get_value().shape
        part = param_sharding(mesh, axes_of(variable), shape).shard_shape(shape)
        own += 4 * prod(part)
        whole += [4 * prod(shape)] if part == shape else []
    assert max(whole, default=0) < 2**30 and own < 2 * 4 * want / 64


def test_published_configs_of_experts_are_read_and_written_in_their_own_spelling():
    cfg = from_hf(QWEN3_30B_A3B)
    assert cfg.experts == Experts(count=128, top_k=8, size=768)
    assert kinds(cfg) == [LayerKind(0, None)] * 48
    written = AutoConfig.for_model(**QWEN3_30B_A3B).to_dict()  # transformers 5 names it otherwise
    assert "num_experts" not in written and from_hf(written) == cfg
    assert to_hf(cfg)["num_experts"] == 128
    assert from_hf(MIXTRAL_8X7B).experts == Experts(count=8, top_k=2, size=14336)


def test_gpt_oss_has_clamped_experts_with_biases_and_windows_in_turn():
    cfg = from_hf(GPT_OSS_120B)
    assert cfg.experts == Experts(128, 4, 2880, bias=True, limit=7.0, alpha=1.702)
    assert kinds(cfg) == [LayerKind(0, 128), LayerKind(0, None)] * 18
    assert cfg.sinks and cfg.qkv_bias and cfg.o_bias and not cfg.mlp_bias
    (rope,) = cfg.ropes
    assert (rope.kind, rope.theta, rope.factor, rope.truncate) == ("yarn", 150000.0, 32.0, False)
    assert rope.mscale == pytest.approx(0.1 * math.log(32) + 1)


def test_qwen3_next_has_three_delta_nets_to_a_layer_of_attention():
    cfg = from_hf(QWEN3_NEXT_80B_A3B)
    assert kinds(cfg) == ([LayerKind(mixer="delta")] * 3 + [LayerKind()]) * 12
    assert [len(layers) for layers in cfg.stacks.values()] == [12] * 4  # one scan of periods
    assert cfg.delta == Delta(16, 32, 128, 128, 4, grouped=True)
    assert cfg.ropes == (Rope(10_000_000.0, partial=0.25),) and cfg.output_gate == "query"
    with pytest.raises(UserError, match="linear_num_value_heads 24 is no multiple of linear_num_k"):
        from_hf(QWEN3_NEXT_80B_A3B | {"linear_num_value_heads": 24})


def test_granite_4_has_state_spaces_and_attention_without_positions():
    cfg = from_hf(GRANITE_4_H_TINY)
    block = [LayerKind(1, mixer="mamba")] * 5 + [LayerKind(1)] + [LayerKind(1, mixer="mamba")] * 4
    assert kinds(cfg) == block * 4 and cfg.ropes == (Rope(10_000.0), Rope(kind="none"))
    assert cfg.mamba == Mamba(48, 64, 1, 128, 4)
    assert cfg.experts == Experts(64, 6, 512, shared_size=1024)
    written = to_hf(cfg)
    assert written["mamba_expand"] == 2 and from_hf(written) == cfg
    dense = from_hf(GRANITE_4_H_TINY | {"num_local_experts": 0})
    assert dense.experts is None and dense.intermediate_size == 1024
    plain = from_hf(
        GRANITE_4_H_TINY | {"layer_types": ["attention"] * 40, "position_embedding_type": "rope"}
    )
    assert kinds(plain) == [LayerKind()] * 40 and not plain.recurrent and cfg.recurrent
    assert from_hf(to_hf(plain)) == plain
    tagged = GRANITE_4_H_TINY | {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    assert from_hf(tagged) == cfg


def test_nemotron_h_has_layers_that_are_one_sub_layer():
    cfg, nano = from_hf(NEMOTRON_H_8B), from_hf(NEMOTRON_3_NANO)
    mamba, mlp = LayerKind(mixer="mamba", mlp=False), LayerKind(mixer="none")
    attention = LayerKind(mlp=False)
    names = {"M": mamba, "-": mlp, "E": mlp, "*": attention}
    assert kinds(cfg) == [names[c] for c in NEMOTRON_H_8B["hybrid_override_pattern"]]
    assert kinds(nano) == [names[c] for c in NEMOTRON_3_NANO["hybrid_override_pattern"]]
    assert cfg.ropes == nano.ropes == (Rope(kind="none"),) and cfg.experts is None
    assert (cfg.head_dim, cfg.activation, cfg.gated_mlp) == (128, "relu2", False)
    assert cfg.mamba == Mamba(128, 64, 8, 128, 4, least_step=0.001)
    assert nano.experts == Experts(128, 6, 1856, "sigmoid", True, scale=2.5, shared_size=3712)
    written = to_hf(nano)
    assert "rope_parameters" not in written and from_hf(written) == nano
    both = NEMOTRON_3_NANO | {"hybrid_override_pattern": "ME-*", "num_hidden_layers": 4}
    assert [kind.dense for kind in kinds(from_hf(both))] == [False, False, True, False]
    assert from_hf(to_hf(from_hf(both))) == from_hf(both)
    config, _ = updated_configs(dict(NEMOTRON_H_8B), "float32", 131072, None)
    assert config.items() >= NEMOTRON_H_8B.items() and "rope_theta" not in config
    with pytest.raises(UserError, match="mtp_loss: the multi-token prediction of nemotron_h is no"):
        with_mtp(nano, NEMOTRON_3_NANO)


def test_olmo_hybrid_has_norms_before_delta_nets_and_after_attention():
    cfg = from_hf(OLMO_HYBRID_7B)
    delta, attention = LayerKind(mixer="delta", norm_placement="pre"), LayerKind()
    assert kinds(cfg) == ([delta] * 3 + [attention]) * 8 and cfg.norm_placement == "post"
    assert cfg.delta == Delta(30, 30, 96, 192, 4, negative=True, norm_eps=1e-5)
    assert cfg.ropes == (Rope(kind="none"),) and to_hf(cfg)["rope_parameters"]["rope_theta"] is None
    rotated = from_hf(OLMO_HYBRID_7B | {"rope_parameters": {"rope_theta": 5e5}})
    assert rotated.ropes == (Rope(500_000.0),) and from_hf(to_hf(rotated)) == rotated


def test_cohere2_moe_has_rotary_positions_in_dense_layers_too():
    dense = dict(first_k_dense_replace=1, prefix_dense_intermediate_size=48, sliding_window=8)
    config = TINY | dense | {"model_type": "cohere2_moe", "num_hidden_layers": 5}
    cfg = from_hf(config | {"num_shared_experts": 2})
    local, first = LayerKind(0, 8), LayerKind(0, dense=True)
    assert kinds(cfg) == [first, local, local, local, LayerKind(1)] and cfg.intermediate_size == 48
    assert cfg.experts == Experts(8, 1, 24, shared_size=48, shared_mean=True)
    assert (cfg.norm, cfg.norm_eps) == ("layer", 1e-5) and from_hf(to_hf(cfg)) == cfg
    other = from_hf(config | {"prefix_dense_sliding_window_pattern": 4, "rms_norm_eps": 1e-3})
    assert kinds(other)[0] == LayerKind(0, 8, dense=True) and other.norm_eps == 1e-3
    full = config | {"layer_types": ["full_attention"] * 5}
    for pattern, rope in ((1, "default"), (2, "none")):
        cfg = from_hf(full | {"prefix_dense_sliding_window_pattern": pattern})
        assert cfg.ropes[kinds(cfg)[0].rope].kind == rope and from_hf(to_hf(cfg)) == cfg
    strategy = "shared_expert_combination_strategy"
    with pytest.raises(UserError, match=f"{strategy} 'best' is not supported; use average or sum"):
        from_hf(config | {strategy: "best"})
    with pytest.raises(UserError, match="expert_selection_fn 'topk' is not supported; use softmax"):
        from_hf(config | {"expert_selection_fn": "topk"})


def test_mimo_v2_flash_has_sinks_and_more_heads_in_layers_with_a_window():
    config = TINY | {"model_type": "mimo_v2_flash", "num_hidden_layers": 7, "v_head_dim": 6}
    cfg = from_hf(config | {"head_dim": 12, "sliding_window_size": 8})
    local = LayerKind(1, 9, num_kv_heads=4, sinks=True)
    full = LayerKind(0, dense=True), LayerKind(0)
    assert kinds(cfg) == [full[0], *[local] * 4, full[1], local] and not cfg.sinks
    assert cfg.ropes == (Rope(5e6, partial=0.334), Rope(1e4, partial=0.334))
    assert cfg.attention_dims == (12, 6) and cfg.value_scale == 0.707
    assert cfg.of(local).cached_dims == (4, 12, 6) and from_hf(to_hf(cfg)) == cfg
    with pytest.raises(UserError, match="heads 4, of which layers with a window have 8"):
        from_hf(config | {"num_key_value_heads": 4})
    ropes = {
        "full_attention": cfg.ropes[0],
        "sliding_attention": replace(cfg.ropes[1], partial=1.0),
    }
    ropes = {n: write_rope(rope, FAMILIES["mimo_v2_flash"]) for n, rope in ropes.items()}
    with pytest.raises(UserError, match="partial_rotary_factor differs among layers"):
        from_hf(config | {"rope_parameters": ropes})


def test_bamba_lists_its_layers_with_attention():
    cfg = from_hf(BAMBA_9B)
    attends = [kind.mixer == "attention" for kind in kinds(cfg)]
    assert [i for i, one in enumerate(attends) if one] == [9, 18, 27]
    assert cfg.mamba == Mamba(128, 64, 1, 128, 4) and cfg.ropes == (Rope(10_000.0, partial=0.5),)
    assert to_hf(cfg)["attn_layer_indices"] == [9, 18, 27]


def test_lfm3_has_convolutions_and_attention_with_and_without_a_window():
    config = TINY | {"model_type": "lfm3", "num_hidden_layers": 5, "sliding_window": 8}
    cfg = from_hf(config)
    conv, full, local = LayerKind(mixer="conv"), LayerKind(0), LayerKind(1, 8)
    assert kinds(cfg) == [conv, conv, full, conv, local]
    whole = Rope(1_000_000.0, "proportional", partial=0.5)
    assert cfg.ropes == (whole, Rope(10_000.0)) and cfg.output_gate == "head"
    assert "conv" not in to_hf(cfg)["rope_parameters"] and from_hf(to_hf(cfg)) == cfg


def test_gpt_neox_has_a_norm_each_for_attention_and_mlp_side_by_side():
    cfg = from_hf(PYTHIA_1_4B)
    assert (cfg.norm_placement, cfg.norm_bias, cfg.num_kv_heads) == ("parallel_each", True, 16)
    assert cfg.ropes == (Rope(10000, partial=0.25),) and cfg.qkv_bias and cfg.mlp_bias
    names = {name for key in key_table(cfg) for name in tensor_names(cfg, key.name)}
    assert {n.partition(".")[0] for n in names} == {"gpt_neox", "lm_head"}
    assert from_hf(GPT_NEOX_20B).activation == "gelu_tanh"


def test_granite_swa_has_a_base_of_rope_for_each_layer():
    config = TINY | {"model_type": "granite_swa", "num_hidden_layers": 4, "sliding_window": 8}
    cfg = from_hf(config | {"layer_rope_theta": [0, 500.0, 500.0, 1e6]})
    assert cfg.ropes == (Rope(kind="none"), Rope(500.0), Rope(1e6))
    assert kinds(cfg) == [LayerKind(0), LayerKind(1, 8), LayerKind(1, 8), LayerKind(2, 8)]
    unrotated = from_hf(config | {"layer_rope_theta": [0] * 4})
    assert unrotated.ropes == (Rope(kind="none"),) and from_hf(to_hf(unrotated)) == unrotated


def test_llama4_has_chunks_in_the_layers_with_rope_and_experts_in_some():
    scout, maverick = from_hf(LLAMA_4_SCOUT), from_hf(LLAMA_4_MAVERICK)
    assert kinds(scout) == ([LayerKind(0, 8192)] * 3 + [LayerKind(1, None)]) * 12
    assert scout.ropes[1] == Rope(kind="none", query_beta=0.1, query_shift=1, original_length=8192)
    experts = dict(score="sigmoid", renormalised=False, on_input=True, shared_size=8192)
    assert scout.experts == Experts(16, 1, 8192, **experts)
    assert (scout.chunked, scout.qk_norm, maverick.qk_norm) == (True, "unit", "none")
    assert [kind.dense for kind in kinds(maverick)] == [True, False] * 24
    assert maverick.intermediate_size == 16384 and len(scout.stacks) == 1


def test_cohere2_rotates_only_the_layers_with_a_window():
    cfg = from_hf(COMMAND_R7B)
    assert kinds(cfg) == ([LayerKind(0, 4096)] * 3 + [LayerKind(1, None)]) * 8
    assert cfg.ropes == (Rope(50000.0), Rope(kind="none"))
    assert cfg.logit_scale == 0.25 and cfg.norm_placement == "parallel"
