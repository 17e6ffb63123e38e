# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of training state: asynchronous and atomic; keeps the latest few and the best."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import xxhash

from jaxllm import dist
from jaxllm.errors import UserError
from jaxllm.paths import (
    as_path,
    delete,
    file_size,
    files_in,
    is_bucket,
    read_checked,
    rename_folder,
    write_checked,
    write_text,
)
from jaxllm.untrusted import odd_values, read_text

FILES = "files.json"  # in each checkpoint: {file: [bytes, xxh3 digest or null]}
ITEMS = ("state", "meta")  # the folders of a checkpoint
AMENDED = "amended.json"  # in some: the values given to `amend`
UNFINISHED = ".orbax-checkpoint-tmp"  # orbax's suffix of a checkpoint that is being written
FULL = (errno.ENOSPC, errno.EDQUOT)
# In a bucket, orbax completes a checkpoint by writing a file.
COMMIT_FILE = ocp.path.atomicity.CommitFileTemporaryPath
COMMITTED = ocp.path.atomicity.COMMIT_SUCCESS_FILE


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """A logging filter that drops orbax's messages; its errors are raised as well."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


class Checkpoints:
    """Training state by step: DIRECTORY/STEP/{state/, meta/, files.json}.

    A checkpoint gets its name once it is complete, so a killed run leaves no partial checkpoint;
    files.json shows whether a file changed later. One run writes a directory; others may read it at
    the same time.

    keep: how many of the latest checkpoints are kept, besides the best one (0 = all).
    """

    def __init__(self, directory: Path | str, keep: int = 3):
        logging.getLogger("absl").addFilter(_not_of_orbax)
        path = as_path(directory)
        self.remote = is_bucket(path)
        self.directory = path if self.remote else path.absolute()
        self.keep = keep
        if str(path).startswith("s3://"):
            _patch_orbax_for_s3()
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self,
                lightweight_initialize=True,  # latest() finds damaged files
                temporary_path_class=COMMIT_FILE if self.remote else None,
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._list_files, barrier_sync_fn=self._meet
                ),
            ),
            # zstd makes float32 weights 8 % smaller, but saving and restoring four times slower.
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )
        self._problems: dict[int, str] = {}  # step -> why it is damaged; "" if it is valid
        self._best: int | None = None  # kept, however old
        self._saving: int | None = None
        self._digests: dict[str, str | None] = {}  # of the files that each process has written
        self._tidied = False

    # ---- writing

    def save(self, step: int, state: Any, meta: dict[str, Any], best: int | None = None) -> None:
        """Starts to save a pytree of jax.Arrays, and `meta` as JSON, as checkpoint `step`.

        best: the step of the best checkpoint so far, which is kept; it may be this one. The arrays
        may be donated or deleted when this returns; the files are written in the background. Waits
        for the previous save and raises its error: UserError if the disk is full. Earlier
        checkpoints stay as they were.
        """
        self.wait()
        if not self._tidied:
            self._tidy()
        if problem := self.missing_space(state):
            raise UserError(problem)
        self._best = best
        record = {"meta": meta, "best": best}
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(record))
        self._saving = step
        self._problems[step] = ""
        with self._undone_when_full():
            self.manager.save(step, args=args, force=True)

    def amend(self, step: int, meta: dict[str, Any], best: int | None) -> None:
        """Updates entries of a saved checkpoint's meta, and its best step."""
        if dist.is_main():
            write_checked(self.directory / str(step) / AMENDED, {"meta": meta, "best": best})

    def wait(self) -> None:
        """Waits until nothing is being written; raises as `save` does."""
        with self._undone_when_full():
            self.manager.wait_until_finished()
            self._saving = None

    def close(self) -> None:
        """Completes the checkpoint that is being written."""
        self.wait()
        self.manager.close()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any = None) -> Sequence[bool]:
        """orbax's PreservationPolicy: True for each checkpoint (oldest first) that is kept.

        orbax's BestN loses the metrics when the process ends, unless `best_fn` is set too; then it
        cannot open a directory with an unreadable checkpoint.
        """
        steps = [info.step for info in checkpoints]
        kept = {*steps[-self.keep :], self._best}
        return [step in kept for step in steps]

    def _tidy(self) -> None:
        """Deletes the partial files of a killed run and renames damaged checkpoints."""
        damaged = [step for step, problem in self._problems.items() if problem]
        if dist.is_main():
            for path in self._unfinished("*"):
                delete(path)
            for step in damaged:
                aside = self.directory / f"{step}.damaged"
                delete(aside)
                rename_folder(self.directory / str(step), aside)
        for step in damaged:
            del self._problems[step]
        dist.barrier("tidy")
        self.manager.reload()
        self._tidied = True

    def _unfinished(self, step: str) -> list[Path]:
        """The directories of saves of `step` ("*": of all) that did not end. In a bucket, where
        none can be renamed, orbax ends a save by writing a file."""
        if not self.remote:
            return list(self.directory.glob(f"{step}{UNFINISHED}*"))
        folders = self.directory.iterdir() if self.directory.exists() else ()
        here = [p for p in folders if p.name.isdigit() and step in ("*", p.name)]
        return [p for p in here if not (p / COMMITTED).exists()]

    def missing_space(self, state: Any) -> str | None:
        """An error message if the disk has too little space for another checkpoint of `state`, a
        pytree of arrays or of ShapeDtypeStructs."""
        if self.remote:
            return None
        need = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        disk = shutil.disk_usage(self.directory)
        if not disk.total or disk.free >= need:  # some network file systems report 0 of 0
            return None
        return (
            f"disk full: a checkpoint takes {need / 2**30:.2f} GiB and {self.directory} has "
            f"{disk.free / 2**30:.2f} GiB left; free some space and start again, the saved "
            "checkpoints are valid"
        )

    @contextmanager
    def _undone_when_full(self) -> Iterator[None]:
        """Deletes what a failed save wrote; raises UserError if the disk is full."""
        try:
            yield
        except Exception as error:
            step, self._saving = self._saving, None
            if step is not None:
                self._problems.pop(step, None)
                for path in self._unfinished(str(step)):
                    delete(path)
            self.manager.reload()
            # It is an OSError, or a text of tensorstore.
            named = any(os.strerror(code) in str(error) for code in FULL)
            if named or getattr(error, "errno", None) in FULL:
                raise UserError(
                    f"disk full: checkpoint {step} could not be written to {self.directory}; free "
                    "some space and start again, the saved checkpoints are valid"
                ) from error
            raise

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """orbax's barrier in the saving thread of several processes.

        Each process reads the files that it wrote, once they are complete, for their digests. A
        process whose save fails raises the error in `wait`, which ends all of them (watch.py); it
        must not wait at the barrier after a save, which the others do not reach.
        """
        if "async_" not in key:
            return
        own: dict[str, str | None] = {}
        if "async_write_complete" in key:
            folder = self._folder()
            own = _digests(folder, folder / "state" / f"ocdbt.process_{dist.index()}")
        for theirs in dist.everyone(own, key):
            self._digests |= theirs

    def _folder(self) -> Path:
        """The folder in which orbax writes a checkpoint that is not complete."""
        return self.directory / f"{self._saving}{'' if self.remote else UNFINISHED}"

    def _list_files(self) -> None:
        """Writes files.json into a checkpoint that orbax is about to rename."""
        folder = self._folder()
        list_files(folder, [p for item in ITEMS for p in files_in(folder / item)], self._digests)
        self._digests = {}

    # ---- reading

    def latest(self) -> int | None:
        """The latest valid step, None if there is no checkpoint; damaged ones are reported.

        Raises UserError if all checkpoints are damaged.
        """
        self.wait()
        steps = sorted(self.manager.all_steps(), reverse=True)
        valid = next((step for step in steps if self._is_valid(step)), None)
        if steps and valid is None:
            raise UserError(
                f"{self.directory}: all checkpoints are damaged ({', '.join(map(str, steps))}); "
                "move them away to start from step 0"
            )
        return valid

    def best(self) -> int | None:
        """The best step, as recorded in the latest valid checkpoint; None if there is none."""
        latest = self.latest()
        return None if latest is None else self._record(latest).get("best")

    def is_good(self, step: int) -> bool:
        """True if checkpoint `step` exists and its files are unchanged."""
        self.wait()
        return step in self.manager.all_steps() and self._is_valid(step)

    def check(self, step: int) -> None:
        """Raises UserError if there is no checkpoint `step`, or if it is damaged."""
        self.wait()
        if step not in self.manager.all_steps():
            steps = ", ".join(map(str, self.manager.all_steps())) or "none"
            raise UserError(f"{self.directory} has no checkpoint {step}; it has {steps}")
        if not self._is_valid(step):
            problem = self._problems[step]
            raise UserError(f"{self.directory / str(step)} is damaged ({problem}); use another")

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON values saved with the state."""
        self.wait()
        return self._record(step)["meta"]

    def restore(self, step: int, like: Any, *, partial: bool = False) -> Any:
        """The state of `step`: jax.Arrays with the shapes and shardings of `like`.

        like: a pytree of ShapeDtypeStructs, which may be sharded over another mesh than the saved
        state. partial: `like` is a dict of some fields of the state; no others are read. Raises
        UserError if there is no such step, or if it is damaged or has other shapes.
        """
        self.check(step)
        with self._reading(step):
            metadata = self.manager.item_metadata(step)["state"].tree
        saved, wanted = _by_name(metadata), _by_name(like)
        for name in wanted if partial else wanted | saved:
            here, there = (tree[name].shape if name in tree else None for tree in (wanted, saved))
            if here != there:
                now, then = (f"has shape {s}" if s is not None else "is not" for s in (here, there))
                raise UserError(
                    f"{self.directory / str(step)} belongs to another model or optimizer: {name} "
                    f"{now} in this run, and {then} in the checkpoint"
                )
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        item = ocp.args.PyTreeRestore(like, restore_args=restore_args, partial_restore=partial)
        with self._reading(step):
            return self.manager.restore(step, args=ocp.args.Composite(state=item))["state"]

    def arrays(self, step: int) -> Iterator[tuple[str, np.ndarray]]:
        """(name, array on the host) of all arrays in the state of `step`, one after another, so
        that memory holds one. Raises UserError if there is no such step, or if it is damaged."""
        self.check(step)
        tree = self.manager.item_metadata(step)["state"].tree
        leaves, structure = jax.tree.flatten(tree)
        options = structure.unflatten([ocp.RestoreArgs(restore_type=np.ndarray) for _ in leaves])
        for place, name in enumerate(_by_name(tree)):
            wanted = [x if i == place else ocp.PLACEHOLDER for i, x in enumerate(leaves)]
            item = ocp.args.PyTreeRestore(structure.unflatten(wanted), restore_args=options)
            found = self.manager.restore(step, args=ocp.args.Composite(state=item))["state"]
            yield name, jax.tree.leaves(found)[place]

    def _record(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        file = self.directory / str(step) / AMENDED
        with self._reading(step):
            record = self.manager.restore(step, args=args)["meta"]
            later = read_checked(file) if file.is_file() else {}
            return record | later | {"meta": record["meta"] | later.get("meta", {})}

    def _reading(self, step: int) -> Any:
        """Raises UserError if the block fails at files that are as they were saved, but odd."""
        return odd_values(f"{self.directory / str(step)} cannot be read; use another", OSError)

    def _is_valid(self, step: int) -> bool:
        """True if the files of `step` are unchanged; otherwise says so once."""
        if step not in self._problems:
            problems = dist.everyone(damage(self.directory / str(step)))
            self._problems[step] = problem = next(filter(None, problems), "")
            if problem and dist.is_main():
                print(f"jaxllm: checkpoint {step} is damaged, skipped: {problem}", file=sys.stderr)
        return not self._problems[step]


def list_files(folder: Path, files: Sequence[Path], digests: dict[str, str | None]) -> None:
    """Writes files.json: the sizes and digests of `files`, which are in `folder`. digests: those
    that are known, by the path within `folder`."""
    named = {str(p.relative_to(folder)): p for p in files}
    listed = {n: [file_size(p), digests.get(n) or _digest(p)] for n, p in named.items()}
    write_text(folder / FILES, json.dumps(listed))


def changed_file(folder: Path, start: int = 0, every: int = 1) -> str:
    """What is wrong with the files of a folder, one line; "" if they are as files.json lists them.

    start, every: look at some of the files only.
    """
    try:
        listed = json.loads(read_text(folder / FILES))
        if not (listed and isinstance(listed, dict)):
            return f"{FILES} lists no files"
        for name, entry in list(listed.items())[start::every]:
            if not (isinstance(entry, list) and len(entry) == 2):
                return f"{FILES} has {entry!r} for {name}"
            (size, digest), now = entry, file_size(folder / name)
            if now != size:
                return f"{name} has {now} of {size} bytes"
            if digest is not None and _digest(folder / name) not in (None, digest):
                return f"{name} has changed"
    except (OSError, ValueError, RecursionError) as error:
        return str(error).strip().split("\n")[0] or "unreadable"
    return ""


def damage(folder: Path) -> str:
    """Why a checkpoint is damaged, or "". Each process looks at its share of the files."""
    try:
        for path in () if is_bucket(folder) else folder.rglob("*"):
            if not (path.is_file() or path.is_dir()):  # a pipe, for which orbax would wait
                return f"{path.relative_to(folder)} is not a regular file"
        if (folder / AMENDED).is_file():
            read_checked(folder / AMENDED)
    except (OSError, ValueError) as error:
        return str(error)
    return changed_file(folder, dist.index(), dist.count())


@cache
def _patch_orbax_for_s3() -> None:
    """Makes orbax read and write arrays in s3:// by tensorstore's driver of that name.

    orbax 0.12 knows files and gs:// only (github.com/google/orbax/pull/2739), and has no option for
    the key-value store. The keys are the same, so the specification of gs:// is changed to S3's.
    """
    from orbax.checkpoint._src.serialization import tensorstore_utils

    build = tensorstore_utils.build_kvstore_tspec
    store: dict[str, Any] = {"driver": "s3"}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
        store |= {"endpoint": endpoint, "aws_region": region}
    if "AWS_ACCESS_KEY_ID" in os.environ:  # else the files and services that AWS's clients ask
        store["aws_credentials"] = {"type": "environment"}

    def with_s3(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if value.get("driver") in ("gcs", "gcs_grpc"):
            return {k: value[k] for k in ("bucket", "path")} | store
        return {key: with_s3(item) for key, item in value.items()}

    def build_kvstore_tspec(directory: str, *args: Any, **options: Any) -> Any:
        if not directory.startswith("s3://"):
            return build(directory, *args, **options)
        return with_s3(build(f"gs{directory[2:]}", *args, **options))

    tensorstore_utils.build_kvstore_tspec = build_kvstore_tspec


def _by_name(tree: Any) -> dict[str, Any]:
    """{a/b/0: leaf}, the same for a tree and for orbax's metadata of it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _digests(folder: Path, part: Path) -> dict[str, str | None]:
    """{path within `folder`: digest} of the files in `part`."""
    return {str(p.relative_to(folder)): _digest(p) for p in files_in(part)}


def _digest(path: Path) -> str | None:
    """xxh3 of a file; None in a bucket, which keeps checksums itself."""
    if is_bucket(path):
        return None
    if not path.is_file():  # a pipe or a device may have no end
        raise ValueError(f"{path.name} is not a regular file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()
