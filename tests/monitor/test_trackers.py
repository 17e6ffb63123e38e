# SPDX-License-Identifier: Apache-2.0
"""The trackers' own packages, without a server: what a run sends them is where its line says."""

import glob
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
# A run of one step, which is then resumed. The exit status is 0 if the tracker took everything.
RUN = """
import sys
from jaxllm.monitor.metrics import Metrics
run, tracker = sys.argv[1:]
for step in (1, 2):
    names = {"name": "first", "project": "papers"}
    metrics = Metrics(run, (tracker,), {"optim": {"b1": 0.5}}, step - 1, **names)
    metrics.write("train", step, loss=1.5, mfu=None)
    metrics.write("eval", step, name="books (1)", loss=1.25)
    rows = [{"prompt": "p", "text": f"answer {step}", "rewards": {"length": 0.5}}]
    metrics.samples(step, rows)
    metrics.close()
"""
# Of each tracker: the files that contain the logged values, and texts in them.
FILES = {
    "wandb": ("run/wandb/offline-run-*/**", ["train/loss", "books (1)/loss", "answer 2"]),
    "swanlab": ("run/swanlog/run-*/**", ["train/loss", "books (1)/loss", "answer 2"]),
    "trackio": ("trackio/**", ["train/loss", "books (1)/loss", "answer 2"]),
    "mlflow": ("run/mlflow/**", ["train/loss", "books _1_/loss", "answer 2", "optim.b1"]),
}
# Of each: the printed command, a command that tries it without a server, and its answer.
COMMANDS = {
    "wandb": ("sync {run}/wandb/offline-run-*", "sync --dry-run {run}/wandb/offline-run-*", "run-"),
    "swanlab": ("sync {run}/swanlog/run-*", "sync {run}/swanlog/run-*", "Please login first"),
    "trackio": ("show --project papers", "list runs --project papers", "first-"),
}


@pytest.fixture(params=FILES)
def tracker(request, tmp_path_factory):
    """(the name of a tracker, the folder of its package; installs it if it is missing)"""
    name = request.param
    if find_spec(name):
        return name, None
    if name == "mlflow":
        pytest.skip("mlflow takes 900 MB; install it to test it")
    folder = tmp_path_factory.mktemp(name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), name]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{name} cannot be installed: {done.stderr.strip()[-200:]}")
    return name, folder


def test_a_tracker_keeps_what_it_gets_where_the_run_says(tracker, tmp_path):
    name, package = tracker
    run, (files, texts) = tmp_path / "run", FILES[name]
    paths = [str(path) for path in (ROOT, package) if path]
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MLFLOW_", "SWANLAB"))
    }
    env |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    env |= {"TRACKIO_DIR": str(tmp_path / "trackio")}

    def said_by(*command):
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)

    done = said_by(sys.executable, "-c", RUN, str(run), name)
    assert done.returncode == 0 and "is disabled" not in done.stderr, done.stderr
    found = [Path(file) for file in glob.glob(str(tmp_path / files), recursive=True)]
    kept = b"".join(file.read_bytes() for file in found if file.is_file())
    assert not [text for text in texts if text.encode() not in kept]
    if name in COMMANDS:
        printed, tried, answer = (text.format(run=run) for text in COMMANDS[name])
        assert f"`{name} {printed}`" in done.stderr
        words = [match for word in tried.split() for match in glob.glob(word) or [word]]
        program = str(package / "bin" / name) if package else name
        told = said_by(sys.executable, program, *words) if package else said_by(program, *words)
        assert re.search(answer, told.stdout + told.stderr), told
