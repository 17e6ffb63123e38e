# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: asynchronous, atomic, the last few and the best; and whose folder it is."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import xxhash

from jaxllm import dist
from jaxllm.config import TrainConfig, to_dict
from jaxllm.errors import UserError

FILES = "files.json"  # in each checkpoint: {file: [bytes, xxh3 digest or null]}
AMENDED = "amended.json"  # in some: what `amend` was told
UNFINISHED = ".orbax-checkpoint-tmp"  # orbax's suffix of what is being written
FULL = (errno.ENOSPC, errno.EDQUOT)


class _NotOrbax(logging.Filter):
    """Drops what orbax logs: what matters of it is raised."""

    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


_NOT_ORBAX = _NotOrbax()


class Checkpoints:
    """Training state by step: DIRECTORY/STEP/{state/, meta/, files.json}.

    A checkpoint takes its name when it is whole, so a killed run leaves none in pieces; files.json
    tells when something happened to it later. One process group writes a folder; others may read it
    meanwhile.

    keep: how many of the newest stay (0 = all). What `save` was told is the best stays too.
    """

    def __init__(self, directory: Path | str, keep: int = 3):
        logging.getLogger("absl").addFilter(_NOT_ORBAX)
        self.directory = Path(directory).absolute()
        self.keep = keep
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self,
                lightweight_initialize=True,  # a torn file is found by latest(), not here
                async_options=ocp.AsyncOptions(post_finalization_callback=self._list_files),
            ),
            # zstd makes float32 weights 8 % smaller, and saving and restoring four times slower
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )
        self._problems: dict[int, str] = {}  # step -> what is wrong with it, "" when nothing is
        self._best: int | None = None  # to stay, whatever its age
        self._saving: int | None = None
        self._tidied = False

    # ---- writing

    def save(self, step: int, state: Any, meta: dict[str, Any], best: int | None = None) -> None:
        """Starts to save a pytree of jax.Arrays, and `meta` as JSON, as checkpoint `step`.

        best: the step of the best checkpoint so far, which is kept; it may be this one. The arrays
        may be donated or deleted when this returns; the files are written in the background. Waits
        for the save before this one and raises what went wrong in it: ValueError when the disk is
        full, which leaves every earlier checkpoint as it was.
        """
        self.wait()
        if not self._tidied:
            self._tidy()
        self._check_space(state)
        self._best = best
        record = {"meta": meta, "best": best}
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(record))
        self._saving = step
        self._problems[step] = ""
        with self._undone_when_full():
            self.manager.save(step, args=args, force=True)

    def amend(self, step: int, meta: dict[str, Any], best: int | None) -> None:
        """Changes entries of checkpoint `step`'s meta, and its best, after it was written."""
        if dist.is_main():
            new = self.directory / str(step) / f"{AMENDED}.new"
            new.write_text(json.dumps({"meta": meta, "best": best}))
            new.replace(new.with_suffix(""))

    def wait(self) -> None:
        """Returns when nothing is being written; raises as `save` does."""
        with self._undone_when_full():
            self.manager.wait_until_finished()
            self._saving = None

    def close(self) -> None:
        """Waits for what is being written."""
        self.wait()
        self.manager.close()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any = None) -> Sequence[bool]:
        """orbax's PreservationPolicy: which of the checkpoints (oldest first) stay.

        Its own BestN forgets the metrics with the process unless `best_fn` is set too, and then
        cannot open a folder in which one of them is unreadable.
        """
        steps = [info.step for info in checkpoints]
        stay = {*steps[-self.keep :], self._best}
        return [step in stay for step in steps]

    def _tidy(self) -> None:
        """Before the first save: drops what a killed run left, moves broken checkpoints aside."""
        if dist.is_main():
            for path in self.directory.glob(f"*{UNFINISHED}*"):
                shutil.rmtree(path, ignore_errors=True)
            for step in [step for step, problem in self._problems.items() if problem]:
                aside = self.directory / f"{step}.broken"
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / str(step)).rename(aside)
                del self._problems[step]
        self.manager.reload()
        self._tidied = True

    def _check_space(self, state: Any) -> None:
        """Raises ValueError when the disk cannot take another checkpoint."""
        need = sum(x.nbytes for x in jax.tree.leaves(state))
        disk = shutil.disk_usage(self.directory)
        if disk.total and disk.free < need:  # some network file systems report 0 of 0
            raise UserError(
                f"disk full: a checkpoint takes {need / 2**30:.2f} GiB and {self.directory} has "
                f"{disk.free / 2**30:.2f} GiB left; make room and start again, the checkpoints "
                "already saved are whole"
            )

    @contextmanager
    def _undone_when_full(self) -> Iterator[None]:
        """Takes back the save that failed, and says in one line that the disk is full."""
        try:
            yield
        except Exception as error:
            step, self._saving = self._saving, None
            if step is not None:
                self._problems.pop(step, None)
                for path in self.directory.glob(f"{step}{UNFINISHED}*"):
                    shutil.rmtree(path, ignore_errors=True)
            self.manager.reload()
            # what the disk says comes as an OSError, or as text from tensorstore
            said = [os.strerror(code) in str(error) for code in FULL]
            if any(said) or getattr(error, "errno", None) in FULL:
                raise UserError(
                    f"disk full: checkpoint {step} could not be written to {self.directory}; make "
                    "room and start again, the checkpoints already saved are whole"
                ) from error
            raise

    def _list_files(self) -> None:
        """Writes files.json into a checkpoint that is written but has not got its name yet."""
        if not dist.is_main():
            return
        folder = self.directory / f"{self._saving}{UNFINISHED}"
        files = [p for item in ("state", "meta") for p in (folder / item).rglob("*") if p.is_file()]
        listed = {str(p.relative_to(folder)): [p.stat().st_size, _digest(p)] for p in files}
        (folder / FILES).write_text(json.dumps(listed))

    # ---- reading

    def latest(self) -> int | None:
        """The newest step whose files are what was written; a broken one is named and passed over.

        None when nothing was saved yet. Raises ValueError when all there is is broken.
        """
        self.wait()
        steps = sorted(self.manager.all_steps(), reverse=True)
        found = next((step for step in steps if self._whole(step)), None)
        if steps and found is None:
            raise UserError(
                f"{self.directory}: none of the checkpoints {', '.join(map(str, steps))} is whole; "
                "move them away to start anew"
            )
        return found

    def best(self) -> int | None:
        """The step that the newest good checkpoint calls the best; None when it knows of none."""
        latest = self.latest()
        return None if latest is None else self._record(latest).get("best")

    def is_good(self, step: int) -> bool:
        """True if `step` is there and its files are what was written."""
        self.wait()
        return step in self.manager.all_steps() and self._whole(step)

    def restore(self, step: int, like: Any) -> Any:
        """The state of `step`: a pytree of jax.Arrays like the ShapeDtypeStructs of `like`.

        Each lies as the sharding of its ShapeDtypeStruct says, whatever mesh it was saved from.
        Raises ValueError when there is no such step, when it is broken or holds another tree.
        """
        return self._restore(step, like)

    def restore_part(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Some fields of the state ({"trainable": …}), without reading the others."""
        return self._restore(step, like, partial_restore=True)

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the state."""
        self.wait()
        return self._record(step)["meta"]

    def _restore(self, step: int, like: Any, **keys: Any) -> Any:
        self.wait()
        if step not in self.manager.all_steps():
            steps = ", ".join(map(str, self.manager.all_steps())) or "none"
            raise UserError(f"{self.directory} has no checkpoint {step}; it has {steps}")
        if not self._whole(step):
            problem = self._problems[step]
            raise UserError(f"{self.directory / str(step)} is broken ({problem}); use another")
        saved = _by_name(self.manager.item_metadata(step)["state"].tree)
        for name, leaf in _by_name(like).items():
            shape = saved[name].shape if name in saved else None
            if shape != leaf.shape:
                raise UserError(
                    f"{self.directory / str(step)} is of another model or optimizer: {name} has "
                    f"shape {leaf.shape} now and {shape or 'is not there'} in the checkpoint"
                )
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        item = ocp.args.PyTreeRestore(like, restore_args=restore_args, **keys)
        return self.manager.restore(step, args=ocp.args.Composite(state=item))["state"]

    def _record(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        record = self.manager.restore(step, args=args)["meta"]
        file = self.directory / str(step) / AMENDED
        later = json.loads(file.read_text()) if file.is_file() else {}
        return record | later | {"meta": record["meta"] | later.get("meta", {})}

    def _whole(self, step: int) -> bool:
        """Whether the files of `step` are those it was saved with; says so once when not."""
        if step not in self._problems:
            problem = self._problem(self.directory / str(step))
            if problem:
                self._found_broken(step, problem)
            else:
                self._problems[step] = ""
        return not self._problems[step]

    def _found_broken(self, step: int, problem: str) -> None:
        self._problems[step] = problem.strip().split("\n")[0] or "unreadable"
        if dist.is_main():
            print(
                f"jaxllm: checkpoint {step} is broken and passed over: {self._problems[step]}",
                file=sys.stderr,
            )

    @staticmethod
    def _problem(folder: Path) -> str:
        try:
            files = json.loads((folder / FILES).read_text())
            for name, (size, digest) in files.items():
                seen = (folder / name).stat().st_size
                if seen != size:
                    return f"{name} has {seen} of {size} bytes"
                if digest is not None and _digest(folder / name) not in (digest, None):
                    return f"{name} is not what was written"
        except (OSError, ValueError) as error:
            return str(error)
        return ""


def _by_name(tree: Any) -> dict[str, Any]:
    """{a/b/0: leaf}, the same for a tree and for orbax's record of it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _digest(path: Path) -> str | None:
    """xxh3 of a file. None in a multi-process run, whose checkpoints no process reads whole."""
    if dist.count() > 1:
        return None
    hasher = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            hasher.update(chunk)
    return hasher.hexdigest()


# ---- the run folder

# What a resumed run may change: it keeps the data, the model and the optimizer. Another length
# (epochs, steps) reshapes what is left of the schedule.
FREE = {
    "": ("output_dir", "overwrite", "resume", "epochs", "steps", "micro_batch_size", "eval_every"),
    "model": ("remat", "scan_unroll", "loss_chunk"),
    "data": ("workers", "cache_dir"),
    "eval": ("patience", "min_delta"),
}
FREE_SECTIONS = ("mesh", "log", "save")


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys of a config that another run of the same folder must share."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in FREE_SECTIONS or key in FREE[""]:
            continue
        if isinstance(value, dict):
            flat |= {f"{key}.{k}": v for k, v in value.items() if k not in FREE.get(key, ())}
        else:
            flat[key] = value
    return flat


def _read_config(run: Path) -> dict[str, Any] | None:
    """config.json of a run folder, None where nothing is. Raises ValueError for anything else."""
    if not run.exists():
        return None
    if not run.is_dir():
        raise UserError(f"output_dir {run} is a file; choose another place")
    if not any(run.iterdir()):
        return None
    try:
        config = json.loads((run / "config.json").read_text())
        if {"objective", "optim", "data"} <= config.keys():
            return config
    except (OSError, ValueError, AttributeError):
        pass  # a HF directory has a config.json too
    raise UserError(f"output_dir {run} holds something that is no run; choose another place")


def guard(cfg: TrainConfig) -> bool:
    """Makes a new run folder, or checks that the one there is this run's or may be overwritten.

    Returns whether there is a run for `claim` to delete. Raises ValueError when the folder holds
    results of another config, naming the keys, or anything that is no run, and when `overwrite`
    would delete what the run reads.
    """
    run = Path(cfg.output_dir)
    config = to_dict(cfg)
    before = _read_config(run)
    if before is not None and cfg.overwrite:
        reads = [cfg.model.path, cfg.model.config, cfg.model.tokenizer, cfg.peft.path]
        reads += [cfg.data.template, cfg.data.cache_dir, cfg.log.compile_cache]
        reads += [source.path for source in (*cfg.data.train, *cfg.data.eval)]
        for path in filter(None, reads):
            place = Path(path).expanduser()
            if place.exists() and place.resolve().is_relative_to(run.resolve()):
                raise UserError(
                    f"overwrite would delete {path}, which this run reads; change output_dir"
                )
    if before is not None and not cfg.overwrite:
        metrics = run / "metrics.jsonl"
        saved = any((run / "checkpoints").glob("[0-9]*"))
        if saved and not cfg.resume:
            raise UserError(f"{run} has checkpoints; resume them, or say --overwrite true")
        if saved or (metrics.is_file() and metrics.stat().st_size):
            was, now = _fixed(before), _fixed(config)
            differ = [key for key in now if key in was and now[key] != was[key]]
            if differ:
                what = "; ".join(f"{k} was {was[k]!r}, is {now[k]!r}" for k in differ[:3])
                more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
                raise UserError(
                    f"{run} belongs to another run ({what}{more}); "
                    "change output_dir or say --overwrite true"
                )
    if before is None:
        claim(cfg)
    return before is not None and cfg.overwrite


def claim(cfg: TrainConfig, empty: bool = False) -> None:
    """Writes the run's config.json; `empty`: deletes what is in its folder first.

    To be called when nothing can be wrong with the new run any more.
    """
    run = Path(cfg.output_dir)
    if dist.is_main():
        run.mkdir(parents=True, exist_ok=True)
        for path in run.iterdir() if empty else ():  # the folder itself may be a link or a mount
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        new = run / "config.json.new"
        new.write_text(json.dumps(to_dict(cfg), indent=2) + "\n")
        new.replace(run / "config.json")


def same_base(saves: Checkpoints, step: int, base: dict[str, Any] | None) -> None:
    """Raises ValueError when `step` was trained over another frozen model than `base`, as far as
    that says."""
    before = saves.meta(step).get("base") or {}
    base = base or {}
    if {key: before.get(key) for key in base} != base:
        raise UserError(
            f"{saves.directory / str(step)} was trained over another model: {before}, now {base}; "
            "put it back, or change output_dir"
        )


def same_data(run: Path, manifest: dict[str, Any]) -> None:
    """Raises ValueError when a run's data.json tells of other training data than `manifest`."""
    file = run / "data.json"
    if not file.is_file():
        return
    before = json.loads(file.read_text())
    changed = [
        now["path"]
        for was, now in zip(before["train"]["sources"], manifest["train"]["sources"], strict=True)
        if any(was[key] != now[key] for key in ("content", "examples", "tokens"))
    ]
    if before["tokenizer"] != manifest["tokenizer"]:
        changed.append("the tokenizer")
    if changed:
        raise UserError(
            f"{', '.join(changed)} changed since {run} began, so it cannot go on exactly; put the "
            "data back, or change output_dir"
        )
