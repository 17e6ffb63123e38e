# SPDX-License-Identifier: Apache-2.0
"""Several processes stop, fail and hang as one run.

Every process writes a beat (step, phase, host, …) to jax's coordinator every second. The main
process reads them all and writes its verdict, which every process reads: stop at a common step, or
end. A process whose beat stands still for cluster.timeout is lost; so is the main one, if its
verdict does. Then the others exit with status 75: the same command, started again, resumes.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax

from jaxllm import dist
from jaxllm.config import ClusterSection
from jaxllm.errors import UserError

REQUEUE = 75  # exit status: start the same command again
BEAT, VERDICT = "jaxllm/beat/", "jaxllm/verdict"
HANG_SECONDS, HANG_FACTOR = 60.0, 10.0  # a step is late after both
EVERY = 0.5  # seconds between beats


class Watch:
    """Watches the processes of a run: `with Watch(cfg.cluster, folder) as watch`.

    With one process it does nothing but count the time of each phase.
    """

    def __init__(self, section: ClusterSection, folder: Path):
        self.section, self.folder = section, folder
        self.stop = threading.Event()  # a process was asked to stop
        self.step, self.phase = 0, "start"
        self._requested = False
        self._stop_step: int | None = None
        self._end: dict[str, Any] | None = None  # why this process ends
        self._closed = threading.Event()
        self._since = time.monotonic()
        self._pace: deque[float] = deque(maxlen=50)  # seconds per step, one for each `progress`
        self._done = (0, self._since)

    # ---- stopping at a common step

    def request_stop(self) -> None:
        """Asks all processes to stop; safe in a signal handler."""
        self._requested = True
        self.stop.set()

    def should_stop(self, step: int) -> bool:
        """True from the step on at which all processes stop; ask after each step.

        Processes may be some steps apart when they hear of the request, so they stop at the step
        of the one that is ahead.
        """
        if not self.stop.is_set():
            return False
        if self._stop_step is None:
            self._stop_step = max(dist.everyone(step, "stop"))
        return step >= self._stop_step

    def finish(self, step: int) -> None:
        """To be called after the last step: a process may wait for this one's step."""
        if self._stop_step is None:
            self._stop_step = max(dist.everyone(step, "stop"))
        self.enter("end", step)

    # ---- what this process does

    def enter(self, phase: str, step: int) -> None:
        """This process begins `phase` (compile, step, eval, save, export …) of `step`."""
        self.phase, self.step, self._since = phase, step, time.monotonic()

    def progress(self, step: int) -> None:
        """The devices have finished `step`."""
        now, (before, then) = time.monotonic(), self._done
        if step > before:
            self._pace.append((now - then) / (step - before))
        self._done = step, now

    def late(self) -> float:
        """Seconds by which the current step is late; negative or 0 if it is not."""
        if self.phase != "step" or not self._pace:
            return 0.0
        done, then = self._done
        steps = max(self.step - done, 1)
        limit = max(HANG_SECONDS, HANG_FACTOR * statistics.median(self._pace) * steps)
        return time.monotonic() - max(then, self._since) - limit
