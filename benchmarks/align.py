# SPDX-License-Identifier: Apache-2.0
"""Quality of reward, DPO, GRPO and PPO runs: SmolLM2 with LoRA, before and after training.

reward  accuracy on held-out pairs with the 95 % Wilson interval, untrained and trained
dpo     margin and accuracy on the same held-out pairs
grpo    mean reward and KL every few updates; the task is to answer a sum with an equation
ppo     the same

python benchmarks/align.py --model DIR --pairs FILE [--only reward,dpo,grpo,ppo] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def sums(prompts: list[str], completions: list[str], answer: list[str], **_: object) -> list[float]:
    """1 for exactly the right equation, 0.2 if the last number is the right result, else 0."""
    found = []
    for text, right in zip(completions, answer, strict=True):
        numbers = re.findall(r"\d+", text)
        ends = bool(numbers) and numbers[-1] == right.rpartition(" ")[2]
        found.append(1.0 if text.strip().rstrip(".") == right else 0.2 * ends)
    return found


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion observed in `count` draws."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count)
    half *= math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def run(verb: str, folder: Path, *flags: str) -> list[dict]:
    """Runs one verb and returns the lines of its metrics.jsonl."""
    command = [sys.executable, "-m", "jaxllm", verb, "--output_dir", str(folder / verb)]
    command += ["--overwrite", "--use_peft", "--bf16", "--log.progress", "false", *flags]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, check=True)
    return [json.loads(x) for x in (folder / verb / "metrics.jsonl").read_text().splitlines()]


def pairs(verb: str, a: argparse.Namespace, folder: Path) -> None:
    """Trains on two thirds of the pairs; evaluates on the rest before and after training."""
    shared = ["--model.path", a.model, "--data.train", a.pairs, "--data.eval_fraction", "0.33"]
    shared += ["--data.max_length", str(a.length), "--batch_size", "8", "--micro_batch_size", "4"]
    first = run(verb, folder, *shared, "--steps", "1", "--learning_rate", "1e-12", "--seed", "0")
    rate = "2e-4" if verb == "reward" else "1e-4"
    trained = ["--epochs", str(a.epochs), "--learning_rate", rate, "--optim.warmup", "0.1"]
    last = run(verb, folder, *shared, *trained, "--log.every", "5", "--seed", "0")
    count = json.loads((folder / verb / "data.json").read_text())["eval"]["eval"]["examples"]
    for name, lines in (("untrained", first), ("trained", last)):
        found = [x for x in lines if x["kind"] == "eval"][-1]
        low, high = wilson(found["accuracy"], count)
        print(
            f"{verb:<7} {name:<10} loss {found['loss']:.4f}  margin {found['margin']:+.4f}  "
            f"accuracy {found['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {count} held-out pairs",
            flush=True,
        )


def online(verb: str, a: argparse.Namespace, folder: Path) -> None:
    """Trains on sums of two small numbers; prints means over groups of updates."""
    data = folder / "sums.jsonl"
    asked = [
        {"prompt": f"What is {x} + {y}? Answer with an equation.", "answer": f"{x} + {y} = {x + y}"}
        for x in range(1, 10)
        for y in range(1, 10)
    ]
    data.write_text("".join(json.dumps(one) + "\n" for one in asked))
    flags = ["--model.path", a.model, "--data.train", str(data), "--data.max_length", "64"]
    flags += ["--rl.rewards", f"{Path(__file__)}:sums", "--rl.max_new_tokens", "12"]
    flags += ["--batch_size", "32", "--micro_batch_size", "16", "--log.every", "1"]
    flags += ["--optim.schedule", "constant", "--steps", str(a.updates)]
    if verb == "grpo":
        flags += ["--rl.group_size", "8", "--learning_rate", "3e-4", "--align.beta", "0.04"]
    else:
        flags += ["--rl.iterations", "2", "--learning_rate", "3e-4", "--align.beta", "0.04"]
    lines = [x for x in run(verb, folder, *flags) if x.get("reward") is not None]
    size = max(len(lines) // 8, 1)
    for start in range(0, len(lines), size):
        some = lines[start : start + size]
        reward, kl = (sum(x[key] for x in some) / len(some) for key in ("reward", "kl"))
        steps = f"{some[0]['step']}-{some[-1]['step']}"
        print(f"{verb:<7} updates {steps:>8}  reward {reward:.3f}  KL {kl:+.3f} nats", flush=True)


STAGES: dict[str, Callable[[str, argparse.Namespace, Path], None]] = {
    "reward": pairs,
    "dpo": pairs,
    "grpo": online,
    "ppo": online,
}


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--model", required=True, help="HF directory of SmolLM2-135M-Instruct")
    p.add_argument("--pairs", help="file of preference pairs, for reward and dpo")
    p.add_argument("--only", default=",".join(STAGES), help="stages to run [%(default)s]")
    p.add_argument("--out", help="directory for the run folders; default: temporary")
    p.add_argument("--length", type=int, default=512, help="data.max_length [%(default)s]")
    p.add_argument(
        "--epochs", type=float, default=2.0, help="epochs of reward and dpo [%(default)s]"
    )
    p.add_argument("--updates", type=int, default=40, help="updates of grpo and ppo [%(default)s]")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(a.out or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for stage in a.only.split(","):
            STAGES[stage](stage, a, folder)


if __name__ == "__main__":
    main()
