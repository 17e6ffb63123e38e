# SPDX-License-Identifier: Apache-2.0
"""HF names of modules, within a layer, that several families share or that are named by no rule:
values of `Family.modules`."""

MIXTRAL = {
    "mlp.router": "block_sparse_moe.gate",
    "mlp.choice_bias": "block_sparse_moe.e_score_correction_bias",
    "mlp.experts.gate": "block_sparse_moe.experts.{expert}.w1",
    "mlp.experts.up": "block_sparse_moe.experts.{expert}.w3",
    "mlp.experts.down": "block_sparse_moe.experts.{expert}.w2",
}
DEEPSEEK = {"mlp.choice_bias": "mlp.gate.e_score_correction_bias"} | {
    f"mlp.shared.{part}": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")
}
AFMOE = {
    "mlp.router": "mlp.router.gate",
    "mlp.choice_bias": "mlp.expert_bias",
    "mlp_norm": "pre_mlp_layernorm",
    "mlp_post_norm": "post_mlp_layernorm",
}
BAMBA = {"mlp_norm": "pre_ff_layernorm", "norm": "final_layernorm"} | {
    f"mlp.{part}": f"feed_forward.{part}_proj" for part in ("gate", "up", "down")
}
# One tensor for each projection, and for each part of the convolution.
OLMO_HYBRID = {
    f"delta.{ours}": f"{theirs}_proj"
    for ours, theirs in zip(("q", "k", "v", "gate", "beta", "decay", "o"), "qkvgbao", strict=True)
} | {"delta.norm": "o_norm", **{f"delta.{part}_conv": f"{part}_conv1d" for part in "qkv"}}
HUNYUAN = {
    "attn.q_norm": "self_attn.query_layernorm",
    "attn.k_norm": "self_attn.key_layernorm",
    "mlp.router": "mlp.gate.wg",
} | {f"mlp.shared.{part}": f"mlp.shared_mlp.{part}_proj" for part in ("gate", "up", "down")}
GPT_NEOX = {
    "embed": "embed_in",
    "norm": "final_layer_norm",
    "attn.o": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
} | {f"attn.{part}": "attention.query_key_value" for part in "qkv"}
PHI = {
    "norm": "final_layernorm",
    "attn.o": "self_attn.dense",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
_LFM = {
    "mlp.gate": "feed_forward.w1",
    "mlp.up": "feed_forward.w3",
    "mlp.down": "feed_forward.w2",
    "attn_norm": "operator_norm",
    "mlp_norm": "ffn_norm",
    "norm": "embedding_norm",
}
LFM2 = _LFM | {
    "mlp": "feed_forward",
    "attn.o": "self_attn.out_proj",
    "attn.q_norm": "self_attn.q_layernorm",
    "attn.k_norm": "self_attn.k_layernorm",
}
LFM3 = _LFM | {
    "attn.gate": "self_attn.g_proj",
    "attn_post_norm": "post_operator_norm",
    "mlp_post_norm": "post_ffn_norm",
}
LFM2_MOE = LFM2 | {
    "mlp.choice_bias": "feed_forward.expert_bias",
    "mlp.experts.gate": "feed_forward.experts.{expert}.w1",
    "mlp.experts.up": "feed_forward.experts.{expert}.w3",
    "mlp.experts.down": "feed_forward.experts.{expert}.w2",
}
NEMOTRON_H = (
    {
        "embed": "embeddings",
        "norm": "norm_f",
        "attn_norm": "norm",
        "mlp_norm": "norm",
        "mamba": "mixer",
        "mlp": "mixer",
        "mlp.choice_bias": "mixer.gate.e_score_correction_bias",
        "mlp.inward": "mixer.fc1_latent_proj",
        "mlp.outward": "mixer.fc2_latent_proj",
    }
    | {f"attn.{part}": f"mixer.{part}_proj" for part in "qkvo"}
    | {f"mlp.shared.{part}": f"mixer.shared_experts.{part}_proj" for part in ("up", "down")}
)
GRANITE = {
    f"{mlp}.{part}": f"shared_mlp.{'output' if part == 'down' else 'input'}_linear"
    for mlp in ("mlp", "mlp.shared")
    for part in ("gate", "up", "down")
} | {
    "mlp": "block_sparse_moe",
    "mlp.router": "block_sparse_moe.router",
}
# A value of `Family.stored`.
GRANITE_STORED = (
    (".block_sparse_moe.router.layer.", ".block_sparse_moe.router."),
    (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
    (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
)
