# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl is valid JSON without a repeated step; a failing tracker never stops a run."""

import json
import struct
import sys
import threading
import time
import tomllib
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock, call

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import DataSection, LogSection, ModelSection, Source, TrainConfig
from jaxllm.config.checks import check, check_run
from jaxllm.config.fields import TRACKER_PACKAGES, trackers
from jaxllm.monitor import metrics as module
from jaxllm.monitor.metrics import Metrics
from jaxllm.paths import as_path

ROOT = Path(__file__).parents[2]


def lines(file):
    """The lines of a file without their times."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    found = [json.loads(x, parse_constant=refuse) for x in file.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in found]


class Recorder:
    """A tracker that records its calls and fails at step 13."""

    def __init__(self, run):
        self.calls, self.closed, self.note = [], False, f"in {run.shown}"
        Recorder.last = self

    def write(self, kind, step, numbers):
        if step == 13:
            raise ConnectionError("no route to host\nlong trace")
        self.calls.append((kind, step, numbers))

    def samples(self, step, columns):
        self.calls.append((step, columns))

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


def test_lines_have_the_time_in_seconds(tmp_path, recorder):
    before = time.time()
    metrics = Metrics(tmp_path, report_to=("wandb",))
    metrics.write("train", 1, loss=1.0)
    metrics.write("eval", 1, name="a", loss=1.0)
    metrics.close()
    times = [json.loads(x)["time"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert before - 0.001 <= times[0] <= times[1] <= time.time() + 0.001
    assert [call[2] for call in recorder.last.calls] == [{"loss": 1.0}] * 2  # trackers have theirs


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
        metrics.samples(step, [{"prompt": "a", "text": "line\u2028separator \u4f60\u597d"}])
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
        metrics.samples(step, [{"prompt": "a", "text": "b", "reward": 1.0}])  # by a rollout
        metrics.write("train", step, loss=1.0)
        metrics.write("eval", step, loss=1.0)
        metrics.samples(step, [{"prompt": "a", "text": "b"}])
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
    metrics.samples(1, [{"text": ""}])
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
    said = f"wandb: in {tmp_path}\njaxllm: wandb is disabled: no route to host\n"
    assert capsys.readouterr().err == said
    assert [call[1] for call in recorder.last.calls] == [12]
    assert len(lines(tmp_path / "metrics.jsonl")) == 3


def test_a_slow_tracker_does_not_hold_up_the_run(tmp_path, recorder, monkeypatch):
    answers, write = threading.Event(), recorder.write
    monkeypatch.setattr(recorder, "write", lambda *args: answers.wait(10) and write(*args))
    metrics = Metrics(tmp_path, report_to=("wandb",))
    for step in (1, 2):
        metrics.write("train", step, loss=1.0)
    metrics.samples(2, [{"prompt": "a", "text": "b"}])
    answers.set()
    metrics.close()  # waits for them
    assert [call[-2] for call in recorder.last.calls] == [1, 2, 2] and recorder.last.closed


def test_a_tracker_that_never_answers_is_given_up(tmp_path, recorder, monkeypatch, capsys):
    monkeypatch.setattr(recorder, "write", lambda *args: threading.Event().wait())
    monkeypatch.setattr("jaxllm.monitor.metrics.PATIENCE", 0.2)
    metrics = Metrics(tmp_path, report_to=("wandb",))
    for step in range(40):  # more than may wait
        metrics.write("train", step, loss=1.0)
    metrics.close()
    said = capsys.readouterr().err.splitlines()
    assert said.count("jaxllm: wandb is disabled: no answer for 0 s") == 1
    assert len(lines(tmp_path / "metrics.jsonl")) == 40
    metrics = Metrics(tmp_path, report_to=("wandb",))
    metrics.write("train", 41, loss=1.0)
    metrics.close()  # nothing waits behind it
    assert "wandb is disabled" in capsys.readouterr().err


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
        Table=lambda **keys: keys,
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


def events_of(folder):
    """{tag: [(step, value)]} of the scalars and texts in TensorBoard's files."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in sorted(folder.glob("events*")):
        data = file.read_bytes()
        while data:  # length, its checksum, an event, its checksum
            size = struct.unpack("<Q", data[:8])[0]
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            for value in event.summary.value:
                text = b"".join(value.tensor.string_val).decode()
                seen = text if value.HasField("tensor") else value.simple_value
                found.setdefault(value.tag, []).append((event.step, seen))
    return found


def write_everything(tmp_path, tracker):
    """What a run sends to a tracker."""
    metrics = Metrics(tmp_path / "run", (tracker,), CONFIG, name="first", project="papers")
    metrics.write("train", 1, loss=1.5, mfu=None)
    metrics.write("eval", 1, name="books", loss=1.25)
    scores = {"length": 0.5}
    metrics.samples(1, [{"prompt": f"p{i}", "text": f"t{i}", "rewards": scores} for i in range(2)])
    assert tracker in metrics.trackers
    metrics.close()


CONFIG = {"seed": 0, "optim": {"b1": 0.5}}


def test_tensorboard_has_numbers_by_kind_and_set_and_samples(tmp_path, capsys):
    pytest.importorskip("tensorboardX")
    write_everything(tmp_path, "tensorboard")
    folder = tmp_path / "run" / "tensorboard"
    assert capsys.readouterr().err == (
        f"tensorboard: look at it with `tensorboard --logdir {folder}`\n"
    )
    events = events_of(folder)
    assert events["train/loss"] == [(1, 1.5)] and events["eval/books/loss"] == [(1, 1.25)]
    ((step, text),) = events["samples/text_summary"]
    assert step == 1 and all(word in text for word in ("p0", "t0", "p1", "t1"))


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a module in the place of a tracker's package; it records its calls."""

    def put(*names):
        module = MagicMock()
        for name in names:
            monkeypatch.setitem(sys.modules, name, module)
        return module

    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return put


def test_wandb_gets_samples_as_a_table(tmp_path, stand_in, capsys):
    wandb = stand_in("wandb")
    wandb.login.return_value = False
    write_everything(tmp_path, "wandb")
    made = wandb.init.call_args.kwargs
    assert (made["project"], made["name"], made["mode"]) == ("papers", "first", "offline")
    columns, rows = ["prompt", "text", "rewards"], [["p0", "t0", '{"length": 0.5}']]
    table = wandb.Table.call_args.kwargs
    assert table["columns"] == columns and table["data"][:1] == rows and len(table["data"]) == 2
    logged = [call.args[0] for call in wandb.init.return_value.log.call_args_list]
    assert logged[-1] == {"step": 1, "samples": wandb.Table.return_value}
    folder = tmp_path / "run" / "wandb"
    said = f"wandb: offline in {folder}; upload it with `wandb sync {folder}/offline-run-*`\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("given", "key", "mode"),
    [("online", None, "offline"), ("online", "k", "online"), ("disabled", None, "disabled")],
)
def test_swanlab_is_offline_unless_logged_in(tmp_path, stand_in, capsys, given, key, mode):
    swanlab = stand_in("swanlab")
    swanlab.Settings.return_value = types.SimpleNamespace(api_key=key, mode=given)
    for _ in range(2):
        write_everything(tmp_path, "swanlab")
    first, second = (call.kwargs for call in swanlab.init.call_args_list)
    assert first == second and first["resume"] == "allow" and len(first["id"]) == 16
    assert (first["project"], first["name"], first["mode"]) == ("papers", "first", mode)
    assert first["config"] == CONFIG and first["log_dir"] == str(tmp_path / "run" / "swanlog")
    run = swanlab.init.return_value
    numbers, evals, samples = run.log.call_args_list[:3]
    assert numbers == call({"train/loss": 1.5}, step=1)
    assert evals == call({"eval/books/loss": 1.25}, step=1)
    assert samples == call({"samples": [swanlab.Text.return_value] * 2}, step=1)
    assert swanlab.Text.call_args_list[:2] == [call("t0", caption="p0"), call("t1", caption="p1")]
    run.finish.assert_called()
    said = capsys.readouterr().err
    assert ("upload it with `swanlab sync " in said) is (mode == "offline")


def test_trackio_logs_to_this_machine(tmp_path, stand_in, capsys):
    trackio = stand_in("trackio")
    trackio.utils.TRACKIO_DIR = "/cache/trackio"
    trackio.init.side_effect = lambda **_: print("* Trackio project") or trackio.run
    trackio.finish.side_effect = lambda: print("* Run finished")
    write_everything(tmp_path, "trackio")
    name = (tmp_path / "run" / "trackio-id.txt").read_text()
    assert name.startswith("first-") and len(name) == len("first-") + 4
    keys = {"project": "papers", "name": name, "config": CONFIG, "resume": "allow"}
    assert trackio.init.call_args == call(**keys, embed=False)
    assert trackio.run.log.call_args_list == [
        call({"train/loss": 1.5}, step=1),
        call({"eval/books/loss": 1.25}, step=1),
        call({"samples": trackio.Table.return_value}, step=1),
    ]
    trackio.finish.assert_called_once_with()
    shown = capsys.readouterr()
    assert shown.out == ""
    look = "look at it with `trackio show --project papers`"
    assert shown.err == f"trackio: in /cache/trackio; {look}\n"


@pytest.mark.parametrize("uri", [None, "https://mlflow.example"])
def test_mlflow_logs_to_the_run_folder_or_a_server(tmp_path, stand_in, monkeypatch, capsys, uri):
    mlflow = stand_in("mlflow", "mlflow.entities")
    client = mlflow.MlflowClient.return_value
    client.get_experiment_by_name.return_value = None
    client.create_run.return_value.info.run_id = "0123"
    mlflow.Metric.side_effect = lambda *args: args
    mlflow.Param.side_effect = lambda *args: args
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for _ in range(2):  # the second start resumes the first one's run
        write_everything(tmp_path, "mlflow")
    place = tmp_path / "run" / "mlflow"
    database = f"sqlite:///{place}/mlflow.db"
    assert mlflow.MlflowClient.call_args == call(uri or database)
    artifacts = None if uri else str(place / "artifacts")
    client.create_experiment.assert_called_once_with("papers", artifact_location=artifacts)
    client.create_run.assert_called_once()
    assert client.create_run.call_args.kwargs["run_name"] == "first"
    params, *rest = client.log_batch.call_args_list
    assert params == call("0123", params=[("seed", "0"), ("optim.b1", "0.5")])
    (((name, value, _, step),),) = [one.kwargs["metrics"] for one in rest[1:2]]
    assert (name, value, step) == ("eval/books/loss", 1.25, 1)
    columns = {"step": [1, 1], "prompt": ["p0", "p1"], "text": ["t0", "t1"]}
    columns["rewards"] = ['{"length": 0.5}'] * 2
    run, table, file = client.log_table.call_args.args
    assert (run, file) == ("0123", "samples.json") and table == columns
    client.set_terminated.assert_called_with("0123")
    assert (f"mlflow ui --backend-store-uri {database}" in capsys.readouterr().err) is (uri is None)


def test_trackio_keeps_runs_of_one_name_apart(tmp_path, stand_in):
    trackio = stand_in("trackio")
    for folder in ("a", "b", "a"):
        Metrics(tmp_path / folder / "sft", ("trackio",)).close()
    first, other, again = (made.kwargs["name"] for made in trackio.init.call_args_list)
    assert first == again != other


def test_mlflow_needs_a_server_for_a_run_in_a_bucket(tmp_path, stand_in):
    stand_in("mlflow", "mlflow.entities")
    session = module.Session(tmp_path, as_path("gs://b/run"), "run", "p", {}, 0)
    with pytest.raises(ValueError, match="set MLFLOW_TRACKING_URI"):
        module.TRACKERS["mlflow"](session)
    note = module._offline("gs://b/run/wandb", "wandb sync {}/offline-run-*", "offline")
    assert "copy it to a disk, then `wandb sync COPY/offline-run-*`" in note


def test_a_name_that_mlflow_does_not_take_is_written_with_underscores(tmp_path, stand_in):
    mlflow = stand_in("mlflow", "mlflow.entities")
    mlflow.MlflowClient.return_value.create_run.return_value.info.run_id = "0123"
    metrics = Metrics(tmp_path, ("mlflow",))
    metrics.write("eval", 1, name="a (1)", loss=1.0)
    metrics.close()
    assert mlflow.Metric.call_args.args[0] == "eval/a _1_/loss"


def test_a_run_needs_the_packages_of_its_trackers(monkeypatch):
    cfg = TrainConfig(
        model=ModelSection(path="m"),
        data=DataSection(train=(Source("d.txt"),)),
        log=LogSection(report_to=("mlflow",)),
    )
    check(cfg)  # a plan does not need it
    empty = types.ModuleType("mlflow")
    empty.__spec__ = ModuleSpec("mlflow", None)  # a folder ./mlflow
    for found in (None, empty):
        monkeypatch.setitem(sys.modules, "mlflow", found)
        with pytest.raises(ValueError, match=r"not installed: mlflow; pip install 'jaxllm\[mlf"):
            check_run(cfg)
    empty.__spec__ = ModuleSpec("mlflow", None, origin="mlflow/__init__.py")
    monkeypatch.setitem(sys.modules, "mlflow", empty)
    check_run(cfg)
    for name in set(TRACKER_PACKAGES.values()) - {"mlflow"}:
        monkeypatch.setitem(sys.modules, name, None)
    assert trackers("all") == ["mlflow"]


def test_every_tracker_is_an_extra_and_has_a_row():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(TRACKER_PACKAGES) == set(module.TRACKERS)
    for name, package in TRACKER_PACKAGES.items():
        (line,) = project["optional-dependencies"][name]
        assert line.startswith(package)
