# SPDX-License-Identifier: Apache-2.0
"""The page is written while a run trains, and at its end."""

import json
import threading
import time

import pytest
from folders import run_folder, train_line, write_lines
from runs import arguments, lines_of, refused

from jaxllm import training
from jaxllm.cli import main
from jaxllm.errors import UserError
from jaxllm.lock import Lock
from jaxllm.report import live
from jaxllm.report.reading import read_run

pytestmark = pytest.mark.usefixtures("on_one_device")


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_page_follows_the_run_and_ends_with_it(tmp_path, monkeypatch):
    folder = run_folder(tmp_path / "run")
    write_lines(folder / "metrics.jsonl", [train_line(1)])
    monkeypatch.setattr(live, "FIRST", 0.01)
    monkeypatch.setattr(Lock, "is_held", None)  # to open the lock would release it
    file = folder / "report.html"
    with live.reported(folder, folder):
        wait_for(file.is_file)
        assert '"state":"running"' in file.read_text() and '"every":30.0' in file.read_text()
    assert '"state":"killed"' in file.read_text()  # no line says how it ended
    assert not [one for one in threading.enumerate() if one.name == "report"]


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    folder = run_folder(tmp_path / "run")
    (folder / "report.html").mkdir()
    tries = []
    monkeypatch.setattr(live, "read_run", lambda *a, **k: tries.append(0) or read_run(*a, **k))
    for name in ("FIRST", "EVERY", "MOST"):
        monkeypatch.setattr(live, name, 0.01)
    with pytest.raises(KeyError), live.reported(folder, folder):
        wait_for(lambda: len(tries) > 3)
        raise KeyError("of the run")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("jaxllm: report.html is not written: ")


def test_after_an_error_the_page_is_written_again(tmp_path, capsys, monkeypatch):
    folder = run_folder(tmp_path / "run")
    (folder / "report.html").mkdir()
    for name in ("FIRST", "EVERY", "MOST"):
        monkeypatch.setattr(live, name, 0.01)
    said = ""
    with live.reported(folder, folder):

        def is_said():
            nonlocal said
            said += capsys.readouterr().err
            return said

        wait_for(is_said)
        (folder / "report.html").rmdir()
        wait_for((folder / "report.html").is_file)
        assert '"state":"running"' in (folder / "report.html").read_text()
    said += capsys.readouterr().err
    assert said.count("jaxllm: report.html is not written: ") == len(said.splitlines()) == 1


def test_a_slow_page_is_written_every_ten_minutes_at_least():
    now = time.perf_counter()
    assert live._pause(now) == 30 and live._pause(now - 3600) == 600
    assert live._pause(now - 2) == pytest.approx(200, rel=0.1)


def test_another_process_writes_nothing(tmp_path):
    folder = run_folder(tmp_path / "run")
    with live.reported(folder, folder, enabled=False):
        pass
    assert not (folder / "report.html").exists()


def page_of(run):
    text = (run / "report.html").read_text()
    return json.loads(text.split('id="run-data">')[1].split("</script>")[0])["runs"][0]


def test_a_run_leaves_its_page(project, tmp_path, capsys, monkeypatch):
    """With the origins of its config, what was planned, its last checkpoint and its model; one that
    fails says why."""
    monkeypatch.setattr(training, "planned_for", lambda *_: (1.5, 0.4))  # None on a CPU
    (tmp_path / "run.yaml").write_text("seed: 3\n")
    args = arguments(project, "sft", "reported", "--log.samples", "Say", "--log.sample_tokens", "2")
    args += ["--steps", "3", "--save.every", "2"]
    assert main([args[0], str(tmp_path / "run.yaml"), *args[1:]]) == 0
    run = page_of(project / "reported")
    assert (run["state"], run["step"], run["steps"], run["final"]) == ("done", 3, 3, True)
    assert [one["step"] for one in run["checkpoints"]] == [2, 3]
    assert run["train"]["mean"]["loss"] == [
        pytest.approx(line["loss"], rel=1e-4) for line in lines_of(project / "reported").values()
    ]
    origins = {key: origin for key, _, origin in run["config"]}
    assert origins["seed"] == f"{tmp_path / 'run.yaml'}:1" and origins["steps"] == "--steps"
    assert origins["optim.clip"] == "default" and origins["model.config"] == "--model.config"
    start = run["starts"][0]
    assert start["devices"] == "1 x cpu" and start["versions"]["jax"]
    assert start["parameters"] == start["trainable"] > 0
    source = run["data"]["train"]["sources"][0]
    assert sum(source["lengths"]["counts"]) == source["examples"]
    assert source["lengths"]["edges"][-1] <= 65
    assert [one["step"] for one in run["samples"]] == [3]
    assert (run["plan"]["memory_gib"], run["plan"]["mfu"]) == (1.5, 0.4)

    def full(*_):
        raise UserError("no space for final/")

    monkeypatch.setattr(training, "write_final", full)
    refused(capsys, arguments(project, "sft", "exported", "--steps", "1"), "no space for final/")
    run = page_of(project / "exported")
    assert (run["state"], run["message"]) == ("failed", "no space for final/")
    assert [one["step"] for one in run["checkpoints"]] == [1] and run["ledger"]

    args = arguments(project, "sft", "failed", "--optim.learning_rate", "1e30")
    refused(capsys, args, "step")
    run = page_of(project / "failed")
    assert run["state"] == "failed" and "is nan" in run["message"]
