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
SHARE = 0.01  # of the time that writing may take; a page of a long run is written less often


@contextmanager
def reported(folder: Path, lines: Path, *, enabled: bool = True) -> Iterator[None]:
    """Writes the page of the run in `folder` in the background, and at the end.

    lines: the local folder of the files that are appended to. A page that cannot be written is one
    line on stderr; training continues.
    """
    if not enabled:
        yield
        return
    over = threading.Event()

    def write(running: bool) -> float:
        """Seconds that it took."""
        began = time.perf_counter()
        run = read_run(folder, lines=lines if running else None, running=running)
        write_text(folder / FILE, page([run]))
        return time.perf_counter() - began

    def keep_writing() -> None:
        pause = FIRST
        while not over.wait(pause):
            try:
                pause = max(EVERY, write(True) / SHARE)
            except Exception as error:  # no error of a report may stop the run
                return _say(error)

    thread = threading.Thread(target=keep_writing, name="report", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        try:
            write(False)
        except Exception as error:
            _say(error)


def _say(error: Exception) -> None:
    print(f"jaxllm: {FILE} is not written: {first_line(error)}", file=sys.stderr)
