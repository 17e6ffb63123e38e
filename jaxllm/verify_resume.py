# SPDX-License-Identifier: Apache-2.0
"""`jaxllm verify-resume`: shows on this machine that a run that is killed resumes exactly.

A run trains without interruption; the same run is killed by SIGKILL after its first checkpoint and
resumed. Both are processes that run the config's own command in a temporary folder. Then their
metrics, rows, samples and checkpoints are compared bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.checkpoint import Checkpoints
from jaxllm.config import TrainConfig, to_dict
from jaxllm.config.checks import check, resolve
from jaxllm.errors import BUG, DONE, UserError, seen
from jaxllm.report.columns import parsed
from jaxllm.watch import STARTS

# Values of a line of metrics.jsonl that two runs do not share.
TIMES = {"rollout_seconds", "sampling_seconds", "step_seconds", "tokens_per_second", "memory_gib"}
TIMES |= {"mfu", "time"}
TRIES = 3  # a short run may end before it can be killed
POLL = 0.002  # seconds between two looks for a checkpoint
TAIL = 2000  # characters of a failed run's output to show


# ---- runs that are killed


def killed(
    command: Sequence[str], run: Path, step: int, env: Mapping[str, str], log: Path | None = None
) -> int:
    """Runs a command and kills it by SIGKILL once `run` has checkpoint `step`; returns its exit
    status: -9 unless it ended before. log: the file that gets what it prints."""
    with _process(command, env, log) as process:
        while process.poll() is None and not (run / "checkpoints" / str(step)).is_dir():
            time.sleep(POLL)
        process.kill()
        return process.wait()


@contextmanager
def _process(
    command: Sequence[str], env: Mapping[str, str], log: Path | None
) -> Iterator[subprocess.Popen[bytes]]:
    """A running command, which does not outlive the block."""
    with (log or Path(os.devnull)).open("wb") as out:
        process = subprocess.Popen(
            [*command], env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


# ---- what two runs must share


def numbers(file: Path, kinds: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The objects in a JSONL file of a run, of these `kinds` or all, without TIMES."""
    lines = file.read_bytes().splitlines() if file.is_file() else []
    found = [line for line in parsed(lines) if not kinds or line.get("kind") in kinds]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


@dataclass
class Compared:
    """A row of the table: how many values were compared, and those that differ."""

    name: str
    count: int = 0
    unit: str = "values"
    different: list[str] = field(default_factory=list)
    """a line for each"""

    def add(self, what: str, want: Any, got: Any) -> None:
        """Compares two JSON values; `what` names them."""
        self.count += 1
        if json.dumps(want) != json.dumps(got):  # NaN equals NaN, and 1 is not 1.0
            self.different.append(f"{what}: {seen(want)}, resumed {seen(got)}")


def compared(want: Path, got: Path, steps: Sequence[int]) -> list[Compared]:
    """Compares the run folder of an uninterrupted run with that of a resumed one. steps: of the
    checkpoints to compare."""
    rows = [*_metrics(want, got), _samples(want, got), _rows(want, got)]
    return [row for row in rows if row.count] + [_arrays(want, got, step) for step in steps]


def _metrics(want: Path, got: Path) -> list[Compared]:
    losses, others = Compared("losses"), Compared("other metrics")
    kinds = ("train", "eval")
    here, there = (
        {
            (x["kind"], x["step"], x.get("name", "")): x
            for x in numbers(one / "metrics.jsonl", kinds)
        }
        for one in (want, got)
    )
    for key in sorted({*here, *there}):
        kind, step, name = key
        a, b = here.get(key, {}), there.get(key, {})
        for metric in sorted({*a, *b} - {"kind", "step", "name"}):
            what = f"step {step}, {f'{name} ' if kind == 'eval' else ''}{metric}"
            row = losses if metric == "loss" else others
            row.add(what, a.get(metric), b.get(metric))
    return [losses, others]


def _samples(want: Path, got: Path) -> Compared:
    found = Compared("samples", unit="samples")
    here, there = (numbers(one / "samples.jsonl") for one in (want, got))
    for place in range(max(len(here), len(there))):
        a, b = (some[place] if place < len(some) else {} for some in (here, there))
        found.add(f"step {(a or b).get('step')}, sample {place + 1}", a, b)
    return found


def _rows(want: Path, got: Path) -> Compared:
    found = Compared("hashes of the rows", unit="hashes")
    here, there = (np.frombuffer((one / "rows.bin").read_bytes(), "<u8") for one in (want, got))
    found.count = max(len(here), len(there))
    if here.shape != there.shape:
        found.different.append(f"{len(here)} hashes, resumed {len(there)}")
    else:
        places = np.flatnonzero(here != there)
        found.different += [f"hash {place + 1}" for place in places.tolist()]
    return found


def _arrays(want: Path, got: Path, step: int) -> Compared:
    found = Compared(f"checkpoint {step}", unit="arrays")
    saves = [Checkpoints(run / "checkpoints") for run in (want, got)]
    for (name, a), (other, b) in zip(*(one.arrays(step) for one in saves), strict=True):
        found.count += 1
        if (name, a.dtype, a.shape) != (other, b.dtype, b.shape):
            found.different.append(f"{name} {a.dtype}{a.shape}, resumed {other} {b.dtype}{b.shape}")
        elif a.tobytes() != b.tobytes():
            places = a.reshape(-1).view(np.uint8) != b.reshape(-1).view(np.uint8)
            count = int(places.reshape(a.size, -1).any(1).sum())
            gap = np.nanmax(np.abs(a.astype(np.float64) - b.astype(np.float64)))
            found.different.append(f"{name}: {count:,} of {a.size:,} values, by at most {gap:.3g}")
    for one in saves:
        one.close()
    return found


# ---- the command


def prepared(cfg: TrainConfig, after: int) -> tuple[TrainConfig, int]:
    """The config of both runs, without a run folder, and the step of the checkpoint after which
    one is killed; online, that is the next multiple of the updates of a rollout.

    Model, data, objective and optimizer stay; evaluations take place as configured. Raises
    UserError for a config that is not valid.
    """
    check(cfg)
    cfg = resolve(cfg)  # a date of the template is today's in all processes
    stride = cfg.rl.updates if cfg.verb.online else 1
    step = -(-after // stride) * stride
    log = replace(cfg.log, every=1, report_to=(), progress=False)
    save = replace(cfg.save, every=step, keep=0, final=False, hub=None, hub_private=False)
    optim = replace(cfg.optim, decay=min(cfg.optim.decay, 2 * step))
    judged = replace(cfg.eval, patience=0, min_delta=0.0)  # neither run ends early
    given = dict(overwrite=False, resume=True, resume_changed=(), steps=2 * step)
    return replace(cfg, log=log, save=save, optim=optim, eval=judged, **given), step


def _run(command: Sequence[str], log: Path, what: str) -> float:
    """Runs a command to its end; returns its seconds. Raises UserError if it fails."""
    began = time.monotonic()
    with _process(command, os.environ, log) as process:
        status = process.wait()
    _check(status, log, what)
    return time.monotonic() - began


def _check(status: int, log: Path, what: str) -> None:
    if status == 0:
        return
    said = log.read_text(errors="replace").strip()
    lines = [line for line in said.splitlines() if line.startswith("jaxllm: error: ")]
    if lines:
        raise UserError(lines[-1].removeprefix("jaxllm: error: "))
    print(said[-TAIL:], file=sys.stderr)
    raise UserError(f"{what} ended with status {status}; the end of its output is above")


def verify_resume(cfg: TrainConfig, after: int) -> int:
    """Does the two runs of `prepared`, prints the table and the verdict; returns the exit status:
    0 if they are equal, 1 if they are not.

    Raises UserError if a run fails.
    """
    processes = cfg.cluster.processes or os.environ.get("JAX_NUM_PROCESSES") or "1"
    if str(processes) != "1":
        raise UserError(
            f"verify-resume starts runs of one process, and here are {processes} "
            "(cluster.processes, JAX_NUM_PROCESSES); run it without a launcher"
        )
    cfg, step = prepared(cfg, after)
    with tempfile.TemporaryDirectory(prefix="jaxllm-verify-resume-") as temporary:
        folder = Path(temporary)
        runs = {name: folder / name for name in ("straight", "resumed")}
        commands = {}
        for name, run in runs.items():
            file = folder / f"{name}.json"
            values = to_dict(replace(cfg, output_dir=str(run)))
            file.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
            commands[name] = [sys.executable, "-P", "-m", "jaxllm", cfg.objective, str(file)]
        log = folder / "log"
        _say(f"{2 * step} steps without interruption …")
        seconds = _run(commands["straight"], log, "the uninterrupted run")
        _say(f"done in {seconds:.0f} s; the same run, killed after checkpoint {step} …")
        began = time.monotonic()
        _kill(commands["resumed"], runs["resumed"], step, log)
        seconds = time.monotonic() - began
        _say(f"killed after {seconds:.0f} s; the same command again, which resumes it …")
        seconds = _run(commands["resumed"], log, "the resumed run")
        _check_resumed(runs["resumed"], step)
        _say(f"done in {seconds:.0f} s")
        rows = compared(runs["straight"], runs["resumed"], (step, 2 * step))
    print("\n".join(_table(rows)))
    return _verdict(rows, step)


def _kill(command: Sequence[str], run: Path, step: int, log: Path) -> None:
    """Runs a command and kills it between checkpoint `step` and its last one."""
    for _ in range(TRIES):
        status = killed(command, run, step, os.environ, log)
        saved = run / "checkpoints"
        if status == -9 and (saved / str(step)).is_dir() and not (saved / str(2 * step)).is_dir():
            return
        if status != -9:
            _check(status, log, "the run that was to be killed")
        shutil.rmtree(run, ignore_errors=True)
    raise UserError(
        f"the run ended {TRIES} times before it could be killed; give a larger --after than {step}"
    )


def _check_resumed(run: Path, step: int) -> None:
    """Raises UserError unless the last start of a run resumed it from checkpoint `step`."""
    starts = [*parsed((run / STARTS).read_bytes().splitlines())]
    if len(starts) < 2 or starts[-1].get("step") != step:
        raise UserError(f"the run did not resume from checkpoint {step}")


def _table(rows: Sequence[Compared]) -> Iterator[str]:
    yield f"{'':<24}{'compared':>18}{'different':>12}"
    for row in rows:
        yield f"{row.name:<24}{f'{row.count:,} {row.unit}':>18}{len(row.different):>12,}"
    for row in rows:
        for line in row.different[:3]:
            yield f"  {row.name}: {line}"
        if (more := len(row.different) - 3) > 0:
            yield f"  {row.name}: and {more:,} more"


def _verdict(rows: Sequence[Compared], step: int) -> int:
    """Prints the verdict; returns the exit status."""
    if not any(row.different for row in rows):
        print(f"exact: the run resumed from step {step} equals the uninterrupted one bit for bit")
        return DONE
    first = next(row for row in rows if row.name == f"checkpoint {step}")
    if first.different:
        print(
            f"not exact: the two runs differed before the kill, at checkpoint {step}, so the steps "
            "themselves are not reproducible on this machine; on a GPU set "
            "XLA_FLAGS=--xla_gpu_deterministic_ops=true "
            "(docs/troubleshooting.md#a-resumed-run-is-not-exact)"
        )
    else:
        print(
            f"not exact: both runs were equal at step {step} and differ after the resume; please "
            "report this with the table (docs/troubleshooting.md#a-resumed-run-is-not-exact)"
        )
    return BUG


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
