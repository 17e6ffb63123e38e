# SPDX-License-Identifier: Apache-2.0
"""A run of 2,000 steps that evaluates, saves, samples and reports: does anything grow?

    make faults

Resident memory must stay within 2 % of what it was after the warm-up, the number of threads and of
open files must not grow, and no program may be compiled after all of them have run once. Exits with
status 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
from kills import command, make_project  # noqa: E402, found by the line above
from runs import DEVICES, ENV  # noqa: E402

EVERY = 50  # steps between evaluations, saves and samples
SHARE = 0.02  # by which memory may grow


class Samples:
    """What the process has after each step."""

    def __init__(self) -> None:
        self.memory: list[int] = []  # bytes
        self.threads: list[int] = []
        self.files: list[int] = []
        self.compiled: list[int] = []  # programs since the start
        self.programs = 0

    def count(self, event: str, _: float, **__: object) -> None:
        self.programs += event.endswith("backend_compile_duration")

    def __call__(self, step: int, _: object) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.memory.append(pages * resource.getpagesize())
        self.threads.append(threading.active_count())
        self.files.append(len(os.listdir("/proc/self/fd")))
        self.compiled.append(self.programs)


def problems(found: Samples, steps: int) -> list[str]:
    """Prints the figures; returns what grew."""
    warm, width = steps // 4, steps // 10
    wrong = []

    def row(name: str, before: float, after: float, limit: float) -> None:
        print(f"{name:<36}{before:>14,.1f}{after:>14,.1f}{after / before - 1:>+10.2%}")
        if after > limit:
            wrong.append(f"{name}: {before:,.1f} -> {after:,.1f}")

    print(f"{'':<36}{'after ' + format(warm, ','):>14}{'at the end':>14}{'growth':>10}")
    before, after = (
        statistics.median(part) / 2**20
        for part in (found.memory[warm : warm + width], found.memory[-width:])
    )
    row("resident memory, MiB, median", before, after, before * (1 + SHARE))
    for name, values in (("threads, most", found.threads), ("open files, most", found.files)):
        most = max(values[warm : warm + width])
        row(name, most, max(values[-width:]), most)
    first, second = EVERY - 1, EVERY + 2  # until the first evaluation, and after it
    row(
        "programs compiled, steps 3 to 49",
        found.compiled[1],
        found.compiled[first - 1],
        found.compiled[1],
    )
    row(
        "programs compiled, from step 53 on",
        found.compiled[second],
        found.compiled[-1],
        found.compiled[second],
    )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    os.environ |= ENV | {"XLA_FLAGS": f"{DEVICES}1"}
    import jax

    from jaxllm.config import load_config
    from jaxllm.report import live
    from jaxllm.training import train

    live.EVERY = live.FIRST = 2.0  # a page of the report as often as that
    found, began = Samples(), time.monotonic()
    jax.monitoring.register_event_duration_secs_listener(found.count)
    with tempfile.TemporaryDirectory() as temporary:
        project = Path(temporary, "project")
        make_project(project)
        args = command(project, "pretrain", Path(temporary, "run"), steps=options.steps)
        args += ["--data.eval", str(project / "text.txt"), "--log.samples", "def load("]
        args += ["--log.sample_tokens", "8", "--log.report_to", "tensorboard"]
        args += ["--eval_every", str(EVERY), "--save.every", str(EVERY)]
        cfg, origins = load_config(args[0], None, args[1:])
        train(cfg, on_step=found, origins=origins)
    assert len(found.memory) == options.steps
    print(
        f"\n{options.steps:,} steps, {options.steps // EVERY} evaluations, saves and samples each"
    )
    wrong = problems(found, options.steps)
    print(*wrong, sep="\n", end="\n" * bool(wrong))
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
