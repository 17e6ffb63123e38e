# SPDX-License-Identifier: Apache-2.0
"""Progress: a bar on a terminal, lines elsewhere, silence in other processes."""

import pytest
from rich.console import Console

from jaxllm.monitor.progress import Progress, track


def numbers(**more):
    return {"loss": 2.5, "tokens_per_second": 1234.5, "mfu": None, "memory": 3.21} | more


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Progress(100) as progress:
        for step in range(10, 101, 10):
            progress.update(step, **numbers(mfu=0.415))
            now[0] += 4
        progress.say("step 100  eval: loss 2")
    out = capsys.readouterr()
    assert out.out == ""
    shown = out.err.splitlines()
    assert shown[0] == "step 10/100  loss 2.5000  1,234 tokens/s  MFU 42%  3.2 GiB"
    assert shown[1] == ("step 40/100  loss 2.5000  1,234 tokens/s  MFU 42%  3.2 GiB  0:00:24 left")
    assert [x.split()[1] for x in shown[:-1]] == ["10/100", "40/100", "70/100", "100/100"]
    assert shown[-1] == "step 100  eval: loss 2"


def test_an_online_run_shows_its_reward_in_place_of_the_loss(capsys, monkeypatch):
    now = iter(range(100, 1000, 20))
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    with Progress(3) as progress:
        progress.update(1, **numbers(loss=0.0, reward=0.25))
        progress.update(2, **numbers(loss=0.0))  # an update of the same rollout
        progress.update(3, **numbers(loss=0.0, reward=0.5))
    shown = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[1] for line in shown] == ["reward 0.2500"] * 2 + ["reward 0.5000"]
    assert not any("loss" in line for line in shown)


def test_on_a_terminal_progress_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(
        "rich.console.Console", lambda **keys: Console(**keys, force_terminal=True, width=120)
    )
    with Progress(100, start=20) as progress:
        assert progress.bar.tasks[0].description == "compiling"
        progress.compiled(2.0)
        assert progress.bar.tasks[0].description == "compiled the step in 2.0 s"
        progress.advance(21)  # between two log lines
        assert progress.bar.tasks[0].completed == 21
        progress.update(50, **numbers())
        progress.say("[eval] loss 2")
        assert progress.bar.tasks[0].completed == 50
    shown = capsys.readouterr().err
    assert "loss 2.5000" in shown
    assert "[eval] loss 2" in shown
    assert "\x1b[" in shown


def test_compilation_is_reported_without_a_terminal_and_when_progress_is_off(capsys, monkeypatch):
    with Progress(10) as progress, Progress(10, enabled=False) as off:
        progress.compiling()
        progress.compiled(12.34)
        off.compiled(0.06)
    first, *after = capsys.readouterr().err.splitlines()
    assert first == "compiling the step…"
    assert after == ["compiled the step in 12.3 s", "compiled the step in 0.1 s"]
    monkeypatch.setattr("jaxllm.dist.index", lambda: 1)
    Progress(10).compiling()
    Progress(10).compiled(1.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("enabled", "process"), [(False, 0), (True, 1)])
def test_progress_is_silent_when_off_and_in_other_processes(capsys, monkeypatch, enabled, process):
    monkeypatch.setattr("jaxllm.dist.index", lambda: process)
    with Progress(10, enabled=enabled) as progress:
        progress.update(10, **numbers())
        progress.say("x")
    assert capsys.readouterr() == ("", "")


def test_track_yields_every_item_and_reports_without_a_terminal(capsys, monkeypatch):
    now = iter(range(0, 1000, 6))
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    assert list(track(range(5), "tokenizing", 5)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == "tokenizing: 1 of 5\ntokenizing: 3 of 5\n"
