# SPDX-License-Identifier: Apache-2.0
"""Two sides of a comparison, each a process of its own, that do one step at a time in turn.

So both meet the same machine, however its speed drifts, and peak memory is each process's own.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


class Side:
    """A running `serve`; `ready` is how many seconds it took to get there."""

    def __init__(self, script: str, **options: object):
        flags = [x for k, v in options.items() for x in (f"--{k}", str(v))]
        # Large pages: without them page faults alone cost either side some percent.
        env = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, script, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.ready = self._answer()["ready"]

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("a side ended before its answer; its error stands above")

    def step(self) -> dict:
        """{"s": seconds, "count": what was done, "gib": peak memory so far}."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()


class Turn:
    """Inside a side: `begin` waits to be told, `end` answers."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def ready(self) -> None:
        print(json.dumps({"ready": time.perf_counter() - self.started}), flush=True)

    def begin(self) -> bool:
        told = bool(sys.stdin.readline())
        self.started = time.perf_counter()
        return told

    def end(self, count: float) -> None:
        seconds = time.perf_counter() - self.started
        gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"s": seconds, "count": count, "gib": gib}), flush=True)


def serve(make: Callable[[], Callable[[], float]]) -> None:
    """Builds a step (which returns how much it did) and runs it each time it is told."""
    turn = Turn()
    step = make()
    turn.ready()
    while turn.begin():
        turn.end(step())


# What a torch Trainer is told beside its own settings, and how it takes its turns.
TRAINER: dict[str, object] = dict(
    use_cpu=True,
    gradient_checkpointing=False,
    optim="adamw_torch_fused",
    max_steps=10_000,
    report_to=[],
    logging_strategy="no",
    save_strategy="no",
    disable_tqdm=True,
)


def run_trainer(trainer, turn: Turn, count: Callable[[dict], float]) -> None:
    """Trains a step each time it is told; `count` is how much a step's batch is."""
    from transformers import TrainerCallback

    class Told(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if not turn.begin():
                raise SystemExit

        def on_step_end(self, args, state, control, **_):
            turn.end(done)

    done, collate = 0.0, trainer.data_collator

    def counted(examples):
        nonlocal done
        batch = collate(examples)
        done = count(batch)
        return batch

    trainer.data_collator = counted
    trainer.add_callback(Told())
    turn.ready()
    trainer.train()


def examples(path: str, read_one: Callable) -> list:
    """read_one(record, source, data, where it stands) of each record of a file jaxllm reads."""
    from jaxllm.config import DataSection, Source
    from jaxllm.data.sources import locate, read, records

    with tempfile.TemporaryDirectory() as folder:
        source, data = Source(path), DataSection()
        table = read(locate(source), Path(folder))
        found = records(table[:], list(range(len(table))), path)
        return [read_one(record, source, data, at) for at, record in found]


def compare(sides: dict[str, Side], rounds: int, warmup: int = 1) -> dict[str, dict[str, float]]:
    """Medians of each side: {"rate": count per second, "gib"}; the first rounds are not counted."""
    runs: dict[str, list[dict]] = {name: [] for name in sides}
    for number in range(rounds + warmup):
        for name, side in sides.items():
            out = side.step()
            if number >= warmup:
                runs[name].append(out)
    for side in sides.values():
        side.close()
    return {
        name: {
            "rate": statistics.median(o["count"] / o["s"] for o in outs),
            "gib": max(o["gib"] for o in outs),
        }
        for name, outs in runs.items()
    }
