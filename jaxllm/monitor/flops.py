# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of a model and peaks of devices, for model FLOPs utilisation (MFU)."""

from __future__ import annotations

import resource
import sys
from typing import Any

import jax

from jaxllm.model.config import ModelConfig

# Dense bf16 peak in FLOP/s by what the device calls itself (vendors' data sheets).
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L4": 121e12,
}


def flops_per_token(cfg: ModelConfig, length: int) -> float:
    """Forward and backward (3x forward) FLOPs a token of a row of `length`, without recomputation.

    Counts the products with weights (the head included, the look-up not) and causal attention, a
    window where a layer has one.
    """
    Q, KV = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    layer = cfg.hidden_size * (2 * Q + 2 * KV) + 3 * cfg.hidden_size * cfg.intermediate_size
    weights = cfg.num_layers * layer + cfg.hidden_size * cfg.vocab_size
    seen = 0.0
    for kind in cfg.layer_kinds or (0,) * cfg.num_layers:
        window = min(cfg.kinds[kind].window or length, length)
        seen += window - window * (window - 1) / (2 * length)  # mean keys a query sees
    return 3 * (2 * weights + 4 * Q * (seen if cfg.num_layers else 0))


def peak_flops(device: Any, dtype: str = "bfloat16") -> float | None:
    """Peak FLOP/s of a device, None where it is not known (a CPU); float32 counts as half."""
    kind = device.device_kind
    for name in sorted(PEAK, key=len, reverse=True):
        if name in kind:
            return PEAK[name] / (1 if dtype == "bfloat16" else 2)
    return None


def memory_gib() -> float:
    """Peak memory in GiB: the fullest local device's, or this process's on CPU."""
    stats = [d.memory_stats() for d in jax.local_devices() if d.platform != "cpu"]
    if stats and stats[0]:
        return max(s["peak_bytes_in_use"] for s in stats if s) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
