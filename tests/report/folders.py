# SPDX-License-Identifier: Apache-2.0
"""Run folders as a run leaves them, without a run."""

import json
import math
from dataclasses import replace
from pathlib import Path

from jaxllm.config import LogSection, TrainConfig, to_dict

BEGAN = 1_700_000_000.0
EVIL = '</script><script>document.title="taken"</script><img src=x onerror=alert(1)>'


def write_lines(file: Path, lines: list[dict]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def train_line(step: int, **more) -> dict:
    numbers = {
        "loss": 2.0 + 6.0 * math.exp(-step / 20),
        "grad_norm": 1.0 + math.sin(step) / 4,
        "learning_rate": 1e-3 / step,
        "tokens": 512.0,
        "tokens_seen": 512.0 * step,
        "tokens_per_second": 4000.0 + step,
        "step_seconds": 0.1 + step % 3 / 100,
        "mfu": None,
        "memory_gib": 1.5,
        "epoch": step / 50,
    }
    return {"kind": "train", "step": step, "time": BEGAN + 10 + step} | numbers | more


def eval_line(step: int, loss: float, name: str = "held-out") -> dict:
    line = {"kind": "eval", "step": step, "time": BEGAN + 10.5 + step, "name": name}
    return line | {"loss": loss, "perplexity": math.exp(loss), "tokens": 100.0}


LEDGER = {"train_seconds": 80.0, "eval_seconds": 15.0, "lost_seconds": 5.0, "goodput": 0.8}
SOURCE = {
    "path": "texts.jsonl",
    "examples": 90,
    "tokens": 9000,
    "learned_tokens": 4500,
    "rows": 40,
    "dropped_too_long": 3,
    "truncated": 2,
    "share": 1.0,
    "lengths": {"edges": [10, 20, 40, 81], "counts": [20, 60, 10]},
}


def run_folder(folder: Path, steps: int = 60, objective: str = "pretrain", **more) -> Path:
    """A complete run of `steps` steps with evaluations of which step 40 is the best."""
    folder.mkdir(parents=True)
    cfg = TrainConfig(objective=objective, output_dir=str(folder), steps=steps, **more)
    if objective == "grpo":
        cfg = replace(cfg, log=LogSection(samples=()))
    (folder / "config.json").write_text(json.dumps(to_dict(cfg)))
    lines = []
    for step in range(1, steps + 1):
        lines.append(train_line(step))
        if step % 20 == 0:
            lines.append(eval_line(step, 2.5 + abs(step - 40) / 100))
    lines.append({"kind": "goodput", "step": steps, "restarts": 1, "ended": "done"} | LEDGER)
    write_lines(folder / "metrics.jsonl", lines)
    start = {
        "time": BEGAN,
        "last": 0.0,
        "step": 0,
        "steps": steps,
        "devices": "8 x TPU v5p",
        "processes": 2,
        "mesh": {"fsdp": 8},
        "parameters": 1_500_000_000,
        "trainable": 1_500_000_000,
        "versions": {"jax": "0.10.2"},
        "origins": {"steps": "--steps", "output_dir": "run.yaml:3"},
    }
    again = start | {"time": BEGAN + 50, "last": BEGAN + 40, "step": 20}
    write_lines(folder / "starts.jsonl", [start, again])
    texts = [{"step": s, "prompt": f"Say {EVIL}", "text": f"text of step {s}"} for s in (20, 40)]
    write_lines(folder / "samples.jsonl", texts)
    data = {"max_length": 64, "train": {"sources": [SOURCE], "fill": 0.9}, "eval": {}}
    (folder / "data.json").write_text(json.dumps(data, indent=2))
    saved = folder / "checkpoints" / "40"
    saved.mkdir(parents=True)
    (saved / "files.json").write_text(json.dumps({"state/a": [2**30, None], "b": [2**29, "x"]}))
    return folder
