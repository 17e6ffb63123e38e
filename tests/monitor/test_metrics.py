# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl is valid JSON without a repeated step; a failing tracker never stops a run."""

import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.monitor import metrics as module
from jaxllm.monitor.metrics import Metrics


def lines(file):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(x, parse_constant=refuse) for x in file.read_text().splitlines()]


class Recorder:
    """A tracker that records its calls and fails at step 13."""

    def __init__(self, run, config, step):
        self.calls, self.closed = [], False
        Recorder.last = self

    def write(self, kind, step, numbers):
        if step == 13:
            raise ConnectionError("no route to host\nlong trace")
        self.calls.append((kind, step, numbers))

    def close(self):
        self.closed = True


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(module.TRACKERS, "wandb", Recorder)
    return Recorder


# ---- files


def test_one_json_object_a_line(tmp_path):
    metrics = Metrics(tmp_path / "run")
    metrics.write("train", 10, loss=2.5, mfu=None, tokens=np.int64(7), grad_norm=jnp.float32(0.5))
    metrics.write("eval", 10, name="held-out", loss=np.float32(2), tokens=jnp.bfloat16(3))
    metrics.close()
    assert lines(tmp_path / "run" / "metrics.jsonl") == [
        {"kind": "train", "step": 10, "loss": 2.5, "mfu": None, "tokens": 7, "grad_norm": 0.5},
        {"kind": "eval", "step": 10, "name": "held-out", "loss": 2.0, "tokens": 3.0},
    ]


@pytest.mark.parametrize("make", [float, np.float32, jnp.float32, lambda x: np.array(float(x))])
def test_numbers_that_are_not_finite_are_written_as_valid_json(tmp_path, make):
    metrics = Metrics(tmp_path)
    metrics.write("train", 1, loss=make("nan"), a=[make("inf")], b={"c": make("-inf")})
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line["loss"] == "NaN"
    assert line["a"] == ["Infinity"]
    assert line["b"] == {"c": "-Infinity"}
    assert float(line["a"][0]) == float("inf")


def test_resuming_drops_lines_after_the_checkpoint(tmp_path):
    metrics = Metrics(tmp_path)
    for step in range(0, 50, 10):
        metrics.write("train", step, loss=1.0)
        metrics.sample(step, prompt="a", text="line\u2028separator \u4f60\u597d")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "ste')  # the run was killed here
    metrics = Metrics(tmp_path, resume_step=20)
    metrics.write("train", 30, loss=2.0)
    found = lines(tmp_path / "metrics.jsonl")
    assert [(x["step"], x["loss"]) for x in found] == [(0, 1), (10, 1), (20, 1), (30, 2)]
    samples = (tmp_path / "samples.jsonl").read_text().strip().split("\n")
    assert [json.loads(x)["step"] for x in samples] == [0, 10, 20]
    assert "\u4f60\u597d" in samples[0]


def test_a_pending_evaluation_is_written_once(tmp_path):
    """The run was killed after it had evaluated the checkpoint that it resumes from."""
    metrics = Metrics(tmp_path)
    for step in (10, 20):
        metrics.sample(step, prompt="a", text="b", reward=1.0)  # by a rollout
        metrics.write("train", step, loss=1.0)
        metrics.write("eval", step, loss=1.0)
        metrics.sample(step, prompt="a", text="b")
    for pending, kept in ((False, ["train", "eval"]), (True, ["train"])):
        Metrics(tmp_path, resume_step=20, eval_pending=pending)
        found = [x["kind"] for x in lines(tmp_path / "metrics.jsonl")]
        assert found == ["train", "eval", *kept]
        assert len(lines(tmp_path / "samples.jsonl")) == 2 + len(kept)


def test_a_new_run_starts_an_empty_file(tmp_path):
    Metrics(tmp_path).write("eval", 0, loss=1.0)
    Metrics(tmp_path).write("eval", 0, loss=2.0)
    assert [x["loss"] for x in lines(tmp_path / "metrics.jsonl")] == [2.0]


def test_manifest_is_data_json(tmp_path):
    Metrics(tmp_path).manifest({"tokens": np.int64(5), "share": float("nan")})
    assert json.loads((tmp_path / "data.json").read_text()) == {"tokens": 5, "share": "NaN"}


def test_only_process_0_writes(tmp_path, monkeypatch, recorder):
    monkeypatch.setattr("jaxllm.dist.index", lambda: 1)
    metrics = Metrics(tmp_path, report_to=("wandb",))
    metrics.write("train", 1, loss=1.0)
    metrics.sample(1, text="")
    metrics.manifest({})
    metrics.close()
    assert not metrics.trackers
    assert not any(tmp_path.iterdir())


# ---- trackers


def test_trackers_get_numbers_only(tmp_path, recorder):
    metrics = Metrics(tmp_path, report_to=("wandb",))
    metrics.write("train", 1, loss=1.5, mfu=None, note="text", grad_norm=float("inf"))
    metrics.write("eval", 1, name="books", loss=np.float32(2))
    metrics.close()
    expected = [
        ("train", 1, {"loss": 1.5, "grad_norm": float("inf")}),
        ("eval/books", 1, {"loss": 2.0}),
    ]
    assert recorder.last.calls == expected
    assert recorder.last.closed


def test_a_tracker_that_fails_is_reported_once_and_disabled(tmp_path, recorder, capsys):
    metrics = Metrics(tmp_path, report_to=("wandb",))
    for step in (12, 13, 14):
        metrics.write("train", step, loss=1.0)
    metrics.close()
    assert capsys.readouterr().err == "jaxllm: wandb is disabled: no route to host\n"
    assert [call[1] for call in recorder.last.calls] == [12]
    assert len(lines(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboardX")])
def test_a_tracker_that_is_not_installed_says_what_to_install(
    tmp_path, monkeypatch, capsys, name, package
):
    monkeypatch.setitem(sys.modules, package, None)
    Metrics(tmp_path, report_to=(name,)).write("train", 1, loss=1.0)
    error = capsys.readouterr().err
    assert error.startswith(f"jaxllm: {name} is disabled")
    assert f"pip install 'jaxllm[{name}]'" in error


def test_trackers_are_imported_only_when_asked_for(tmp_path):
    Metrics(tmp_path).write("train", 1, loss=1.0)
    assert "wandb" not in sys.modules
    assert "tensorboardX" not in sys.modules


def test_an_unknown_tracker_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="'mlflow' is unknown; choose from wandb, tensorboard"):
        Metrics(tmp_path, report_to=("mlflow",))


@pytest.mark.parametrize(
    ("environment", "logged_in", "mode"),
    [(None, False, "offline"), (None, True, "online"), ("disabled", True, "disabled")],
)
def test_wandb_is_offline_unless_logged_in_and_a_resumed_run_keeps_its_id(
    tmp_path, monkeypatch, environment, logged_in, mode
):
    inits, logged = [], []
    session = types.SimpleNamespace(
        log=logged.append, define_metric=lambda *_, **__: None, finish=lambda: None
    )
    fake = types.SimpleNamespace(
        login=lambda **_: logged_in,
        init=lambda **keys: (inits.append(keys), session)[1],
        Settings=lambda **keys: keys,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    for step in (1, 2):
        metrics = Metrics(tmp_path, ("wandb",), {"seed": 0}, resume_step=step - 1)
        metrics.write("train", step, loss=1.0)
        metrics.close()
    assert [x["mode"] for x in inits] == [mode] * 2
    assert inits[0]["id"] == inits[1]["id"]
    assert inits[0]["config"] == {"seed": 0}
    assert logged == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 1.0}]


def test_tensorboard_writes_event_files(tmp_path):
    pytest.importorskip("tensorboardX")
    metrics = Metrics(tmp_path, report_to=("tensorboard",))
    metrics.write("train", 1, loss=1.0)
    assert "tensorboard" in metrics.trackers
    metrics.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    ("log", "wanted"),
    [
        ({"run_name": "first", "project": "mine"}, ("first", "mine")),
        ({"run_name": None, "project": None}, ("run", "jaxllm")),
    ],
)
def test_wandb_has_the_name_and_project_of_the_config(tmp_path, monkeypatch, log, wanted):
    inits = []
    session = types.SimpleNamespace(define_metric=lambda *_, **__: None, finish=lambda: None)
    fake = types.SimpleNamespace(
        init=lambda **keys: (inits.append(keys), session)[1], Settings=lambda **keys: keys
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    Metrics(tmp_path / "run", ("wandb",), {"log": log}).close()
    assert (inits[0]["name"], inits[0]["project"]) == wanted
