# SPDX-License-Identifier: Apache-2.0
"""Runs the sides of a benchmark in separate processes that alternate, a block of steps at a time.

Alternating exposes all sides to the same drift in machine speed. Separate processes give each side
its own peak memory. The first step of a block is left out: it is slower
after a wait, torch's by up to three seconds.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# Flags of x86 and of ARM, the widest instructions first, and what these are called.
WIDEST = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512", "avx512f": "AVX-512", "avx2": "AVX2"}
WIDEST |= {"sme": "SME", "sve2": "SVE2", "sve": "SVE", "bf16": "NEON", "asimd": "NEON"}


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


def add_blocks(parser: ArgumentParser) -> None:
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each side [%(default)s]")
    parser.add_argument("--steps", type=int, default=5, help="steps of a block [%(default)s]")


def compare(
    row: str, sides: dict[str, Side], blocks: int = 5, steps: int = 5, *, save: bool = True
) -> dict[str, dict[str, float]]:
    """Runs blocks of 1 + `steps` steps on each side in turn, after two steps of warm-up.

    Prints and returns {side: {"rate": median over blocks of count per second, "low" and "high": its
    range, "gib": peak memory}}. save: keep it as `row` of this processor's file of results.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    gib: dict[str, float] = {}
    for block in range(blocks + 1):
        for name, side in sides.items():
            side.step()
            out = [side.step() for _ in range(steps if block else 1)]
            if block:
                rates[name].append(sum(o["count"] for o in out) / sum(o["s"] for o in out))
            gib[name] = max(o["gib"] for o in out)
    for side in sides.values():
        side.close()
    found = {
        name: {
            "rate": statistics.median(some),
            "low": min(some),
            "high": max(some),
            "gib": gib[name],
        }
        for name, some in rates.items()
    }
    ours, *others = found
    for name, one in found.items():
        print(
            f"{row:<34} {name:<14} {one['rate']:>8.1f} [{one['low']:.1f}, {one['high']:.1f}] /s"
            f" {one['gib']:>6.2f} GiB",
            flush=True,
        )
    for name in others:
        ratio, memory = (found[ours][key] / found[name][key] for key in ("rate", "gib"))
        print(f"{row:<34} {ours} / {name}: {ratio:.2f} speed, {memory:.2f} memory", flush=True)
    if save:
        keep(row, found)
    return found


def cpu() -> dict[str, str]:
    """What lscpu says of the processor, by its names; {} where there is none."""
    try:
        env = os.environ | {"LC_ALL": "C"}
        text = subprocess.run(["lscpu"], env=env, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(re.findall(r"^ *([^:\n]+?): +(.*)$", text, re.M))


def widest(found: dict[str, str]) -> str:
    """A key of WIDEST; the architecture if there is none."""
    flags = found.get("Flags", "").split()
    return next((one for one in WIDEST if one in flags), platform.machine())


def processor() -> str:
    """The processor's vendor, family and the widest matrix instructions it has."""
    found = cpu()
    name = found.get("Model name") or platform.processor() or platform.machine()
    kind = "/".join(found[key] for key in ("CPU family", "Model") if key in found)
    about = " ".join(filter(None, [found.get("Vendor ID"), kind]))
    return f"{name} ({about or platform.system()}), {widest(found)}"


def results_file() -> Path:
    """The file of this kind of processor in benchmarks/results."""
    kind = processor().rpartition(", ")[2]
    return Path(__file__).parent / "results" / f"cpu-{kind}.json"


def keep(row: str, found: dict[str, dict[str, float]]) -> None:
    """Adds a row to the file of this kind of processor in benchmarks/results."""
    file = results_file()
    rows = json.loads(file.read_text()) if file.is_file() else {"rows": {}}
    names = ("jax", "jaxlib", "torch", "transformers", "peft", "trl")
    rows |= {"processor": processor(), "cores": os.cpu_count()}
    versions = {name: version(name) for name in names if find_spec(name)}
    rounded = {s: {k: round(v, 2) for k, v in one.items()} for s, one in found.items()}
    rows["rows"][row] = {"date": time.strftime("%Y-%m-%d"), "versions": versions} | rounded
    file.write_text(json.dumps(rows, indent=1) + "\n")
