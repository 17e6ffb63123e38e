# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl is valid, has no step twice and hides nothing; no tracker stops a run."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxllm.monitor import metrics as module
from jaxllm.monitor.flops import Flops
from jaxllm.monitor.metrics import Meter, Metrics, Progress, track


def lines(file):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(x, parse_constant=refuse) for x in file.read_text().splitlines()]


class Recorder:
    """A tracker that remembers, and fails at `fails`."""

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
def test_numbers_that_are_not_finite_are_shown_and_are_valid_json(tmp_path, make):
    metrics = Metrics(tmp_path)
    metrics.write("train", 1, loss=make("nan"), a=[make("inf")], b={"c": make("-inf")})
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line["loss"] == "NaN"
    assert line["a"] == ["Infinity"]
    assert line["b"] == {"c": "-Infinity"}
    assert float(line["a"][0]) == float("inf")


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
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


def test_a_pending_evaluation_is_there_once(tmp_path):
    """Of a run that was killed after it had made up for the evaluation of its checkpoint."""
    metrics = Metrics(tmp_path)
    for step in (10, 20):
        metrics.sample(step, prompt="a", text="b", reward=1.0)  # of a rollout
        metrics.write("train", step, loss=1.0)
        metrics.write("eval", step, loss=1.0)
        metrics.sample(step, prompt="a", text="b")
    for pending, kept in ((False, ["train", "eval"]), (True, ["train"])):
        Metrics(tmp_path, resume_step=20, eval_pending=pending)
        found = [x["kind"] for x in lines(tmp_path / "metrics.jsonl")]
        assert found == ["train", "eval", *kept]
        assert len(lines(tmp_path / "samples.jsonl")) == 2 + len(kept)


def test_a_run_from_the_start_begins_an_empty_file(tmp_path):
    Metrics(tmp_path).write("eval", 0, loss=1.0)
    Metrics(tmp_path).write("eval", 0, loss=2.0)
    assert [x["loss"] for x in lines(tmp_path / "metrics.jsonl")] == [2.0]


def test_manifest_is_data_json(tmp_path):
    Metrics(tmp_path).manifest({"tokens": np.int64(5), "share": float("nan")})
    assert json.loads((tmp_path / "data.json").read_text()) == {"tokens": 5, "share": "NaN"}


def test_only_process_0_writes(tmp_path, monkeypatch, recorder):
    monkeypatch.setattr(module.jax, "process_index", lambda: 1)
    metrics = Metrics(tmp_path, report_to=("wandb",))
    metrics.write("train", 1, loss=1.0)
    metrics.sample(1, text="")
    metrics.manifest({})
    metrics.close()
    assert not metrics.trackers
    assert not any(tmp_path.iterdir())


# ---- trackers


def test_trackers_get_the_numbers_alone(tmp_path, recorder):
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


def test_a_tracker_that_fails_is_named_once_and_left_out(tmp_path, recorder, capsys):
    metrics = Metrics(tmp_path, report_to=("wandb",))
    for step in (12, 13, 14):
        metrics.write("train", step, loss=1.0)
    metrics.close()
    assert capsys.readouterr().err == "jaxllm: wandb is left out: no route to host\n"
    assert [call[1] for call in recorder.last.calls] == [12]
    assert len(lines(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboardX")])
def test_a_tracker_that_is_not_installed_says_what_to_install(
    tmp_path, monkeypatch, capsys, name, package
):
    monkeypatch.setitem(sys.modules, package, None)
    Metrics(tmp_path, report_to=(name,)).write("train", 1, loss=1.0)
    error = capsys.readouterr().err
    assert error.startswith(f"jaxllm: {name} is left out")
    assert f"pip install 'jaxllm[{name}]'" in error


def test_trackers_are_imported_only_when_asked_for(tmp_path):
    Metrics(tmp_path).write("train", 1, loss=1.0)
    assert "wandb" not in sys.modules
    assert "tensorboardX" not in sys.modules


def test_an_unknown_tracker_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="'mlflow': known are wandb, tensorboard"):
        Metrics(tmp_path, report_to=("mlflow",))


@pytest.mark.parametrize(
    ("environment", "logged_in", "mode"),
    [(None, False, "offline"), (None, True, "online"), ("disabled", True, "disabled")],
)
def test_wandb_is_offline_unless_logged_in_and_goes_on_as_one_run(
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


# ---- what a line holds


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def step_of(tokens, learned=0.0):
    ones = {name: (np.float32(1), np.float32(1)) for name in ("loss", "grad_norm")}
    return ones | {"tokens": (np.float32(tokens), 0), "learned": (np.float32(learned), 0)}


def test_only_training_is_timed(clock):
    compiling = "/jax/core/compile/backend_compile_duration"
    with Meter({}, 0.0) as meter:
        with meter.paused():
            clock[0] += 100  # the step is compiled
            jax.monitoring.record_event_duration_secs(compiling, 99.0)  # within that
        clock[0] += 30  # a rollout, 28 of which its programs were compiled
        jax.monitoring.record_event_duration_secs(compiling, 28.0)
        meter.add(1, step_of(50))
        line = meter.line()
        assert (line["step_seconds"], line["tokens_per_second"]) == (2.0, 25.0)
        meter.add(2, step_of(50))
        clock[0] += 4
        with meter.paused():
            clock[0] += 60
            assert meter.seconds == 4.0  # what a checkpoint keeps
        assert meter.line()["step_seconds"] == 4.0
    clock[0] += 5
    jax.monitoring.record_event_duration_secs(compiling, 3.0)  # nobody listens any more
    assert meter.seconds == 5.0


def test_a_line_of_a_resumed_run_is_of_all_its_steps(clock):
    straight, killed = Meter({}, 0.0), Meter({}, 0.0)
    for meter in (straight, killed):
        clock[0] += 2
        meter.add(1, step_of(10))
        meter.read()
    resumed = Meter(killed.sums, 2.0)
    resumed.add(2, step_of(30))
    straight.add(2, step_of(30))
    assert resumed.line()["tokens"] == straight.line()["tokens"] == 40


def test_mfu_is_the_flops_of_real_and_of_learned_tokens_over_the_peak(clock):
    meter = Meter({}, 0.0, peak=1000.0)
    meter.add(1, step_of(10, learned=4))
    clock[0] += 2
    meter.flops = Flops(layers=50.0, head=100.0)
    line = meter.line()
    assert line["mfu"] == (10 * 50 + 4 * 100) / (2 * 1000)
    assert "learned" not in line
    meter = Meter({}, 0.0)  # a device whose peak is not known
    meter.flops = Flops(1.0, 1.0)
    meter.add(1, step_of(10))
    assert meter.line()["mfu"] is None


# ---- the terminal


def numbers(**more):
    return {"loss": 2.5, "tokens_per_second": 1234.5, "mfu": None, "memory": 3.21} | more


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
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


def test_on_a_terminal_progress_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(
        "rich.console.Console", lambda **keys: Console(**keys, force_terminal=True, width=120)
    )
    with Progress(100, start=20) as progress:
        assert progress.bar.tasks[0].description == "compiling"
        progress.compiled(2.0)
        assert progress.bar.tasks[0].description == "compiled the step in 2.0 s"
        progress.update(50, **numbers())
        progress.say("[eval] loss 2")
        assert progress.bar.tasks[0].completed == 50
    shown = capsys.readouterr().err
    assert "loss 2.5000" in shown
    assert "[eval] loss 2" in shown
    assert "\x1b[" in shown


def test_compiling_is_told_off_a_terminal_and_where_the_bar_is_off(capsys, monkeypatch):
    with Progress(10) as progress, Progress(10, enabled=False) as off:
        progress.compiling()
        progress.compiled(12.34)
        off.compiled(0.06)
    first, *after = capsys.readouterr().err.splitlines()
    assert first == "compiling the step…"
    assert after == ["compiled the step in 12.3 s", "compiled the step in 0.1 s"]
    monkeypatch.setattr(module.jax, "process_index", lambda: 1)
    Progress(10).compiling()
    Progress(10).compiled(1.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("enabled", "process"), [(False, 0), (True, 1)])
def test_progress_is_silent_when_off_and_in_other_processes(capsys, monkeypatch, enabled, process):
    monkeypatch.setattr(module.jax, "process_index", lambda: process)
    with Progress(10, enabled=enabled) as progress:
        progress.update(10, **numbers())
        progress.say("x")
    assert capsys.readouterr() == ("", "")


def test_track_yields_everything_and_reports_without_a_terminal(capsys, monkeypatch):
    now = iter(range(0, 1000, 6))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    assert list(track(range(5), "tokenizing", 5)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == "tokenizing: 1 of 5\ntokenizing: 3 of 5\n"
