# SPDX-License-Identifier: Apache-2.0
"""Several processes stop, fail and hang as one run.

Every process writes a beat (step, phase, host, …) to jax's coordinator every second. The main
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
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import jax

from jaxllm import dist
from jaxllm.config import ClusterSection, TrainConfig
from jaxllm.errors import UserError
from jaxllm.paths import as_path, modified

REQUEUE = 75  # exit status: start the same command again
BEAT, VERDICT = "jaxllm/beat/", "jaxllm/verdict"
HANG_SECONDS, HANG_FACTOR = 60.0, 10.0  # a step is late after both
EVERY = 0.5  # seconds between beats


_current: list[Watch] = []


def current() -> Watch:
    """The watch of the run that is going on in this process."""
    return _current[-1]


def watched(run: Callable[[TrainConfig], Any]) -> Callable[[TrainConfig], Any]:
    """Connects the processes of a run before it and watches them until its end."""

    @wraps(run)
    def connected(cfg: TrainConfig) -> Any:
        dist.start(cfg.cluster)
        with Watch(cfg.cluster, as_path(cfg.output_dir)) as watch:
            _current.append(watch)
            try:
                return run(cfg)
            finally:
                _current.pop()

    return connected


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
        self._closed = threading.Event()
        self._since = time.monotonic()
        self._pace: deque[float] = deque(maxlen=50)  # seconds per step, one for each `progress`
        self._done = (0, self._since)
        self._reported: int | None = None  # the step whose hang was reported

    # ---- stopping at a common step

    def request_stop(self) -> None:
        """Asks all processes to stop; safe in a signal handler."""
        self._requested = True
        self.stop.set()

    def begin(self, step: int) -> None:
        """The loop of this process begins with `step`."""
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
        """This process begins `phase` at `step`: load, compile, data or rollout (it makes the
        batch), train, eval, save or export."""
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._since
        self.phase, self.step, self._since = phase, step, now

    def meta(self) -> dict[str, Any]:
        """What `restore` reads from a checkpoint."""
        now = time.time()
        return {"phases": self.seconds, "restarts": self.restarts, "saved_at": now}

    def restore(self, saved: dict[str, Any]) -> None:
        """Adds the times of the run that this one resumes; it lost those after the checkpoint."""
        if not saved:
            return
        file = self.folder / "metrics.jsonl"
        last = modified(file) if file.is_file() else 0.0
        lost = max(last - saved.get("saved_at", last), 0.0)
        for phase, value in (*saved.get("phases", {}).items(), ("lost", lost)):
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value
        self.restarts = saved.get("restarts", 0) + 1

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
        """Seconds by which the current step is late; negative or 0 if it is not."""
        if self.phase not in ("data", "rollout", "train") or not self._pace:
            return 0.0
        done, then = self._done
        steps = max(self.step - done, 1)
        usual = HANG_FACTOR * statistics.median(self._pace) * steps
        limit = max(min(HANG_SECONDS, self.section.hang_exit), usual)
        return time.monotonic() - max(then, self._since) - limit

    # ---- beats and the verdict

    def __enter__(self) -> Watch:
        if dist.count() > 1:
            _exit_if_the_coordinator_is_gone()
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._beats: dict[int, dict[str, Any]] = {}
            self._seen = dict.fromkeys(range(dist.count()), time.monotonic())
            self._verdict: dict[str, Any] = {}
            self._heard = time.monotonic()
            threading.Thread(target=self._guard, name="watch guard", daemon=True).start()
            self._thread.start()
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
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(self.section.timeout + 4 * EVERY)  # `_run` ends the process if one is lost
        code = 2 if isinstance(error, UserError) else 1
        line = " ".join(str(error).split())[:500] or type(error).__name__
        self._end = {"process": dist.index(), "host": socket.gethostname(), "code": code}
        self._end["message"] = line
        until = time.monotonic() + 10
        while time.monotonic() < until and not self._all_know():
            time.sleep(EVERY)
        if dist.is_main():
            time.sleep(4 * EVERY)  # the coordinator goes last
        _exit_at_the_end(code)

    def _all_know(self) -> bool:
        if not dist.is_main():
            return bool(self._verdict.get("end"))
        return all(self._beats.get(i, {}).get("ended") for i in range(1, dist.count()))

    def _run(self) -> None:
        """The watching thread."""
        store, me = dist.client(), dist.index()
        for number in itertools.count():
            if self._closed.wait(EVERY):
                return
            beat = {
                "number": number,
                "step": self.step,
                "phase": self.phase,
                "host": socket.gethostname(),
                "time": time.time(),
                "stop": self._requested,
                "begun": self._begun,
                "end": self._end,
                "ended": bool(self._end or self._verdict.get("end")),
                "late": self.late() > 0,
            }
            try:
                store.key_value_set(f"{BEAT}{me}", json.dumps(beat), allow_overwrite=True)
                if dist.is_main():
                    self._judge(store, number)
                else:
                    verdict = json.loads(store.key_value_try_get(VERDICT))
            except jax.errors.JaxRuntimeError as error:
                if dist.is_main() or "NOT_FOUND" not in str(error):
                    continue  # `_guard` counts the time
                verdict = {}
            if not dist.is_main():
                if verdict.get("number") != self._verdict.get("number"):
                    self._heard = time.monotonic()
                self._verdict = verdict
            else:
                self._heard = time.monotonic()
            self._obey(self._verdict)

    def _judge(self, store: Any, number: int) -> None:
        """Reads all beats and writes the verdict."""
        now = time.monotonic()
        for key, text in store.key_value_dir_get(BEAT):
            process, beat = int(key.rpartition("/")[2]), json.loads(text)
            if beat["number"] != self._beats.get(process, {}).get("number"):
                self._beats[process], self._seen[process] = beat, now
        beats = self._beats
        lost = [i for i, then in self._seen.items() if now - then > self.section.timeout]
        late = any(beat["late"] for beat in beats.values())
        begun: list[Any] = [beats.get(i, {}).get("begun") for i in range(dist.count())]
        self._verdict = {
            "number": number,
            "last": None if None in begun else max(begun),
            "stop": self.stop.is_set() or any(beat["stop"] for beat in beats.values()),
            "end": next((beat["end"] for beat in beats.values() if beat["end"]), None),
            "lost": [self._describe(i) for i in lost],
            "hang": [self._describe(i) for i in self._behind(now)] if late else None,
        }
        store.key_value_set(VERDICT, json.dumps(self._verdict), allow_overwrite=True)

    def _behind(self, now: float) -> list[int]:
        """Processes that the others wait for: silent ones, else those at the earliest step."""
        silent = [i for i, then in self._seen.items() if now - then > 10 * EVERY]
        first = min(beat["step"] for beat in self._beats.values())
        return silent or [i for i, beat in self._beats.items() if beat["step"] == first]

    def _describe(self, process: int) -> str:
        beat = self._beats.get(process)
        if beat is None:
            return f"process {process} (never heard of)"
        return f"process {process} ({beat['host']}, {beat['phase']} of step {beat['step']})"

    def _obey(self, verdict: dict[str, Any]) -> None:
        if verdict.get("stop"):
            self.stop.set()
            with self._lock:
                self._begun = self._next if self._begun is None else self._begun
        if verdict.get("last") is not None:
            self._last = verdict["last"]
            self._decided.set()
        if (hang := verdict.get("hang")) is not None:
            self._report_hang(hang)
        if lost := verdict.get("lost"):
            _quit(REQUEUE, f"lost {', '.join(lost)}; start the same command again to resume")
        end = verdict.get("end")
        if end and self._end is None:
            time.sleep(2 * EVERY if dist.is_main() else EVERY)  # the others hear of it
            if self._end is None:
                _quit(end["code"], f"process {end['process']} ({end['host']}): {end['message']}")

    def _report_hang(self, behind: list[str]) -> None:
        """Writes this process's Python stacks into the run folder, once for each late step."""
        if self._reported == self.step:
            return
        self._reported = self.step
        file = self.folder / f"hang-{self.step}-process-{dist.index()}.txt"
        with tempfile.TemporaryFile() as stacks:  # the folder may be in a bucket
            faulthandler.dump_traceback(stacks)
            stacks.seek(0)
            file.write_bytes(stacks.read())
        if dist.is_main():
            _say(
                f"step {self.step} hangs; the others wait for {', '.join(behind)}; the Python "
                f"stacks of all processes are in {self.folder}/hang-{self.step}-process-*.txt"
            )

    def _guard(self) -> None:
        """Ends the process if it hears nothing of the coordinator, or a hang takes too long.

        A thread of its own: a call to the coordinator may block.
        """
        while not self._closed.wait(EVERY):
            if time.monotonic() - self._heard > self.section.timeout + 4 * EVERY:
                _quit(REQUEUE, "lost process 0; start the same command again to resume")
            if self.late() > self.section.hang_exit:
                _quit(REQUEUE, f"step {self.step} hung; start the same command again to resume")


def _say(line: str) -> None:
    os.write(2, f"\njaxllm: {line}\n".encode())


def _quit(code: int, line: str) -> None:
    """Ends the process from a thread; its main thread may be blocked on a device for ever."""
    _say(line)
    sys.stdout.flush()
    os._exit(code)


def _exit_at_the_end(code: int) -> None:
    """Makes the interpreter exit without waiting for the other processes, which are gone."""

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)


@cache
def _exit_if_the_coordinator_is_gone() -> Any:
    """jax aborts a process whose coordinator is gone; makes that an exit with status REQUEUE.

    It cannot be asked for another way: jaxlib's callback for it does not accept Python functions.
    """

    def aborted(_: int) -> None:
        if not dist.coordinator_answers():
            _quit(REQUEUE, "lost process 0; start the same command again to resume")
        signal.signal(signal.SIGABRT, signal.SIG_DFL)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)
    return handler  # kept alive by the cache
