# SPDX-License-Identifier: Apache-2.0
"""What signals do to a run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from jaxllm.watch import Watch


@contextmanager
def stop_signal(watch: Watch) -> Iterator[None]:
    """SIGTERM, SIGINT or SIGHUP at any process ends the loop of all of them after a step.

    The second signal ends the process at once, without another checkpoint; see `spare_the_save`.
    """
    names = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        names.append(signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        names = []

    def handle(*_: Any) -> None:
        watch.request_stop()
        for name in names:
            signal.signal(name, signal.SIG_DFL)
        _write(b"stopping after this step; a second signal ends the run at once")

    before = {name: signal.signal(name, handle) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def spare_the_save(watch: Watch) -> None:
    """Once a signal has stopped the run, the next one does not end the process: from here on its
    checkpoint is being saved. The one after it does."""
    if not watch.stop.is_set() or threading.current_thread() is not threading.main_thread():
        return
    stopping = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    names = [name for name in stopping if signal.getsignal(name) == signal.SIG_DFL]

    def handle(*_: Any) -> None:
        for name in names:
            signal.signal(name, signal.SIG_DFL)
        _write(b"saving a checkpoint; the next signal ends the run at once, without it")

    for name in names:
        signal.signal(name, handle)


def _write(line: bytes) -> None:
    """Writes a line to stderr from a signal handler, where print() is not safe: the interrupted
    code may hold the stream's lock."""
    with suppress(OSError):  # the terminal is closed
        os.write(2, b"\n" + line + b"\n")
