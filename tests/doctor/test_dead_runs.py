# SPDX-License-Identifier: Apache-2.0
"""What doctor says of a run folder: what is whole, what is lost, and what to type."""

import json
import os
import re
import shlex
import shutil
import sys
import time

import pytest
from runs import arguments, refused

from jaxllm.checkpoint import UNFINISHED
from jaxllm.cli import main
from jaxllm.doctor import sections
from jaxllm.doctor.findings import Fact, Next, Problem
from jaxllm.doctor.run import run as examined
from jaxllm.lock import Lock


@pytest.fixture(scope="module")
def done(project):
    """A run of 12 steps with checkpoints at 4, 8 and 12. Other tests compile the same program."""
    assert main(arguments(project, "pretrain", "done")) == 0
    return project / "done"


@pytest.fixture
def killed(done, tmp_path):
    """A copy of the run as if it had been killed after step 12 was logged."""
    folder = tmp_path / "killed"
    shutil.copytree(done, folder)
    shutil.rmtree(folder / "checkpoints" / "12")
    shutil.rmtree(folder / "final")
    edit(folder, lambda lines: [line for line in lines if line["kind"] == "train"])
    return folder


def edit(folder, change, name="metrics.jsonl"):
    """Changes the lines of a file of a run."""
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in change(lines)))


def findings(folder):
    found = [*examined(str(folder))]
    problems = {one.entry: one for one in found if isinstance(one, Problem)}
    facts = {one.name: one.value for one in found if isinstance(one, Fact)}
    return problems, facts, [one for one in found if isinstance(one, Next)]


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_complete_run_has_no_problem(done):
    problems, facts, following = findings(done)
    assert not problems
    assert facts["state"] == "done" and facts["final/"] == "written"
    assert all(facts[f"checkpoint {step}"].startswith("whole, ") for step in (4, 8, 12))
    assert following[0].command == f"jaxllm report {done}"


def test_the_command_for_a_killed_run_resumes_it_exactly(done, killed):
    problems, facts, (following,) = findings(killed)
    assert "after step 12 was logged" in problems["a-run-ended-unexpectedly"].seen
    assert facts["lost"].startswith("steps 9 to 12, which are trained again")
    assert facts["lock"].startswith("free")
    assert following.what == "to resume from step 8"
    assert main(shlex.split(following.command)[1:]) == 0
    for name in ("final/model.safetensors", "rows.bin"):
        assert (killed / name).read_bytes() == (done / name).read_bytes()
    assert not findings(killed)[0]


def test_a_complete_run_without_its_model_is_no_complete_run(done, tmp_path):
    shutil.copytree(done, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    problems, _, (following,) = findings(tmp_path / "run")
    assert "final/ is not there" in problems["a-run-ended-unexpectedly"].seen
    assert following.what == "to write final/"


def test_the_command_neither_overwrites_nor_refuses_to_resume(killed):
    config = json.loads((killed / "config.json").read_text())
    config |= {"overwrite": True, "resume": False}
    (killed / "config.json").write_text(json.dumps(config))
    words = findings(killed)[2][0].command
    assert words.endswith("--overwrite false --resume true")


def test_a_run_of_several_processes_is_resumed_by_its_launcher(killed):
    edit(killed, lambda lines: [line | {"processes": 2} for line in lines], "starts.jsonl")
    (following,) = findings(killed)[2]
    assert "it ran on 2 processes" in following.what
    assert following.command.startswith("jaxllm launch pretrain ")
    assert following.command.endswith("--on local --nodes 2")


def test_a_damaged_checkpoint_is_named_with_the_one_before_it(killed):
    file = largest(killed / "checkpoints" / "8")
    flip(file)
    problems, facts, (following,) = findings(killed)
    problem = problems["a-checkpoint-is-damaged"]
    assert f"{file.name} has changed" in problem.seen
    assert "continues from step 4" in problem.remedy and following.what == "to resume from step 4"
    assert facts["checkpoint 8"].startswith("damaged") and facts["checkpoint 4"].startswith("whole")
    assert facts["lost"].startswith("steps 5 to 12")
    (killed / "checkpoints" / "4" / "files.json").unlink()
    problems, _, (following,) = findings(killed)
    assert (
        "move it away: the run then starts from step 0"
        in problems["a-checkpoint-is-damaged"].remedy
    )
    assert following.what == "to start again, from step 0"


@pytest.mark.parametrize(
    ("message", "entry"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes", "out-of-memory"),
        ("step 5: the loss is not finite", "a-loss-is-not-finite"),
        ("[Errno 28] No space left on device", "the-disk-is-full"),
        ("the reward returned a string", "a-run-failed"),
    ],
)
def test_the_error_of_a_run_has_its_remedy(killed, message, entry):
    error = {"kind": "error", "step": 5, "time": time.time() + 9, "message": message}
    edit(killed, lambda lines: [*lines, error])
    problems, facts, _ = findings(killed)
    assert problems[entry].seen == f"the run failed in step 5: {message}"
    assert facts["state"] == "failed in step 5"


def test_what_a_killed_run_was_doing_is_read_from_its_files(killed):
    (killed / "checkpoints" / f"12{UNFINISHED}-1").mkdir()
    problems, facts, _ = findings(killed)
    assert "while it saved checkpoint 12" in problems["a-run-ended-unexpectedly"].seen
    assert facts["unfinished"] == "checkpoint 12, which a resumed run deletes"
    (killed / ".final.1").mkdir()
    assert findings(killed)[1]["state"] == "ended unexpectedly while it wrote final/"
    shutil.rmtree(killed / ".final.1")
    shutil.rmtree(killed / "checkpoints" / f"12{UNFINISHED}-1")
    again = {"time": time.time() + 60, "last": time.time(), "step": 8, "steps": 12}
    edit(killed, lambda lines: [*lines, lines[0] | again], "starts.jsonl")
    assert "loaded, compiled or trained its first steps" in findings(killed)[1]["state"]


def test_a_run_that_trains_is_no_problem_unless_it_hangs(killed):
    lock = Lock.of(killed)
    problems, facts, following = findings(killed)
    assert not problems and not following and facts["state"] == "running"
    assert facts["lock"].startswith("held by process ")
    edit(killed, lambda lines: [x | {"time": x["time"] - 9000} for x in lines])
    edit(killed, lambda lines: [x | {"time": x["time"] - 9000} for x in lines], "starts.jsonl")
    assert "a-run-hangs" in findings(killed)[0]
    del lock


def test_damaged_files_and_inputs_that_are_gone_are_named(killed, project):
    flip(killed / "model" / "config.json")
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    config = json.loads((killed / "config.json").read_text())
    config["model"]["tokenizer"] = str(project / "gone")
    (killed / "config.json").write_text(json.dumps(config))
    problems, facts, _ = findings(killed)
    assert "config.json has changed" in problems["a-file-of-a-run-is-damaged"].seen
    assert facts["metrics.jsonl"] == "1 of 13 lines are damaged and are skipped"
    assert str(project / "gone") in problems["an-input-is-gone"].seen
    (killed / "config.json").write_text(json.dumps(config | {"seeds": 1}))
    assert "seeds" in problems_of(killed)["a-config-is-not-valid-here"].seen
    (killed / "config.json").write_text("{")
    shutil.rmtree(killed / "model")
    problems, facts, following = findings(killed)
    assert "delete it to resume" in problems["a-file-of-a-run-is-damaged"].seen
    assert facts["checkpoint 8"].startswith("whole") and not following


def problems_of(folder):
    return findings(folder)[0]


def test_a_disk_without_space_for_a_checkpoint_is_named(killed, monkeypatch):
    usage = type(shutil.disk_usage(killed))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10))
    assert str(killed) in problems_of(killed)["the-disk-is-full"].seen


def test_a_section_that_hangs_is_ended_and_the_others_are_printed(
    done, tmp_path, monkeypatch, capsys
):
    """A plugin of jax that does not come back stands for a backend that does not start. None of
    them imports torch. On a slow machine the import of jax may take the 3 s already."""
    plugin = tmp_path / "jax_plugins" / "stuck"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text("import time\ndef initialize():\n    time.sleep(900)\n")
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setattr(sections, "SECTIONS", dict.fromkeys(("devices", "run")))
    limits = {"devices": 3}
    section = sections.Section
    monkeypatch.setattr(
        sections, "Section", lambda name, run, limit: section(name, run, limits.get(name, limit))
    )
    assert main(["doctor", str(done), "--limit", "90"]) == 1
    said = capsys.readouterr().out
    what = r"(importing jax|starting JAX's backend \(JAX_PLATFORMS=cpu\))"
    assert re.search(f"{what} did not end within 3 s", said)
    assert "1 problem\n" in said and "docs/troubleshooting.md#something-does-not-answer" in said
    assert "whole, " in said and f"jaxllm report {done}" in said


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    for name in ("model", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    for folder in (tmp_path / "model", tmp_path / "empty"):
        with pytest.raises(ValueError, match=f"{folder} is not a run folder"):
            findings(folder)
    refused(capsys, ["doctor", str(tmp_path / "none")], "no such directory")
