# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of a model and peaks of devices, for model FLOPs utilisation (MFU); peak memory."""

from __future__ import annotations

import re
import resource
import sys
from dataclasses import dataclass
from typing import Any

import jax

from jaxllm.config import TrainConfig
from jaxllm.model.config import ModelConfig

# Dense bfloat16 peak in FLOP/s of what jax calls a device, by words of its device_kind; the longest
# match counts. From the vendors' data sheets, without sparsity. A v2, v3 or 7x chip is two devices.
PEAK = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v4 lite": 138e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "A100": 312e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "L4": 121e12,
    "L40S": 362e12,
    "A10": 125e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 5090": 209e12,
}


@dataclass(frozen=True)
class Flops:
    """FLOPs of an update by what it learns from: `layers` of each token in its rows (padding is
    none), `head` of each token that has a loss weight."""

    layers: float
    head: float


def forward_flops(model: ModelConfig, length: int) -> tuple[float, float, float]:
    """FLOPs of a forward pass, a token: (products with the layers' weights, attention, the head).

    2 for each weight. Attention is causal, in rows of `length` tokens: q·k and p·v are 2 FLOPs each
    for each of the heads' features and each key that a query sees, (length + 1) / 2 on average or
    fewer within a layer's window. It is counted over whole rows, also where packing keeps a
    document from seeing those before it and less is computed. A reward model's head reads one token
    of a text and counts as none.
    """
    Q, KV = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = model.hidden_size * (2 * Q + 2 * KV + 3 * model.intermediate_size)
    keys = 0.0  # that a query sees on average, summed over layers
    for kind in model.layer_kinds or (0,) * model.num_layers:
        window = min(model.kinds[kind].window or length, length)
        keys += window - window * (window - 1) / (2 * length)
    head = 0 if model.scores else model.hidden_size * model.vocab_size
    return 2 * model.num_layers * layer, 4 * Q * keys, 2 * head


def run_flops(
    cfg: TrainConfig,
    model: ModelConfig,
    length: int,
    *,
    frozen: bool = False,
    compares: bool = False,
    baseline: bool = False,
) -> Flops:
    """FLOPs of a run's update, in rows of `length` tokens: those of a preference are 2 max_length,
    those of an online run a prompt with its completion.

    Forward and backward are 3 forward passes, of weights 2 where they are `frozen` and have no
    gradient; what an adapter adds, recomputation and elementwise work do not count. Further forward
    passes: that of the reference where the run `compares` with one whose log-probabilities are not
    precomputed, and those of a `baseline`. Online, each token of a rollout is sampled, read by the
    policy and by the reference: a forward pass each, shared by the rl.iterations updates that learn
    from it, as the rollout's time is. A separate critic is trained and read as the policy is, but
    has no head. What rewards compute is not counted.
    """
    weights, attention, head = forward_flops(model, length)
    again = 1 / (cfg.rl.iterations or 1)  # a rollout's work, in each update that learns from it
    if cfg.verb.online:
        more = (2 + compares) * again
    else:
        reads = compares and cfg.align.reference == "model"
        more = reads + baseline * (1 + reads)
    once = 2 if frozen else 3
    layers = (once + more) * weights + (3 + more) * attention
    if cfg.verb.critic and cfg.rl.critic == "separate":
        layers += (once + again) * weights + (3 + again) * attention
    return Flops(layers, (once + more) * head)


def peak_flops(device: Any, dtype: str = "bfloat16") -> float | None:
    """Peak FLOP/s of a device for products of `dtype`, None where it is not known (a CPU).

    float32 products, at jax's default precision, are tf32 on a GPU, half as fast as bfloat16, and
    bfloat16 on a TPU.
    """
    kind = device.device_kind
    names = [name for name in PEAK if re.search(rf"\b{re.escape(name)}\b", kind)]
    if not names:
        return None
    peak = PEAK[max(names, key=len)]
    return peak / 2 if dtype == "float32" and not kind.startswith("TPU") else peak


def memory_gib() -> float:
    """Peak memory in GiB: of the fullest local device, or of this process where the CPU is it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
