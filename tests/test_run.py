# SPDX-License-Identifier: Apache-2.0
"""The run folder: who may use it, and what a resumed run must share with what is in it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxllm import dist
from jaxllm.checkpoint import changed_file
from jaxllm.config import DataSection, LogSection, OptimSection, Source, TrainConfig
from jaxllm.errors import UserError, mistake
from jaxllm.run import LOCK, RunFolder


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


def damaged(cfg, text=""):
    """A run folder with results and a damaged config.json."""
    run = used(cfg)
    with open(f"{run}/config.json", "w") as file:
        file.write(text)
    return run


@pytest.mark.parametrize("text", ["", "[1]", '{"objective": "pre', "null"])
def test_a_damaged_config_is_named_and_the_run_goes_on_without_it_or_starts_over(cfg, text):
    run = damaged(cfg, text)
    with pytest.raises(UserError, match=rf"^{run}/config.json is damaged .*delete it to resume"):
        RunFolder(cfg)
    assert RunFolder(replace(cfg, overwrite=True)).replaces
    os.unlink(f"{run}/config.json")
    folder = RunFolder(cfg)
    assert not folder.replaces
    folder.claim()
    with open(f"{run}/config.json") as file:
        assert json.load(file)["seed"] == 0


def test_a_damaged_config_of_a_folder_that_is_no_runs_stays(cfg):
    run = damaged(cfg)
    os.unlink(f"{run}/{LOCK}")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="has files that are not from a run"):
            RunFolder(replace(cfg, overwrite=overwrite))
    assert os.path.isdir(f"{run}/checkpoints/10")


def test_a_disk_that_is_full_at_the_first_start_leaves_a_folder_that_can_be_used(cfg, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space") as error:
            RunFolder(cfg)
    assert f"({cfg.output_dir}/config.json: No space left on device)" in mistake(error.value)
    assert os.listdir(cfg.output_dir) == [LOCK]
    os.makedirs(f"{cfg.output_dir}/model.new")  # of the next file that the disk had no room for
    RunFolder(replace(cfg, seed=1))
    assert (RunFolder(replace(cfg, seed=2)).path / "config.json").is_file()


KILLED = """
import os, sys
from pathlib import Path
from jaxllm.paths import write_checked
os.fsync = lambda _: os.kill(os.getpid(), 9)
write_checked(Path(sys.argv[1]), {})
"""


def test_the_next_start_deletes_what_a_killed_one_had_not_renamed(cfg):
    run = Path(used(cfg))
    (run / "checkpoints" / "1").mkdir(parents=True)
    for file in (run / "data.json", run / "checkpoints" / "1" / "amended.json"):
        assert subprocess.run([sys.executable, "-c", KILLED, str(file)]).returncode == -9
    (run / "notes.json.1a2b3c4d.new").touch()  # the user's
    (run / "a.new").touch()
    assert len(list(run.rglob("*.new"))) == 4
    RunFolder(cfg)
    assert sorted(file.name for file in run.rglob("*.new")) == ["a.new", "notes.json.1a2b3c4d.new"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_that_cannot_be_written_is_named_at_once(cfg, monkeypatch, exists):
    if exists:
        used(cfg)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match=rf"output_dir {cfg.output_dir} is not writable \("):
        RunFolder(cfg)


def test_a_read_only_disk_is_a_mistake_that_names_the_file():
    error = OSError(errno.EROFS, os.strerror(errno.EROFS), "cache/part")
    assert mistake(error) == "cache/part: Read-only file system; write to another directory"


def test_the_model_at_the_start_is_written_again_if_it_is_damaged(cfg):
    from runs import MODEL
    from test_reference import decoder

    model = decoder()
    model.hf_config = json.dumps(MODEL)
    run, start = RunFolder(cfg), Path(cfg.output_dir, "model")
    run.save_start(model, None, resumed=False)
    before = {file.name: file.read_bytes() for file in start.iterdir()}
    assert set(before) == {"config.json", "generation_config.json", "files.json"}
    (start / "config.json").write_text("{}")
    assert changed_file(start).startswith("config.json has 2 of")
    run.save_start(model, None, resumed=True)
    assert {file.name: file.read_bytes() for file in start.iterdir()} == before
    (start / "files.json").write_text('{"a":' * 100_000)
    assert "recursion" in changed_file(start)
    (start / "files.json").unlink()
    run.save_start(model, None, resumed=True)
    assert {file.name: file.read_bytes() for file in start.iterdir()} == before
    assert not list(start.parent.glob("*.new"))


def test_a_checkpoint_without_an_identity_is_resumed_with_a_line(cfg, capsys):
    run = RunFolder(cfg)
    run.checkpoints.save(3, {"w": jax.numpy.ones(3)}, {})
    assert run.latest({"data": {}, "weights": {}}) == 3
    assert "checkpoint 3 has no record of data, weights" in capsys.readouterr().err
    run.checkpoints.close()


def test_resume_changed_accepts_keys_of_the_config(cfg):
    used(cfg)
    with pytest.raises(UserError, match="seed was 0, is 1.*--resume_changed seed$"):
        RunFolder(replace(cfg, seed=1))
    RunFolder(replace(cfg, seed=1, resume_changed=("seed",)))


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
