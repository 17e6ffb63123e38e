# SPDX-License-Identifier: Apache-2.0
"""`jaxllm verify-resume`: what it runs, what it compares, and its verdict."""

import json
import shutil
import sys

import jax.numpy as jnp
import pytest
from runs import arguments, refused
from test_configs import FILES, verb

from jaxllm import verify_resume as verifying
from jaxllm.checkpoint import Checkpoints
from jaxllm.cli import main
from jaxllm.config import load_config, to_dict
from jaxllm.config.checks import resolve
from jaxllm.config.schema import flat
from jaxllm.errors import UserError
from jaxllm.verify_resume import compared, killed, prepared


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The files of a run folder that are compared."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    folder.mkdir()
    train = {"kind": "train", "step": 1, "loss": 2.5, "accuracy": 0.5, "step_seconds": 3.0}
    held = {"kind": "eval", "step": 2, "name": "wiki", "loss": "NaN"}
    lines = [train, train | {"step": 2}, held, {"kind": "goodput", "step": 2, "restarts": 0}]
    write(folder, "metrics.jsonl", lines)
    write(folder, "samples.jsonl", [{"step": 2, "prompt": "a", "text": "b", "time": 1.0}])
    (folder / "rows.bin").write_bytes(bytes(range(64)))
    save(folder, jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3))
    return folder


def write(folder, name, lines):
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def save(folder, kernel):
    with_kernel = {"step": jnp.int32(2), "opt_state": (jnp.ones(2), {"mu": kernel})}
    saves = Checkpoints(folder / "checkpoints")
    saves.save(2, with_kernel, {})
    saves.close()


@pytest.fixture
def resumed(straight, tmp_path):
    """A copy that differs in what two runs need not share."""
    shutil.copytree(straight, tmp_path / "resumed")
    file = tmp_path / "resumed" / "metrics.jsonl"
    text = file.read_text().replace('"step_seconds": 3.0', '"step_seconds": 4.0')
    file.write_text(text.replace('"restarts": 0', '"restarts": 1'))
    return tmp_path / "resumed"


def rows_of(straight, resumed):
    return {row.name: row for row in compared(straight, resumed, [2])}


def test_equal_runs_are_exact(straight, resumed, capsys):
    rows = rows_of(straight, resumed)
    counts = {"losses": 3, "other metrics": 2, "samples": 1, "hashes of the rows": 8}
    assert {name: row.count for name, row in rows.items()} == counts | {"checkpoint 2": 3}
    assert verifying._verdict([*rows.values()], 2) == 0
    assert "equals the uninterrupted one bit for bit" in capsys.readouterr().out


def test_each_difference_is_counted_and_named(straight, resumed, capsys):
    file = resumed / "metrics.jsonl"
    file.write_text(file.read_text().replace("2.5", "2.5000000000000004"))
    write(resumed, "samples.jsonl", [{"step": 2, "prompt": "a", "text": "c"}])
    (resumed / "rows.bin").write_bytes(bytes(range(63)) + b"\0")
    shutil.rmtree(resumed / "checkpoints")
    save(resumed, jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3).at[1, 1].set(4.5))
    rows = rows_of(straight, resumed)
    assert {name: len(row.different) for name, row in rows.items()} == {
        "losses": 2,
        "other metrics": 0,
        "samples": 1,
        "hashes of the rows": 1,
        "checkpoint 2": 1,
    }
    table = "\n".join(verifying._table([*rows.values()]))
    assert "losses: step 1, loss: 2.5, resumed 2.5000000000000004" in table
    assert "opt_state/1/mu: 1 of 6 values, by at most 0.5" in table
    assert verifying._verdict([*rows.values()], 2) == 1
    assert "differed before the kill, at checkpoint 2" in capsys.readouterr().out
    assert verifying._verdict([*rows.values(), verifying.Compared("checkpoint 1")], 1) == 1
    assert "equal at step 1 and differ after the resume" in capsys.readouterr().out


def test_a_line_that_is_missing_is_a_difference(straight, resumed):
    file = resumed / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    rows = rows_of(straight, resumed)
    assert rows["losses"].different == ["step 1, loss: 2.5, resumed None"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_the_runs_have_the_config_of_the_user(path, tmp_path):
    """But for when they log, save and end, and where; both read it from a file."""
    cfg, _ = load_config(verb(path), str(path))
    made, step = prepared(cfg, 3)
    stride = made.rl.updates if made.verb.online else 1
    assert step % stride == 0 and 3 <= step < 3 + stride
    assert (made.steps, made.save.every, made.save.keep, made.log.every) == (2 * step, step, 0, 1)
    before, after = (flat(to_dict(one)) for one in (resolve(cfg), made))
    changed = {key for key in after if after[key] != before[key]}
    assert changed <= {"steps", "overwrite", "log.every", "log.report_to", "log.progress"} | {
        *("save.every", "save.keep", "save.final", "eval.patience", "eval.min_delta")
    }
    (tmp_path / "run.json").write_text(json.dumps(to_dict(made), ensure_ascii=False))
    again, _ = load_config(verb(path), str(tmp_path / "run.json"))
    assert again == made


def python(code):
    return [sys.executable, "-c", code]


def test_a_run_is_killed_once_its_checkpoint_is_there(tmp_path):
    code = f"import os, time; os.makedirs('{tmp_path}/checkpoints/2'); time.sleep(900)"
    assert killed(python(code), tmp_path, 2, {}) == -9
    assert killed(python("raise SystemExit(3)"), tmp_path / "none", 2, {}) == 3


def test_a_run_that_fails_or_is_too_short_says_so(tmp_path, monkeypatch, capsys):
    log = tmp_path / "log"
    code = "import sys; print('jaxllm: error: no data', file=sys.stderr); sys.exit(2)"
    with pytest.raises(UserError, match="^no data$"):
        verifying._run(python(code), log, "the run")
    with pytest.raises(UserError, match="the run ended with status 1"):
        verifying._run(python("raise KeyError('k')"), log, "the run")
    assert "KeyError: 'k'" in capsys.readouterr().err
    with pytest.raises(UserError, match="ended 3 times before .* larger --after than 2"):
        verifying._kill(python(""), tmp_path / "run", 2, log)


def test_mistakes_are_reported_before_anything_runs(project, monkeypatch, capsys):
    args = arguments(project, "pretrain", "unused")
    refused(capsys, ["verify-resume", *args[1:]], "no objective")
    refused(capsys, ["verify-resume", *args, "--after", "0"], "--after", "from 1")
    refused(capsys, ["verify-resume", *args, "--seeds", "1"], "seeds")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    refused(capsys, ["verify-resume", *args], "runs of one process, and here are 2")
    assert not (project / "unused").exists()


SMALL = ("--data.max_length", "32", "--batch_size", "8", "--micro_batch_size", "8")
JUDGE = """
import random
def length(prompts, completions, **_):
    return [len(c) / 10 for c in completions]
def chance(prompts, completions, **_):
    return [random.random() for c in completions]
"""


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("command", "reward", "status", "verdict"),
    [
        ("sft", "", 0, "exact: the run resumed from step 2"),
        ("grpo", "length", 0, "exact: the run resumed from step 2"),
        ("grpo", "chance", 1, "not exact: the two runs differed before the kill"),
    ],
)
def test_a_run_is_killed_resumed_and_compared(project, command, reward, status, verdict, capsys):
    """Nothing is written to output_dir."""
    args = arguments(project, command, "unused", *SMALL)
    if reward:
        (project / "judge.py").write_text(JUDGE)
        sums = [{"prompt": f"{a} + {b} = "} for a in range(8) for b in range(8)]
        (project / "sums.jsonl").write_text("".join(json.dumps(s) + "\n" for s in sums))
        args[args.index("--data.train") + 1] = str(project / "sums.jsonl")
        args += ["--rl.rewards", f"{project}/judge.py:{reward}", "--rl.max_new_tokens", "8"]
        args += ["--rl.group_size", "4"]
    assert main(["verify-resume", *args, "--after", "2"]) == status
    said = capsys.readouterr().out
    assert verdict in said
    assert "checkpoint 4" in said and ("samples" in said) == bool(reward)
    assert not (project / "unused").exists()
