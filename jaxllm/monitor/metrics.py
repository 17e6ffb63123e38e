# SPDX-License-Identifier: Apache-2.0
"""The numbers of a run: metrics.jsonl, samples.jsonl, data.json and experiment trackers."""

from __future__ import annotations

import io
import json
import os
import queue
import re
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxllm import dist
from jaxllm.config.schema import flat
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


@dataclass(frozen=True)
class Session:
    """A run, as a tracker sees it.

    folder: where the tracker writes its files. shown: the path at which the user finds them, which
    differs for a run in a bucket. step: of the checkpoint that the run resumes from.
    """

    folder: Path
    shown: Path
    name: str
    project: str
    config: dict[str, Any]
    step: int

    def id(self, tracker: str, make: Callable[[], str]) -> str:
        """The run's id in a tracker, which it keeps when it is resumed."""
        file = self.folder / f"{tracker}-id.txt"
        if not file.is_file():
            write_text(file, make())
        return file.read_text()


def _offline(folder: str, command: str, mode: str) -> str:
    """Where a tracker's files are if its mode is offline, and the command that uploads them."""
    if mode != "offline":
        return ""
    if is_bucket(folder):
        return f"offline in {folder}; copy it to a disk, then `{command.format('COPY')}` uploads it"
    return f"offline in {folder}; upload it with `{command.format(folder)}`"


class _Wandb:
    """Weights & Biases. Offline unless the user is logged in."""

    def __init__(self, run: Session):
        import wandb  # pyright: ignore[reportMissingImports]

        mode = os.environ.get("WANDB_MODE")
        if mode is None:
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        self.session = wandb.init(
            project=run.project,
            name=run.name,
            dir=run.folder,
            config=run.config,
            mode=mode,
            id=run.id("wandb", partial(secrets.token_hex, 4)),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
        # wandb's own step must increase, but a resumed run repeats the steps after its checkpoint.
        self.session.define_metric("*", step_metric="step")
        self.table = wandb.Table
        self.note = _offline(f"{run.shown}/wandb", "wandb sync {}/offline-run-*", mode)

    def write(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        self.session.log({"step": step} | {f"{kind}/{k}": v for k, v in numbers.items()})

    def samples(self, step: int, columns: dict[str, list[Any]]) -> None:
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self.session.log({"step": step, "samples": self.table(columns=[*columns], data=rows)})

    def close(self) -> None:
        self.session.finish()


class _TensorBoard:
    """Event files in RUN/tensorboard, by tensorboardX."""

    def __init__(self, run: Session):
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        purge = run.step + 1 if run.step else None
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)
        self.note = f"look at it with `tensorboard --logdir {run.shown}/tensorboard`"

    def write(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(f"{kind}/{key}", value, step)
        self.writer.flush()

    def samples(self, step: int, columns: dict[str, list[Any]]) -> None:
        rows = zip(columns["prompt"], columns["text"], strict=True)
        text = "\n\n".join(f"```\n{prompt}\n```\n```\n{answer}\n```" for prompt, answer in rows)
        self.writer.add_text("samples", text, step)

    def close(self) -> None:
        self.writer.close()


class _SwanLab:
    """SwanLab. Offline unless the user is logged in, or has set another mode."""

    def __init__(self, run: Session):
        import swanlab  # pyright: ignore[reportMissingImports]

        settings = swanlab.Settings()  # with what the user has set and saved
        mode = settings.mode if settings.api_key or settings.mode != "online" else "offline"
        self.session = swanlab.init(
            project=run.project,
            name=run.name,
            log_dir=str(run.folder / "swanlog"),
            config=run.config,
            mode=mode,
            id=run.id("swanlab", partial(secrets.token_hex, 8)),
            resume="allow",
        )
        self.text = swanlab.Text
        self.note = _offline(f"{run.shown}/swanlog", "swanlab sync {}/run-*", mode)

    def write(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        self.session.log({f"{kind}/{k}": v for k, v in numbers.items()}, step=step)

    def samples(self, step: int, columns: dict[str, list[Any]]) -> None:
        rows = zip(columns["prompt"], columns["text"], strict=True)
        self.session.log({"samples": [self.text(b, caption=a) for a, b in rows]}, step=step)

    def close(self) -> None:
        self.session.finish()


class _Trackio:
    """Trackio: a database on this machine, unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set."""

    def __init__(self, run: Session):
        import trackio  # pyright: ignore[reportMissingImports]

        # It resumes the latest run of a name, so other folders of the same name need another one.
        name = run.id("trackio", lambda: f"{run.name}-{secrets.token_hex(2)}")
        with redirect_stdout(io.StringIO()):  # prints what `note` says
            self.session = trackio.init(
                project=run.project, name=name, config=run.config, resume="allow", embed=False
            )
        self.table, self.finish = trackio.Table, trackio.finish
        self.note = (
            f"in {trackio.utils.TRACKIO_DIR}; look at it with `trackio show --project "
            f"{run.project}`"
        )

    def write(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        self.session.log({f"{kind}/{k}": v for k, v in numbers.items()}, step=step)

    def samples(self, step: int, columns: dict[str, list[Any]]) -> None:
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self.session.log({"samples": self.table(columns=[*columns], data=rows)}, step=step)

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self.finish()


class _MLflow:
    """MLflow: the server of MLFLOW_TRACKING_URI, else a database in RUN/mlflow."""

    def __init__(self, run: Session):
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        self.note = ""
        if uri is None and is_bucket(run.shown):
            raise UserError("a run in a bucket needs a server; set MLFLOW_TRACKING_URI")
        if uri is None:
            place = (run.folder / "mlflow").absolute()
            place.mkdir(exist_ok=True)
            uri, artifacts = f"sqlite:///{place}/mlflow.db", str(place / "artifacts")
            shown = f"{run.shown}/mlflow/mlflow.db"
            self.note = (
                f"in {shown}; look at it with `mlflow ui --backend-store-uri sqlite:///{shown}`"
            )
        self.client, self.metric = MlflowClient(uri), Metric
        self.run = run.id("mlflow", partial(self._create, run, artifacts, Param))
        self.client.update_run(self.run, status="RUNNING")

    def _create(self, run: Session, artifacts: str | None, param: Any) -> str:
        """The id of a new run with the config as its parameters."""
        found = self.client.get_experiment_by_name(run.project)
        experiment = (
            found.experiment_id
            if found
            else self.client.create_experiment(run.project, artifact_location=artifacts)
        )
        made = self.client.create_run(experiment, run_name=run.name).info.run_id
        params = [param(key, str(value)) for key, value in flat(run.config).items()]
        for start in range(0, len(params), 100):  # at most, in one call
            self.client.log_batch(made, params=params[start : start + 100])
        return made

    def write(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        now = int(1000 * time.time())
        allowed = {re.sub(r"[^\w./ :-]", "_", f"{kind}/{k}"): v for k, v in numbers.items()}
        metrics = [self.metric(key, value, now, step) for key, value in allowed.items()]
        self.client.log_batch(self.run, metrics=metrics)

    def samples(self, step: int, columns: dict[str, list[Any]]) -> None:
        steps = {"step": [step] * len(columns["prompt"])}
        self.client.log_table(self.run, steps | columns, "samples.json")

    def close(self) -> None:
        self.client.set_terminated(self.run)


# They receive the numbers of metrics.jsonl and the rows of samples.jsonl.
TRACKERS: dict[str, Callable[[Session], Any]] = {
    "wandb": _Wandb,
    "tensorboard": _TensorBoard,
    "swanlab": _SwanLab,
    "trackio": _Trackio,
    "mlflow": _MLflow,
}
# Files at the top of a run folder that are appended to or kept.
SPOOLED = ("metrics.jsonl", "samples.jsonl", "rows.bin", *(f"{name}-id.txt" for name in TRACKERS))


def _cell(value: Any) -> Any:
    """A value for a tracker's table: a number, text or None as it is, else JSON."""
    return strict_json(value) if isinstance(value, dict | list) else value


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


BACKLOG = 16  # calls that may wait for the trackers, so that the end of a run soon follows
PATIENCE = 60.0  # seconds that a run waits for its trackers


class Metrics:
    """Writes a run's numbers to its folder and to trackers. Only the main process writes.

    report_to: names in TRACKERS. config: a dict, for the trackers. On resume, lines after
    `resume_step` are dropped, so that no step occurs twice. `eval_pending`: the checkpoint was
    saved before its evaluation, so the evaluation's lines are dropped too. name, project: of the
    run in the trackers; default: the folder's name, and WANDB_PROJECT or jaxllm. A thread sends
    them the numbers, as a server may be slow. A tracker that fails, at start or later, is disabled
    with one line on stderr; training continues. So are all if they do not answer for PATIENCE.
    """

    def __init__(
        self,
        run: Path | str,
        report_to=(),
        config=None,
        resume_step=0,
        eval_pending=False,
        *,
        name: str | None = None,
        project: str | None = None,
    ):
        self.run = shown = as_path(run)
        self.enabled = dist.is_main()
        self.trackers: dict[str, Any] = {}
        self._calls: queue.Queue[Any] = queue.Queue(BACKLOG)
        # A daemon: a tracker that never answers does not keep the process.
        self._sender = threading.Thread(target=self._send_calls, name="trackers", daemon=True)
        self.spool: Spool | None = None
        if not self.enabled:
            return
        if is_bucket(self.run):
            self.spool = Spool(self.run)
            self.run = self.spool.folder
        self.run.mkdir(parents=True, exist_ok=True)
        for file in SPOOLED[:2]:
            _drop_after(self.run / file, resume_step, eval_pending)
        name = name or self.run.resolve().name
        project = project or os.environ.get("WANDB_PROJECT", "jaxllm")
        config = strict(config or {})
        session = Session(self.run, shown, name, project, config, resume_step)
        for tracker in report_to:
            made = self._try(tracker, partial(TRACKERS[tracker], session))
            if made is not None:
                self.trackers[tracker] = made
                if made.note:
                    print(f"{tracker}: {made.note}", file=sys.stderr)
        if self.trackers:
            self._sender.start()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends {"kind", "step", "time", …} to metrics.jsonl and sends the other numbers to the
        trackers.

        None is written as null, and a number that is not finite as a string such as "NaN". time: in
        seconds since 1970.
        """
        if not self.enabled:
            return
        values = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in values.items()}
        line = {"kind": kind, "step": step, "time": round(time.time(), 3)}
        self._append("metrics.jsonl", line | values)
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float)}
        group = f"{kind}/{values['name']}" if "name" in values else kind
        self._send("write", group, step, numbers)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Appends {"step", "prompt", "text", …} of each row to samples.jsonl, and sends the rows to
        the trackers as a table. All rows have the same keys."""
        if not self.enabled or not rows:
            return
        for row in rows:
            self._append("samples.jsonl", {"step": step} | row)
        columns = {key: [_cell(row[key]) for row in rows] for key in rows[0]}
        self._send("samples", step, columns)

    def manifest(self, data: dict[str, Any]) -> None:
        """Writes data.json: the sources that were read and their counts."""
        if self.enabled:
            write_text(self.run / "data.json", json.dumps(strict(data), indent=2) + "\n")

    def flush(self) -> None:
        """Uploads what was written, if the run folder is in a bucket."""
        if self.spool:
            self.spool.flush()

    def close(self) -> None:
        """Closes the trackers, after they have received everything."""
        self._send("close")
        if self._sender.ident and self._queue(None):
            self._sender.join(PATIENCE)
        if self._sender.is_alive():
            self._give_up()
        self.trackers.clear()
        if self.spool:
            self.spool.close()

    def _send(self, method: str, *args: Any) -> None:
        if self.trackers and not self._queue((method, *args)):
            self._give_up()

    def _queue(self, call: Any) -> bool:
        """Queues a call; False if none of those before it has ended for PATIENCE."""
        try:
            self._calls.put(call, timeout=PATIENCE if self.trackers else 0)
        except queue.Full:
            return False
        return True

    def _give_up(self) -> None:
        for name in list(self.trackers):
            print(f"jaxllm: {name} is disabled: no answer for {PATIENCE:.0f} s", file=sys.stderr)
        self.trackers = {}

    def _send_calls(self) -> None:
        while (call := self._calls.get()) is not None:
            self._call_trackers(*call)

    def _call_trackers(self, method: str, *args: Any) -> None:
        for name, tracker in list(self.trackers.items()):
            self._try(name, partial(getattr(tracker, method), *args))

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
