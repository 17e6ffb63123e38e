# SPDX-License-Identifier: Apache-2.0
"""What a run folder says about its run, as values for JSON. The run may train, or be dead."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.best import Best
from jaxllm.config import EvalSection, TrainConfig, from_dict
from jaxllm.config.describe import plain
from jaxllm.config.schema import flat, leaves
from jaxllm.errors import UserError
from jaxllm.lock import Lock
from jaxllm.paths import absolute, as_path, entries, is_bucket, modified
from jaxllm.report.charts import charts_of
from jaxllm.report.columns import Columns, histogram, number, parsed, reduced
from jaxllm.run_folder import is_run_config

POINTS = 900  # of a curve, shared by the runs of a page
FEW = 150  # at least, of each run
STEPS, ROWS, CHARACTERS = 24, 6, 3000  # of samples: steps, rows of a step, of a text
LATE = 600.0  # seconds without a line, after which a run without a lock counts as dead


def read_run(
    run: str | Path, *, lines: Path | None = None, running: bool | None = None, points: int = POINTS
) -> dict[str, Any]:
    """A run for the page.

    lines: the local folder that has the files that are appended to, of a run in a bucket. running:
    whether a process trains in the folder; None: asks its lock or, where there is none, the age of
    its last line. Raises UserError if the folder is not a run's.
    """
    folder = as_path(run)
    lines = lines if lines is not None and lines.is_dir() else folder
    config = object_in(folder / "config.json")
    if not is_run_config(config):
        raise UserError(f"{run} is not a run folder: it has no config.json of a run")
    cfg = _config(config)
    starts = list(parsed(lines_in(folder / "starts.jsonl")))
    log = Lines(lines_in(lines / "metrics.jsonl"))
    rows, times, metrics = log.train.arrays()
    last = max([*times[np.isfinite(times)][-1:], *_times(starts)[-1:], 0.0])
    began = min([*times[np.isfinite(times)][:1], *_times(starts)[:1], last])
    ended = log.ended(max(_times(starts), default=0.0))
    running = Lock.is_held(folder) if running is None else running
    recent = _is_recent(times, last)
    running = not ended and recent if running is None else running
    steps = next((s["steps"] for s in reversed(starts) if "steps" in s), config.get("steps"))
    found = {
        "name": str(flat(config).get("log.run_name") or absolute(folder).name or run),
        "folder": str(run),
        "objective": str(config["objective"]),
        "model": _model(config),
        **log.state(running, bool(starts), rows, steps),
        "steps": number(steps),
        "began": began,
        "last": last,
        "recent": recent,
        "seconds": _seconds(starts, last),
        "left": _left(rows, times, starts, steps) if running else None,
        "train": reduced(log.train, began, points),
        "evals": {name: reduced(columns, began, points) for name, columns in log.evals.items()},
        "best": _best(log.evals, cfg, starts),
        "step_seconds": histogram(metrics.get("step_seconds", np.array([]))),
        # While the run trains on, the one before is of the session before.
        "ledger": log.last.get("goodput") if ended or not running else None,
        "plan": log.last.get("plan"),
        "resumed": sorted({s["step"] for s in starts[1:] if number(s.get("step"))}),
        "samples": _samples(lines_in(lines / "samples.jsonl")),
        "data": object_in(lines / "data.json") or object_in(folder / "data.json"),
        "config": _values(config, starts),
        "starts": [_start(s) for s in starts],
        "checkpoints": _checkpoints(folder / "checkpoints"),
        "final": (folder / "final").is_dir(),
    }
    names = {*found["train"]["about"]}.union(*(e["about"] for e in found["evals"].values()))
    if found["train"]["mean"].get("nll") == found["train"]["mean"].get("loss"):
        names -= {"nll"}
    form = cfg.verb.data if cfg else ""
    return found | {"charts": charts_of(names, form), "online": form == "prompts"}


class Lines:
    """The lines of metrics.jsonl, by kind."""

    def __init__(self, lines: Iterable[bytes]):
        self.train, self.evals = Columns(), dict[str, Columns]()
        self.last: dict[str, dict[str, Any]] = {}
        """{kind: its last line}, of other kinds"""
        self._end: dict[str, Any] | None = None
        for line in parsed(lines):
            kind = str(line.get("kind"))
            self._end = line if kind in ("goodput", "error") else None
            if kind == "train":
                self.train.add(line)
            elif kind == "eval":
                self.evals.setdefault(str(line.get("name")), Columns()).add(line)
            else:
                self.last[kind] = line

    def ended(self, start: float) -> bool:
        """True if the last line says how the run ended, after its last start."""
        return self._end is not None and (number(self._end.get("time")) or math.inf) >= start

    def state(self, running: bool, started: bool, rows: np.ndarray, steps: Any) -> dict[str, Any]:
        """{"state", "message", "step"}: how the run is, and why, if that is known."""
        step, message = int(rows[-1]) if len(rows) else 0, None
        if running:
            state = "running" if len(rows) else "starting"
        elif self._end is None:
            state = "killed" if started or len(rows) else "starting"
        elif self._end["kind"] == "error":
            state, message = "failed", str(self._end.get("message", ""))
        else:
            state = str(self._end.get("ended", "done" if step == steps else "stopped"))
        return {"state": state, "message": message, "step": step}


# ---- files


def lines_in(file: Path) -> Iterator[bytes]:
    """The lines of a file; none if there is none, or a pipe or a device in its place."""
    if file.is_file():
        with suppress(FileNotFoundError), file.open("rb") as opened:
            yield from opened


def object_in(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none, or it is damaged."""
    return next(parsed([b"".join(lines_in(file))]), {})


def _config(config: dict[str, Any]) -> TrainConfig | None:
    """The config; None if it is of a version with other keys."""
    with suppress(UserError):
        return from_dict(config)
    return None


def _model(config: dict[str, Any]) -> str:
    values = flat(config)
    path = str(values.get("model.path") or values.get("model.config") or "")
    method = str(values.get("peft.method", "none"))
    return path + (f" with {method}" if method not in ("none", "None") else "")


# ---- time


def _times(starts: list[dict[str, Any]]) -> list[float]:
    return [t for s in starts if (t := number(s.get("time"))) is not None and math.isfinite(t)]


def _seconds(starts: list[dict[str, Any]], last: float) -> float:
    """Seconds until the run's last line, without those between its end and a restart."""
    ends = [number(s.get("last")) or 0.0 for s in starts[1:]] + [last]
    return sum(max(end - begin, 0.0) for begin, end in zip(_times(starts), ends, strict=False))


def _left(
    rows: np.ndarray, times: np.ndarray, starts: list[dict[str, Any]], steps: Any
) -> float | None:
    """Seconds left, from the pace of the last lines since the last start, with evaluations."""
    recent = times >= max(_times(starts)[-1:], default=0.0)
    rows, times = rows[recent][-50:], times[recent][-50:]
    total = number(steps)
    if total is None or len(rows) < 2 or not times[-1] > times[0]:
        return None
    return float((times[-1] - times[0]) / (rows[-1] - rows[0]) * max(total - rows[-1], 0.0))


def _is_recent(times: np.ndarray, last: float) -> bool:
    """True if the last line is not older than LATE, or three times the longest of the last 50
    pauses between lines."""
    pauses = np.diff(times[np.isfinite(times)][-50:])
    return bool(time.time() - last < max(LATE, 3 * float(pauses.max(initial=0.0))))


def _start(start: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in start.items() if key != "origins"}


# ---- the best evaluation


def _best(
    evals: dict[str, Columns], cfg: TrainConfig | None, starts: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """{"step", "value", "metric"} of the best evaluation by eval.metric."""
    section, best = cfg.eval if cfg else EvalSection(), Best()
    if section.greater is None and starts and isinstance(starts[-1].get("greater"), bool):
        section = replace(section, greater=starts[-1]["greater"])
    sets: dict[int, dict[str, dict[str, float]]] = {}
    for name, columns in evals.items():
        steps, _, metrics = columns.arrays()
        for i, step in enumerate(steps.tolist()):
            found = {metric: float(v[i]) for metric, v in metrics.items() if np.isfinite(v[i])}
            sets.setdefault(int(step), {})[name] = found
    for step in sorted(sets):
        with suppress(UserError):  # an evaluation without this metric
            best = best.after_evals(step, sets[step], section)
    if best.step is None:
        return None
    return {"step": best.step, "value": best.value, "metric": section.metric}


# ---- samples, config, checkpoints


def _samples(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """[{"step", "rows", "more"}]: samples of at most STEPS steps, the first and the last included;
    more: rows of the step that are left out."""
    by_step: dict[int, dict[str, Any]] = {}
    last = -math.inf
    for line in parsed(lines):
        if (step := number(line.get("step"))) is None or not math.isfinite(step):
            continue
        if step < last:  # a resumed run repeats steps
            by_step = {s: found for s, found in by_step.items() if s < step}
        last = step
        found = by_step.setdefault(int(step), {"step": int(step), "rows": [], "more": 0})
        if len(found["rows"]) < ROWS:
            found["rows"].append(_sample(line))
        else:
            found["more"] += 1
    steps = sorted(by_step)
    if len(steps) > STEPS:
        places = np.linspace(0, len(steps) - 1, STEPS).round().astype(int)
        steps = [steps[i] for i in places]
    return [by_step[step] for step in steps]


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {key: _cut(row[key]) for key in ("prompt", "text") if key in row}
    rewards = row.get("rewards")
    named = rewards if isinstance(rewards, dict) else {}
    kept["rewards"] = {str(name): number(value) for name, value in named.items()}
    return kept | {"reward": number(row.get("reward")), "truncated": row.get("truncated") is True}


def _cut(text: Any) -> str:
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    more = len(text) - CHARACTERS
    return text if more <= 0 else f"{text[:CHARACTERS]}… ({more:,} more characters)"


def _values(config: dict[str, Any], starts: list[dict[str, Any]]) -> list[list[str]]:
    """[key, value, origin] of every key. origin: `default`, a file and its line or a flag; empty if
    the run did not record it, as one that was not started from the command line."""
    known = [s["origins"] for s in starts if isinstance(s.get("origins"), dict)]
    origins = known[-1] if known else {}
    missing = "default" if known else ""
    defaults = {key: plain(leaf.default) for key, leaf in leaves().items()}
    rows = []
    for key, value in flat(config).items():
        text = "null" if value is None else plain(_given(value))
        same = "default" if text == defaults.get(key) else missing
        rows.append([key, text, str(origins.get(key, same))])
    return rows


def _given(value: Any) -> Any:
    """A value without what is empty in the objects of a list, such as data sources."""
    if not isinstance(value, list):
        return value
    return [
        {k: v for k, v in one.items() if v not in (None, False, {}, [])}
        if isinstance(one, dict)
        else one
        for one in value
    ]


def _checkpoints(folder: Path) -> list[dict[str, Any]]:
    """[{"step", "time", "gib"}] of the complete checkpoints."""
    found = []
    with suppress(OSError):
        for path in entries(folder) if folder.is_dir() else ():
            if not path.name.isdecimal():
                continue
            one: dict[str, Any] = {"step": int(path.name), "time": None, "gib": None}
            if not is_bucket(path):
                with suppress(OSError):  # it is being deleted
                    one["time"] = modified(path)
                with suppress(TypeError, ValueError, LookupError, OverflowError):  # damaged
                    sizes = [float(entry[0]) for entry in object_in(path / "files.json").values()]
                    one["gib"] = sum(sizes) / 2**30 if sizes else None
            found.append(one)
    return sorted(found, key=lambda one: one["step"])
