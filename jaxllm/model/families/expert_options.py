# SPDX-License-Identifier: Apache-2.0
"""Options of mixtures of experts: ModelConfig fields and the HF keys they are kept under."""

from __future__ import annotations

from typing import Any

from jaxllm.errors import UserError, seen
from jaxllm.model.families.options import ATTENTION_BIAS, GRANITE, SHORT_CONV, Option, one_of


def experts(count: str, size: str = "moe_intermediate_size") -> tuple[Option, ...]:
    return (
        Option("experts.count", count),
        Option("experts.top_k", "num_experts_per_tok"),
        Option("experts.size", size),
    )


def shared_experts(key: str) -> Option:
    """Experts that every token passes: one MLP as large as all of them."""
    return Option(
        "experts.shared_size",
        key,
        lambda count, size: (count or 0) * size,
        lambda total, size: total // size,
        beside="moe_intermediate_size",
    )


SIGMOID = {"experts.score": "sigmoid", "experts.has_bias": True}  # fixed fields of their router
RENORMALISED = Option("experts.renormalised", "norm_topk_prob", bool)
GROUPED_EXPERTS = (
    RENORMALISED,
    Option("experts.groups", "n_group"),
    Option("experts.top_groups", "topk_group"),
    Option("experts.scale", "routed_scaling_factor"),
)
DEEPSEEK_EXPERTS = (
    *experts("n_routed_experts"),
    shared_experts("n_shared_experts"),
    *GROUPED_EXPERTS,
)


def _method(name: Any) -> int:
    if name not in ("greedy", GROUPED):
        raise UserError(f"topk_method {seen(name)} is not supported; known: greedy, {GROUPED}")
    return 1


def _if_grouped(count: Any, method: str) -> int:
    return count if method == GROUPED else 1


GROUPED = "group_limited_greedy"  # one group is what "greedy" is
DEEPSEEK_V2_EXPERTS = (
    *experts("n_routed_experts"),
    shared_experts("n_shared_experts"),
    Option("experts.group_best", "topk_method", _method, lambda _: GROUPED),
    Option("experts.groups", "n_group", _if_grouped, lambda n, _: n, beside="topk_method"),
    Option("experts.top_groups", "topk_group", _if_grouped, lambda n, _: n, beside="topk_method"),
    Option("experts.scale", "routed_scaling_factor"),
)
LFM2_MOE = (
    *SHORT_CONV,
    *experts("num_experts"),
    RENORMALISED,
    Option("experts.has_bias", "use_expert_bias", bool),
    Option("experts.scale", "routed_scaling_factor"),
)
LLAMA4_EXPERTS = (
    *experts("num_local_experts", "intermediate_size"),
    Option("experts.shared_size", "intermediate_size"),
    Option("intermediate_size", "intermediate_size_mlp"),
)
GRANITE_MOE = (
    *ATTENTION_BIAS,
    *GRANITE,
    *experts("num_local_experts", "intermediate_size"),
)
GRANITE_MOE_SHARED = (
    *GRANITE_MOE,
    Option("experts.shared_size", "shared_intermediate_size"),
)
GRANITE_EXPERTS = (
    Option("intermediate_size", "shared_intermediate_size"),
    Option("experts.count", "num_local_experts", lambda n: n or None, lambda n: n or 0),
    Option("experts.top_k", "num_experts_per_tok", write=lambda n: n or 0),
    Option(
        "experts.size",
        "intermediate_size",
        lambda size, _: size,
        lambda size, shared: size or shared,
        beside="shared_intermediate_size",
    ),
    Option(
        "experts.shared_size",
        "shared_intermediate_size",
        lambda size, _: size,
        lambda _, size: size,
        beside="shared_intermediate_size",
    ),
)
COHERE_EXPERTS = (
    *experts("num_experts", "intermediate_size"),
    Option(
        "experts.shared_size",
        "num_shared_experts",
        lambda count, size: count * size,
        lambda total, size: total // size,
        beside="intermediate_size",
    ),
    one_of(
        "experts.shared_mean",
        "shared_expert_combination_strategy",
        {"average": True, "sum": False},
    ),
    one_of("experts.score", "expert_selection_fn", {name: name for name in ("softmax", "sigmoid")}),
    Option(
        "experts.renormalised",
        "norm_topk_prob",
        lambda sums, score: sums or score == "softmax",
        lambda sums, _: sums,
        beside="expert_selection_fn",
    ),
    Option(
        "intermediate_size",
        "prefix_dense_intermediate_size",
        lambda size, other: size or other,
        lambda size, _: size,
        beside="intermediate_size",
    ),
    # Norms of the root mean square where `rms_norm_eps` is set.
    Option(
        "norm_eps",
        "layer_norm_eps",
        lambda eps, rms: eps if rms is None else rms,
        lambda eps, _: eps,
        beside="rms_norm_eps",
    ),
    Option(
        "norm",
        "rms_norm_eps",
        lambda rms, _: "layer" if rms is None else "rms",
        lambda norm, eps: eps if norm == "rms" else None,
        beside="layer_norm_eps",
    ),
    Option("logit_scale", "logit_scale"),
    *ATTENTION_BIAS,
)
QWEN_EXPERTS = (*experts("num_experts"), RENORMALISED)
QWEN_SHARED = Option("experts.shared_size", "shared_expert_intermediate_size")
