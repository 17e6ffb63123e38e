# SPDX-License-Identifier: Apache-2.0
"""A real Slurm on this machine: submit a run, kill a process, see the requeue and the end.

Needs Debian's slurm-wlm and munge. The daemons listen on loopback, as the user of the test.
"""

import getpass
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from runs import ENV, FAST, MODEL

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
PATH = f"{ENV['PATH']}:/usr/sbin:/sbin"
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        not all(shutil.which(name, path=PATH) for name in PROGRAMS),
        reason="needs slurm-wlm and munge",
    ),
]
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits for cred_expire seconds before it starts again.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
KillWait=20
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def wait_for(condition, seconds: float, what: str):
    """The first true value of `condition`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {seconds} s")


def free_ports(count: int) -> list[int]:
    with socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in (first, second)][:count]


@pytest.fixture(scope="module")
def slurm():
    """Environment of a Slurm client; the cluster has one node with two CPUs."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # the socket needs a short path
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(64))
    conf = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    fill = {"host": host, "ports": free_ports(2), "user": getpass.getuser(), "folder": folder}
    conf.write_text(CONF.format(**fill))
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    commands = [
        ["munged", "--force", "--foreground", f"--socket={folder}/munge.socket", *munge],
        ["slurmctld", "-D", "-f", str(conf)],
        ["slurmd", "-D", "-f", str(conf)],
    ]
    env = ENV | {"PATH": PATH, "SLURM_CONF": str(conf)}
    daemons = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("w") as out:
                daemons.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
            time.sleep(1)
        wait_for(lambda: "idle" in call(env, "sinfo", "-h"), 30, "the node is idle")
        yield env
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


def call(env, *command) -> str:
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30).stdout


@pytest.fixture
def config(tmp_path):
    from jaxllm.data.tokenizer_training import train_tokenizer

    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 400)
    train_tokenizer([text], tmp_path / "tokenizer", vocab_size=300)
    (tmp_path / "model.json").write_text(json.dumps(MODEL | {"vocab_size": 300}))
    config = {
        "objective": "pretrain",
        "output_dir": str(tmp_path / "run"),
        "batch_size": 4,
        "model": {"config": str(tmp_path / "model.json"), "tokenizer": str(tmp_path / "tokenizer")},
        "data": {"train": str(text), "max_length": 32, "workers": 0},
        "log": {"every": 1},
        "save": {"every": 20},
        "cluster": {"timeout": 20},
    }
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config))
    return file


def submit(env, config: Path, steps: int) -> tuple[str, Path]:
    """Submits two tasks; (job id, its log)"""
    log = config.parent / "log.txt"
    options = f"--ntasks=2 --ntasks-per-node=2 --output={log}"
    command = [sys.executable, "-m", "jaxllm", "launch", str(config), "--on", "slurm"]
    command += [f"--options={options}", "--steps", str(steps)]
    flags = f"{FAST} --xla_force_host_platform_device_count=1"
    env = env | {"XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1], log


def state(env, job: str) -> str:
    shown = dict(
        word.split("=", 1)
        for word in call(env, "scontrol", "show", "job", job).split()
        if "=" in word
    )
    return f"{shown.get('JobState')} {shown.get('Restarts')}"


def process_of(config: Path, index: int) -> int | None:
    """Id of the process of a run."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"pretrain" in words and str(config).encode() in words:
            if words[0].endswith(b"python") or b"python3" in words[0]:
                if f"JAX_PROCESS_ID={index}".encode() in environment:
                    return int(folder.name)
    return None


def test_a_job_whose_process_is_killed_is_requeued_and_ends(slurm, config):
    checkpoints = config.parent / "run" / "checkpoints"
    job, log = submit(slurm, config, steps=100)
    try:
        wait_for((checkpoints / "20").is_dir, 240, "the first checkpoint")
        process = process_of(config, 1)
        assert process, call(slurm, "scontrol", "listpids")
        os.kill(process, signal.SIGKILL)
        wait_for(lambda: state(slurm, job) == "COMPLETED 1", 300, "the end of the requeued job")
    finally:
        call(slurm, "scancel", job)
        print(log.read_text()[-4000:])
    said = log.read_text()
    assert "lost process 1" in said and "is requeued and resumes" in said
    assert "resuming from step" in said and said.count("done: 100 steps") == 1
    lines = [
        json.loads(x) for x in (config.parent / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [x["step"] for x in lines if x["kind"] == "train"]
    assert steps == list(range(1, 101))


def test_a_signal_saves_and_requeues_unless_requeueing_is_off(slurm, config):
    job, log = submit(slurm, config, steps=100_000)
    try:
        wait_for(lambda: log.exists() and re.search(r"step \d+/", log.read_text()), 240, "a step")
        call(slurm, "scancel", "--signal=TERM", job)  # as before the time limit
        wait_for(lambda: "resuming from step" in log.read_text(), 240, "the requeued job")
        assert "status 75: job" in log.read_text()
        call(slurm, "scontrol", "update", f"jobid={job}", "requeue=0")
        call(slurm, "scancel", "--signal=TERM", job)
        wait_for(lambda: state(slurm, job) == "FAILED 1", 120, "the end of the job")
        wait_for(lambda: process_of(config, 0) is None, 60, "the end of its processes")
        time.sleep(8)  # longer than a requeued job waits
        assert state(slurm, job) == "FAILED 1"
    finally:
        call(slurm, "scancel", job)
        print(log.read_text()[-4000:])
    saved = re.findall(r"stopped at step (\d+); run the same command", log.read_text())
    assert len(saved) == 2
    assert (config.parent / "run" / "checkpoints" / saved[-1]).is_dir()
