# SPDX-License-Identifier: Apache-2.0
"""Seconds from the command to the end of the first update: `jaxllm sft` and TRL's SFTTrainer.

Each round starts one process of each side, on the same chats. Both have run once before, so that
files, tokens and compiled programs are cached.

    python benchmarks/start_vs_trl.py --model SMOLLM2_DIR --data CHATS.json [--rounds 5]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from turns import TRAINER, examples, keep


def trl_side(a) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            print(json.dumps({"ended": time.time()}), flush=True)
            control.should_training_stop = True

    rows = json.loads(Path(a.data).read_text())  # prompts and completions
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32),
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=4,
            max_length=512,
            bf16=a.dtype == "bfloat16",
            **TRAINER,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(a.model),
        callbacks=[Stop()],
    )
    trainer.train()


def trl_seconds(a, data: Path) -> float:
    command = [sys.executable, __file__, "--side", "trl", "--model", a.model, "--data", str(data)]
    command += ["--dtype", a.dtype]
    began = time.time()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    ended = [json.loads(x)["ended"] for x in done.stdout.splitlines() if x.startswith('{"ended"')]
    return ended[0] - began


def jaxllm_seconds(a, folder: Path) -> float:
    command = [sys.executable, "-m", "jaxllm", "sft", "--model.path", a.model]
    command += ["--data.train", a.data, "--data.max_length", "512", "--batch_size", "4"]
    command += [
        "--model.compute_dtype",
        a.dtype,
        "--steps",
        "1",
        "--save.final",
        "false",
        "--save.every",
        "0",
    ]
    command += ["--output_dir", str(folder / "run"), "--data.cache_dir", str(folder / "cache")]
    began = time.time()
    subprocess.run([*command, "--overwrite"], check=True, capture_output=True)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return next(x["time"] for x in map(json.loads, lines) if x["kind"] == "train") - began


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--side", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.side:
        return trl_side(a)
    from jaxllm.data.conversations import parse_conversation

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        chats = [one["messages"] for one in examples(a.data, parse_conversation)]
        rows = [{"prompt": m[:-1], "completion": m[-1:]} for m in chats]
        (folder / "rows.json").write_text(json.dumps(rows))
        took: dict[str, list[float]] = {"jaxllm": [], "trl": []}
        for number in range(a.rounds + 1):
            pair = {
                "jaxllm": jaxllm_seconds(a, folder),
                "trl": trl_seconds(a, folder / "rows.json"),
            }
            if number:
                for name, seconds in pair.items():
                    took[name].append(seconds)
    found = {
        name: {"seconds": statistics.median(some), "low": min(some), "high": max(some)}
        for name, some in took.items()
    }
    print(json.dumps(found))
    ours, theirs = (found[n]["seconds"] for n in ("jaxllm", "trl"))
    print(f"command to first update: jaxllm {ours:.1f} s, trl {theirs:.1f} s, {ours / theirs:.2f}")
    keep(f"command to first update, SFT, {a.dtype}", found)
    return None


if __name__ == "__main__":
    main()
