# SPDX-License-Identifier: Apache-2.0
"""Options of families: ModelConfig fields and the HF keys they are kept under.

Those of mixtures of experts are in expert_options.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxllm.errors import UserError, seen

ACTIVATIONS = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu2": "relu2",
}


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
    """A ModelConfig field and the HF key it is kept under, with the change of value each way.

    beside: HF keys, with spaces between, whose values are further arguments of `read` and `write`.
    """

    field: str
    key: str
    read: Callable[..., Any] = _same
    write: Callable[..., Any] = _same
    beside: str = ""

    def arguments(self, value: Any, config: dict[str, Any]) -> tuple[Any, ...]:
        """Those of `read` and `write` for a value."""
        return value, *(config.get(key) for key in self.beside.split())


def _activation_under(
    key: str, field: str = "activation", tanh: str = "gelu_pytorch_tanh"
) -> Option:
    """tanh: the name under which gelu_tanh is written."""
    back = {ours: theirs for theirs, ours in ACTIVATIONS.items()} | {"gelu_tanh": tanh}
    return Option(field, key, _activation, back.__getitem__)


def same_for_all_layers(value: Any) -> Any:
    """The value of a key that may list one for each layer."""
    values = value if isinstance(value, list) and value else [value]
    if any(one != values[0] for one in values):
        raise UserError(f"{seen(value)}: layers with other numbers of experts are not supported")
    return values[0]


def _softcap(field: str, key: str) -> Option:
    return Option(field, key, lambda cap: cap or 0.0, lambda cap: cap or None)


def _inverse(value: float) -> float:
    """1 / value, rounded so that the inverse of an inverse is the value."""
    return _rounded(1 / value)


def _rounded(value: float) -> float:
    return float(f"{value:.12g}")


def either(field: str, key: str, yes: str, no: str) -> Option:
    """The field is `yes` if the key is true, else `no`."""
    return Option(field, key, lambda true: yes if true else no, lambda value: value == yes)


def one_of(field: str, key: str, values: dict[str, Any]) -> Option:
    """The field is what `values` has for the name under the key."""

    def read(name: Any) -> Any:
        if not isinstance(name, str) or name not in values:
            raise UserError(f"{key} {seen(name)} is not supported; use {' or '.join(values)}")
        return values[name]

    return Option(field, key, read, {ours: name for name, ours in values.items()}.__getitem__)


def biases(key: str, *fields: str) -> tuple[Option, ...]:
    return tuple(Option(f"{field}_bias", key, bool) for field in fields)


GELU_NEW = _activation_under("hidden_act", tanh="gelu_new")
XIELU = one_of("activation", "hidden_act", {"xielu": "xielu"})
CLIPPED = Option("qkv_clip", "clip_qkv", lambda limit: limit or 0.0, lambda limit: limit or None)


def positive(value: float) -> float:
    if not value > 0:
        raise UserError(f"swiglu_limit is {seen(value)}; it must be positive")
    return value


# An option of a family takes the place of the shared one with the same field.
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
    _activation_under("hidden_act"),
)
ATTENTION_BIAS = biases("attention_bias", "qkv", "o")
MLP_BIAS = biases("mlp_bias", "mlp")
LOGIT_SOFTCAP = _softcap("logit_softcap", "final_logit_softcapping")
GEMMA = (
    Option("embed_scale", "hidden_size", math.sqrt, lambda scale: round(scale**2)),
    *ATTENTION_BIAS,
)
GEMMA2 = (
    *GEMMA,
    _activation_under("hidden_activation"),
    Option(
        "query_scale",
        "query_pre_attn_scalar",
        lambda width: width**-0.5,
        lambda scale: round(scale**-2),
    ),
    LOGIT_SOFTCAP,
)
GEMMA4_DENSE = (
    *GEMMA,
    _activation_under("hidden_activation"),
    LOGIT_SOFTCAP,
)
GEMMA4 = (
    *GEMMA4_DENSE,
    Option(
        "layer_embeds.size",
        "hidden_size_per_layer_input",
        lambda size: size or None,
        lambda size: size or 0,
    ),
    Option(
        "layer_embeds.vocab_size",
        "vocab_size_per_layer_input",
        lambda count, _: count,
        lambda count, tokens: count or tokens,
        beside="vocab_size",
    ),
    Option("experts", "enable_moe_block", lambda _: None, lambda group: group is not None),
    Option(
        "experts.count",
        "num_experts",
        lambda count, enabled: count if enabled else None,
        lambda count, _: count,
        beside="enable_moe_block",
    ),
    Option("experts.top_k", "top_k_experts"),
    Option("experts.size", "moe_intermediate_size"),
    Option(
        "experts.shared_size",
        "intermediate_size",
        lambda size, _: size,
        lambda _, size: size,
        beside="intermediate_size",
    ),
)
ATTENTION_SOFTCAP = (_softcap("attention_softcap", "attn_logit_softcapping"),)
MUP = (
    Option("embed_scale", "embedding_multiplier"),
    Option("query_scale", "attention_multiplier"),
    Option("residual_scale", "residual_multiplier"),
)
GRANITE = (
    *MUP,
    Option("logit_scale", "logits_scaling", _inverse, _inverse),
)

LATENT = (
    Option("latent.q_rank", "q_lora_rank", lambda rank: rank or 0, lambda rank: rank or None),
    Option("latent.kv_rank", "kv_lora_rank"),
    Option("latent.nope_dim", "qk_nope_head_dim"),
    Option("latent.value_dim", "v_head_dim"),
    Option("head_dim", "qk_rope_head_dim"),
    *ATTENTION_BIAS,
)


def _chosen_by_all(count: int, types: Any) -> int:
    if "shared" in (types or ()):
        raise UserError(
            "indexer_types names shared layers: layers that attend to the keys which an earlier "
            "layer chose are not supported"
        )
    return count


INDEXER = (
    Option(
        "indexer.top_keys",
        "index_topk",
        _chosen_by_all,
        lambda count, _: count,
        beside="indexer_types",
    ),
    Option("indexer.heads", "index_n_heads"),
    Option("indexer.dim", "index_head_dim"),
)
DELTA = (
    Option("delta.key_heads", "linear_num_key_heads"),
    Option("delta.value_heads", "linear_num_value_heads"),
    Option("delta.key_dim", "linear_key_head_dim"),
    Option("delta.value_dim", "linear_value_head_dim"),
    Option("delta.taps", "linear_conv_kernel_dim"),
)
OLMO_HYBRID = (
    *ATTENTION_BIAS,
    *DELTA,
    Option("delta.negative", "linear_allow_neg_eigval", bool),
)


def _unlimited(taps: int, limit: Any) -> int:
    if limit is not None and [*limit] != [0, math.inf]:
        raise UserError(
            f"time_step_limit is {seen(limit)}: transformers ignores it while decoding; only "
            "[0, Infinity] is supported"
        )
    return taps


def _mamba_taps(key: str) -> Option:
    return Option("mamba.taps", key, _unlimited, lambda taps, _: taps, beside="time_step_limit")


MAMBA = (
    Option(
        "mamba",
        "mamba_expand",
        lambda *_: None,
        lambda group, size: group.heads * group.head_dim // size,
        beside="hidden_size",
    ),
    Option("mamba.heads", "mamba_n_heads"),
    Option("mamba.head_dim", "mamba_d_head"),
    Option("mamba.groups", "mamba_n_groups"),
    Option("mamba.state", "mamba_d_state"),
    _mamba_taps("mamba_d_conv"),
    Option("mamba.conv_bias", "mamba_conv_bias", bool),
    Option("mamba.bias", "mamba_proj_bias", bool),
    _activation_under("hidden_act", "mamba.activation"),
)


def _present(field: str, key: str, absent: Any) -> Option:
    """`absent` is written where the model lacks the group of the field."""
    return Option(field, key, write=lambda value: absent if value is None else value)


# The width of the shared experts is that of MLPs where it is 0, as in transformers.
NEMOTRON_H = (
    Option("norm_eps", "layer_norm_epsilon"),
    _activation_under("mlp_hidden_act"),
    *MLP_BIAS,
    Option("mamba.heads", "mamba_num_heads"),
    Option("mamba.head_dim", "mamba_head_dim"),
    Option("mamba.groups", "n_groups"),
    Option("mamba.state", "ssm_state_size"),
    _mamba_taps("conv_kernel"),
    Option("mamba.conv_bias", "use_conv_bias", bool),
    Option("mamba.bias", "use_bias", bool),
    Option("mamba.least_step", "time_step_min", float),
    _activation_under("mamba_hidden_act", "mamba.activation"),
    Option(
        "experts.count",
        "n_routed_experts",
        lambda count, types: count if "moe" in types else None,
        lambda count, _: count or 1,
        beside="layer_types",
    ),
    _present("experts.top_k", "num_experts_per_tok", 1),
    _present("experts.size", "moe_intermediate_size", 1),
    Option(
        "experts.shared_size",
        "moe_shared_expert_intermediate_size",
        lambda size, other: size or other,
        lambda size, _: size or 1,
        beside="intermediate_size",
    ),
    Option("experts.latent_size", "moe_latent_size", lambda n: n or 0, lambda n: n or None),
    Option("experts.renormalised", "norm_topk_prob", bool, bool),
    _present("experts.groups", "n_group", 1),
    _present("experts.top_groups", "topk_group", 1),
    _present("experts.scale", "routed_scaling_factor", 1.0),
)


def _adjusted(size: int, adjusts: bool, factor: float | None, multiple: int) -> int:
    """The hidden features of LFM2's MLPs, rounded up to a multiple."""
    if not adjusts:
        return size
    size = int(2 * size / 3)
    return size if factor is None else -(-int(factor * size) // multiple) * multiple


SHORT_CONV = (
    Option("norm_eps", "norm_eps"),
    Option("conv.taps", "conv_L_cache"),
    Option("conv.bias", "conv_bias"),
)
LFM2 = (
    *SHORT_CONV,
    Option(
        "intermediate_size",
        "intermediate_size",
        _adjusted,
        lambda size, *_: size,
        "block_auto_adjust_ff_dim block_ffn_dim_multiplier block_multiple_of",
    ),
    # It has one activation, and what is written is the size as it is.
    Option("activation", "block_auto_adjust_ff_dim", lambda _: "silu", lambda _: False),
)
LFM3 = (
    *SHORT_CONV,
    *ATTENTION_BIAS,
    either("norm_placement", "use_sandwich_norm", "sandwich", "pre"),
    either("output_gate", "use_attention_gate", "head", "none"),
)
INTERLEAVED = either("rope_pairs", "rope_interleave", "neighbours", "halves")
MINICPM3 = (
    Option("embed_scale", "scale_emb"),
    Option(
        "residual_scale",
        "scale_depth",
        lambda depth, layers: depth / math.sqrt(layers),
        lambda scale, layers: _rounded(scale * math.sqrt(layers)),
        beside="num_hidden_layers",
    ),
    Option(
        "logit_scale",
        "dim_model_base",
        lambda base, size: base / size,
        lambda scale, size: round(scale * size),
        beside="hidden_size",
    ),
)
