# SPDX-License-Identifier: Apache-2.0
"""The run folder: who may use it, and what a resumed run must share with what is in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxllm import dist
from jaxllm.config import DataSection, LogSection, OptimSection, Source, TrainConfig
from jaxllm.errors import UserError
from jaxllm.run import LOCK, RunFolder, check_same_data


@pytest.fixture
def cfg(tmp_path):
    return TrainConfig(
        output_dir=str(tmp_path / "run"),
        data=DataSection(train=(Source("a.txt"),)),
        optim=OptimSection(learning_rate=1e-3),
    )


def used(cfg):
    """A run folder that holds results."""
    RunFolder(cfg)
    os.makedirs(f"{cfg.output_dir}/checkpoints/10")
    return cfg.output_dir


def test_first_use_writes_the_config(cfg):
    assert not RunFolder(cfg).replaces
    with open(f"{cfg.output_dir}/config.json") as file:
        assert json.load(file)["optim"]["learning_rate"] == 1e-3
    assert sorted(os.listdir(cfg.output_dir)) == [LOCK, "config.json"]


HOLDER = """
import sys, time
from pathlib import Path
from jaxllm.run import Lock
lock = Lock.of(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_in_which_another_process_trains_is_refused(cfg, overwrite):
    """Until that process ends, even if it is killed."""
    used(cfg)
    cfg = replace(cfg, overwrite=overwrite)
    command = [sys.executable, "-c", HOLDER, cfg.output_dir]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        try:
            with pytest.raises(UserError, match=f"process {other.pid} on .* is training in "):
                RunFolder(cfg)
        finally:
            other.kill()
    run = RunFolder(cfg)
    again = RunFolder(cfg)  # of the same process
    run.claim()
    assert (run.path / LOCK).is_file() and again.replaces == overwrite


def test_another_runs_folder_is_refused_naming_the_keys(cfg):
    used(cfg)
    other = replace(cfg, seed=1, optim=OptimSection(learning_rate=2e-3))
    with pytest.raises(ValueError, match="seed was 0, is 1; optim.learning_rate was 0.001"):
        RunFolder(other)
    RunFolder(cfg)


def test_a_resumed_run_may_change_what_does_not_change_its_course(cfg):
    used(cfg)
    assert not RunFolder(
        replace(cfg, steps=100, micro_batch_size=2, log=LogSection(every=1))
    ).replaces
    assert not RunFolder(
        replace(cfg, model=replace(cfg.model, remat="none", loss_chunk=64))
    ).replaces


def test_a_resumed_run_may_wait_longer_but_not_judge_by_another_metric(cfg):
    used(cfg)
    assert not RunFolder(replace(cfg, eval=replace(cfg.eval, patience=3, min_delta=0.1))).replaces
    with pytest.raises(ValueError, match="eval.metric was 'loss', is 'accuracy'"):
        RunFolder(replace(cfg, eval=replace(cfg.eval, metric="accuracy")))


def test_a_folder_without_results_may_be_taken_over(cfg):
    RunFolder(cfg)
    RunFolder(replace(cfg, seed=1)).claim()
    with open(f"{cfg.output_dir}/metrics.jsonl", "w") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match="belongs to another run"):
        RunFolder(replace(cfg, seed=2))


def test_overwrite_empties_a_runs_folder(cfg):
    run = used(cfg)
    other = replace(cfg, seed=1, overwrite=True)
    folder = RunFolder(other)
    assert folder.replaces
    assert sorted(os.listdir(run)) == [LOCK, "checkpoints", "config.json"]  # nothing is deleted yet
    folder.claim()
    assert sorted(os.listdir(run)) == [LOCK, "config.json"]


def test_a_folder_that_is_a_link_is_emptied_not_removed(cfg, tmp_path):
    (tmp_path / "disk").mkdir()
    os.symlink(tmp_path / "disk", cfg.output_dir)
    used(cfg)
    RunFolder(replace(cfg, overwrite=True)).claim()
    assert sorted(os.listdir(tmp_path / "disk")) == [LOCK, "config.json"]


def test_a_folder_that_process_0_does_not_see_is_named(cfg, monkeypatch):
    """As where output_dir is on a disk of each host."""
    cfg = replace(cfg, cluster=replace(cfg.cluster, timeout=0.1))
    monkeypatch.setattr(dist, "is_main", lambda: False)
    with pytest.raises(ValueError, match="is not the folder that process 0 sees; share it"):
        RunFolder(cfg)


def test_a_disk_without_room_for_a_checkpoint_is_named_before_the_run(cfg, monkeypatch):
    usage = SimpleNamespace(total=10**9, used=10**9, free=100)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    state = {"x": jax.ShapeDtypeStruct((1000,), np.float32)}
    with pytest.raises(ValueError, match="disk full: a checkpoint takes"):
        RunFolder(cfg).claim(state)
    RunFolder(cfg).claim({"x": jax.ShapeDtypeStruct((25,), np.float32)})


def test_a_cache_in_the_run_folder_does_not_make_it_strange(cfg):
    """As when the data turn out to be wrong after they were read."""
    cfg = replace(cfg, data=replace(cfg.data, cache_dir=f"{cfg.output_dir}/cache"))
    RunFolder(cfg)
    os.makedirs(cfg.data.cache_dir)
    assert not RunFolder(cfg).replaces
    with pytest.raises(ValueError, match="overwrite would delete .*cache"):
        RunFolder(replace(cfg, overwrite=True))


def test_overwrite_does_not_delete_what_the_run_reads(cfg):
    run = used(cfg)
    os.makedirs(f"{run}/final")
    inside = replace(cfg, model=replace(cfg.model, path=f"{run}/final"), overwrite=True)
    with pytest.raises(ValueError, match="overwrite would delete .*final"):
        RunFolder(inside)


@pytest.mark.parametrize("pattern", ["run/d*/a.jsonl", "*/data/[a-z].jsonl", "**/?.jsonl"])
def test_overwrite_does_not_delete_data_that_a_pattern_names(cfg, tmp_path, pattern):
    run = used(cfg)
    os.makedirs(f"{run}/data")
    (tmp_path / "run" / "data" / "a.jsonl").touch()
    data = replace(cfg.data, train=(Source(str(tmp_path / pattern)),))
    with pytest.raises(UserError, match="overwrite would delete .*jsonl"):
        RunFolder(replace(cfg, data=data, overwrite=True))


def test_overwrite_does_not_delete_a_reward_model_that_the_run_reads(cfg):
    run = used(cfg)
    os.makedirs(f"{run}/final")
    inside = replace(cfg, rl=replace(cfg.rl, rewards=(f"{run}/final",)), overwrite=True)
    with pytest.raises(UserError, match="overwrite would delete .*final"):
        RunFolder(inside)


def manifest(content="1", **evals):
    source = {"path": "a.txt", "content": content, "examples": 3, "tokens": 9, "rows": 2}
    sets = {name: {"sources": [source | {"path": name, "content": c}]} for name, c in evals.items()}
    return {"tokenizer": "t", "train": {"sources": [source]}, "eval": sets}


@pytest.mark.parametrize(
    ("now", "named"),
    [
        (manifest("2", b="1"), "a.txt"),
        (manifest(b="2"), "b"),
        (manifest(b="1", c="1"), "c"),
        (manifest(), "b"),
        (manifest(b="1") | {"tokenizer": "u"}, "the tokenizer"),
        (manifest(b="1") | {"train": {"sources": []}}, "a.txt"),
    ],
)
def test_a_run_is_not_resumed_on_other_training_or_evaluation_data(tmp_path, now, named):
    check_same_data(tmp_path, now)  # there is no record yet
    (tmp_path / "data.json").write_text(json.dumps(manifest(b="1")))
    check_same_data(tmp_path, manifest(b="1"))
    with pytest.raises(UserError, match=rf"^{named} changed since"):
        check_same_data(tmp_path, now)


def test_resume_off_does_not_write_over_checkpoints(cfg):
    used(cfg)
    with pytest.raises(ValueError, match="has checkpoints; resume them"):
        RunFolder(replace(cfg, resume=False))


@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
def test_a_folder_that_is_no_run_is_never_emptied(cfg, name):
    """A HF directory has a config.json too."""
    os.makedirs(cfg.output_dir)
    file = f"{cfg.output_dir}/{name}"
    with open(file, "w") as stream:
        json.dump({"model_type": "llama"}, stream)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="has files that are not from a run"):
            RunFolder(replace(cfg, overwrite=overwrite))
    assert os.path.exists(file)


def test_an_output_dir_that_is_a_file_is_refused(cfg):
    with open(cfg.output_dir, "w"):
        pass
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(cfg)
