# SPDX-License-Identifier: Apache-2.0
"""The sections of `jaxllm doctor`, each in a process, within a limit of time."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from typing import IO, Any

from jaxllm.doctor.findings import KINDS, Doing, Fact, Finding, Mistake, Next, Problem
from jaxllm.errors import BUG, DONE, UserError

# name -> the module of its function, which yields findings; only `run` has an argument
SECTIONS = {
    "machine": "machine",
    "versions": "machine",
    "disks": "machine",
    "processes": "machine",
    "devices": "devices",
    "run": "run",
}
WIDTH = 22  # of the names of facts


class Section:
    """A section that runs in a process of its own.

    limit: seconds within which it must report something, unless it says that it needs more.
    """

    def __init__(self, name: str, run: str | None, limit: float):
        self.name, self.limit, self.doing = name, limit, Doing("", limit)
        self.said: IO[bytes] = tempfile.TemporaryFile()
        code = "import sys; from jaxllm.doctor.sections import report; report(*sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, name, *([run] if run else [])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.said,
            start_new_session=True,  # what it starts ends with it
        )

    def findings(self) -> Iterator[Finding]:
        """What it reports, until it ends; a hang and a crash are problems."""
        assert self.process.stdout is not None
        pipe, text = self.process.stdout.fileno(), b""
        until = time.monotonic() + self.doing.seconds
        while select.select([pipe], [], [], max(until - time.monotonic(), 0))[0]:
            if not (part := os.read(pipe, 1 << 16)):
                yield from self._end()
                return
            *lines, text = (text + part).split(b"\n")
            for line in lines:
                kind, values = json.loads(line)
                finding = KINDS[kind](**values)
                if isinstance(finding, Doing):
                    self.doing = Doing(finding.what, max(finding.seconds, self.limit))
                else:
                    yield finding
            until = time.monotonic() + self.doing.seconds
        what = self.doing.what or f"the section {self.name}"
        yield Problem(
            "something-does-not-answer",
            f"{what} did not end within {self.doing.seconds:.0f} s",
            "end other processes that use the devices, check network file systems and, on a pod, "
            "start all its workers; --limit waits longer",
        )

    def _end(self) -> Iterator[Finding]:
        with suppress(subprocess.TimeoutExpired):
            if status := self.process.wait(5):
                self.said.seek(0)
                lines = self.said.read().decode(errors="replace").strip().splitlines()
                what = self.doing.what or f"the section {self.name}"
                yield Problem(
                    "a-part-of-doctor-fails",
                    f"{what} ended with status {status}: {lines[-1] if lines else 'no message'}",
                    "the message is of Python or of a library; if it is no fault of the machine, "
                    "please report it",
                )

    def close(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # one that waits for a disk cannot be killed
            self.process.wait(1)
        self.said.close()


def report(name: str, run: str | None = None) -> None:
    """Prints the findings of a section as lines of JSON: the process of a `Section`."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print what they like
    section: Any = getattr(import_module(f"jaxllm.doctor.{SECTIONS[name]}"), name)
    try:
        for finding in section(run) if name == "run" else section():
            print(json.dumps([type(finding).__name__, asdict(finding)]), file=out)
    except UserError as error:
        print(json.dumps(["Mistake", {"message": str(error)}]), file=out)
    out.flush()
    os._exit(0)  # a backend may not end


def examine(run: str | None = None, limit: float = 60.0) -> int:
    """Examines this machine and, if given, a run; prints what it finds. Returns the exit status: 0
    if all is well, 1 if there is a problem.

    limit: seconds that a section may be silent. Raises UserError if `run` is not a run's folder.
    """
    names = [name for name in SECTIONS if run or name != "run"]
    sections = [Section(name, run if name == "run" else None, limit) for name in names]
    problems: list[Problem] = []
    following: list[Next] = []
    try:
        for section in sections:
            print(section.name if section.name != "run" else f"run {run}", flush=True)
            for finding in section.findings():
                match finding:
                    case Fact(name, value):
                        print(f"  {name:<{WIDTH}}{value}", flush=True)
                    case Problem():
                        problems.append(finding)
                        print(f"  {'problem':<{WIDTH}}{finding.seen}", flush=True)
                    case Next():
                        following.append(finding)
                    case Mistake(message):
                        raise UserError(message)
    finally:
        for section in sections:
            section.close()
    print(f"\n{len(problems)} problem{'s' * (len(problems) != 1)}" if problems else "\nall is well")
    for number, problem in enumerate(problems, 1):
        print(f"  {number}. {problem}")
    for one in following:
        print(f"\n{one.what}:\n  {one.command}")
    return BUG if problems else DONE
