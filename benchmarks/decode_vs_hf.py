# SPDX-License-Identifier: Apache-2.0
"""Batched greedy decoding: new tokens/s of jaxllm and of `transformers.generate` on torch.

Every row generates all its tokens; stop tokens are disabled. The time runs from prompts to tokens
on the host and includes the prefill. Both sides store the weights in the compute dtype; jaxllm lays
them out for decoding before, as `jaxllm generate` does.

    python benchmarks/decode_vs_hf.py --model SMOLLM2_DIR
"""

import argparse
import json

import numpy as np
from turns import Side, add_blocks, compare, serve


def prompts(a) -> np.ndarray:
    """Random prompts int64 [B, P], the same on both sides."""
    with open(f"{a.model}/config.json") as file:
        size = json.load(file)["vocab_size"]
    return np.random.default_rng(0).integers(size // 50, size, (a.batch, a.prompt))


def torch_step(a):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=getattr(torch, a.dtype)).eval()
    tokens = torch.from_numpy(prompts(a))
    options = dict(attention_mask=torch.ones_like(tokens), do_sample=False, pad_token_id=0)
    options |= dict(max_new_tokens=a.new, min_new_tokens=a.new, eos_token_id=None)

    @torch.inference_mode()
    def step():
        return model.generate(tokens, **options)[:, a.prompt :].numel()

    return step


def jaxllm_step(a):
    from jaxllm.libraries import hide_torch

    hide_torch()  # as a command does
    from flax import nnx

    from jaxllm.config import MeshSection
    from jaxllm.hf import load_hf
    from jaxllm.mesh import make_mesh
    from jaxllm.sampling import Sampling, completions, for_decoding

    mesh = make_mesh(MeshSection())
    graph, weights = nnx.split(for_decoding(load_hf(a.model, dtype=a.dtype)))
    rows = prompts(a).tolist()

    def step():
        return int(completions(graph, weights, rows, Sampling(a.new), mesh=mesh).lengths.sum())

    return step


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True)
    add_blocks(p)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--prompt", type=int, default=64)
    p.add_argument("--new", type=int, default=64)
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--side", choices=("jaxllm", "transformers"), help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.side:
        return serve(lambda: (jaxllm_step if a.side == "jaxllm" else torch_step)(a))
    options = {k: v for k, v in vars(a).items() if k not in ("side", "blocks", "steps")}
    sides = {n: Side(__file__, side=n, **options) for n in ("jaxllm", "transformers")}
    compare(f"decoding, batch {a.batch}, {a.dtype}", sides, a.blocks, a.steps)
    return None


if __name__ == "__main__":
    main()
