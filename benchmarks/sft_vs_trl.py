# SPDX-License-Identifier: Apache-2.0
"""SFT on chats: learned tokens/s of jaxllm (packed) and of TRL's SFTTrainer.

Learned tokens are those with a loss: the assistant's content and end-of-turn tokens, the same on
both sides. TRL runs in two modes. `trl` pads, with examples grouped by length; on a CPU this is its
only mode in which examples do not attend to each other. `trl-packed` packs (bfd); without flash
attention its examples attend to each other, so it is not the same training.

    python benchmarks/sft_vs_trl.py --model SMOLLM2_DIR --data CHATS.jsonl

CHATS.jsonl: {"messages": [...]} lines, or alpaca records.
"""

import argparse
import tempfile

from turns import TRAINER, Side, Turn, add_blocks, compare, examples, run_trainer, serve


def trl_side(a) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from jaxllm.data.conversations import parse_conversation

    turn = Turn()
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    chats = [found["messages"] for found in examples(a.data, parse_conversation)]
    rows = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in chats]
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=a.rows if a.side == "trl-packed" else a.examples,
        max_length=a.length,
        packing=a.side == "trl-packed",
        train_sampling_strategy="group_by_length" if a.side == "trl" else "random",
        bf16=a.dtype == "bfloat16",
        **TRAINER,
    )
    trainer = SFTTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    run_trainer(trainer, turn, lambda batch: int((batch["labels"] != -100).sum()))


def jaxllm_step(a):
    from jaxllm.libraries import hide_torch

    hide_torch()  # as a command does
    from functools import partial

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxllm.config import DataSection, ModelSection, OptimSection, Source, TrainConfig
    from jaxllm.data.batch import Batch
    from jaxllm.data.dataset import load_data
    from jaxllm.data.loader import make_loader
    from jaxllm.hf import load_hf
    from jaxllm.objectives.lm import lm_loss
    from jaxllm.optim import make_optimizer, make_schedule
    from jaxllm.step import TrainState, alone, make_step
    from jaxllm.tokenizer import load_tokenizer

    cache = tempfile.mkdtemp()
    section = DataSection(train=(Source(a.data),), max_length=a.length, cache_dir=cache, workers=1)
    cfg = TrainConfig(objective="sft", model=ModelSection(path=a.model), data=section)
    data = load_data(cfg, load_tokenizer(a.model))
    loader = make_loader(data.train, batch_size=a.rows)
    model = load_hf(a.model, compute_dtype=a.dtype, remat=a.remat)
    graph, weights = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(weights)
    del model, weights
    optim = OptimSection(learning_rate=5e-5, schedule="constant")
    schedule = make_schedule(optim, 10_000)
    optimizer = make_optimizer(optim, schedule)
    step_fn = make_step(alone(graph), partial(lm_loss), optimizer, schedule, max_norm=1.0)
    update = jax.jit(step_fn, donate_argnums=0)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))

    def step():
        nonlocal state
        host = next(loader)
        state, _ = update(state, {}, Batch(**jax.device_put(host)))
        jax.block_until_ready(state)
        return float(host["weights"].sum())

    return step


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True)
    p.add_argument("--data", required=True)
    add_blocks(p)
    p.add_argument("--rows", type=int, default=4, help="packed rows per step [%(default)s]")
    p.add_argument(
        "--examples", type=int, default=12, help="trl: padded examples per step [%(default)s]"
    )
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--remat", default="full")
    p.add_argument("--side", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.side == "jaxllm":
        return serve(lambda: jaxllm_step(a))
    if a.side:
        return trl_side(a)
    options = {k: v for k, v in vars(a).items() if k not in ("side", "blocks", "steps")}
    sides = {n: Side(__file__, side=n, **options) for n in ("jaxllm", "trl", "trl-packed")}
    compare(f"SFT, learned tokens, {a.dtype}", sides, a.blocks, a.steps)
    return None


if __name__ == "__main__":
    main()
