# SPDX-License-Identifier: Apache-2.0
"""Reads thousands of odd inputs of each kind, and prints how each kind was answered.

    make faults

Each kind runs in a process of its own, which may use 2 GiB more than it had at the start, and must
answer each input within 20 seconds. Exits with status 1 if there is a traceback, a hang or a death.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

SECONDS, BYTES = 20, 2 << 30
DONE, LINE, FAULT = "successes", "one-line errors", "tracebacks"


def outcome(read: Any, value: Any) -> tuple[str, str]:
    """(DONE, LINE or FAULT, the line or the kind of the traceback)."""
    from jaxllm.errors import mistake

    try:
        read(value)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        line = None if isinstance(error, MemoryError) else mistake(error)
        if line:
            assert "\n" not in line, line
            return LINE, line
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "jaxllm" in f.filename]
        where = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno} {where.name}"
        return FAULT, f"{type(error).__name__} in {place}: {str(error)[:150]}"
    return DONE, ""


def run(kind: Any, examples: int, report: Any) -> None:
    """Reads `examples` inputs of a kind; calls `report(outcome, detail, value, seconds)`."""
    from hypothesis import HealthCheck, Phase, given, settings

    strategy, read = kind
    options = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )

    @options
    @given(strategy)
    def one(value: Any) -> None:
        began = time.monotonic()
        report(*outcome(read, value), value, time.monotonic() - began)

    one()


def child(name: str, examples: int) -> None:
    """Runs one kind, and prints a line of JSON for each outcome."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is read may print

    def report(which: str, detail: str, value: Any, seconds: float) -> None:
        faulthandler.cancel_dump_traceback_later()
        shown = repr(value)[:300] if which == FAULT or seconds > 3 else ""
        print(json.dumps([which, detail, shown, round(seconds, 2)]), file=out, flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)

    with tempfile.TemporaryDirectory() as folder:
        from inputs import kinds

        kind = kinds(Path(folder, "files"))[name]
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        run(kind, examples, report)
    faulthandler.cancel_dump_traceback_later()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", action="append", help="only this kind; repeatable")
    parser.add_argument("--examples", type=int, default=600, help="inputs of each kind")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.examples)
        return 0
    from inputs import kinds

    with tempfile.TemporaryDirectory() as folder:
        names = options.kind or list(kinds(Path(folder, "files")))
    rows, faults = [], Counter[str]()
    for name in names:
        command = [sys.executable, __file__, "--child", name, "--examples", str(options.examples)]
        with tempfile.TemporaryFile("w+") as log:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True)
            log.seek(0)
            tail = log.read()[-3000:]
        found = [json.loads(line) for line in done.stdout.splitlines()]
        counts = Counter(one[0] for one in found)
        if done.returncode:
            faults[f"{name}: died with status {done.returncode}: {tail}"] += 1
        for which, detail, value, _ in found:
            if which == FAULT:
                faults[f"{name}: {detail}\n        {value}"] += 1
        slow = [f"{name}, {one[3]} s: {one[1]} {one[2]}" for one in found if one[3] > 5]
        slowest = max((one[3] for one in found), default=0.0)
        print(*slow, sep="\n", end="\n" * bool(slow))
        rows.append((name, len(found), counts[LINE], counts[DONE], counts[FAULT], slowest))
    print(f"{'kind of input':<30}{'tried':>8}{LINE:>18}{DONE:>12}{FAULT:>12}{'slowest':>10}")
    for row in rows:
        print("{:<30}{:>8,}{:>18,}{:>12,}{:>12,}{:>9.1f}s".format(*row))
    totals = (sum(row[i] for row in rows) for i in range(1, 5))
    print("{:<30}{:>8,}{:>18,}{:>12,}{:>12,}".format("all", *totals))
    for fault, count in faults.most_common():
        print(f"\n{count} x {fault}")
    few = not options.kind and sum(row[1] for row in rows) < 16 * options.examples
    if few:
        print("\nfewer inputs were tried than asked for")
    return 1 if faults or few else 0


if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
