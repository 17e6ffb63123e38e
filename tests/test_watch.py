# SPDX-License-Identifier: Apache-2.0
"""Where the time of a run went, and when a step is late."""

from __future__ import annotations

import json
import os
import re
import time
from typing import Any

import jax
import pytest
from runs import arguments, lines_of

from jaxllm import dist
from jaxllm import watch as module
from jaxllm.cli import main
from jaxllm.config import ClusterSection
from jaxllm.watch import HANG_FACTOR, HANG_SECONDS, Watch


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until `clock(seconds)` moves it."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


def test_the_seconds_of_a_phase_end_when_the_next_begins(clock, tmp_path):
    watch = Watch(ClusterSection(), tmp_path)
    for phase, seconds in (("load", 4), ("data", 1), ("train", 12), ("data", 1), ("train", 12)):
        watch.enter(phase, 1)
        clock(seconds)
    assert watch.finish() == {
        "start_seconds": 0,
        "load_seconds": 4,
        "data_seconds": 2,
        "train_seconds": 24,
        "restarts": 0,
        "goodput": 24 / 30,
    }


def test_a_resumed_run_adds_its_seconds_and_those_that_were_lost(clock, tmp_path):
    first = Watch(ClusterSection(), tmp_path)
    first.restore({}, {})
    assert first.restarts == 0
    first.enter("train", 1)
    clock(30)
    first.enter("save", 3)
    saved = first.meta()
    file = tmp_path / "metrics.jsonl"  # the last line was written 10 s after the checkpoint
    file.write_text("")
    os.utime(file, (saved["saved_at"] + 10, saved["saved_at"] + 10))

    second = Watch(ClusterSection(), tmp_path)
    second.restore(json.loads(json.dumps(saved)), {})
    second.enter("train", 3)
    clock(20)
    ledger = second.finish()
    assert ledger["train_seconds"] == 50 and ledger["lost_seconds"] == pytest.approx(10)
    assert ledger["restarts"] == 1 and ledger["goodput"] == pytest.approx(50 / 60)


def test_restarts_and_lost_seconds_count_without_a_checkpoint(clock, tmp_path, monkeypatch):
    now = iter((100.0, 200.0, 300.0))
    monkeypatch.setattr(time, "time", lambda: next(now))
    file = tmp_path / "metrics.jsonl"
    for number, died in enumerate((None, 130.0, 205.0)):  # the second start found a line of 130 s
        if died:
            file.write_text("")
            for name in ("metrics.jsonl", "starts.jsonl"):
                os.utime(tmp_path / name, (died, died))
        watch = Watch(ClusterSection(), tmp_path)
        watch.restore({}, {})
        assert watch.restarts == number
    assert watch.finish()["lost_seconds"] == 30 + 5


def test_a_damaged_start_is_left_out(tmp_path):
    start = b'{"time": 1.0, "last": 0.0}\n'
    (tmp_path / "starts.jsonl").write_bytes(start + b'\xff{"time": 2.0\n' + start)
    watch = Watch(ClusterSection(), tmp_path)
    watch.restore({}, {})
    assert watch.restarts == 2 and len((tmp_path / "starts.jsonl").read_text().splitlines()) == 3


def test_the_wait_for_a_lost_process_is_lost_too(tmp_path, monkeypatch):
    """The survivor of a run that was started at 100 s and logged until 130 s ends at 430 s."""
    now = iter((100.0, 500.0))
    monkeypatch.setattr(time, "time", lambda: next(now))
    monkeypatch.setattr(os, "_exit", lambda code: None)
    monkeypatch.setattr(module, "touch", lambda file: os.utime(file, (430, 430)))
    watch = Watch(ClusterSection(), tmp_path)
    watch.restore({}, {})
    (tmp_path / "metrics.jsonl").write_text("")
    for name in ("metrics.jsonl", "starts.jsonl"):
        os.utime(tmp_path / name, (130, 130))
    watch._give_up("lost process 1")
    resumed = Watch(ClusterSection(), tmp_path)
    resumed.restore({}, {})
    assert resumed.finish()["lost_seconds"] == 330


def test_a_step_is_late_after_ten_times_the_usual_one_and_a_minute(clock, tmp_path):
    watch = Watch(ClusterSection(), tmp_path)
    for step in range(1, 11):
        watch.enter("train", step)
        clock(20)
        watch.progress(step)
    watch.enter("train", 11)
    clock(HANG_FACTOR * 20)
    assert watch.late() == 0
    clock(1)
    assert watch.late() == 1
    watch.enter("eval", 11)
    assert watch.late() == -ClusterSection().hang_exit  # an evaluation may take longer
    quick = Watch(ClusterSection(), tmp_path)
    quick.enter("train", 1)
    clock(0.1)
    quick.progress(1)
    clock(HANG_SECONDS)
    assert quick.late() == pytest.approx(0)


class Coordinator(dict):
    """The key-value store of jax's coordinator."""

    def key_value_set(self, key, text, allow_overwrite=False):
        self[key] = text

    def key_value_dir_get(self, folder):
        return [(key, text) for key, text in self.items() if key.startswith(folder)]


@pytest.fixture
def two(clock, tmp_path, monkeypatch):
    """The watch of process 0 of 2, in step 3 and not late; `clock` is its time."""
    store = Coordinator()
    monkeypatch.setattr(dist, "client", lambda: store)
    monkeypatch.setattr(module, "_exit_at_the_end", lambda code: None)
    watch = Watch(ClusterSection(), tmp_path)
    watch._beats, watch._seen = {}, {0: time.monotonic(), 1: time.monotonic()}
    for step in (1, 2):
        watch.enter("train", step)
        watch.progress(step)
        clock(1)
    watch.enter("train", 3)
    return watch


def hang_after(watch, clock, seconds: int) -> Any:
    """What the verdict says of a hang when all processes have been silent for so long."""
    clock(seconds)
    watch._beat(seconds)
    watch._judge(seconds)
    return watch._verdict["hang"]


def test_a_process_that_waits_for_a_lost_one_does_not_hang(two, clock, monkeypatch, capfd):
    """A collective fails when another process is killed; the next verdicts report no hang."""
    assert hang_after(two, clock, 1) is None
    hangs = []
    monkeypatch.setattr(time, "sleep", lambda _: hangs.append(hang_after(two, clock, 200)))
    two._fail(jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed"))
    assert hangs[0] is None and two.late() == 0
    said = capfd.readouterr().err
    assert "jaxllm: the connection to another process seems broken (UNKNOWN: Gloo" in said
    assert "302 s" in said and "the same command then resumes" in said


def test_a_process_that_is_silent_in_a_step_hangs(two, clock):
    assert hang_after(two, clock, 1) is None
    hang = hang_after(two, clock, int(HANG_SECONDS) + 10)
    assert (hang["step"], hang["phase"]) == (3, "train")


def test_a_run_ends_with_the_seconds_of_each_phase_over_its_restarts(project, capsys):
    args = arguments(project, "pretrain", "ledger", "--data.eval", str(project / "text.txt"))
    args += ["--eval_every", "2", "--save.every", "2"]
    start = time.perf_counter()
    for steps in ("2", "4"):
        assert main([*args, "--steps", steps]) == 0
    took = time.perf_counter() - start
    lines = (project / "ledger" / "metrics.jsonl").read_text().splitlines()
    ledger = [one for one in map(json.loads, lines) if one["kind"] == "goodput"][-1]
    seconds = {name: ledger[f"{name}_seconds"] for name in PHASES}
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) < took
    assert ledger["step"] == 4 and ledger["restarts"] == 1 and ledger["lost_seconds"] >= 0
    total = sum(value for name, value in ledger.items() if name.endswith("_seconds"))
    assert ledger["goodput"] == pytest.approx(seconds["train"] / total)
    assert list(lines_of(project / "ledger")) == [1, 2, 3, 4]
    said = capsys.readouterr().err
    assert said.count("initializing random weights") == said.count("resuming from step 2") == 1
    *_, shown = re.findall(r"\n(\d:\d\d:\d\d: .*)\n", said)
    share = f"train {seconds['train'] / total:.0%}"
    assert share in shown and shown.endswith("; 1 restart")


PHASES = ("start", "load", "compile", "data", "train", "eval", "save")
