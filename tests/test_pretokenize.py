# SPDX-License-Identifier: Apache-2.0
"""`jaxllm tokenize` fills the cache of a training run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import DEVICES, ENV, arguments, refused

from jaxllm import cli
from jaxllm.data import examples

ROOT = Path(__file__).parents[1]


def tokenize(project: Path, *more: str, processes: int = 1, **env: str):
    args = arguments(project, "sft", "run", "--data.eval_fraction", "0.1", *more)[1:]
    command = [sys.executable, "-m", "jaxllm", "tokenize", "--objective", "sft", *args]
    if processes > 1:
        command = [str(ROOT / "launch" / "local.sh"), str(processes), *command]
    env = ENV | {"XLA_FLAGS": DEVICES + "1", "PYTHONPATH": str(ROOT)} | env
    command = ["timeout", "-s", "KILL", "120", *command]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_a_run_tokenizes_nothing_after_it(project, monkeypatch, capsys):
    # jax would raise an error if it looked for a TPU.
    done = tokenize(project, JAX_PLATFORMS="tpu")
    assert done.returncode == 0, done.stderr
    assert not (project / "run").exists()
    monkeypatch.setattr(examples, "tokenize_table", None)
    steps = ("--steps", "1", "--mesh.fsdp", "8", "--data.eval_fraction", "0.1")
    assert cli.main(arguments(project, "sft", "run", *steps)) == 0
    printed = [x for x in capsys.readouterr().err.splitlines() if x.startswith(("train:", "eval:"))]
    assert done.stdout.splitlines() == printed and len(printed) == 2


def test_a_mistake_in_the_data_ends_all_processes(project):
    bad = project / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "a", "completion": "b"}) + '\n{"prompt": 1}\n')
    done = tokenize(project, "--data.train", str(bad), processes=2)
    assert done.returncode == 2
    assert "bad.jsonl:2: " in done.stderr and "Traceback" not in done.stderr


def test_what_it_refuses(project, capsys, monkeypatch):
    args = arguments(project, "sft", "run")[1:]
    refused(capsys, ["tokenize", *args], "no objective: give --objective sft")
    refused(capsys, ["tokenize", *args, "--objective", "sff"], "objective", "sff")
    refused(capsys, ["tokenize", "--objective", "sft", "--steps", "2"], "no model")


def test_the_objective_may_be_in_the_file(project, capsys, monkeypatch):
    from jaxllm import pretokenize

    seen = []
    manifest = {"train": {"sources": []}, "eval": {}}
    monkeypatch.setattr(pretokenize, "tokenize", lambda cfg: seen.append(cfg) or manifest)
    file = project / "c.yaml"
    file.write_text("objective: dpo\n")
    assert cli.main(["tokenize", str(file), *arguments(project, "dpo", "run")[1:]]) == 0
    assert [cfg.objective for cfg in seen] == ["dpo"]


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_its_help_needs_no_config(flag, capsys):
    assert cli.main(["tokenize", flag]) == 0
    assert "usage: jaxllm tokenize [CONFIG.yaml] --objective VERB" in capsys.readouterr().out
