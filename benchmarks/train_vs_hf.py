# SPDX-License-Identifier: Apache-2.0
"""Full fine-tuning: jaxllm and transformers on torch, same shapes.

The architecture is that of SmolLM2-135M, or a mixture of 64 experts of 0.3 billion parameters in
which a token passes 8. Prints tokens/s, peak memory and their ratios.

    python benchmarks/train_vs_hf.py [--shape experts] [--batch 4] [--length 512] [--remat full]
"""

import argparse

from turns import Side, add_blocks, compare, serve

DENSE = dict(
    model_type="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=100_000.0,
    tie_word_embeddings=True,
)
EXPERTS = DENSE | dict(
    model_type="qwen3_moe",
    hidden_size=512,
    num_hidden_layers=11,
    num_attention_heads=8,
    num_key_value_heads=4,
    num_experts=64,
    num_experts_per_tok=8,
    moe_intermediate_size=256,
    norm_topk_prob=True,
)
SHAPES = {"dense": DENSE, "experts": EXPERTS}


def shape_of(a) -> dict:
    shape = SHAPES[a.shape]
    return shape | ({"num_hidden_layers": a.layers} if a.layers else {})


def torch_step(a):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape_of(a))
    model = AutoModelForCausalLM.from_config(config).train()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    tokens = torch.randint(0, config.vocab_size, (a.batch, a.length))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=a.dtype == "bfloat16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        return a.batch * a.length

    return step


def jaxllm_step(a):
    from jaxllm.libraries import hide_torch

    hide_torch()  # as a command does
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from jaxllm.config import OptimSection
    from jaxllm.data.batch import Batch
    from jaxllm.model.decoder import Decoder
    from jaxllm.model.families import from_hf
    from jaxllm.objectives.lm import lm_loss
    from jaxllm.optim import make_optimizer, make_schedule
    from jaxllm.step import TrainState, alone, make_step

    cfg = from_hf(shape_of(a))
    options = dict(compute_dtype=a.dtype, remat=a.remat)
    graph, weights = nnx.split(Decoder(cfg, rngs=nnx.Rngs(0), **options), nnx.Param)
    params = nnx.to_pure_dict(weights)
    del weights
    optim = OptimSection(learning_rate=1e-4, weight_decay=0.1, schedule="constant")
    schedule = make_schedule(optim, 100)
    optimizer = make_optimizer(optim, schedule)
    update = jax.jit(
        make_step(alone(graph), lm_loss, optimizer, schedule, max_norm=1.0), donate_argnums=0
    )
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, a.batch, a.length + 1))
    ones = np.ones((1, a.batch, a.length), np.int32)
    places = np.arange(a.length) * ones
    fields = (tokens[..., :-1], tokens[..., 1:], ones.astype(np.float32), ones, places)
    batch = Batch(*(jnp.asarray(f) for f in fields))
    compiled = update.lower(state, {}, batch).compile()

    def step():
        nonlocal state
        state, _ = compiled(state, {}, batch)
        jax.block_until_ready(state)
        return a.batch * a.length

    return step


def side(name: str, dtype: str, a, layers: int | None = None) -> Side:
    options = dict(batch=a.batch, length=a.length, remat=a.remat, shape=a.shape)
    options["layers"] = layers or a.layers
    return Side(__file__, side=name, dtype=dtype, **options)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_blocks(p)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--layers", type=int, default=0, help="0 = the shape's own")
    p.add_argument("--shape", choices=SHAPES, default="dense")
    p.add_argument("--remat", default="full")
    p.add_argument("--dtypes", default="float32,bfloat16")
    p.add_argument("--side", help=argparse.SUPPRESS)
    p.add_argument("--dtype", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.side:
        make = {"torch": torch_step, "jaxllm": jaxllm_step}[a.side]
        return serve(lambda: make(a))
    for dtype in a.dtypes.split(","):
        sides = {name: side(name, dtype, a) for name in ("jaxllm", "torch")}
        row = "experts" if a.shape == "experts" else "full"
        compare(f"{row}, {dtype}, remat {a.remat}", sides, a.blocks, a.steps)
    return None


if __name__ == "__main__":
    main()
