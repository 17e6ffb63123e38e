# SPDX-License-Identifier: Apache-2.0
"""How far the measured rows are from what this processor could do.

    python benchmarks/roofline.py --model SMOLLM2_DIR [--dtype float32]

The bound of a row is the time of its products at the rate of the MLP's product (2048 x 576 x 1536
for SmolLM2), or that of reading its weights once at the rate at which a large array is summed,
whichever is longer. FLOPs are those of `monitor.flops`, without recomputation. The measured rows
are those of this kind of processor in benchmarks/results.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from turns import processor, results_file


def seconds(run: Callable[[], Any], times: int = 9) -> float:
    """The median time of a run, after one that is left out."""
    took = []
    for _ in range(times + 1):
        began = time.perf_counter()
        run().block_until_ready()
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


def rates(cfg: Any, dtype: str, tokens: int) -> tuple[float, float]:
    """(FLOP/s of the MLP's product as the model computes it, bytes/s of reading)."""
    import jax
    import jax.numpy as jnp

    from jaxllm.ops.matmul import product

    x = jnp.ones((tokens, cfg.hidden_size), dtype)
    w = jnp.ones((cfg.hidden_size, cfg.intermediate_size), dtype)
    multiply = jax.jit(lambda x, w: product(x, w, (1, 0), x.dtype))
    flops = 2 * tokens * w.size / seconds(lambda: multiply(x, w))
    large = jnp.ones(1 << 27, jnp.float32)
    total = jax.jit(jnp.sum)
    return flops, 4 * large.size / seconds(lambda: total(large))


def bounds(cfg: Any, dtype: str, flops: float, read: float, length: int) -> dict[str, float]:
    """{the row's begin: tokens/s at best}."""
    from jaxllm.monitor.flops import forward_flops

    weights, attention, head = forward_flops(cfg, length)
    found = {
        f"full, {dtype}": flops / (3 * (weights + attention + head)),
        f"LoRA q,v, {dtype}": flops / (2 * (weights + head) + 3 * attention),
        f"LoRA all-linear, {dtype}": flops / (2 * (weights + head) + 3 * attention),
    }
    prompt = new = 64  # of decode_vs_hf.py
    stored = (weights + head) / 2 * (2 if dtype == "bfloat16" else 4)
    one, _, _ = forward_flops(cfg, prompt)
    for rows in (16, 1):
        step = max(stored / read, rows * (weights + head) / flops)
        found[f"decoding, batch {rows}, {dtype}"] = (
            rows * new / (new * step + rows * prompt * one / flops)
        )
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--length", type=int, default=512)
    a = p.parse_args()
    from jaxllm.hf_config import read_config
    from jaxllm.model.families import from_hf

    cfg = from_hf(read_config(a.model))
    flops, read = rates(cfg, a.dtype, a.batch * a.length)
    print(f"{processor()}: {flops / 1e9:.0f} GFLOP/s, {read / 1e9:.1f} GB/s")
    rows = json.loads(results_file().read_text())["rows"]
    for row, best in bounds(cfg, a.dtype, flops, read, a.length).items():
        for name, found in rows.items():
            if name.startswith(row):
                share = found["jaxllm"]["rate"] / best
                print(f"{name:<40} at best {best:>6.0f} tokens/s, measured {share:.0%} of it")


if __name__ == "__main__":
    main()
