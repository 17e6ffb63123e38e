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
from jaxllm.report import live, reading


def test_the_page_follows_the_run_and_ends_with_it(tmp_path, monkeypatch):
    folder = run_folder(tmp_path / "run")
    write_lines(folder / "metrics.jsonl", [train_line(1)])
    monkeypatch.setattr(live, "FIRST", 0.01)
    monkeypatch.setattr(reading, "_is_locked", None)  # to open the lock would release it
    file, until = folder / "report.html", time.monotonic() + 20
    with live.reported(folder, folder):
        while not file.is_file() and time.monotonic() < until:
            time.sleep(0.01)
        assert '"state":"running"' in file.read_text()
    assert '"state":"killed"' in file.read_text()  # no line says how it ended
    assert not [one for one in threading.enumerate() if one.name == "report"]


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    folder = run_folder(tmp_path / "run")
    (folder / "report.html").mkdir()
    monkeypatch.setattr(live, "FIRST", 0.01)
    with pytest.raises(KeyError), live.reported(folder, folder):
        time.sleep(0.3)
        raise KeyError("of the run")
    said = capsys.readouterr().err.splitlines()
    assert said and all(line.startswith("jaxllm: report.html is not written: ") for line in said)


def test_another_process_writes_nothing(tmp_path):
    folder = run_folder(tmp_path / "run")
    with live.reported(folder, folder, enabled=False):
        pass
    assert not (folder / "report.html").exists()


def page_of(run):
    text = (run / "report.html").read_text()
    return json.loads(text.split('id="run-data">')[1].split("</script>")[0])["runs"][0]


def test_a_run_leaves_its_page(project, tmp_path, capsys, monkeypatch):
    """With the origins of its config and what was planned; one that fails says why."""
    monkeypatch.setattr(training, "planned_for", lambda *_: (1.5, 0.4))  # None on a CPU
    (tmp_path / "run.yaml").write_text("seed: 3\n")
    args = arguments(project, "sft", "reported", "--log.samples", "Say", "--log.sample_tokens", "2")
    assert main([args[0], str(tmp_path / "run.yaml"), *args[1:], "--steps", "3"]) == 0
    run = page_of(project / "reported")
    assert (run["state"], run["step"], run["steps"], run["final"]) == ("done", 3, 3, False)
    assert run["train"]["mean"]["loss"] == [
        pytest.approx(line["loss"], rel=1e-4) for line in lines_of(project / "reported").values()
    ]
    origins = {key: origin for key, _, origin in run["config"]}
    assert origins["seed"] == f"{tmp_path / 'run.yaml'}:1" and origins["steps"] == "--steps"
    assert origins["optim.clip"] == "default" and origins["model.config"] == "--model.config"
    start = run["starts"][0]
    assert start["devices"] == "8 x cpu" and start["versions"]["jax"]
    assert start["parameters"] == start["trainable"] > 0
    source = run["data"]["train"]["sources"][0]
    assert sum(source["lengths"]["counts"]) == source["examples"]
    assert source["lengths"]["edges"][-1] <= 65
    assert [one["step"] for one in run["samples"]] == [3]
    assert (run["plan"]["memory_gib"], run["plan"]["mfu"]) == (1.5, 0.4)

    args = arguments(project, "sft", "failed", "--optim.learning_rate", "1e30")
    refused(capsys, args, "step")
    run = page_of(project / "failed")
    assert run["state"] == "failed" and "is nan" in run["message"]
