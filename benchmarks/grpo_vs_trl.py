# SPDX-License-Identifier: Apache-2.0
"""GRPO: completions/s of jaxllm and of TRL's GRPOTrainer with transformers' generation.

Both sides fine-tune all weights on the same prompts, which ask for the sum of two numbers, with the
same reward function, groups of 8, one update per rollout and completions of at most --new tokens.

    python benchmarks/grpo_vs_trl.py --model SMOLLM2_DIR
"""

import argparse
import json
import tempfile
from pathlib import Path

from align import sums
from turns import TRAINER, Side, Turn, add_blocks, compare, run_trainer

GROUP = 8


def prompts(count: int) -> list[dict[str, str]]:
    """Sums with their answers, in an order that mixes them."""
    pairs = [(3 + i * 7 % 40, 2 + i * 11 % 40) for i in range(count)]
    return [
        {"prompt": f"What is {x} + {y}? Answer with an equation.", "answer": f"{x} + {y} = {x + y}"}
        for x, y in pairs
    ]


def trl_side(a) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    turn = Turn()
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)

    def reward(completions, answer, **_):
        return sums([], [c[0]["content"] for c in completions], answer)

    rows = [
        one | {"prompt": [{"role": "user", "content": one["prompt"]}]} for one in prompts(2_000)
    ]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=a.completions,
        num_generations=GROUP,
        max_completion_length=a.new,
        learning_rate=1e-6,
        beta=0.0,
        bf16=a.dtype == "bfloat16",
        **TRAINER,
    )
    trainer = GRPOTrainer(
        model,
        reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    run_trainer(trainer, turn, len)


def jaxllm_side(a) -> None:
    from jaxllm.libraries import hide_torch

    hide_torch()  # as a command does
    from jaxllm import load_config, train

    turn = Turn()
    folder = Path(tempfile.mkdtemp())
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in prompts(2_000)))
    flags = ["--model.path", a.model, "--data.train", str(data), "--data.max_length", "64"]
    flags += ["--rl.rewards", f"{Path(__file__).parent / 'align.py'}:sums"]
    flags += ["--rl.max_new_tokens", str(a.new), "--rl.group_size", str(GROUP)]
    flags += ["--batch_size", str(a.completions), "--micro_batch_size", str(a.completions)]
    flags += ["--learning_rate", "1e-6", "--align.beta", "0", "--steps", "10000"]
    flags += ["--model.compute_dtype", a.dtype, "--model.remat", a.remat, "--save.every", "0"]
    flags += ["--log.every", "1", "--log.progress", "false", "--output_dir", str(folder / "run")]
    cfg, _ = load_config("grpo", None, flags)
    begun = False

    def on_step(*_) -> None:
        nonlocal begun
        turn.end(a.completions) if begun else turn.ready()
        begun = True
        if not turn.begin():
            raise SystemExit

    train(cfg, on_step=on_step)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True)
    add_blocks(p)
    p.add_argument("--completions", type=int, default=32, help="of an update [%(default)s]")
    p.add_argument("--new", type=int, default=32, help="tokens of a completion [%(default)s]")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--remat", default="dots")
    p.add_argument("--side", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.side:
        return (jaxllm_side if a.side == "jaxllm" else trl_side)(a)
    options = {k: v for k, v in vars(a).items() if k not in ("side", "blocks", "steps")}
    sides = {n: Side(__file__, side=n, **options) for n in ("jaxllm", "trl")}
    compare(f"GRPO, completions, {a.dtype}", sides, a.blocks, a.steps)
    return None


if __name__ == "__main__":
    main()
