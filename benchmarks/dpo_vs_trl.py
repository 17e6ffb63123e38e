# SPDX-License-Identifier: Apache-2.0
"""DPO with LoRA: real tokens/s of jaxllm (packed) and of TRL's DPOTrainer (padded).

Real tokens are those of both answers with their prompts, without padding. Both sides adapt all
linear layers with the same rank, use the frozen base model as the reference, and truncate at the
same length. jaxllm packs pairs into rows. TRL pads the pairs of a step to the longest of them; it
cannot group pairs by length.

    python benchmarks/dpo_vs_trl.py --model SMOLLM2_DIR --data PAIRS.json
"""

import argparse
import sys
import tempfile

from turns import TRAINER, Side, Turn, add_blocks, compare, examples, run_trainer, serve


def trl_side(a) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from jaxllm.data.conversations import parse_pair

    turn = Turn()
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    pairs = [
        {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}
        for p in examples(a.data, parse_pair)
    ]
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=a.pairs,
        max_length=a.length,
        bf16=a.dtype == "bfloat16",
        **TRAINER,
    )
    trainer = DPOTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=a.r, lora_alpha=16, target_modules="all-linear"),
    )

    def real(batch) -> int:
        found, padded = int(batch["attention_mask"].sum()), batch["attention_mask"].numel()
        print(f"trl: {found} real tokens of {padded}", file=sys.stderr)
        return found

    run_trainer(trainer, turn, real)


def jaxllm_step(a):
    from jaxllm.libraries import hide_torch

    hide_torch()  # as a command does
    import jax

    from jaxllm.config import (
        DataSection,
        MeshSection,
        ModelSection,
        OptimSection,
        PeftSection,
        Source,
        TrainConfig,
    )
    from jaxllm.config.checks import resolve
    from jaxllm.data.batch import Batch
    from jaxllm.data.dataset import load_data
    from jaxllm.data.loader import make_loader
    from jaxllm.mesh import make_mesh, put
    from jaxllm.program import build
    from jaxllm.tokenizer import load_tokenizer

    cache = tempfile.mkdtemp()
    section = DataSection(train=(Source(a.data),), max_length=a.length, cache_dir=cache, workers=1)
    cfg = TrainConfig(
        objective="dpo",
        batch_size=a.rows,
        model=ModelSection(path=a.model, compute_dtype=a.dtype, remat=a.remat),
        data=section,
        peft=PeftSection(method="lora", r=a.r),
        optim=OptimSection(learning_rate=5e-5, schedule="constant"),
    )
    cfg, mesh = resolve(cfg, 1), make_mesh(MeshSection(), jax.devices()[:1])
    data = load_data(cfg, load_tokenizer(a.model))
    assert data.train is not None
    loader = make_loader(data.train, batch_size=a.rows)
    program = build(cfg, mesh)
    trainable, frozen = program.load()
    frozen = program.with_reference(trainable, frozen)
    state, update = program.begin(trainable), program.step(10_000)

    def step():
        nonlocal state
        host = next(loader)
        with jax.set_mesh(mesh):
            state, _ = update(state, frozen, Batch(**put(mesh, host)))
        jax.block_until_ready(state)
        return float((host["segment_ids"] > 0).sum())

    return step


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True)
    p.add_argument("--data", required=True)
    add_blocks(p)
    p.add_argument("--rows", type=int, default=2, help="jaxllm: packed rows per step [%(default)s]")
    p.add_argument("--pairs", type=int, default=4, help="TRL: padded pairs per step [%(default)s]")
    p.add_argument(
        "--length", type=int, default=512, help="maximum tokens of an answer with its prompt"
    )
    p.add_argument("--r", type=int, default=8, help="LoRA rank [%(default)s]")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--remat", default="dots")
    p.add_argument("--side", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.side == "jaxllm":
        return serve(lambda: jaxllm_step(a))
    if a.side:
        return trl_side(a)
    options = {k: v for k, v in vars(a).items() if k not in ("side", "blocks", "steps")}
    sides = {n: Side(__file__, side=n, **options) for n in ("jaxllm", "trl")}
    compare(f"DPO with LoRA, real tokens, {a.dtype}", sides, a.blocks, a.steps)
    return None


if __name__ == "__main__":
    main()
