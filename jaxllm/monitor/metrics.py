# SPDX-License-Identifier: Apache-2.0
"""The numbers of a run: metrics.jsonl, samples.jsonl, data.json and experiment trackers."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jaxllm import dist
from jaxllm.errors import UserError
from jaxllm.files import strict, strict_json
from jaxllm.paths import (
    as_path,
    copy,
    first_line,
    is_bucket,
    naming,
    version,
    write_bytes,
    write_text,
)


class _Wandb:
    """Weights & Biases, an optional extra. Offline unless the user is logged in."""

    def __init__(self, run: Path, config: dict[str, Any], step: int):
        import wandb  # pyright: ignore[reportMissingImports]

        mode = os.environ.get("WANDB_MODE")
        if mode is None:
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        log = config.get("log", {})  # the section of the run's config
        id_file = run / "wandb-id.txt"  # a resumed run keeps its id
        if not id_file.is_file():
            write_text(id_file, secrets.token_hex(4))
        self.session = wandb.init(
            project=log.get("project") or os.environ.get("WANDB_PROJECT", "jaxllm"),
            name=log.get("run_name") or run.resolve().name,
            dir=run,
            config=config,
            mode=mode,
            id=id_file.read_text(),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
        # wandb's own step must increase, but a resumed run repeats the steps after its checkpoint.
        self.session.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        self.session.log({"step": step} | {f"{kind}/{k}": v for k, v in numbers.items()})

    def close(self) -> None:
        self.session.finish()


class _TensorBoard:
    """Event files in RUN/tensorboard; tensorboardX is an optional extra."""

    def __init__(self, run: Path, config: dict[str, Any], step: int):
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(f"{kind}/{key}", value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


SPOOLED = ("metrics.jsonl", "samples.jsonl", "wandb-id.txt", "rows.bin")
# They receive the numbers of metrics.jsonl, and are made with (run folder, config, resume step).
TRACKERS: dict[str, Callable[..., Any]] = {"wandb": _Wandb, "tensorboard": _TensorBoard}


class Spool:
    """The local folder of files that a run in a bucket appends to, as objects cannot be.

    The files at the top of the run folder are copied to it. A thread uploads those that changed
    every EVERY seconds; a process that is killed loses the lines since.
    """

    EVERY = 10.0

    def __init__(self, run: Path):
        self.run, self._parent = run, Path(tempfile.mkdtemp(prefix="jaxllm-"))
        self.folder = self._parent / run.name
        self.folder.mkdir()
        self._sent: dict[Path, str] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        for name in SPOOLED:
            if (run / name).is_file():
                copy(run / name, self.folder / name)
        self._thread = threading.Thread(target=self._run, name="upload metrics", daemon=True)
        self._thread.start()

    def flush(self) -> bool:
        """Uploads the files that changed. If the bucket does not take one, prints a line and
        returns False."""
        done = True
        with self._lock:
            # rglob raises for a directory that vanishes, such as a tracker's; os.walk skips it.
            walk = os.walk(self.folder)
            for file in [Path(folder, name) for folder, _, names in walk for name in names]:
                try:
                    changed = version(file)
                    if self._sent.get(file) != changed:
                        copy(file, self.run / file.relative_to(self.folder).as_posix())
                        self._sent[file] = changed
                except Exception as error:  # each client has errors of its own
                    if file.exists():
                        done = False
                        line = f"{file.name} is not uploaded yet: {first_line(error)}"
                        print(f"jaxllm: {line}", file=sys.stderr)
        return done

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        if self.flush():
            shutil.rmtree(self._parent)
        else:
            print(f"jaxllm: copy {self.folder} to {self.run}; it is complete", file=sys.stderr)

    def _run(self) -> None:
        while not self._closed.wait(self.EVERY):
            self.flush()


class Metrics:
    """Writes a run's numbers to its folder and to trackers. Only the main process writes.

    report_to: names in TRACKERS. config: a dict, for the trackers. On resume, lines after
    `resume_step` are dropped, so that no step occurs twice. `eval_pending`: the checkpoint was
    saved before its evaluation, so the evaluation's lines are dropped too. A tracker that fails, at
    start or later, is disabled with one line on stderr; training continues.
    """

    def __init__(
        self, run: Path | str, report_to=(), config=None, resume_step=0, eval_pending=False
    ):
        for name in report_to:
            if name not in TRACKERS:
                names = ", ".join(TRACKERS)
                raise UserError(f"log.report_to {name!r} is unknown; choose from {names}")
        self.run = as_path(run)
        self.enabled = dist.is_main()
        self.trackers: dict[str, Any] = {}
        self.spool: Spool | None = None
        if not self.enabled:
            return
        if is_bucket(self.run):
            self.spool = Spool(self.run)
            self.run = self.spool.folder
        self.run.mkdir(parents=True, exist_ok=True)
        for name in SPOOLED[:2]:
            _drop_after(self.run / name, resume_step, eval_pending)
        config = strict(config or {})
        for name in report_to:
            tracker = self._try(name, partial(TRACKERS[name], self.run, config, resume_step))
            if tracker is not None:
                self.trackers[name] = tracker

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends {"kind", "step", …} to metrics.jsonl and sends its numbers to the trackers.

        None is written as null, and a number that is not finite as a string such as "NaN".
        """
        if not self.enabled:
            return
        values = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in values.items()}
        self._append("metrics.jsonl", {"kind": kind, "step": step} | values)
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float)}
        group = f"{kind}/{values['name']}" if "name" in values else kind
        for name, tracker in list(self.trackers.items()):
            self._try(name, partial(tracker.write, group, step, numbers))

    def sample(self, step: int, **values: Any) -> None:
        """Appends a line to samples.jsonl."""
        if self.enabled:
            self._append("samples.jsonl", {"step": step} | values)

    def manifest(self, data: dict[str, Any]) -> None:
        """Writes data.json: the sources that were read and their counts."""
        if self.enabled:
            write_text(self.run / "data.json", json.dumps(strict(data), indent=2) + "\n")

    def flush(self) -> None:
        """Uploads what was written, if the run folder is in a bucket."""
        if self.spool:
            self.spool.flush()

    def close(self) -> None:
        """Closes the trackers."""
        for name, tracker in list(self.trackers.items()):
            self._try(name, tracker.close)
        self.trackers.clear()
        if self.spool:
            self.spool.close()

    def _try(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # no error of a tracker may stop the run
            self.trackers.pop(name, None)
            reason = str(error).split("\n")[0]
            if isinstance(error, ImportError):
                reason += f"; pip install 'jaxllm[{name}]'"
            print(f"jaxllm: {name} is disabled: {reason}", file=sys.stderr)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        path = self.run / name
        with naming(path), path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(strict_json(line) + "\n")


def _drop_after(file: Path, step: int, eval_pending: bool) -> None:
    """Keeps the lines up to `step`; with step 0, none.

    Drops an incomplete line, which a killed run may leave, and with `eval_pending` the lines that
    the evaluation at `step` wrote. A sample with a reward is of a rollout, not of an evaluation.
    """

    def keeps(line: dict[str, Any]) -> bool:
        by_eval = line["kind"] == "eval" if "kind" in line else "reward" not in line
        return line["step"] < step + (not (by_eval and eval_pending))

    if not file.is_file():
        return
    kept = []
    for line in file.read_bytes().split(b"\n") if step else ():
        try:
            if keeps(json.loads(line)):
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_bytes(file, b"".join(kept))
