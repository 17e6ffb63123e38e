# SPDX-License-Identifier: Apache-2.0
"""Several processes stop, fail and hang as one run.

Every process writes a beat (step, phase, host, …) to jax's coordinator twice a second. The main
process reads them all and writes its verdict, which every process reads: stop at a common step, or
end. A process whose beat stands still for cluster.timeout is lost; so is the main one, if its
verdict does. Then the others exit with status 75: the same command, started again, resumes.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import itertools
import json
import math
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax

from jaxllm import dist
from jaxllm.config import ClusterSection, TrainConfig
from jaxllm.errors import BUG, INTERRUPTED, MISTAKE, STOPPED, mistake
from jaxllm.paths import as_path, modified, touch, write_text

BEAT, VERDICT = "jaxllm/beat/", "jaxllm/verdict"
HANG_SECONDS, HANG_FACTOR = 60.0, 10.0  # a step is late after both
EVERY = 0.5  # seconds between beats
# The phases of a run, in order. Those that take too long are reported; those in ENDING end the run.
PHASES = ("start", "load", "rollout", "data", "compile", "train", "eval", "save", "export", "end")
STEP, ENDING = ("data", "train"), ("data", "train", "rollout")
STARTS = "starts.jsonl"
# Errors of the devices of this process; others may come from a process that is gone.
OWN_ERRORS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "OUT_OF_RANGE", "UNIMPLEMENTED")


_current: list[Watch] = []


def current() -> Watch:
    """The watch of the run that is going on in this process."""
    return _current[-1]


@contextmanager
def connected(cfg: TrainConfig) -> Iterator[Watch]:
    """Connects the processes of a run and watches them."""
    try:
        dist.start(cfg.cluster)
    except jax.errors.JaxRuntimeError as error:
        _say(f"a process was lost at the start ({_line(error)}); start the same command again")
        raise SystemExit(STOPPED) from error
    with Watch(cfg.cluster, as_path(cfg.output_dir)) as watch:
        _current.append(watch)
        try:
            yield watch
        finally:
            _current.pop()


def watched(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a config that runs `connected`."""

    @wraps(run)
    def with_watch(cfg: TrainConfig, **options: Any) -> Any:
        with connected(cfg):
            return run(cfg, **options)

    return with_watch


class Watch:
    """Watches the processes of a run: `with Watch(cfg.cluster, folder) as watch`.

    With one process it does nothing but count the time of each phase.
    """

    def __init__(self, section: ClusterSection, folder: Path):
        self.section, self.folder = section, folder
        self.stop = threading.Event()  # a process was asked to stop
        self.step, self.phase = 0, "start"
        self.seconds: dict[str, float] = {}  # of each phase
        self.restarts = 0
        self._requested = False
        self._lock = threading.Lock()  # of the next two
        self._next: int | None = None  # the step that this process is in, None before the loop
        self._begun: int | None = None  # the same, once it is known that the run stops
        self._last: int | None = None  # the step after which all processes stop
        self._decided = threading.Event()
        self._end: dict[str, Any] | None = None  # why this process ends
        self._waiting = False  # for whether a process is lost, after a collective failed
        self._closed = threading.Event()
        self._since = time.monotonic()
        self._pace: deque[float] = deque(maxlen=50)  # seconds per step, one for each `progress`
        self._done = (0, self._since)
        self._reported: tuple[int, str] | None = None  # the step and phase that were reported

    # ---- stopping at a common step

    def request_stop(self) -> None:
        """Asks all processes to stop; safe in a signal handler."""
        self._requested = True
        self.stop.set()

    def begin(self, step: int) -> None:
        """The loop of this process begins with `step`."""
        self._done = step - 1, time.monotonic()
        with self._lock:
            self._next = step

    def should_stop(self, step: int, following: int) -> bool:
        """True after the step at which all processes stop; ask after each step that may be last.

        following: the next such step. A device of another process may already wait for this one in
        a step that it has begun, so all stop after the last step that any process has begun.
        """
        if dist.count() == 1:
            return self.stop.is_set()
        with self._lock:
            if self._begun is None:
                self._next = following
                return False
        self._decided.wait()
        assert self._last is not None
        return step >= self._last

    # ---- what this process does

    def enter(self, phase: str, step: int) -> None:
        """This process begins a phase of PHASES at `step`."""
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._since
        self.phase, self.step, self._since = phase, step, now

    def meta(self) -> dict[str, Any]:
        """What `restore` reads from a checkpoint."""
        now = time.time()
        return {"phases": self.seconds, "restarts": self.restarts, "saved_at": now}

    def restore(self, saved: dict[str, Any], noted: dict[str, Any] | None) -> None:
        """Adds the times of the run that this one resumes, as `meta` saved them, and notes this
        start in STARTS, with what else is `noted` of it; None: the run is complete, and nothing is
        noted. What it did after the checkpoint is lost."""
        if noted is None or not dist.is_main():
            return
        file, lines = self.folder / STARTS, self.folder / "metrics.jsonl"
        starts = _starts(file.read_bytes().decode(errors="replace") if file.is_file() else "")
        ends = [modified(one) for one in (file, lines) if one.is_file()]  # of the previous run
        start: dict[str, Any] = {"time": time.time(), "last": max(ends, default=0.0)}
        starts.append(start | noted)
        write_text(file, "".join(json.dumps(start) + "\n" for start in starts))
        since = saved.get("saved_at", 0.0)
        self.restarts = saved.get("restarts", -1) + sum(start["time"] > since for start in starts)
        ran = [(before["time"], after["last"]) for before, after in pairwise(starts)]
        lost = sum(max(end - max(begin, since), 0.0) for begin, end in ran)
        for phase, value in (*saved.get("phases", {}).items(), ("lost", lost)):
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value

    def finish(self) -> dict[str, float]:
        """Seconds of each phase over all restarts, and goodput: the share of the steps."""
        self.enter("end", self.step)
        goodput = self.seconds.get("train", 0.0) / max(sum(self.seconds.values()), 1e-9)
        return {f"{phase}_seconds": value for phase, value in self.seconds.items()} | {
            "restarts": self.restarts,
            "goodput": goodput,
        }

    def progress(self, step: int) -> None:
        """The devices have finished `step`."""
        now, (before, then) = time.monotonic(), self._done
        if step > before:
            self._pace.append((now - then) / (step - before))
        self._done = step, now

    def late(self) -> float:
        """Seconds by which the current phase is late; negative or 0 if it is not."""
        if self._waiting or self.phase in ("start", "end"):  # tokenizing may take hours
            return 0.0
        done, then = self._done
        if self.phase not in STEP or not self._pace:
            first = HANG_FACTOR * HANG_SECONDS if self.phase in STEP else math.inf
            return time.monotonic() - self._since - min(first, self.section.hang_exit)
        steps = max(self.step - done, 1)
        usual = HANG_FACTOR * statistics.median(self._pace) * steps
        limit = max(min(HANG_SECONDS, self.section.hang_exit), usual)
        return time.monotonic() - max(then, self._since) - limit

    # ---- beats and the verdict

    def __enter__(self) -> Watch:
        if dist.count() > 1:
            _exit_if_the_coordinator_is_gone()
            self._beats: dict[int, dict[str, Any]] = {}
            self._seen = dict.fromkeys(range(dist.count()), time.monotonic())
            self._verdict: dict[str, Any] = {}
            self._heard = time.monotonic()
            threading.Thread(target=self._guard, name="watch guard", daemon=True).start()
            threading.Thread(target=self._run, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, *_: Any) -> None:
        if dist.count() == 1:
            return
        if error is not None:
            self._fail(error)
        else:
            dist.barrier("end")
        self._closed.set()

    def _fail(self, error: BaseException) -> None:
        """Tells the other processes that this one ends by an error, and lets them end first."""
        line = _line(error)
        if isinstance(error, jax.errors.JaxRuntimeError) and not line.startswith(OWN_ERRORS):
            wait = self.section.timeout + 4 * EVERY  # `_run` ends this process if one is lost
            _say(
                f"the connection to another process seems broken ({line}); if a process is lost, "
                f"this is known in {wait:.0f} s or less, and the same command then resumes the "
                "run; if none is, this process ends with this error"
            )
            self._waiting = True
            time.sleep(wait)
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else BUG
        if (said := mistake(error)) is not None:
            code, line = MISTAKE, said
        where = {"process": dist.index(), "host": socket.gethostname()}
        self._end = where | {"code": code, "message": line}
        until = time.monotonic() + 10
        while time.monotonic() < until and not self._all_know():
            time.sleep(EVERY)
        if dist.is_main():
            time.sleep(2 * EVERY)  # the coordinator goes last
        _exit_at_the_end(code)

    def _all_know(self) -> bool:
        if not dist.is_main():
            return bool(self._verdict.get("end"))
        return all(self._beats.get(i, {}).get("ended") for i in range(1, dist.count()))

    def _run(self) -> None:
        """The watching thread."""
        for number in itertools.count():
            if self._closed.wait(EVERY):
                return
            try:
                self._beat(number)
                if dist.is_main():
                    self._judge(number)
                else:
                    verdict = json.loads(dist.client().key_value_try_get(VERDICT))
            except jax.errors.JaxRuntimeError as error:
                if dist.is_main() or "NOT_FOUND" not in str(error):
                    continue  # `_guard` counts the time
                verdict = {}
            if dist.is_main():
                self._heard = time.monotonic()
            else:
                if verdict.get("number") != self._verdict.get("number"):
                    self._heard = time.monotonic()
                self._verdict = verdict
            self._obey(self._verdict, number)

    def _beat(self, number: int, *, ended: bool = False) -> None:
        """Writes what this process does. ended: it ends because of an error."""
        beat = {
            "number": number,
            "step": self.step,
            "phase": self.phase,
            "host": socket.gethostname(),
            "stop": self._requested,
            "begun": self._begun,
            "end": self._end,
            "ended": ended or self._end is not None,
            "late": self.late() > 0,
            "waiting": self._waiting,
            "time": time.time(),
        }
        key = f"{BEAT}{dist.index()}"
        dist.client().key_value_set(key, json.dumps(beat), allow_overwrite=True)

    def _judge(self, number: int) -> None:
        """Reads all beats and writes the verdict."""
        store, now = dist.client(), time.monotonic()
        for key, text in store.key_value_dir_get(BEAT):
            process, beat = int(key.rpartition("/")[2]), json.loads(text)
            if beat["number"] != self._beats.get(process, {}).get("number"):
                self._beats[process], self._seen[process] = beat, now
        beats = self._beats
        lost = [i for i, then in self._seen.items() if now - then > self.section.timeout]
        late, waiting = (any(b[key] for b in beats.values()) for key in ("late", "waiting"))
        begun: list[Any] = [beats.get(i, {}).get("begun") for i in range(dist.count())]
        self._verdict = {
            "number": number,
            "last": None if None in begun else max(begun),
            "stop": self.stop.is_set() or any(beat["stop"] for beat in beats.values()),
            "end": next((beat["end"] for beat in beats.values() if beat["end"]), None),
            "lost": [self._describe(i) for i in lost],
            "hang": self._hang(now) if late and not waiting else None,
        }
        store.key_value_set(VERDICT, json.dumps(self._verdict), allow_overwrite=True)

    def _hang(self, now: float) -> dict[str, Any]:
        """The step and phase of the process that is furthest, and the processes that the others
        wait for: silent ones, else those in the earliest phase; none if all are in the same."""
        where = {i: (b["step"], PHASES.index(b["phase"])) for i, b in self._beats.items()}
        silent = [i for i, then in self._seen.items() if now - then > 10 * EVERY]
        behind = silent or [i for i, place in where.items() if place == min(where.values())]
        behind = [] if len(behind) == dist.count() else behind
        step, phase = max(where.values())
        who = [self._describe(i) for i in behind]
        return {"step": step, "phase": PHASES[phase], "behind": who}

    def _describe(self, process: int) -> str:
        beat = self._beats.get(process)
        if beat is None:
            return f"process {process} (never heard of)"
        return f"process {process} ({beat['host']}, {beat['phase']} of step {beat['step']})"

    def _obey(self, verdict: dict[str, Any], number: int) -> None:
        if verdict.get("stop"):
            self.stop.set()
            with self._lock:
                self._begun = self._next if self._begun is None else self._begun
        if verdict.get("last") is not None:
            self._last = verdict["last"]
            self._decided.set()
        if hang := verdict.get("hang"):
            try:
                self._report_hang(**hang)
            except Exception as error:  # of a disk or a bucket
                _say(f"the stacks of the hang are not written: {_line(error)}")
        if lost := verdict.get("lost"):
            self._give_up(f"lost {', '.join(lost)}")
        end = verdict.get("end")
        if end and self._end is None:
            with suppress(jax.errors.JaxRuntimeError):
                self._beat(number + 1, ended=True)
            time.sleep(4 * EVERY if dist.is_main() else 0)  # the others hear of it
            _quit(end["code"], f"process {end['process']} ({end['host']}): {end['message']}")

    def _report_hang(self, step: int, phase: str, behind: list[str]) -> None:
        """Writes this process's Python stacks into the run folder, once for each phase."""
        if self._reported == (step, phase):
            return
        self._reported = step, phase
        file = self.folder / f"hang-{step}-process-{dist.index()}.txt"
        with tempfile.TemporaryFile() as stacks:  # the folder may be in a bucket
            faulthandler.dump_traceback(stacks)
            stacks.seek(0)
            file.write_bytes(stacks.read())
        if dist.is_main():
            where = f"the others wait for {', '.join(behind)}" if behind else "all processes wait"
            _say(
                f"step {step} hangs in phase {phase}; {where}; the Python stacks of all "
                f"processes are in {self.folder}/hang-{step}-process-*.txt"
            )

    def _guard(self) -> None:
        """Ends the process if it hears nothing of the coordinator, or a hang takes too long.

        A thread of its own: a call to the coordinator may block.
        """
        while not self._closed.wait(EVERY):
            if time.monotonic() - self._heard > self.section.timeout + 4 * EVERY:
                self._give_up("lost process 0")
            if self.phase in ENDING and self.late() > self.section.hang_exit:
                self._give_up(f"step {self.step} hung")

    def _give_up(self, why: str) -> None:
        """Ends this process so that the run can resume. The time of STARTS becomes that of the end,
        so that `restore` counts the wait as lost."""

        def note() -> None:
            with suppress(Exception):  # of a disk or a bucket, or the run has not begun
                touch(self.folder / STARTS)

        noting = threading.Thread(target=note, daemon=True)
        noting.start()
        noting.join(10)  # the disk may not answer
        _quit(STOPPED, f"{why}; start the same command again to resume")


def _starts(text: str) -> list[dict[str, Any]]:
    """The lines of STARTS, but for damaged ones."""
    starts = []
    for line in text.splitlines():
        with suppress(ValueError, TypeError, KeyError):
            start = json.loads(line)
            starts.append(start | {key: float(start[key]) for key in ("time", "last")})
    return starts


def _say(line: str) -> None:
    with suppress(OSError):  # the terminal is closed
        os.write(2, f"\njaxllm: {line}\n".encode())


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _quit(code: int, line: str) -> None:
    """Ends the process from a thread; its main thread may be blocked on a device for ever."""
    _say(line)
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _exit_at_the_end(code: int) -> None:
    """Makes the interpreter exit without waiting for the other processes, which are gone."""

    def leave() -> None:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)


@cache
def _exit_if_the_coordinator_is_gone() -> Any:
    """jax aborts a process whose coordinator is gone; makes that an exit with status STOPPED.

    It cannot be asked for another way: jaxlib's callback for it does not accept Python functions.
    """

    def aborted(_: int) -> None:
        if _current and (end := _current[-1]._end):
            os._exit(end["code"])
        if not dist.coordinator_answers():
            _quit(STOPPED, "lost process 0; start the same command again to resume")

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)
    return handler  # kept alive by the cache
