# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of training state: asynchronous, atomic, the last few and the best."""

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
