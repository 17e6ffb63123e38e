# SPDX-License-Identifier: Apache-2.0
"""Train on the standard library's text: tokenizer, pretraining, SFT, LoRA, reward model and DPO.

    python demo/demo.py [--quick]

Runs the jaxllm commands one after another in this process, prints each as you would type it, and
ends with a table of the results, their paths and metrics. Output goes to run/stdlib; earlier
output there is overwritten. --quick only checks that every command runs, with a twelfth of the
text and a few steps; its metrics are meaningless.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import io
import json
import math
import shlex
import sys
import time
from pathlib import Path

import stdlib
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from jaxllm import cli

OUT = Path("run/stdlib")
VOCABULARY = 4096
QUESTIONS = ("What does shutil.copyfile do?", "What does random.Random.shuffle do?")
console = Console(highlight=False)


def run(*words: object, capture: bool = False) -> list[str]:
    """Prints and runs one command, with `*` expanded as in a shell; exits if the command fails.

    With `capture`, stdout is printed after the command ends and returned as lines.
    """
    typed = [str(word) for word in words]
    line = " ".join(word if "*" in word else shlex.quote(word) for word in typed)
    console.print(f"\n[bold]$ jaxllm {line}[/bold]", soft_wrap=True)
    expanded = [sorted(glob.glob(word)) if "*" in word else [word] for word in typed]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed) if capture else contextlib.nullcontext():
        status = cli.main([word for group in expanded for word in group])
    if status:
        sys.exit(status)
    if capture:
        console.print(printed.getvalue().rstrip(), markup=False, soft_wrap=True)
    return printed.getvalue().splitlines()


def chat_loss(model: Path) -> dict[str, float]:
    """Metrics of `jaxllm eval` on the held-out chats, over assistant tokens."""
    data = OUT / "chat" / "heldout.jsonl"
    words = ("eval", "--model", model, "--data", data, "--chat", "--max_length", 256, "--json")
    return json.loads(run(*words, capture=True)[-1])


def text_losses(run_folder: Path) -> list[float]:
    """Held-out losses in a run's metrics.jsonl, first to last."""
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "eval"]


def numbers(found: dict[str, float]) -> str:
    kinds = (("loss", ".3f"), ("perplexity", ".1f"), ("accuracy", ".1%"))
    return ", ".join(f"{name} {found[name]:{form}}" for name, form in kinds)


def parameters(model: Path, file: str = "model.safetensors") -> int:
    """Number of parameters in a HuggingFace directory with a single weights file."""
    with safe_open(model / file, framework="np") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())


class Summary:
    """The final table: one row per result, with the seconds since the previous row."""

    def __init__(self) -> None:
        self.table = Table(title="What was made", header_style="bold", title_justify="left")
        self.table.add_column("result")
        self.table.add_column("path", overflow="fold")
        self.table.add_column("metrics", overflow="fold")
        self.table.add_column("seconds", justify="right")
        self.start = self.last = time.perf_counter()

    def add(self, what: str, where: object, numbers: str) -> None:
        now = time.perf_counter()
        self.table.add_row(what, str(where), numbers, f"{now - self.last:.0f}")
        self.last = now

    def show(self) -> None:
        self.table.add_section()
        self.table.add_row("total", str(OUT), "", f"{self.last - self.start:.0f}")
        console.print()
        console.print(self.table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a twelfth of the text and a few steps"
    )
    quick = parser.parse_args().quick
    few = ["--steps", 4, "--eval_every", 0] if quick else []
    summary = Summary()

    counts = stdlib.build(OUT, every=12 if quick else 1)
    console.print(", ".join(f"{n:,} {name}" for name, n in counts.items()), soft_wrap=True)
    summary.add(
        "corpus", OUT / "text", f"{counts['modules']} modules, {counts['characters']:,} characters"
    )

    tokenizer = OUT / "tokenizer"
    run(
        "tokenizer",
        "train",
        OUT / "text/train/*.txt",
        "--vocab_size",
        VOCABULARY,
        "--out",
        tokenizer,
    )
    summary.add("tokenizer", tokenizer, f"{VOCABULARY:,} tokens, byte-level BPE")

    base = OUT / "pretrain" / "final"
    run("pretrain", "configs/pretrain/stdlib-tiny.yaml", "--overwrite", *few)
    losses = text_losses(OUT / "pretrain")
    summary.add(
        "base model",
        base,
        f"{parameters(base):,} parameters, held-out loss {losses[0]:.2f} → {losses[-1]:.2f} "
        f"(uniform guess: {math.log(VOCABULARY):.2f})",
    )

    before = chat_loss(base)
    summary.add("evaluation before", OUT / "chat/heldout.jsonl", numbers(before))

    run("sft", "configs/sft/stdlib-tiny.yaml", "--overwrite", *few)
    summary.add("chat model", OUT / "sft", f"{counts['chats']:,} chats, packed")

    model = OUT / "model"
    run("export", OUT / "sft", model, "--dtype", "bfloat16")
    size = (model / "model.safetensors").stat().st_size
    summary.add("HuggingFace directory", model, f"bfloat16, {size / 2**20:.1f} MiB")

    after = chat_loss(model)
    summary.add("evaluation after", OUT / "chat/heldout.jsonl", numbers(after))

    run("sft", "configs/sft/stdlib-lora.yaml", "--overwrite", *few)
    adapter = OUT / "lora" / "final"
    tuned = chat_loss(adapter)
    share = parameters(adapter, "adapter_model.safetensors") / parameters(base)
    summary.add("LoRA adapter", adapter, f"{share:.1%} of the parameters, {numbers(tuned)}")

    run("export", OUT / "lora", OUT / "lora-merged", "--merge", "--dtype", "bfloat16")
    merged = chat_loss(OUT / "lora-merged")
    summary.add("LoRA, merged", OUT / "lora-merged", f"bfloat16, {numbers(merged)}")

    run("reward", "configs/reward/stdlib-tiny.yaml", "--overwrite", *few)
    judge = OUT / "reward" / "final"
    pairs = OUT / "chat" / "heldout-pairs.jsonl"
    words = ("eval", "--model", judge, "--data", pairs, "--max_length", 128, "--json")
    judged = json.loads(run(*words, capture=True)[-1])
    summary.add(
        "reward model",
        judge,
        f"correct answer preferred over its reversed words in {judged['accuracy']:.1%} of "
        f"{judged['examples']} held-out pairs, margin {judged['margin']:+.2f}",
    )

    run("dpo", "configs/dpo/stdlib-tiny.yaml", "--overwrite", *few)
    lines = map(json.loads, (OUT / "dpo" / "metrics.jsonl").read_text().splitlines())
    evals = [line for line in lines if line["kind"] == "eval"]
    preferred = evals[-1]
    summary.add(
        "DPO adapter",
        OUT / "dpo" / "final",
        f"held-out loss {preferred['loss']:.3f} (0.693 before), accuracy "
        f"{preferred['accuracy']:.1%}",
    )

    prompts = [word for question in QUESTIONS for word in ("--prompt", question)]
    words = ("generate", "--model", model, "--chat", *prompts, "--max_new_tokens", 48, "--json")
    answers = [json.loads(line)["text"] for line in run(*words, capture=True)]
    summary.add("an answer", QUESTIONS[0], answers[0])
    summary.show()
    if not quick and max(after["loss"], tuned["loss"]) >= before["loss"]:
        sys.exit("the held-out loss on chats did not decrease")
    if not quick and (judged["accuracy"] <= 0.5 or preferred["loss"] >= math.log(2)):
        sys.exit("the reward model or DPO did not learn the held-out preferences")


if __name__ == "__main__":
    main()
