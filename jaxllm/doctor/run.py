# SPDX-License-Identifier: Apache-2.0
"""A run folder: what the run does or did when it ended, what is whole, what is lost, what to type.

Nothing in the folder is changed.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.checkpoint import COMMITTED, UNFINISHED, changed_file, damage
from jaxllm.config import TrainConfig, checks, from_dict
from jaxllm.data.inputs import check_inputs
from jaxllm.doctor.findings import Doing, Fact, Finding, Next, Problem, gib
from jaxllm.doctor.machine import memory_kills
from jaxllm.errors import UserError
from jaxllm.files import MARKER
from jaxllm.lock import LOCK, Lock
from jaxllm.paths import absolute, as_path, entries, file_size, files_in, is_bucket
from jaxllm.report.columns import parsed
from jaxllm.report.reading import read_run
from jaxllm.run import SIGNS, START, read_config

SLOWEST = 20e6  # bytes per second, below which a disk counts as one that does not answer
# Message of a run's error -> (its entry in the page, what to do).
REMEDIES = {
    r"RESOURCE_EXHAUSTED|out of memory|Out of memory": (
        "out-of-memory",
        "lower micro_batch_size, or set model.remat to full; `jaxllm plan` computes what fits",
    ),
    "not finite|non-finite": (
        "a-loss-is-not-finite",
        "look at the rows of the step (`jaxllm rows`), lower optim.learning_rate, and resume",
    ),
    "disk (is )?full|No space left": ("the-disk-is-full", "free some space, and resume"),
    "bucket": ("a-bucket-cannot-be-accessed", "check the credentials and the network, and resume"),
}
FAILED = ("a-run-failed", "fix what the message names, and resume")


@dataclass
class Checkpoint:
    step: int
    size: int
    problem: str
    """why it is damaged; empty if it is whole"""


def run(folder: str) -> Iterator[Finding]:
    """The findings about a run folder. Raises UserError if it is none."""
    yield Doing(f"reading {folder}", 0)
    path = as_path(folder)
    config: dict[str, Any] = {}
    values: dict[str, Any] = {}  # what a report shows; {} without a valid config
    try:
        config = read_config(path) or {}
        values = read_run(path)
    except UserError as error:
        if not {entry.name for entry in entries(path)} & SIGNS:
            raise UserError(f"{folder} is not a run folder") from None
        remedy = "do what the line says; everything else in the folder stays as it is"
        yield Problem("a-file-of-a-run-is-damaged", str(error), remedy)
    yield from _described(values)
    yield from _lock(path)
    saved: list[Checkpoint] = []
    for one in _checkpoints(path):
        if isinstance(one, Checkpoint):
            saved.append(one)
            state = f"damaged: {one.problem}" if one.problem else "whole"
            yield Fact(f"checkpoint {one.step}", f"{state}, {gib(one.size)}")
        else:
            yield one
    whole = [one.step for one in saved if not one.problem]
    yield from (_damaged(path, one, whole) for one in saved if one.problem)
    yield from _ended(path, values, whole)
    yield from _files(path)
    yield from _space(path, values, saved)
    cfg = (yield from _inputs(config)) if config else None
    if values.get("state") != "running":
        yield from _following(path, cfg, values, whole)


# ---- the run


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _described(values: Mapping[str, Any]) -> Iterator[Finding]:
    if not values:
        return
    yield Fact("objective", f"{values['objective']} of {values['model']}")
    starts = values["starts"]
    if starts:
        last = starts[-1]
        count = last.get("processes", 1)
        where = f"{last.get('devices')}, {count} process{'es' * (count != 1)}"
        from_step = f", the last from step {last['step']}" if last.get("step") else ""
        yield Fact("started", f"{_clock(values['began'])} on {where}")
        yield Fact("starts", f"{len(starts)}{from_step}, at {_clock(last['time'])}")
    steps = values["steps"]
    of = f" of {steps:,.0f}" if steps else ""
    when = f", logged at {_clock(values['last'])}" if values["last"] else ""
    yield Fact("last step", f"{values['step']:,}{of}{when}")
    if best := values["best"]:
        yield Fact("best", f"step {best['step']:,}, {best['metric']} {best['value']:.4f}")


def _lock(path: Path) -> Iterator[Finding]:
    held = Lock.is_held(path)
    if held is None:
        where = "in a bucket" if is_bucket(path) else "on this file system"
        yield Fact("lock", f"unknown: there are none {where}")
    elif held:
        holder = ""
        with suppress(OSError):
            holder = (path / LOCK).read_text(errors="replace").strip()[:200]
        yield Fact("lock", f"held by {holder or 'another process'}")
    else:
        yield Fact("lock", "free: no process trains in the folder")


# ---- checkpoints


def _checkpoints(path: Path) -> Iterator[Checkpoint | Finding]:
    """The checkpoints, oldest first, each compared with its hashes as a resumed run does."""
    folder = path / "checkpoints"
    found = entries(folder) if folder.is_dir() else []
    for one in sorted((p for p in found if p.name.isdecimal()), key=lambda p: int(p.name)):
        if is_bucket(path) and not (one / COMMITTED).exists():
            yield Fact("unfinished", f"checkpoint {one.name}, which a resumed run deletes")
            continue
        size = sum(map(file_size, files_in(one)))
        yield Doing(f"reading checkpoint {one.name} ({gib(size)})", 60 + size / SLOWEST)
        problem = damage(one)
        if one.exists():  # a run that trains deletes old ones
            yield Checkpoint(int(one.name), size, problem)
    for one in found:
        if UNFINISHED in one.name:
            name = one.name.partition(".")[0]
            yield Fact("unfinished", f"checkpoint {name}, which a resumed run deletes")
        elif one.name.endswith(".damaged"):
            yield Fact("set aside", f"{one}, a damaged checkpoint, which you may delete")


def _damaged(path: Path, one: Checkpoint, whole: list[int]) -> Problem:
    earlier = [step for step in whole if step < one.step]
    if whole and whole[-1] > one.step:
        remedy = "nothing to do, because a later checkpoint is whole; do not export this one"
    elif earlier:
        remedy = f"resume: the run sets it aside and continues from step {earlier[-1]}; or restore "
        remedy += "its files from a copy first"
    else:
        remedy = "restore its files from a copy, or move it away: the run then starts from step 0"
    where = path / "checkpoints" / str(one.step)
    return Problem("a-checkpoint-is-damaged", f"{where} is damaged: {one.problem}", remedy)


# ---- how it ended


def _ended(path: Path, values: Mapping[str, Any], whole: list[int]) -> Iterator[Finding]:
    if not values:
        return
    state, step = values["state"], values["step"]
    plan = values["plan"]
    if plan and plan.get("memory_gib"):
        yield Fact("planned memory", f"{plan['memory_gib']:.2f} GiB a device")
    if ledger := values["ledger"]:
        yield Fact("goodput", f"{ledger.get('goodput', math.nan):.0%}")
    hangs = sorted(
        p.name for p in entries(path) if re.fullmatch(r"hang-\d+-process-\d+\.txt", p.name)
    )
    if hangs:
        yield Fact("hang", f"stacks are in {', '.join(hangs[:4])}{' …' if hangs[4:] else ''}")
    if state == "running":
        yield Fact("state", f"running{', with no line yet' if not step else ''}")
        if Lock.is_held(path) and not values["recent"]:
            yield Problem(
                "a-run-hangs",
                f"the run has written no line since {_clock(values['last'])}, although its process "
                "lives",
                "look at its process (py-spy dump --pid PID) and at the hang-*.txt files; end it "
                "by SIGTERM, then by SIGKILL, and resume",
            )
        return
    if state in ("done", "early", "stopped"):
        yield Fact("state", {"early": "stopped early, by eval.patience"}.get(state, state))
        return
    doing = _doing(path, values)
    if state == "failed":
        message = str(values["message"])
        entry, remedy = next(
            (found for pattern, found in REMEDIES.items() if re.search(pattern, message)), FAILED
        )
        yield Fact("state", f"failed {doing}")
        yield Problem(entry, f"the run failed {doing}: {message}", remedy)
    elif state == "starting" and not values["starts"]:
        yield Fact("state", "ended before its first step")
        yield Problem(
            "a-run-ended-before-its-first-step",
            "the run ended before its first step",
            "read what it printed, or start it again",
        )
    else:
        yield Fact("state", f"ended unexpectedly {doing}")
        count = memory_kills()
        hint = f"; the kernel has ended {count} processes here for lack of memory" if count else ""
        yield Problem(
            "a-run-ended-unexpectedly",
            f"the run ended without a last line, {doing}{hint}",
            "it was killed or crashed: look for `out of memory` in the kernel's log (dmesg) or the "
            "scheduler's, and resume",
        )
    first = (whole[-1] if whole else 0) + 1
    if step < first:
        yield Fact("lost", "nothing that was logged")
        return
    pace = _pace(values)
    took = f", about {pace * (step + 1 - first):,.0f} s" if pace else ""
    steps = (
        f"step {step:,}, which is" if step == first else f"steps {first:,} to {step:,}, which are"
    )
    yield Fact("lost", f"{steps} trained again{took}")


def _doing(path: Path, values: Mapping[str, Any]) -> str:
    """What the run did when it ended, as far as its files show."""
    saving = [p.name for p in (path / "checkpoints").glob(f"*{UNFINISHED}*")]
    if any(p.name.startswith(".final.") for p in entries(path)):
        return "while it wrote final/"
    if saving and not is_bucket(path):
        return f"while it saved checkpoint {saving[0].partition('.')[0]}"
    last = _last_line(path)
    begun = max((start["time"] for start in values["starts"]), default=0.0)
    if not last or float(last.get("time") or 0) < begun:
        return "while it loaded, compiled or trained its first steps"
    step = int(last.get("step", 0))
    match last.get("kind"):
        case "error":
            return f"in step {step}"
        case "plan":
            return "after compiling, in its first steps"
        case "eval":
            return f"in or after the evaluation at step {step}"
    return f"after step {step} was logged"


def _last_line(path: Path) -> dict[str, Any]:
    lines: list[dict[str, Any]] = []
    with suppress(OSError):
        lines = [*parsed((path / "metrics.jsonl").read_bytes().splitlines()[-2:])]
    return lines[-1] if lines else {}


def _pace(values: Mapping[str, Any]) -> float | None:
    """Seconds per step, the median of those logged."""
    mean = values["train"]["mean"].get("step_seconds") or []
    known = sorted(x for x in mean if isinstance(x, int | float))
    return known[len(known) // 2] if known else None


# ---- files, disk and inputs


def _files(path: Path) -> Iterator[Finding]:
    if (path / START).is_dir() and (problem := changed_file(path / START)):
        yield Problem(
            "a-file-of-a-run-is-damaged",
            f"{path / START}: {problem}",
            "resume: the run writes the folder again; exports need it",
        )
    for name in ("metrics.jsonl", "samples.jsonl", "starts.jsonl"):
        with suppress(OSError):
            lines = (path / name).read_bytes().splitlines()
            if damaged := len(lines) - len([*parsed(lines)]):
                yield Fact(name, f"{damaged} of {len(lines)} lines are damaged and are skipped")
    if not is_bucket(path) and not os.access(path, os.W_OK):
        yield Problem(
            "a-directory-cannot-be-written",
            f"{path} cannot be written",
            "change its permissions, or mount its file system for writing",
        )
    if (path / "final").is_dir():
        ours = (path / "final" / MARKER).is_file()
        yield Fact("final/", "written" if ours else "not written by jaxllm")


def _space(path: Path, values: Mapping[str, Any], saved: list[Checkpoint]) -> Iterator[Finding]:
    if is_bucket(path) or values.get("state") in ("done", "early"):
        return
    space, need = shutil.disk_usage(path), max((one.size for one in saved), default=0)
    if space.total and space.free < need:
        yield Problem(
            "the-disk-is-full",
            f"a checkpoint takes {gib(need)} and {path} has {gib(space.free)} left",
            "free some space; `save.keep` limits the number of checkpoints",
        )


def _inputs(config: dict[str, Any]) -> Generator[Finding, None, TrainConfig | None]:
    """Yields what a resumed run would not find; returns its config, None if it is not valid."""
    try:
        cfg = from_dict(config)
        checks.check(cfg)
    except UserError as error:
        yield Problem(
            "a-config-is-not-valid-here",
            f"config.json is not valid here: {error}",
            "install the version of jaxllm that the run was started with, or change that key",
        )
        return None
    try:
        check_inputs(cfg)
    except UserError as error:
        yield Problem(
            "an-input-is-gone",
            f"what the run reads is not there: {error}",
            "put it back; relative paths start from the directory in which you type the command",
        )
    return cfg


# ---- what to type


def _following(
    path: Path, cfg: TrainConfig | None, values: Mapping[str, Any], whole: list[int]
) -> Iterator[Finding]:
    if cfg is None or is_bucket(path):
        yield Fact("to go on", "the command that started the run")
        return
    state = values.get("state")
    final = (path / "final").is_dir() or not cfg.save.final
    if state in ("done", "early") and final:
        yield Next("to see the run", f"jaxllm report {shlex.quote(str(path))}")
        return
    if state in ("done", "early"):
        yield Problem(
            "a-run-ended-unexpectedly",
            "the run has trained all its steps, but final/ is not there",
            "start the same command again, which writes it",
        )
    last = next((start for start in reversed(values.get("starts", ()))), {})
    processes = last.get("processes", 1)
    several = isinstance(processes, int) and processes > 1
    words = ["jaxllm", *(["launch"] if several else []), cfg.objective, str(path / "config.json")]
    if absolute(as_path(cfg.output_dir)) != absolute(path):
        words += ["--output_dir", str(path)]
    words += ["--overwrite", "false"] if cfg.overwrite else []
    words += ["--resume", "true"] if not cfg.resume else []
    words += ["--on", "local", "--nodes", str(processes)] if several else []
    what = f"to resume from step {whole[-1]:,}" if whole else "to start again, from step 0"
    what = "to write final/" if state in ("done", "early") else what
    if several:
        what += f" (here; it ran on {processes} processes, so rather use its launcher)"
    yield Next(what, shlex.join(words))
