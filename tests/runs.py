# SPDX-License-Identifier: Apache-2.0
"""Whole runs on a project of its own: what the tests of training, of adapters and of the comparison
share. Nothing here imports jax."""

import atexit
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from jaxllm.cli import main

# The tests run hundreds of programs once each, and compiling them takes most of the time. LLVM does
# not optimise them here and takes each as one module, and XLA's older emitters write the loops of a
# fusion, in half the time of those through MLIR; neither jaxlib 0.12 nor libtpu, which reads these
# flags too, has the emitters. What jax and XLA do before stays as it is.
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FAST += " --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10.") and find_spec("libtpu") is None:
    FAST += " --xla_cpu_use_fusion_emitters=false"
DEVICES = f"{FAST} --xla_force_host_platform_device_count="
MODEL = {
    "model_type": "qwen3",
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
CORPUS = Path(json.__file__)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the processes of one session share it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxllm-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# What the tests, the workers of xdist and the commands that tests start have for environment. The
# flags are part of the cache's keys: with a flag more, or one twice, a process compiles all anew.
ENV = os.environ | {
    "XLA_FLAGS": DEVICES + "8",
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # torch's threads wait for each other by spinning
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",  # source lines in programs take a tenth of the time
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tokenizer, a model config, text and chats."""
    from jaxllm.data.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("project")
    text = "\n".join(p.read_text() for p in sorted(CORPUS.parent.glob("*.py")))
    (folder / "text.txt").write_text(text)
    train_tokenizer([folder / "text.txt"], folder / "tokenizer", vocab_size=500)
    (folder / "model.json").write_text(json.dumps(MODEL))
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 20]
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in zip(lines[::2], lines[1::2], strict=False)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    (folder / "few.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats[:40]))
    return folder


@contextmanager
def one_device():
    """Runs inside, in this process or one with ENV, are on one device, which compiles sooner.
    Sums over eight devices round otherwise, so a run is not compared with one of the other kind."""
    import jax

    from jaxllm.mesh import make_mesh

    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("jaxllm.training")
        patch.setattr(module, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        patch.setitem(ENV, "XLA_FLAGS", DEVICES + "1")
        yield


@pytest.fixture(scope="module")
def on_one_device():
    with one_device():
        yield


def arguments(project: Path, verb: str, out: str, *more: str) -> list[str]:
    data = "text.txt" if verb == "pretrain" else "chats.jsonl"
    train = [] if "--data.train" in more else ["--data.train", str(project / data)]
    return [
        verb,
        *("--model.config", str(project / "model.json")),
        *("--model.tokenizer", str(project / "tokenizer")),
        *(*train, "--data.max_length", "64", "--data.workers", "1"),
        *("--data.cache_dir", str(project / "cache"), "--output_dir", str(project / out)),
        *("--batch_size", "16", "--micro_batch_size", "1", "--steps", "12", "--log.every", "1"),
        *("--save.every", "4", "--optim.learning_rate", "0.01", "--optim.schedule", "constant"),
        *more,
    ]


def command(*args, **keys) -> list[str]:
    return [sys.executable, "-m", "jaxllm", *arguments(*args, **keys)]


def lines_of(run: Path, kind: str = "train") -> dict[int, dict]:
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: x for x in lines if x["kind"] == kind}


def killed(args: list[str], run: Path) -> None:
    """Starts a run and kills it once its first checkpoint is there."""
    from jaxllm.verify_resume import killed as kill

    kill(args, run, 4, ENV)


def refused(capsys, args: list[str], *words: str) -> str:
    """The one line by which a command is refused, which has the `words` in it."""
    capsys.readouterr()
    assert main(args) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("jaxllm: error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def launched(processes: int, devices: int, args: list[str]) -> subprocess.Popen:
    """A command as several processes of this machine, each with some devices."""
    env = {"XLA_FLAGS": f"{DEVICES}{devices}", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [str(Path(__file__).parents[1] / "launch" / "local.sh"), str(processes), *args],
        env=ENV | os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(run: subprocess.Popen, seconds: float = 400) -> tuple[int, str]:
    """(exit status, output) of a launched run; none of its processes is left."""
    try:
        output, _ = run.communicate(timeout=seconds)
    finally:
        left = processes_of(run)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert not left, "a process of the run was left over"
    return run.returncode, output


def processes_of(run: subprocess.Popen) -> list[int]:
    """The pids in the session of a launched run, but those that have ended."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            is_dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if os.getsid(int(entry.name)) == run.pid and not is_dead:
                found.append(int(entry.name))
        except (ValueError, OSError):
            continue
    return found


def batch_at(rows, seed, step, batch_size):
    """The fields of Batch [B, T] of update `step` (from 0)."""
    from jaxllm.data.loader import make_loader

    loader = make_loader(rows, batch_size=batch_size, seed=seed, start_step=step, prefetch=0)
    return {name: value[0] for name, value in next(loader).items()}
