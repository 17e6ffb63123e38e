# SPDX-License-Identifier: Apache-2.0
"""The compilation cache: its directory, its bounds, and when a program is compiled again."""

import json
import os
import stat
import subprocess
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from runs import DEVICES, ENV, arguments

from jaxllm import cli, compilation
from jaxllm.compilation import BOUNDS, DIRECTORY, use_cache

# Runs a command and prints how often each event of the compilation cache occurred.
COUNTED = """
import collections, json, sys
import jax
from jaxllm.cli import main
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event.split("/")[-1]]))
assert main(sys.argv[1:]) == 0
print(json.dumps(seen))
"""
# Sums over all devices and prints whether the program was in the cache.
SPLIT = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxllm.compilation import use_cache
use_cache()
hits = []
jax.monitoring.register_event_listener(lambda e, **_: hits.append(e) if "cache_hits" in e else None)
x = jax.device_put(np.arange(16.0), NamedSharding(Mesh(np.array(jax.devices()), "x"), P("x")))
print(float(jax.jit(lambda x: (x * 2).sum())(x)), len(hits) > 0)
"""


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """jax.config has no directory, and the home directory is empty."""
    before = {name: getattr(jax.config, name) for name in (DIRECTORY, *BOUNDS)}
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("_settings", "_user_settings"):
        monkeypatch.setattr(compilation, name, {})
    jax.config.update(DIRECTORY, None)
    yield tmp_path
    compilation_cache.reset_cache()
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_default_folder_is_private_and_bounded(unset):
    use_cache()
    folder = unset / ".cache" / "jaxllm" / "compiled"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_compilation_cache_max_size == 2**31
    assert jax.config.jax_persistent_cache_min_compile_time_secs < 1  # most programs of a small run
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # its files are executed


def test_a_directory_of_jax_config_keeps_its_bounds(unset):
    jax.config.update(DIRECTORY, str(unset / "mine"))
    use_cache()
    assert jax.config.jax_compilation_cache_dir == str(unset / "mine")
    assert jax.config.jax_compilation_cache_max_size == -1
    use_cache(str(unset / "other"))  # asked for by name
    assert jax.config.jax_compilation_cache_dir == str(unset / "other")
    use_cache("off")
    assert jax.config.jax_compilation_cache_dir is None
    use_cache()
    assert jax.config.jax_compilation_cache_dir == str(unset / "mine")


def test_runs_of_one_process_do_not_share_their_settings(unset):
    default = str(unset / ".cache" / "jaxllm" / "compiled")
    for setting, folder, size in (
        ("off", None, -1),
        (None, default, 2**31),
        (str(unset / "a"), str(unset / "a"), -1),
        (None, default, 2**31),
    ):
        use_cache(setting)
        assert jax.config.jax_compilation_cache_dir == folder
        assert jax.config.jax_compilation_cache_max_size == size


def test_a_directory_that_cannot_be_written_to_is_a_warning(unset, capsys):
    (unset / "file").touch()
    use_cache(str(unset / "file" / "cache"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jaxllm: warning: no compilation cache in") and "Not a directory" in line
    assert jax.config.jax_compilation_cache_dir is None


def test_without_a_home_folder_there_is_no_cache(unset, monkeypatch, capsys):
    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", homeless)
    use_cache()
    (line,) = capsys.readouterr().err.splitlines()
    assert "no compilation cache in ~/.cache" in line and "home directory" in line
    assert jax.config.jax_compilation_cache_dir is None


OLD = ("torn-cache", "whole-cache", "whole-atime")


def filled(folder):
    folder.mkdir(parents=True)
    for name in (*OLD, "new-cache"):
        (folder / name).touch()
    for name in OLD:
        os.utime(folder / name, (0, 0))
    return folder


def test_a_program_that_a_killed_process_left_unfinished_is_deleted(unset):
    folder = filled(unset / ".cache" / "jaxllm" / "compiled")
    (folder / "gone-cache").symlink_to("deleted")  # as one that another process deletes meanwhile
    use_cache()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    (folder / "gone-cache").unlink()
    left = {path.name for path in folder.iterdir()}
    assert left == {"whole-cache", "whole-atime", "new-cache"}  # new: may be in progress


def test_nothing_is_deleted_in_a_directory_of_the_users(unset):
    """JAX itself, without a bound, writes programs without an -atime file."""
    jax.config.update(DIRECTORY, str(unset / "plain"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    jax.jit(lambda x: x * 3 + 1)(jax.numpy.ones(7))
    written = {path.name for path in (unset / "plain").iterdir()}
    assert any(name.endswith("-cache") for name in written)
    assert not any(name.endswith("-atime") for name in written)
    for path in (unset / "plain").iterdir():
        os.utime(path, (0, 0))
    jax.config.update(DIRECTORY, None)
    use_cache(str(unset / "plain"))
    assert {path.name for path in (unset / "plain").iterdir()} == written
    mine = filled(unset / "mine")
    use_cache(str(mine))
    assert {path.name for path in mine.iterdir()} == {*OLD, "new-cache"}


@pytest.mark.parametrize(
    "args",
    [
        ["eval", "--model", "m", "--data", "f"],
        ["generate", "--model", "m", "--prompt", "a"],
        ["chat", "--model", "m"],
        ["export", "run", "out"],
    ],
    ids=lambda args: args[0],
)
def test_verbs_that_compile_enable_the_cache_first(monkeypatch, tmp_path, args):
    class Called(Exception):
        pass

    def raising(*_):
        raise Called

    monkeypatch.setattr(cli, "use_cache", raising)
    monkeypatch.chdir(tmp_path)
    for name in ("m", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "f").touch()
    with pytest.raises(Called):
        cli.main(args)


def test_off_in_yaml_disables_the_cache(tmp_path):
    from jaxllm.config import load_config

    (tmp_path / "run.yaml").write_text("log:\n  compile_cache: off\n")  # false, to YAML
    assert load_config("sft", str(tmp_path / "run.yaml"))[0].log.compile_cache == "off"
    assert load_config("sft", None, ["--no-log.compile_cache"])[0].log.compile_cache == "off"


def test_other_devices_and_flags_have_their_own_programs(tmp_path):
    plain = {k: v for k, v in ENV.items() if not k.startswith("JAX_COMPILATION")}
    plain |= {"HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def ran(flags):
        command = [sys.executable, "-c", SPLIT]
        env = plain | {"XLA_FLAGS": flags}
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        return done.stdout.split()

    assert ran(DEVICES + "8") == ["240.0", "False"]
    assert ran(DEVICES + "2") == ["240.0", "False"]
    assert ran(DEVICES + "8 --xla_cpu_enable_fast_math=true") == ["240.0", "False"]
    assert ran(DEVICES + "8") == ["240.0", "True"]


def test_a_resumed_run_does_not_compile_again(project, tmp_path):
    env = ENV | {"XLA_FLAGS": DEVICES + "1"}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # else it depends on the load
    folder = tmp_path / "compiled"

    def ran(*more):
        more = ("--log.compile_cache", str(folder), "--save.every", "0", *more)
        command = [sys.executable, "-c", COUNTED, *arguments(project, "pretrain", "again", *more)]
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        assert "compiled the step in" in done.stderr
        names = {path.name for path in folder.glob("jit_*-cache")}
        return json.loads(done.stdout.splitlines()[-1]), names

    first, names = ran("--steps", "2")
    assert first["cache_misses"] == len(names) and any(n.startswith("jit_step") for n in names)
    again, same = ran("--steps", "4")
    assert again["cache_hits"] > 0 and names < same
    # The learning rates of both schedules, of 2 steps and of 4, are compared once.
    new = {name.partition("-")[0] for name in same - names}
    assert not new & {name.partition("-")[0] for name in names}
