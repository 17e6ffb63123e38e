# SPDX-License-Identifier: Apache-2.0
"""Where numbers go: metrics.jsonl always, a progress bar, and trackers when asked for."""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxllm.errors import UserError
from jaxllm.monitor.flops import Flops

COMPILING = ("jaxpr_to_mlir_module_duration", "backend_compile_duration")  # events of jax
SECONDS = 10.0  # between lines where there is no terminal for a bar


# ---- files and trackers


def _plain(value: Any) -> Any:
    """A value as JSON has it; what is not finite becomes "NaN", "Infinity" or "-Infinity"."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's and jax's scalars and arrays
        return _plain(value.tolist())
    return str(value)


class Tracker(Protocol):
    """A place besides metrics.jsonl, made with (run folder, config, step to go on from)."""

    def write(self, kind: str, step: int, numbers: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class _Wandb:
    """Weights & Biases: a resumed run goes on as the same one. Offline unless logged in."""

    def __init__(self, run: Path, config: dict[str, Any], step: int):
        import wandb  # pyright: ignore[reportMissingImports]

        mode = os.environ.get("WANDB_MODE")
        if mode is None:
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        name = run / "wandb-id.txt"
        if not name.is_file():
            name.write_text(secrets.token_hex(4))
        self.session = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jaxllm"),
            name=run.resolve().name,
            dir=run,
            config=config,
            mode=mode,
            id=name.read_text(),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
        # A run that was killed writes its last steps again: they do not only rise.
        self.session.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        self.session.log({"step": step} | {f"{kind}/{k}": v for k, v in numbers.items()})

    def close(self) -> None:
        self.session.finish()


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path, config: dict[str, Any], step: int):
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(f"{kind}/{key}", value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


TRACKERS: dict[str, Callable[[Path, dict[str, Any], int], Tracker]] = {
    "wandb": _Wandb,
    "tensorboard": _TensorBoard,
}


class Metrics:
    """Writes a run's numbers, from process 0 alone.

    Lines after `resume_step` (of a run that was killed after its last checkpoint) are dropped
    first, so that no step is there twice; those of an evaluation of that step too, when it is
    `eval_pending`. A tracker that cannot start or fails later is named once
    and left out; training goes on.
    """

    def __init__(
        self,
        run: Path | str,
        report_to: tuple[str, ...] = (),
        config: dict[str, Any] | None = None,
        resume_step: int = 0,
        eval_pending: bool = False,
    ):
        unknown = [name for name in report_to if name not in TRACKERS]
        if unknown:
            raise UserError(f"log.report_to {unknown[0]!r}: known are {', '.join(TRACKERS)}")
        self.run = Path(run)
        self.on = jax.process_index() == 0
        self.trackers: dict[str, Tracker] = {}
        if not self.on:
            return
        self.run.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            _drop_after(self.run / name, resume_step, eval_pending)
        for name in report_to:
            self._guarded(name, lambda name=name: self._start(name, config or {}, resume_step))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line of metrics.jsonl, {"kind", "step", …}, and the numbers in it to the trackers.

        A number that is not finite is written as a string, "NaN" say; one not known as null.
        """
        if not self.on:
            return
        values = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in values.items()}
        self._append("metrics.jsonl", {"kind": kind, "step": step} | values)
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float)}
        group = f"{kind}/{values['name']}" if "name" in values else kind
        for name, tracker in list(self.trackers.items()):
            self._guarded(name, lambda tracker=tracker: tracker.write(group, step, numbers))

    def sample(self, step: int, **values: Any) -> None:
        """One line of samples.jsonl."""
        if self.on:
            self._append("samples.jsonl", {"step": step} | values)

    def manifest(self, data: dict[str, Any]) -> None:
        """data.json: what was read and what became of it."""
        if self.on:
            (self.run / "data.json").write_text(json.dumps(_plain(data), indent=2) + "\n")

    def close(self) -> None:
        """Finishes the trackers."""
        for name, tracker in list(self.trackers.items()):
            self._guarded(name, tracker.close)
        self.trackers.clear()

    def _start(self, name: str, config: dict[str, Any], step: int) -> None:
        self.trackers[name] = TRACKERS[name](self.run, _plain(config), step)

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever it is, it must not stop the run
            self.trackers.pop(name, None)
            reason = str(error).split("\n")[0]
            if isinstance(error, ImportError):
                reason += f"; pip install 'jaxllm[{name}]'"
            print(f"jaxllm: {name} is left out: {reason}", file=sys.stderr)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.run / name).open("a", encoding="utf-8", errors="replace") as file:
            file.write(json.dumps(_plain(line), ensure_ascii=False, allow_nan=False) + "\n")


def _drop_after(file: Path, step: int, eval_pending: bool) -> None:
    """Keeps the lines up to `step` (none when it is 0), without the torn one of a killed run, and
    without those of the evaluation at `step` when it is pending."""

    def stays(line: dict[str, Any]) -> bool:
        evaluated = line["kind"] == "eval" if "kind" in line else "reward" not in line  # a sample
        return line["step"] < step + (not (evaluated and eval_pending))

    if not file.is_file():
        return
    kept = []
    for line in file.read_bytes().split(b"\n") if step else ():
        try:
            if stays(json.loads(line)):
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            continue
    new = file.with_suffix(".new")
    new.write_bytes(b"".join(kept))
    new.replace(file)


# ---- what a line holds


def total(steps: list[tuple[int, Any]], sums: dict[str, list[float]]) -> dict[str, list[float]]:
    """Adds the metrics of `steps` (read from the device here) to `sums`, in float64.

    Raises ValueError at the first step whose loss or gradient is not finite.
    """
    sums = {name: list(pair) for name, pair in sums.items()}
    for step, metrics in zip(
        [s for s, _ in steps], jax.device_get([m for _, m in steps]), strict=True
    ):
        for name, (value, weight) in metrics.items():
            if name in ("loss", "grad_norm") and not np.isfinite(value):
                raise UserError(
                    f"step {step}: {name} is {value}; the last good checkpoint is kept. A lower "
                    "optim.learning_rate, a longer optim.warmup or optim.clip may help"
                )
            pair = sums.setdefault(name, [0.0, 0.0])
            pair[0] += float(value)
            pair[1] += float(weight)
    return sums


def averages(sums: dict[str, list[float]], seconds: float) -> dict[str, float]:
    """One line of metrics.jsonl from sums over updates, without what there was none of; loss is
    token-weighted."""
    steps = sums["grad_norm"][1]
    values = {k: a / w for k, (a, w) in sums.items() if w}
    values |= {k: sums[k][0] for k in ("tokens", "loss") if k not in values}
    return values | {
        "tokens_per_second": values["tokens"] / max(seconds, 1e-9),
        "step_seconds": seconds / steps,
    }


class Meter:
    """Sums of the metrics since the last line, and the seconds of training since then.

    sums, seconds: those of a checkpoint, to go on with. peak: FLOP/s of all devices, None where
    that is not known; `flops` is set when the rows' length is. Within the context, what jax lowers
    and compiles does not count as training, nor does what happens in `paused`.
    """

    def __init__(
        self, sums: dict[str, list[float]], seconds: float, peak: float | None = None
    ) -> None:
        self.sums, self.peak = sums, peak
        self.flops: Flops | None = None
        self._window: list[tuple[int, Any]] = []  # steps whose metrics are still on the device
        self._clock = time.perf_counter() - seconds
        self._paused: float | None = None

    def __enter__(self) -> Meter:
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        return self

    def __exit__(self, *_: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._compiled)

    def _compiled(self, event: str, duration_secs: float, **_: Any) -> None:
        here = threading.get_ident() == self._thread
        if here and event.endswith(COMPILING) and self._paused is None:
            self._clock += duration_secs

    def add(self, step: int, metrics: Any) -> None:
        """The metrics of an update, still on the device."""
        self._window.append((step, metrics))

    def read(self) -> None:
        """Waits for the steps so far. Raises when one is not finite, so that none such is saved."""
        self.sums, self._window = total(self._window, self.sums), []

    def line(self) -> dict[str, Any]:
        """Reads the steps so far and begins anew: `averages` since the line before, and `mfu`."""
        self.read()
        seconds, sums = self.seconds, self.sums
        self.sums, self._clock = {}, self._clock + seconds
        mfu = None
        if self.peak and self.flops:
            tokens, learned = (sums.get(name, [0.0])[0] for name in ("tokens", "learned"))
            done = self.flops.layers * tokens + self.flops.head * learned
            mfu = done / max(seconds, 1e-9) / self.peak
        return averages(sums, seconds) | {"mfu": mfu}

    @property
    def seconds(self) -> float:
        """Of training since the last line."""
        return (self._paused or time.perf_counter()) - self._clock

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what is not training: evaluations, checkpoints, compiling."""
        self._paused = time.perf_counter()
        try:
            yield
        finally:
            self._clock += time.perf_counter() - self._paused
            self._paused = None


# ---- the terminal


class Progress:
    """A bar on a terminal, lines elsewhere: loss, tokens/s, MFU, memory, time left.

    Use as a context manager. Nothing is shown by processes other than 0, or when not `enabled`.
    """

    def __init__(self, total: int, start: int = 0, enabled: bool = True):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self.total = total
        self.on = enabled and jax.process_index() == 0
        self.first: tuple[int, float] | None = None  # step and time of the first update
        self.said = -SECONDS
        console = Console(stderr=True)
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
        )
        bar = Bar(*columns, console=console)
        self.task = bar.add_task("compiling", total=total, completed=start)
        self.bar = bar if self.on and console.is_terminal else None

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar:
            self.bar.stop()

    def update(
        self,
        step: int,
        *,
        loss: float,
        tokens_per_second: float,
        mfu: float | None = None,
        memory: float | None = None,
    ) -> None:
        """What is known after `step` updates; memory in GiB, mfu as a share."""
        if not self.on:
            return
        parts = [f"loss {loss:.4f}", f"{tokens_per_second:,.0f} tokens/s"]
        parts += [f"MFU {mfu:.0%}"] if mfu is not None else []
        parts += [f"{memory:.1f} GiB"] if memory is not None else []
        parts += self._time_left(step)
        text = "  ".join(parts)
        if self.bar:
            self.bar.update(self.task, completed=step, description=text)
        elif time.monotonic() - self.said >= SECONDS or step == self.total:
            self.said = time.monotonic()
            print(f"step {step}/{self.total}  {text}", file=sys.stderr, flush=True)

    def _time_left(self, step: int) -> list[str]:
        """From the pace since the first update, which compilation does not slow."""
        now = time.monotonic()
        if self.first is None:
            self.first = (step, now)
        done = step - self.first[0]
        if done <= 0 or step >= self.total:
            return []
        seconds = (now - self.first[1]) / done * (self.total - step)
        return [f"{timedelta(seconds=round(seconds))} left"]

    def compiling(self) -> None:
        """A line, where there is no bar, that the step is being compiled: it may take minutes."""
        if not self.bar and jax.process_index() == 0:
            print("compiling the step…", file=sys.stderr, flush=True)

    def compiled(self, seconds: float) -> None:
        """Tells that the step is compiled: the bar's text, or a line, also where the bar is off."""
        text = f"compiled the step in {seconds:.1f} s"
        if self.bar:
            self.bar.update(self.task, description=text)
        elif jax.process_index() == 0:
            print(text, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.bar:
            self.bar.console.print(text, highlight=False, markup=False)
        elif self.on:
            print(text, file=sys.stderr, flush=True)


def track(items: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
    """Yields `items` and shows how many of `total` are done: a bar, or a line now and then.

    The bar goes away at the end. Work of less than SECONDS leaves no line.
    """
    from rich.console import Console
    from rich.progress import track as bar

    console = Console(stderr=True)
    if jax.process_index() != 0:
        yield from items
    elif console.is_terminal:
        yield from bar(items, what, total, console=console, transient=True)
    else:
        said = time.monotonic()
        of = "" if total is None else f" of {total:,}"
        for done, item in enumerate(items):
            if time.monotonic() - said >= SECONDS:
                said = time.monotonic()
                print(f"{what}: {done:,}{of}", file=sys.stderr, flush=True)
            yield item
