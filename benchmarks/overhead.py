# SPDX-License-Identifier: Apache-2.0
"""What monitoring costs a training step, and how long a save holds the loop.

Two runs of `jaxllm.train` alternate, of SmolLM2-135M's architecture on jaxllm's own source code.
One writes a line of metrics for each step, TensorBoard events and the report; the other, a line for
each block of steps. A third run saves checkpoints while it trains.

    python benchmarks/overhead.py [--layers 30] [--batch 2] [--length 512] [--blocks 6] [--saves 4]
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from train_vs_hf import DENSE
from turns import Side, Turn, compare, keep

ROOT = Path(__file__).parents[1]


def prepare(folder: Path, layers: int) -> None:
    import jaxllm

    text = "\n".join(file.read_text() for file in sorted((ROOT / "jaxllm").rglob("*.py")))
    (folder / "text.txt").write_text(text * 4)
    jaxllm.train_tokenizer([folder / "text.txt"], folder / "tokenizer", vocab_size=2000)
    (folder / "config.json").write_text(json.dumps(DENSE | {"num_hidden_layers": layers}))


def config(folder: Path, name: str, a, **sections):
    from jaxllm.config import DataSection, LogSection, ModelSection, Source, TrainConfig

    return TrainConfig(
        output_dir=str(folder / name),
        batch_size=a.batch,
        model=ModelSection(
            config=str(folder / "config.json"), tokenizer=str(folder / "tokenizer"), remat="full"
        ),
        data=DataSection(
            train=(Source(str(folder / "text.txt")),),
            max_length=a.length,
            cache_dir=str(folder / "cache"),
        ),
        **{"log": LogSection(progress=False), "steps": 10_000, **sections},
    )


def settle() -> None:
    """Waits until the step that was dispatched last has ended."""
    used = -1.0
    while (now := time.process_time()) - used > 0.02:
        used = now
        time.sleep(0.2)


def one_side(a) -> None:
    """Trains; after each block, waits for the parent's request."""
    from jaxllm.libraries import hide_torch

    hide_torch()  # as a command does
    from jaxllm import train, training
    from jaxllm.config import LogSection

    folder, turn, block = Path(a.folder), Turn(), a.steps + 1
    monitored = a.side == "all"
    if not monitored:
        training.reported = lambda *_, **__: contextlib.nullcontext()  # type: ignore[assignment]
    log = LogSection(
        every=1 if monitored else block,
        report_to=("tensorboard",) if monitored else (),
        progress=False,
    )
    begun = False

    def on_step(step: int, _: object) -> None:
        nonlocal begun
        if step % block:
            return
        if begun:
            # The first step of the block had been dispatched before the parent asked for it.
            turn.end(a.steps * a.batch * a.length)
        settle()
        if not begun:
            turn.ready()
        begun = True
        if not turn.begin():
            os._exit(0)  # without the checkpoint that a run saves when it is stopped

    train(config(folder, a.side, a, log=log), on_step=on_step)


def measure_saves(a) -> None:
    """Prints how long each save holds the loop, and how long it takes until it is complete."""
    import jaxllm
    from jaxllm.config import SaveSection
    from jaxllm.saving import Save

    held, took = [], []
    plain = Save.__call__

    def timed(self, *args) -> None:
        began = time.perf_counter()
        plain(self, *args)
        held.append(time.perf_counter() - began)
        self.checkpoints.wait()
        took.append(time.perf_counter() - began)

    Save.__call__ = timed  # type: ignore[method-assign]
    save = SaveSection(every=2, final=False)
    jaxllm.train(config(Path(a.folder), "saves", a, steps=2 * a.saves, save=save))
    print(json.dumps({"held": held, "took": took}))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--blocks", type=int, default=6, help="blocks of each side [%(default)s]")
    p.add_argument("--steps", type=int, default=3, help="steps of a block [%(default)s]")
    p.add_argument("--layers", type=int, default=30)
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--saves", type=int, default=4)
    p.add_argument("--side", help=argparse.SUPPRESS)
    p.add_argument("--folder", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.side:
        return measure_saves(a) if a.side == "saves" else one_side(a)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, a.layers)
        options = dict(folder=folder, batch=a.batch, length=a.length, steps=a.steps, saves=a.saves)
        sides = {side: Side(__file__, side=side, **options) for side in ("all", "least")}
        row = f"monitoring, batch {a.batch}, {a.length} tokens"
        found = compare(row, sides, a.blocks, 1)
        whole, least = (a.batch * a.length / found[side]["rate"] for side in ("all", "least"))
        print(f"{row:<34} costs {1e3 * (whole - least):.1f} ms, {whole / least - 1:.1%} of a step")
        flags = [x for k, v in options.items() for x in (f"--{k}", str(v))]
        command = [sys.executable, __file__, "--side", "saves", *flags]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    saves = json.loads(out.strip().splitlines()[-1])
    held, took = (statistics.median(saves[key][1:]) for key in ("held", "took"))  # 1: sets up Orbax
    print(f"a save holds the loop for {held:.2f} s of its {took:.2f} s ({held / took:.1%})")
    keep("save", {"loop held": {"s": held}, "whole": {"s": took}})
    return None


if __name__ == "__main__":
    main()
