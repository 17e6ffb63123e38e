# SPDX-License-Identifier: Apache-2.0
"""log.profile: a trace of some steps by jax.profiler, and a table of their time by named scope."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import jax
from jax.extend.backend import get_backend

from jaxllm import dist, hlo
from jaxllm.hlo_memory import scope

FIRST, STEPS = 10, 6  # the first step that is traced, of those of this start, and their number
ROWS = 20  # of the table; what takes least is summed up
CONTROL = {"while", "conditional", "call"}  # instructions that only run others

Interval = tuple[float, float]  # ns


class Profile:
    """Traces steps 10 to 15 of this start of a run, in the main process.

    Online, it begins and ends with a rollout. Call it before each step, within the context. The
    trace goes to `folder`, and a table on the terminal says where the time went.
    """

    def __init__(self, folder: Path, start: int, stride: int, meter: Any, enabled: bool):
        whole = stride * math.ceil(STEPS / stride)
        self.first = start + 1 + stride * math.ceil((FIRST - 1) / stride)
        self.last = self.first + whole - 1
        self.folder, self.meter, self.step = folder, meter, start
        self.waits, self.traces = enabled and dist.is_main(), False

    def __call__(self, step: int, state: Any) -> None:
        """Begins the trace before its first step, and ends it after its last one. step: the one
        that follows; state: what the steps before it compute."""
        self.step = step
        if self.waits and step == self.first:
            with self._paused(state):
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # 20 times as many events, which slow down a step
                jax.profiler.start_trace(str(self.folder), profiler_options=options)
                self.waits, self.traces = False, True
        elif self.traces and step > self.last:
            with self._paused(state):
                self._end(self.last)

    def _paused(self, state: Any) -> AbstractContextManager[None]:
        """Waits for the state, so that a trace has whole steps; its time is not training time."""
        jax.block_until_ready(state)
        return self.meter.paused()

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Ends the trace of a run that ends within it; the checkpoint has waited for its steps."""
        if self.traces and kind is not None:
            with suppress(RuntimeError):  # the error that ends the run is the one to be seen
                jax.profiler.stop_trace()
        elif self.traces:
            self._end(self.step)
        elif self.waits and kind is None:
            dist.say(f"warning: log.profile: no step was traced; the first would be {self.first}")

    def _end(self, last: int) -> None:
        self.traces = False
        jax.profiler.stop_trace()
        file = max(self.folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        traced = f"profile: steps {self.first} to {last} are in {file}"
        dist.say(*table(file, last - self.first + 1), traced)


def table(file: Path, steps: int) -> Iterator[str]:
    """Lines that say how long the operations of each named scope took per step, on a device.

    Operations may run side by side, so their sum may exceed the time of a step.
    """
    found = list(operations(jax.profiler.ProfileData.from_file(str(file))))
    if not found:
        yield "warning: the trace has no operation of a compiled program"
        return
    spent: Counter[str] = Counter()  # ns
    for module, name, path, (begin, end) in found:
        kind = opcode(module, name)
        if kind not in CONTROL:
            named = scope(path or source(module, name))
            named += f", {kind or name}" * (named == "other")
            owner = "" if module == STEP else f"{module.removeprefix('jit_')}: "
            spent[owner + named] += round(end - begin)
    total, devices = spent.total(), jax.local_device_count()
    times = [interval for *_, interval in found]
    wall = max(end for _, end in times) - min(begin for begin, _ in times)
    yield f"{'time by named scope':<50}{'ms a step':>12}{'share':>8}"
    rest = sum(value for _, value in spent.most_common()[ROWS:])
    more = [(f"{len(spent) - ROWS} further scopes", rest)] if rest else []
    for name, value in [*spent.most_common(ROWS), *more]:
        yield f"{name:<50}{value / 1e6 / steps / devices:>12.2f}{value / total:>8.1%}"
    idle = wall - covered(times)
    yield f"{'no operation runs':<50}{idle / 1e6 / steps:>12.2f}{idle / wall:>8.1%} of the time"
    yield f"{'a step':<50}{wall / 1e6 / steps:>12.2f}"


STEP = "jit_step"


def operations(data: Any) -> Iterator[tuple[str, str, str, Interval]]:
    """(module, instruction, its op_name where the trace has it, when it ran) of a trace.

    On a CPU an operation may end in another thread than it began; the end is an event of its own.
    """
    planes = [plane for plane in data.planes if plane.name.startswith("/device:")]
    planes = planes or [plane for plane in data.planes if plane.name == "/host:CPU"]
    events = [
        (line.name, event, dict(event.stats))
        for plane in planes
        for line in plane.lines
        for event in line.events
    ]
    ends = {
        stats.get("_c"): event.start_ns
        for _, event, stats in events
        if event.name.startswith("end: ")
    }
    for line, event, stats in events:
        name = stats.get("hlo_op")
        if name is None and line == "XLA Ops":  # of a TPU, whose events have the text of the HLO
            name = (re.match(r"%?([\w.\-]+)", event.name) or [""])[0].lstrip("%")
        if name:
            end = max(event.end_ns, ends.get(stats.get("_p"), 0))
            module = str(stats.get("hlo_module", STEP))
            yield module, str(name), str(stats.get("tf_op", "")), (event.start_ns, end)


def covered(intervals: Iterable[Interval]) -> float:
    """The length of the union of intervals."""
    total, until = 0.0, -math.inf
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


# ---- what an instruction was compiled from


@cache
def program(module: str) -> hlo.Program | None:
    """The program of this name that this process has compiled or loaded."""
    for executable in get_backend().live_executables():
        for one in executable.hlo_modules():
            if one.name == module:
                return hlo.parse(one.to_string())
    return None


def source(module: str, name: str) -> str:
    """The op_name of an instruction: the path of jax's named scopes."""
    found = program(module)
    return found.source(name) if found else ""


def opcode(module: str, name: str) -> str:
    found = program(module)
    one = found.named.get(name) if found else None
    return one.opcode if one else ""
