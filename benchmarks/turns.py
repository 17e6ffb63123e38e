# SPDX-License-Identifier: Apache-2.0
"""Runs the sides of a benchmark in separate processes that alternate, one step at a time.

Alternating exposes all sides to the same drift in machine speed. Separate processes give each side
its own peak memory.
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
    """A process that runs `serve`; `ready` is its setup time in seconds."""

    def __init__(self, script: str, **options: object):
        flags = [x for k, v in options.items() for x in (f"--{k}", str(v))]
        # Huge pages: without them page faults cost each side a few percent.
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
        raise SystemExit("a benchmark process exited early; see its error above")

    def step(self) -> dict:
        """Runs one step: {"s": seconds, "count": tokens, "gib": peak memory so far}."""
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
    """The child's end of the protocol: `begin` waits for the parent, `end` reports a step."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def ready(self) -> None:
        print(json.dumps({"ready": time.perf_counter() - self.started}), flush=True)

    def begin(self) -> bool:
        requested = bool(sys.stdin.readline())
        self.started = time.perf_counter()
        return requested

    def end(self, count: float) -> None:
        seconds = time.perf_counter() - self.started
        gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"s": seconds, "count": count, "gib": gib}), flush=True)


def serve(make: Callable[[], Callable[[], float]]) -> None:
    """Builds a step with `make` and runs it once per request; a step returns its token count."""
    turn = Turn()
    step = make()
    turn.ready()
    while turn.begin():
        turn.end(step())


# Settings shared by the TRL trainers.
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
    """Trains one step per request; `count` returns the number of tokens in a batch."""
    from transformers import TrainerCallback

    class OnRequest(TrainerCallback):
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
    trainer.add_callback(OnRequest())
    turn.ready()
    trainer.train()


def examples(path: str, read_one: Callable) -> list:
    """Applies read_one(record, source, data, location) to each record of a data file."""
    from jaxllm.config import DataSection, Source
    from jaxllm.data.sources import locate, read, records

    with tempfile.TemporaryDirectory() as folder:
        source, data = Source(path), DataSection()
        table = read(locate(source), Path(folder))
        found = records(table[:], list(range(len(table))), path)
        return [read_one(record, source, data, at) for at, record in found]


def compare(sides: dict[str, Side], rounds: int, warmup: int = 1) -> dict[str, dict[str, float]]:
    """{side: {"rate": median count per second, "gib": peak memory}}, without warm-up rounds."""
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
