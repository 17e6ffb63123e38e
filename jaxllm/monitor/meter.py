# SPDX-License-Identifier: Apache-2.0
"""Averages of a run's metrics between two log lines, and the training time they took."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from jaxllm import dist
from jaxllm.errors import UserError
from jaxllm.monitor.flops import Flops

# jax.monitoring events whose duration is not training time.
COMPILE_EVENTS = ("jaxpr_to_mlir_module_duration", "backend_compile_duration")
Sums = dict[str, list[float]]  # {metric: [Σ, weight]}
LOWER_RATE = "Try a lower optim.learning_rate, a longer optim.warmup or a lower optim.clip"


def means(sums: Mapping[str, Any]) -> dict[str, float]:
    """{metric: Σ / weight} of {metric: (Σ, weight)}.

    A metric of weight 0 is left out, because nothing was counted; the loss is then its sum, 0.
    Counts (tokens, learned) have no weight either: read them from `sums`.
    """
    values = {name: float(value / weight) for name, (value, weight) in sums.items() if weight}
    return {"loss": float(sums["loss"][0])} | values


def add_steps(sums: Sums, steps: list[tuple[int, Any]]) -> Sums:
    """`sums` plus the metrics of `steps`, which are fetched from the device; float64.

    Raises UserError that names the first step whose loss or gradient norm is not finite.
    """
    sums = {name: list(pair) for name, pair in sums.items()}
    fetched = dist.gather([metrics for _, metrics in steps])
    for (step, _), metrics in zip(steps, fetched, strict=True):
        for name, (value, weight) in metrics.items():
            if name in ("loss", "grad_norm") and not np.isfinite(value):
                raise UserError(
                    f"step {step}: {name} is {value}; the last good checkpoint is kept. "
                    f"{LOWER_RATE}"
                )
            pair = sums.setdefault(name, [0.0, 0.0])
            pair[0] += float(value)
            pair[1] += float(weight)
    return sums


class Meter:
    """Sums of the metrics since the last log line, and the seconds of training since then.

    sums, seconds: restored from a checkpoint; `sums` also has the tokens of all earlier lines.
    peak: FLOP/s of all devices together, or None if unknown. `flops` must be set before the first
    log line for it to report MFU. Inside the context, neither compilation nor a `paused` block
    counts as training time.
    """

    def __init__(self, sums: Sums, seconds: float, peak: float | None = None) -> None:
        self.sums, self.peak = sums, peak
        self.flops: Flops | None = None
        # What `plan.planned_for` says of the compiled step.
        self.planned: tuple[float, float | None] | None = None
        self._done, self._trained = 0.0, 0.0  # FLOPs and seconds of all log lines
        self._pending: list[tuple[int, Any]] = []  # steps whose metrics are still on the device
        self._start = time.perf_counter() - seconds
        self._paused_at: float | None = None

    def __enter__(self) -> Meter:
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        return self

    def __exit__(self, *_: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        ours = threading.get_ident() == self._thread
        if ours and event.endswith(COMPILE_EVENTS) and self._paused_at is None:
            self._start += duration_secs

    def add(self, step: int, metrics: Any) -> None:
        """Adds the metrics of an update, and waits for the update before it: a signal would
        otherwise take effect only after all queued updates."""
        self._pending.append((step, metrics))
        jax.block_until_ready(self._pending[-2:-1])

    def read(self) -> None:
        """Waits for the updates so far. Raises UserError if a loss or gradient is not finite, so
        call it before saving a checkpoint."""
        self.sums, self._pending = add_steps(self.sums, self._pending), []

    def line(self) -> dict[str, Any]:
        """The metrics of a log line: means since the previous line, speed and MFU. Resets them."""
        self.read()
        elapsed, sums = self.seconds, self.sums
        self.sums = {"tokens_seen": [self.tokens_seen, 0.0]}  # weight 0: not a mean
        self._start += elapsed
        seconds = max(elapsed, 1e-9)
        tokens, learned = (sums.get(name, [0.0])[0] for name in ("tokens", "learned"))
        mfu = None
        if self.peak and self.flops:
            done = self.flops.layers * tokens + self.flops.head * learned
            mfu = done / seconds / self.peak
            self._done, self._trained = self._done + done, self._trained + seconds
        return means(sums) | {
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds / sums["grad_norm"][1],
            "mfu": mfu,
        }

    @property
    def tokens_seen(self) -> float:
        """Tokens of all updates that were read, since step 0."""
        return sum(self.sums.get(name, [0.0])[0] for name in ("tokens_seen", "tokens"))

    @property
    def mfu(self) -> float | None:
        """MFU of all steps that were logged; None if it is unknown."""
        return self._done / self._trained / self.peak if self._trained and self.peak else None

    @property
    def seconds(self) -> float:
        """Seconds of training since the last log line."""
        return (self._paused_at or time.perf_counter()) - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock, for evaluation, checkpoints and compilation."""
        self._paused_at = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - self._paused_at
            self._paused_at = None
