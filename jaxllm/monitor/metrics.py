# SPDX-License-Identifier: Apache-2.0
"""Where numbers go: metrics.jsonl always, a progress bar, and trackers when asked for."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def _finite(value: Any) -> Any:
    """JSON has no NaN: it becomes null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _wandb(run: Path, config: dict[str, Any]) -> Callable[[str, int, dict[str, float]], None]:
    import wandb  # type: ignore[import-not-found]

    logged_in = os.environ.get("WANDB_API_KEY") or wandb.api.api_key
    mode = os.environ.get("WANDB_MODE") or ("online" if logged_in else "offline")
    session = wandb.init(project="jaxllm", name=run.name, dir=str(run), config=config, mode=mode)
    return lambda kind, step, values: session.log(
        {f"{kind}/{k}": v for k, v in values.items()}, step=step
    )


def _tensorboard(run: Path, config: dict[str, Any]) -> Callable[[str, int, dict[str, float]], None]:
    from tensorboardX import SummaryWriter  # type: ignore[import-not-found]

    writer = SummaryWriter(str(run / "tensorboard"))

    def write(kind: str, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(f"{kind}/{key}", value, step)
        writer.flush()

    return write


TRACKERS = {"wandb": _wandb, "tensorboard": _tensorboard}


class Metrics:
    """Writes a run's numbers from process 0 alone.

    A tracker that cannot start or fails warns once and is left out; training goes on. Lines after
    `resume_step` (of a run that was killed after its last checkpoint) are dropped first.
    """

    def __init__(
        self,
        run: Path | str,
        report_to: tuple[str, ...] = (),
        config: dict[str, Any] | None = None,
        resume_step: int = 0,
    ):
        self.run = Path(run)
        self.on = jax.process_index() == 0
        self.trackers: dict[str, Callable[[str, int, dict[str, float]], None]] = {}
        if not self.on:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            self._drop_after(self.run / name, resume_step)
        for name in report_to:
            self._guarded(
                name,
                lambda name=name: self.trackers.update(
                    {name: TRACKERS[name](self.run, config or {})}
                ),
            )

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a tracker never stops a run
            self.trackers.pop(name, None)
            reason = str(error).split("\n")[0]
            print(f"jaxllm: {name} is left out: {type(error).__name__}: {reason}", file=sys.stderr)

    @staticmethod
    def _drop_after(file: Path, step: int) -> None:
        if not file.is_file():
            return
        kept = []
        for line in file.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):  # the torn last line of a killed run
                continue
        file.write_text("".join(kept))

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.run / name).open("a") as file:
            file.write(json.dumps({k: _finite(v) for k, v in line.items()}) + "\n")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line of metrics.jsonl: {"kind", "step", …}; None and NaN become null."""
        if not self.on:
            return
        self._append("metrics.jsonl", {"kind": kind, "step": step} | values)
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float)}
        for name, tracker in list(self.trackers.items()):
            self._guarded(name, lambda tracker=tracker: tracker(kind, step, numbers))

    def sample(self, step: int, **values: Any) -> None:
        """One line of samples.jsonl."""
        if self.on:
            self._append("samples.jsonl", {"step": step} | values)

    def manifest(self, data: dict[str, Any]) -> None:
        """data.json: what was read and what became of it."""
        if self.on:
            (self.run / "data.json").write_text(json.dumps(data, indent=2) + "\n")


class Progress:
    """A bar on a terminal, lines elsewhere: loss, tokens/s, MFU, memory, time left."""

    def __init__(self, total: int, start: int = 0, enabled: bool = True):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.total = total
        self.on = enabled and jax.process_index() == 0
        self.console = Console(stderr=True)
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        live = self.on and self.console.is_terminal
        self.bar = Bar(*columns, console=self.console) if live else None
        self.task = (
            self.bar.add_task("", total=total, completed=start, text="compiling")
            if self.bar
            else None
        )
        self.said = 0.0

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar:
            self.bar.stop()

    def update(
        self, step: int, *, loss: float, tokens_per_second: float, mfu: float | None, memory: float
    ) -> None:
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        text += f"  MFU {mfu:.0%}" if mfu is not None else ""
        text += f"  {memory:.1f} GiB"
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=step, text=text)
        elif self.on and (time.monotonic() - self.said > 10 or step == self.total):
            self.said = time.monotonic()
            print(f"step {step}/{self.total}  {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.bar:
            self.bar.console.print(text, highlight=False)
        elif self.on:
            print(text, file=sys.stderr, flush=True)
