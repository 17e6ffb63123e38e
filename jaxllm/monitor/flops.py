# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a model, for model FLOPs utilization (MFU), and peak memory."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from typing import Any

import jax

from jaxllm.config import TrainConfig
from jaxllm.model.config import LayerKind, ModelConfig
from jaxllm.model.delta import products
from jaxllm.model.mamba import products as state_products
from jaxllm.topologies import chip_of


@dataclass(frozen=True)
class Flops:
    """FLOPs of an update."""

    layers: float  # for each token that is not padding
    head: float  # for each token that has a loss weight


def forward_flops(model: ModelConfig, length: int) -> tuple[float, float, float]:
    """FLOPs of a forward pass per token: (matmuls with weights of layers, attention, the head).

    A matmul costs 2 FLOPs per weight. Causal attention over rows of `length` tokens costs 2 · 2
    FLOPs (q·k and p·v) per feature of all heads and per key that a query sees, on average
    (length + 1) / 2, or fewer within a layer's window or chunks, or if an indexer chooses them (its
    own cost is `indexer_flops`). A delta net or a state space costs the same at each token
    (`delta.products`, `mamba.products`). Packed rows are counted as one document, although segments
    do less. A reward model's head reads one token per text and counts as 0. A module of multi-token
    prediction is one more layer, its projection, and the head once more.
    """
    D, H = model.hidden_size, model.num_heads
    routed, matrices = 0, 3 if model.gated_mlp else 2
    if (experts := model.experts) is not None:  # those that a token passes, and the router
        width = experts.latent_size or D
        routed = matrices * (experts.top_k * experts.size * width + experts.shared_size * D)
        routed += D * (experts.count + experts.shared_gate + 2 * experts.latent_size)
    # Of a token, summed over layers: products with weights, and FLOPs of attention and delta nets.
    weights = products_of_keys = state = 0.0
    for kind in model.kinds_by_layer + (model.mtp_kind,) * model.mtp:
        layer = model.of(kind)
        if kind.mlp:
            dense = matrices * D * layer.intermediate_size
            weights += routed if kind.routed and experts is not None else dense
        if model.layer_embeds is not None:  # of its gate, up, and part of the projection
            weights += 3 * D * model.layer_embeds.size
        if kind.mixer == "delta" and (delta := model.delta) is not None:
            values = delta.value_heads * delta.value_dim
            weights += D * (2 * delta.key_heads * delta.key_dim + 3 * values)
            weights += 2 * D * delta.value_heads
            state += products(delta, length)
            continue
        if kind.mixer == "mamba" and (mamba := model.mamba) is not None:
            inner = mamba.heads * mamba.head_dim
            weights += D * (3 * inner + 2 * mamba.groups * mamba.state + mamba.heads)
            state += state_products(mamba, length)
            continue
        if kind.mixer == "conv":
            weights += 4 * D * D
        if kind.mixer in ("conv", "none"):
            continue
        weights += _attention_weights(layer, kind)
        window = min(kind.window or length, length)
        window = min(model.indexer.top_keys, window) if model.indexer is not None else window
        if model.chunked:
            rest = length % window
            keys = ((length - rest) * (window + 1) + rest * (rest + 1)) / (2 * length)
        else:
            keys = window - window * (window - 1) / (2 * length)  # of a query, on average
        products_of_keys += sum(layer.attention_dims) * keys
    weights += model.mtp * 2 * D * D  # of a token's hidden state and the next one's embedding
    head = 0 if model.scores else D * model.vocab_size * (1 + model.mtp)
    return 2 * weights, 2 * H * products_of_keys + state, 2 * head


def indexer_flops(model: ModelConfig, length: int) -> float:
    """FLOPs of the indexers per token: their weights, and the scores of all keys that a query sees.
    They have no gradient, and choose nothing in rows of at most `top_keys`."""
    if (indexer := model.indexer) is None or model.latent is None or length <= indexer.top_keys:
        return 0.0
    H, K = indexer.heads, indexer.dim
    weights = model.latent.q_rank * H * K + model.hidden_size * (K + H)
    scores = (H * K + H) * (length + 1) / 2  # and their weighted sum
    return 2 * (weights + scores) * (model.num_layers + model.mtp)


def unread_weights(model: ModelConfig) -> int:
    """Weights of products that are added to the residual stream at the end of a layer, summed over
    the layers: nothing in the backward pass reads such a product, so remat leaves it out."""
    features = 0
    for kind in model.kinds_by_layer + (model.mtp_kind,) * model.mtp:
        layer = model.of(kind)
        last, Q = layer.intermediate_size, layer.num_heads * layer.attention_dims[1]
        if (experts := model.experts) is not None and kind.routed:
            # The router weighs what an expert gives, and a gate the shared one: gradients read it.
            shared = 0 if experts.shared_gate else experts.shared_size
            last = 0 if experts.branch else experts.latent_size + shared
        if not kind.mlp:
            last = Q if model.mamba is None or kind.mixer != "mamba" else model.mamba.widths["x"]
        if layer.norm_placement not in ("post", "sandwich"):
            features += last + Q * layer.norm_placement.startswith("parallel")
    return model.hidden_size * features


def _attention_weights(model: ModelConfig, kind: LayerKind) -> int:
    """Weights of a layer's attention; `model` has the sizes of its kind."""
    (QK, V), D, H = model.attention_dims, model.hidden_size, model.num_heads
    if (latent := model.latent) is None:
        own = (QK + V * (not kind.values_from_keys)) * (kind.uses is None)
        gate = {"none": 0, "head": 1, "feature": V, "query": QK}[model.output_gate]  # of a head
        return D * (H * (QK + gate + V) + model.num_kv_heads * own)
    # The products with low-rank weights, and of latents with those that expand them.
    weights = latent.q_rank * D + (latent.q_rank or D) * H * QK
    weights += D * (latent.kv_rank + model.head_dim) + H * V * D
    return weights + latent.kv_rank * H * (latent.nope_dim + V)


def run_flops(
    cfg: TrainConfig,
    model: ModelConfig,
    length: int,
    *,
    frozen: bool = False,
    compares: bool = False,
    baseline: bool = False,
    on_policy: bool = False,
) -> Flops:
    """FLOPs of an update with rows of `length` tokens (preferences: 2 max_length; online runs: a
    prompt with its completion).

    Forward and backward cost 3 forward passes; matmuls with `frozen` weights, which have no
    gradient, cost 2. Not counted: what an adapter adds, recomputation, elementwise work, rewards.
    Extra forward passes: one for the reference if the run `compares` with a live one, and those of
    a `baseline`. Online, sampling and the log-probabilities of the policy (not `on_policy`) and of
    the reference cost a forward pass each, divided by the rl.iterations updates that reuse the
    rollout, as its time is. A separate critic costs as much as the policy without its head.
    """
    weights, attention, head = forward_flops(model, length)
    chosen = indexer_flops(model, length)
    share = 1 / (cfg.rl.iterations or 1)  # of a rollout's cost, for each update that reuses it
    if cfg.verb.online:
        extra = (2 + compares - on_policy) * share
    else:
        live = compares and cfg.align.reference == "model"
        extra = live + baseline * (1 + live)
    passes = 2 if frozen else 3
    layers = (passes + extra) * weights + (3 + extra) * attention + (1 + extra) * chosen
    if cfg.verb.critic and cfg.rl.critic == "separate":
        layers += (passes + share) * weights + (3 + share) * attention + (1 + share) * chosen
    return Flops(layers, (passes + extra) * head)


def peak_flops(device: Any, dtype: str = "bfloat16") -> float | None:
    """Peak FLOP/s of a device for matmuls in `dtype`; None if it is unknown, as of a CPU.

    At JAX's default precision a float32 matmul is tf32 on a GPU, half as fast as bfloat16, and
    bfloat16 on a TPU.
    """
    chip = chip_of(device.device_kind)
    if chip is None:
        return None
    is_tpu = device.device_kind.startswith("TPU")
    return chip.flops / 2 if dtype == "float32" and not is_tpu else chip.flops


def memory_gib() -> float:
    """Peak memory in GiB of the fullest local device; on a CPU, of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
