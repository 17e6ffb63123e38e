# SPDX-License-Identifier: Apache-2.0
"""Rewrites a run's page while it trains."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxllm.paths import first_line, write_text
from jaxllm.report.page import FILE, page
from jaxllm.report.reading import read_run

FIRST, EVERY = 1.0, 30.0  # seconds until the first page, and between two
SHARE = 0.01  # of the time that writing may take; a page of a long run is written less often,
MOST = 600.0  # but at least once in so many seconds


@contextmanager
def reported(folder: Path, lines: Path, *, enabled: bool = True) -> Iterator[None]:
    """Writes the page of the run in `folder` in the background, and at the end.

    lines: the local folder of the files that are appended to. A page that cannot be written is one
    line on stderr, until one is written; training continues.
    """
    if not enabled:
        yield
        return
    over, failed = threading.Event(), False

    def write(running: bool) -> float:
        """Seconds until the next page."""
        nonlocal failed
        began = time.perf_counter()
        try:
            run = read_run(folder, lines=lines if running else None, running=running)
            write_text(folder / FILE, page([run], every=_pause(began)))
            failed = False
        except Exception as error:  # no error of a report may stop the run
            if not failed:
                print(f"jaxllm: {FILE} is not written: {first_line(error)}", file=sys.stderr)
            failed = True
        return _pause(began)

    def keep_writing() -> None:
        pause = FIRST
        while not over.wait(pause):
            pause = write(True)

    thread = threading.Thread(target=keep_writing, name="report", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        write(False)


def _pause(began: float) -> float:
    """Seconds until the next page, after one that `began` at this time."""
    return min(max(EVERY, (time.perf_counter() - began) / SHARE), MOST)
