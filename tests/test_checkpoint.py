# SPDX-License-Identifier: Apache-2.0
"""What survives rotation, donation, another mesh, torn files, a kill, a full disk; whose folder."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm import checkpoint
from jaxllm.checkpoint import Checkpoints

Moments = namedtuple("Moments", "count mu")


def on(devices, *spec):
    return NamedSharding(Mesh(np.array(jax.devices()[:devices]), "x"), P(*spec))


def make_state(value=1.0, sharding=None):
    """Shaped like a train state: nested dicts, tuples, named tuples, scalars, bfloat16."""
    w = jnp.arange(64 * 32, dtype=jnp.float32).reshape(64, 32) * value
    w = jax.device_put(w, sharding or on(1))
    return {
        "step": jnp.int32(7),
        "trainable": {"up": {"kernel": w}, "norm": {"scale": jnp.ones(3, jnp.bfloat16)}},
        "opt_state": (Moments(jnp.int32(7), {"up": {"kernel": w + 1}}), ()),
    }


def abstract(state, sharding=None):
    def describe(x):
        lay = sharding if sharding is not None and x.ndim == 2 else on(1)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lay)

    return jax.tree.map(describe, state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def steps_in(folder):
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def saved(folder, steps=(1, 2), **keys):
    saves = Checkpoints(folder, **keys)
    for step in steps:
        saves.save(step, make_state(step), {"step": step})
    saves.close()


def test_restores_what_was_saved_bit_for_bit(tmp_path):
    saves, state = Checkpoints(tmp_path), make_state(1 / 3)
    saves.save(7, state, {"sums": {"loss": [1.5, 2.0]}})
    assert saves.latest() == 7
    assert_same(saves.restore(7, abstract(state)), state)
    assert saves.meta(7) == {"sums": {"loss": [1.5, 2.0]}}
    saves.close()


def test_weights_are_read_without_the_optimizer(tmp_path):
    saved(tmp_path, [1])
    like = abstract(make_state())["trainable"]
    assert_same(
        Checkpoints(tmp_path).restore(1, {"trainable": like}, partial=True)["trainable"],
        make_state(1)["trainable"],
    )


@pytest.mark.parametrize("lay", [on(4, "x"), on(8, None, "x"), on(1)])
def test_restores_onto_another_mesh(tmp_path, lay):
    saves, state = Checkpoints(tmp_path), make_state(0.1, on(8, "x"))
    saves.save(1, state, {})
    restored = saves.restore(1, abstract(state, lay))
    assert restored["trainable"]["up"]["kernel"].sharding == lay
    assert_same(restored, state)
    saves.close()


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
    @partial(jax.jit, donate_argnums=0)
    def step(tree):
        return jax.tree.map(lambda x: x + 1, tree)

    saves = Checkpoints(tmp_path)
    tree = {
        "kernel": jnp.zeros((4, 1 << 20)),
        "split": jax.device_put(jnp.zeros(1 << 20), on(8, "x")),
    }
    tree = step(tree)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    saves.save(1, tree, {})
    for _ in range(5):
        tree = step(tree)
    jax.block_until_ready(tree)
    assert all((x == 1).all() for x in jax.tree.leaves(saves.restore(saves.latest(), like)))
    saves.close()


# ---- rotation


def test_the_best_is_never_rotated_away(tmp_path):
    bests = {1: None, 2: 2, 3: 2, 4: 2, 5: 2, 6: 2}
    for step, best in bests.items():  # each in a process of its own, as far as memory goes
        saves = Checkpoints(tmp_path, keep=2)
        saves.save(step, make_state(), {}, best)
        saves.close()
    assert steps_in(tmp_path) == [2, 5, 6]
    assert Checkpoints(tmp_path).best() == 2
    saves = Checkpoints(tmp_path, keep=1)
    saves.save(7, make_state(), {}, best=7)
    saves.close()
    assert steps_in(tmp_path) == [7]


def test_the_best_of_before_a_damaged_checkpoint_is_found(tmp_path):
    saves = Checkpoints(tmp_path, keep=2)
    for step, best in ((1, 1), (2, 1), (3, 3)):  # 3 is the best that only 3 knows of
        saves.save(step, make_state(), {}, best)
    saves.close()
    (tmp_path / "3" / "files.json").unlink()
    assert Checkpoints(tmp_path).best() == 1
    with pytest.raises(ValueError, match="3 is damaged .*use another"):
        Checkpoints(tmp_path).restore(3, abstract(make_state()))


def test_what_is_said_of_a_checkpoint_later_counts_and_goes_with_it(tmp_path):
    saves = Checkpoints(tmp_path, keep=1)
    saves.save(3, make_state(), {"a": 1, "b": 1}, best=1)
    saves.wait()
    saves.amend(3, {"b": 2}, best=3)
    for each in (saves, Checkpoints(tmp_path)):
        assert (each.latest(), each.best(), each.meta(3)) == (3, 3, {"a": 1, "b": 2})
        assert each.is_good(3) and not each.is_good(1)
    saves.save(4, make_state(), {}, best=4)
    saves.close()
    assert steps_in(tmp_path) == [4]


def test_without_a_best_the_last_are_kept_or_all(tmp_path):
    for keep, expected in ((1, [3]), (0, [1, 2, 3])):
        saves = Checkpoints(tmp_path / str(keep), keep=keep)
        for step in (1, 2, 3):
            saves.save(step, make_state(), {})
        saves.close()
        assert steps_in(tmp_path / str(keep)) == expected


def test_an_empty_folder_has_no_latest_and_no_best(tmp_path):
    saves = Checkpoints(tmp_path / "new")
    assert saves.latest() is None
    assert saves.best() is None
    with pytest.raises(ValueError, match="has no checkpoint 3; it has none"):
        saves.restore(3, abstract(make_state()))


# ---- damage


def files_of(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def damage(path, how):
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "torn":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])


@pytest.mark.parametrize("how", ["gone", "torn", "changed"])
def test_a_damaged_file_sends_latest_to_the_checkpoint_before(tmp_path, capsys, how):
    saved(tmp_path / "good")
    harmless = ("_CHECKPOINT_METADATA", "commit_success.txt")  # orbax's own, not needed to restore
    for number, name in enumerate(files_of(tmp_path / "good" / "2")):
        if str(name) in harmless:
            continue
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", copy)
        damage(copy / "2" / name, how)
        saves = Checkpoints(copy)
        assert saves.latest() == 1, name
        assert_same(saves.restore(1, abstract(make_state())), make_state(1))
        assert capsys.readouterr().err.startswith("jaxllm: checkpoint 2 is damaged, skipped")
        assert saves.latest() == 1
        assert capsys.readouterr().err == ""  # said once


@pytest.mark.parametrize("value", [[], {}, "files", 3, None, {"state/d": 1}, {"state/d": [1]}])
def test_a_list_of_files_of_another_form_is_damage_too(tmp_path, capsys, value):
    saved(tmp_path)
    (tmp_path / "2" / "files.json").write_text(json.dumps(value))
    assert Checkpoints(tmp_path).latest() == 1
    assert "checkpoint 2 is damaged, skipped: files.json" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["torn", "changed"])
def test_a_damaged_amendment_is_not_read(tmp_path, how):
    saved(tmp_path)
    saves = Checkpoints(tmp_path)
    saves.amend(2, {"step": 5}, best=2)
    damage(tmp_path / "2" / "amended.json", how)
    again = Checkpoints(tmp_path)
    assert (again.latest(), again.meta(1)) == (1, {"step": 1})


def test_sizes_are_checked_where_files_are_too_many_to_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_digest", lambda _: None)  # as in a run of several processes
    saved(tmp_path)
    assert Checkpoints(tmp_path).latest() == 2
    damage(tmp_path / "2" / "state" / "manifest.ocdbt", "torn")
    assert Checkpoints(tmp_path).latest() == 1


def test_a_damaged_checkpoint_is_moved_aside_when_its_step_is_saved_again(tmp_path):
    saved(tmp_path, keep=2)
    shutil.rmtree(tmp_path / "2" / "state")
    saves = Checkpoints(tmp_path, keep=2)
    assert saves.latest() == 1
    saves.save(2, make_state(5), {})
    assert saves.latest() == 2
    assert_same(saves.restore(2, abstract(make_state())), make_state(5))
    saves.close()
    assert steps_in(tmp_path) == [1, 2]
    assert (tmp_path / "2.damaged").is_dir()


def test_when_all_are_damaged_a_run_does_not_start_anew_by_itself(tmp_path):
    saved(tmp_path)
    for step in (1, 2):
        (tmp_path / str(step) / "files.json").unlink()
    with pytest.raises(ValueError, match=r"all checkpoints are damaged \(2, 1\)"):
        Checkpoints(tmp_path).latest()


def test_another_models_checkpoint_is_refused_by_name_and_shape(tmp_path):
    saved(tmp_path)
    like = abstract(make_state())
    like["trainable"]["norm"]["scale"] = jax.ShapeDtypeStruct((4,), jnp.bfloat16, sharding=on(1))
    words = r"norm/scale has shape \(4,\) in this run, and has shape \(3,\) in the checkpoint"
    with pytest.raises(ValueError, match=words):
        Checkpoints(tmp_path).restore(2, like)
    like["trainable"]["extra"] = like["step"]
    words = r"trainable/extra has shape \(\) in this run, and is not in the checkpoint"
    with pytest.raises(ValueError, match=words):
        Checkpoints(tmp_path).restore(2, like)
    like = abstract(make_state())
    del like["trainable"]["norm"]
    with pytest.raises(ValueError, match=r"norm/scale is not in this run, and has shape \(3,\)"):
        Checkpoints(tmp_path).restore(2, like)


def test_a_kill_while_writing_leaves_the_checkpoint_before(tmp_path):
    script = """
import os, signal, sys
import jax.numpy as jnp
from jaxllm import checkpoint
saves = checkpoint.Checkpoints(sys.argv[1])
saves.save(1, {"w": jnp.ones(1000)}, {})
saves.wait()
checkpoint._digest = lambda path: os.kill(os.getpid(), 9)
saves.save(2, {"w": jnp.ones(1000)}, {})
saves.wait()
"""
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    left = [p for p in tmp_path.iterdir() if p.name.startswith("2.")]
    assert left
    saves = Checkpoints(tmp_path)
    assert saves.latest() == 1
    assert left[0].exists()  # whoever only reads leaves it alone: a run may be writing it
    saves.save(2, make_state(), {})
    saves.close()
    assert steps_in(tmp_path) == [1, 2]
    assert not left[0].exists()


# ---- a full disk


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    saved(tmp_path, [1])
    saves = Checkpoints(tmp_path, keep=1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 100))
    with pytest.raises(ValueError, match="disk full: a checkpoint takes .* free some space"):
        saves.save(2, make_state(), {})
    assert saves.latest() == 1
    assert os.listdir(tmp_path) == ["1"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError(
            "RESOURCE_EXHAUSTED: Failed to write 8 bytes to file 4: No space left on device"
        ),
    ],
)
def test_a_disk_that_fills_while_writing_costs_only_that_checkpoint(
    tmp_path, monkeypatch, capfd, error
):
    saved(tmp_path, [1])
    saves = Checkpoints(tmp_path, keep=1)

    def full(_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_digest", full)
        saves.save(2, make_state(), {}, best=2)
        with pytest.raises(ValueError, match="disk full: checkpoint 2 could not be written"):
            saves.wait()
    assert os.listdir(tmp_path) == ["1"]
    assert (saves.latest(), saves.best()) == (1, None)
    assert capfd.readouterr() == ("", "")  # the error says it all
    saves.save(3, make_state(), {})
    saves.close()
    assert steps_in(tmp_path) == [3]


def test_another_failure_is_raised_as_it_is(tmp_path, monkeypatch):
    def fail(_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(checkpoint, "_digest", fail)
    saves = Checkpoints(tmp_path)
    saves.save(1, make_state(), {})
    with pytest.raises(RuntimeError, match="a bug"):
        saves.wait()


def test_saving_and_restoring_print_and_log_nothing(tmp_path, capfd, caplog):
    with caplog.at_level(logging.INFO):
        saved(tmp_path, keep=1)
        saves = Checkpoints(tmp_path)
        saves.restore(saves.latest(), abstract(make_state()))
        saves.close()
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if "orbax" in record.pathname]
