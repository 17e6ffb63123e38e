# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of a model and peaks of devices, for model FLOPs utilisation (MFU); peak memory."""

from __future__ import annotations

import re
import resource
import sys
from typing import Any

import jax

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


def flops_per_token(cfg: ModelConfig, length: int, frozen: bool = False) -> float:
    """FLOPs of forward and backward (3 times the forward pass) for a token of a row of `length`.

    Twice the forward pass where the weights are `frozen` and have no gradient (attention's products
    are none of weights: 3 times); what an adapter adds is not counted.
    Counted are the products with weights, the head included and the look-up not, and causal
    attention over the whole row, within a layer's window where it has one. Recomputation and
    elementwise work do not count; attention does not stop at a document's start, so packed rows
    show slightly more than they do.
    """
    Q, KV = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    layer = cfg.hidden_size * (2 * Q + 2 * KV + 3 * cfg.intermediate_size)
    weights = cfg.num_layers * layer + cfg.hidden_size * cfg.vocab_size
    keys = 0.0  # that a query sees on average, summed over layers
    for kind in cfg.layer_kinds or (0,) * cfg.num_layers:
        window = min(cfg.kinds[kind].window or length, length)
        keys += window - window * (window - 1) / (2 * length)
    return (2 if frozen else 3) * 2 * weights + 3 * 4 * Q * keys


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
