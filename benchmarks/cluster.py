# SPDX-License-Identifier: Apache-2.0
"""What a run of several processes costs: host memory of loading and saving, and of being watched.

python benchmarks/cluster.py memory [--processes 2]      a model of SmolLM2-135M's shape
python benchmarks/cluster.py watch [--processes 2]       CPU time of the watching threads
python benchmarks/cluster.py speed --baseline CHECKOUT   one process, this checkout and another
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from train_vs_hf import DENSE

ROOT = Path(__file__).parents[1]
MIB = 2**20


def launched(processes: int, *args: object) -> str:
    """Runs this file as several processes with one device each; what they print."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    command = [str(ROOT / "launch" / "local.sh"), str(processes), sys.executable, __file__]
    command += map(str, args)
    return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


# ---- memory


class Peak:
    """The peak of a process's own memory during a block, above that at its start, in bytes.

    Memory-mapped pages of files do not count: the system drops them when it needs the memory.
    """

    def __enter__(self) -> Peak:
        self.start = self.bytes = self._now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.bytes -= self.start

    def _sample(self) -> None:
        while not self.done.wait(0.001):
            self.bytes = max(self.bytes, self._now())

    @staticmethod
    def _now() -> int:
        status = dict(x.split(":\t", 1) for x in Path("/proc/self/status").read_text().splitlines())
        return sum(int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def measure_memory(folder: Path) -> None:
    """A process that loads the model in `folder`, and saves it."""
    import jax

    from jaxllm import dist, load_hf, save_hf
    from jaxllm.config import ClusterSection

    dist.start(ClusterSection())
    jax.device_put(0.0).block_until_ready()
    for _ in range(2):  # the first time also loads libraries and compiles
        with Peak() as loading:
            model = load_hf(str(folder / "model"))
        arrays = jax.tree.leaves(model)
        shards = sum(s.data.nbytes for x in arrays for s in x.addressable_shards)
        with Peak() as saving:
            save_hf(model, str(folder / f"saved-{_}"))
        del model, arrays
    largest = DENSE["vocab_size"] * DENSE["hidden_size"] * 4
    for name, peak, bound in (
        ("load", loading.bytes, 2 * largest + shards),
        ("save", saving.bytes, 2 * largest),  # the shards are there before
    ):
        line = {"what": name, "process": dist.index(), "peak": peak, "bound": bound}
        print(json.dumps(line | {"shards": shards, "largest": largest}), flush=True)
    dist.barrier("end")


def memory(processes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        script = "import sys, json, jax; from jaxllm import hf, save_hf\n"
        script += "from jaxllm.config import MeshSection; from jaxllm.mesh import make_mesh\n"
        script += "from jaxllm.model.families import from_hf; c = json.loads(sys.argv[1])\n"
        script += "m = hf.random_model(from_hf(c), make_mesh(MeshSection()), c)\n"
        script += "save_hf(m, sys.argv[2], max_shard_bytes=100_000_000)"
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", script, json.dumps(DENSE), f"{folder}/model"]
        subprocess.run(command, env=env, check=True)
        output = launched(processes, "memory", "--folder", folder)
    for line in map(json.loads, filter(lambda x: x.startswith("{"), output.splitlines())):
        print(
            f"{line['what']}, process {line['process']} of {processes}: peak "
            f"{line['peak'] / MIB:.0f} MiB; at most {line['bound'] / MIB:.0f} (shards "
            f"{line['shards'] / MIB:.0f}, largest tensor {line['largest'] / MIB:.0f})"
        )


# ---- time


def project(folder: Path) -> list[str]:
    """The arguments of a small pretraining run, but its output_dir and steps."""
    from jaxllm.data.tokenizer_training import train_tokenizer

    shape = DENSE | {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text = "\n".join(p.read_text() for p in sorted(Path(json.__file__).parent.glob("*.py")))
    (folder / "text.txt").write_text(text)
    (folder / "model.json").write_text(json.dumps(shape | {"head_dim": 16}))
    train_tokenizer([folder / "text.txt"], folder / "tokenizer", vocab_size=500)
    data = ["--data.train", str(folder / "text.txt"), "--data.cache_dir", str(folder / "cache")]
    model = ["--model.config", str(folder / "model.json"), "--log.progress", "false"]
    tokenizer = ["--model.tokenizer", str(folder / "tokenizer"), "--data.max_length", "128"]
    sizes = ["--batch_size", "16", "--log.every", "50", "--save.final", "false"]
    return ["pretrain", *model, *data, *tokenizer, *sizes]


def measure_watch(folder: Path) -> None:
    """A process that trains, and then reads the CPU time of the threads that watched."""
    from jaxllm import dist
    from jaxllm.cli import main
    from jaxllm.watch import Watch

    used: dict[str, float] = {}
    close = Watch.__exit__

    def read(watch: Watch, *error: object) -> None:
        for thread in threading.enumerate():
            if thread.name.startswith("watch"):
                file = Path(f"/proc/self/task/{thread.native_id}/schedstat")
                used[thread.name] = int(file.read_text().split()[0]) / 1e9
        close(watch, *error)

    Watch.__exit__ = read
    steps, start = 600, time.perf_counter()
    assert main([*project(folder), "--output_dir", f"{folder}/run", "--steps", str(steps)]) == 0
    took = time.perf_counter() - start
    watch = Watch(*[None] * 2)  # type: ignore[list-item]
    calls = time.perf_counter()
    for step in range(100_000):
        watch.enter("data", step)
        watch.enter("train", step)
    ledger = (time.perf_counter() - calls) / 100_000
    line = {"process": dist.index(), "seconds": took, "used": used, "ledger": ledger}
    print(json.dumps(line | {"steps": steps}), flush=True)


def watch(processes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = launched(processes, "watch", "--folder", folder)
    for line in map(json.loads, filter(lambda x: x.startswith("{"), output.splitlines())):
        share = sum(line["used"].values()) / line["seconds"]
        ledger = line["ledger"] * line["steps"] / line["seconds"]
        print(
            f"process {line['process']} of {processes}, {line['seconds']:.0f} s, {line['steps']} "
            f"steps: watching threads {share:.3%} of a core, ledger {line['ledger'] * 1e6:.1f} us "
            f"a step ({ledger:.3%})"
        )


def speed(baseline: Path, rounds: int) -> None:
    """Steps per second of the same run in this checkout and in another, in turns."""
    found: dict[str, list[float]] = {"this": [], "baseline": []}
    with tempfile.TemporaryDirectory() as folder:
        args = [*project(Path(folder)), "--steps", "1500"]
        for turn in range(rounds + 1):  # the first one compiles
            for name, place in (("this", ROOT), ("baseline", baseline)):
                run = f"{folder}/{name}-{turn}"
                env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(place)}
                command = [sys.executable, "-m", "jaxllm", *args, "--output_dir", run]
                subprocess.run(command, env=env, check=True, capture_output=True, cwd=folder)
                lines = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
                seconds = [x["step_seconds"] for x in lines if x["kind"] == "train"][5:]
                if turn:
                    found[name].append(statistics.median(seconds))
    this, before = (statistics.median(found[name]) for name in ("this", "baseline"))
    print(f"seconds a step: {found}")
    print(f"median {this * 1e3:.3f} ms, baseline {before * 1e3:.3f} ms, ratio {this / before:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("memory", "watch", "speed"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--baseline", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.folder:
        (measure_memory if a.what == "memory" else measure_watch)(a.folder)
    elif a.what == "speed":
        speed(a.baseline.resolve(), a.rounds)
    else:
        (memory if a.what == "memory" else watch)(a.processes)


if __name__ == "__main__":
    main()
