# SPDX-License-Identifier: Apache-2.0
"""Progress in the terminal: a bar, or a line every few seconds where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

from jaxllm import dist

INTERVAL = 10.0  # seconds between lines where there is no terminal


class Progress:
    """Shows loss, tokens/s, MFU, memory and time left: a bar on a terminal, lines elsewhere.

    An online run shows its latest mean reward instead of the loss.

    Use it as a context manager. It is silent when not `enabled`, and in all but the main process.
    """

    def __init__(self, total: int, start: int = 0, enabled: bool = True):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self.total = total
        self.enabled = enabled and dist.is_main()
        self.first: tuple[int, float] | None = None  # (step, time) of the first update
        self.reward: float | None = None
        self.last_line = -INTERVAL
        console = Console(stderr=True)
        columns = (MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"))
        bar = Bar(TextColumn("step"), *columns, console=console)
        self.task = bar.add_task("compiling", total=total, completed=start)
        self.bar = bar if self.enabled and console.is_terminal else None

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar:
            self.bar.stop()

    def update(
        self, step: int, *, loss, tokens_per_second, mfu=None, memory=None, reward=None
    ) -> None:
        """Shows the numbers after `step` updates. memory: GiB or None; mfu: a fraction or None;
        reward: the mean of the rollouts since the last call, None if there is none."""
        if not self.enabled:
            return
        self.reward = self.reward if reward is None else reward
        # The loss of online RL says little: where log-ratios and KL begin at 0, it is 0.
        first = f"loss {loss:.4f}" if self.reward is None else f"reward {self.reward:.4f}"
        parts = [first, f"{tokens_per_second:,.0f} tokens/s"]
        parts += [f"MFU {mfu:.0%}"] if mfu is not None else []
        parts += [f"{memory:.1f} GiB"] if memory is not None else []
        now = time.monotonic()
        if self.first is None:
            self.first = (step, now)
        done = step - self.first[0]
        if done > 0 and step < self.total:
            # Estimated from the pace since the first update, so without compilation.
            seconds = (now - self.first[1]) / done * (self.total - step)
            parts += [f"{timedelta(seconds=round(seconds))} left"]
        text = "  ".join(parts)
        if self.bar:
            self.bar.update(self.task, completed=step, description=text)
        elif now - self.last_line >= INTERVAL or step == self.total:
            self.last_line = now
            print(f"step {step}/{self.total}  {text}", file=sys.stderr, flush=True)

    def advance(self, step: int) -> None:
        """Moves the bar to `step`. The metrics beside it are those of the last log line."""
        if self.bar:
            self.bar.update(self.task, completed=step)

    def compiling(self) -> None:
        """Announces compilation, which may take minutes; the bar already says so at start."""
        if not self.bar and dist.is_main():
            print("compiling the step…", file=sys.stderr, flush=True)

    def compiled(self, seconds: float) -> None:
        """Says that the step is compiled, also when progress is not enabled."""
        text = f"compiled the step in {seconds:.1f} s"
        if self.bar:
            self.bar.update(self.task, description=text)
        elif dist.is_main():
            print(text, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self.bar:
            self.bar.console.print(text, highlight=False, markup=False)
        elif self.enabled:
            print(text, file=sys.stderr, flush=True)


def track(items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
    """Yields `items` and shows how many of `total` are done.

    A bar on a terminal, removed at the end; elsewhere a line every INTERVAL seconds.
    """
    from rich.console import Console
    from rich.progress import track as bar

    console = Console(stderr=True)
    if not dist.is_main():
        yield from items
    elif console.is_terminal:
        yield from bar(items, label, total, console=console, transient=True)
    else:
        last_line = time.monotonic()
        of = "" if total is None else f" of {total:,}"
        for done, item in enumerate(items):
            if time.monotonic() - last_line >= INTERVAL:
                last_line = time.monotonic()
                print(f"{label}: {done:,}{of}", file=sys.stderr, flush=True)
            yield item
