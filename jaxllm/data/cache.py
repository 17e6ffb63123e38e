# SPDX-License-Identifier: Apache-2.0
"""The cache of what is made from data once: directories that never change, and files that grow.

A directory has the hashes of its files. They are compared again when the size, time or inode of a
file has changed: to compare them at each start would read all tokens.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import xxhash

from jaxllm import dist
from jaxllm.data.sources import file_hash
from jaxllm.errors import UserError
from jaxllm.paths import (
    as_path,
    copy,
    files_in,
    is_bucket,
    read_checked,
    unfinished,
    version,
    write_checked,
)

_SUMS = "sums.json"  # in a directory: {file: its hash}
_LAST = "state.json"  # the file of a directory (a saved `datasets.Dataset`) that is uploaded last
_ABANDONED = 86_400.0  # seconds after which the temporary files of a killed run are deleted


class Cache:
    """The directory data.cache_dir, which is created if missing.

    Arrow tables are memory-mapped, so entries are on the local disk. If data.cache_dir is in a
    bucket, they are also copied to it, and from it to the machines that lack them.
    """

    def __init__(self, directory: str | None) -> None:
        self.shared = as_path(str(directory)) if is_bucket(directory) else None
        local = None if self.shared else directory
        try:
            self.root = Path(local or "~/.cache/jaxllm").expanduser()
        except RuntimeError:
            raise UserError(
                "there is no home directory for tokenized data; set data.cache_dir"
            ) from None
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"data.cache_dir: {self.root} is a file, or is inside one") from None
        records = self.root / "hashes"
        for left in (*self.root.glob("making-*"), *unfinished(self.root), *unfinished(records)):
            with suppress(OSError):  # another process deletes it, or another user owns it
                if left.stat().st_mtime < time.time() - _ABANDONED:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()

    def hash_of(self, file: Path, place: Path | None = None) -> str:
        """A hash of all bytes of a file; in a bucket, its version. It is kept in the cache, so the
        file is read again only if its size, time or inode has changed. place: the path to which
        the file will be moved."""
        if is_bucket(file):
            return version(file)
        stat = file.stat()
        state = [str((place or file).absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ino]
        record = self.root / "hashes" / xxhash.xxh3_128_hexdigest(json.dumps(state).encode())
        with suppress(OSError, ValueError):
            return read_checked(record)
        digest = file_hash(file)
        with suppress(OSError):  # a cache that cannot be written
            record.parent.mkdir(exist_ok=True)
            write_checked(record, digest)
        return digest

    def _is_intact(self, made: Path, entry: Path) -> bool:
        """True if the files of a directory have the hashes that `put` wrote. entry: its path, or
        the one to which it will be moved."""
        try:
            sums = read_checked(made / _SUMS)
            return all(self.hash_of(made / n, entry / n) == digest for n, digest in sums.items())
        except (OSError, ValueError):
            return False

    def check(self, name: str) -> bool:
        """True if there is an entry. A directory that is damaged is deleted first, so one process
        of those that share the cache calls it, before any of them reads the entry."""
        entry = self.root / name
        if entry.is_dir() and not self._is_intact(entry, entry):
            print(f"jaxllm: {entry} is damaged, so it is made again", file=sys.stderr)
            moved = self.root / f"making-{uuid.uuid4().hex}"
            with suppress(FileNotFoundError):  # another process moved it
                entry.rename(moved)
                shutil.rmtree(moved)
        return self.get(name) is not None

    def get(self, name: str) -> Path | None:
        """The local path of an entry, None if there is none. A file is read from the bucket again,
        since another machine may have replaced it."""
        entry = self.root / name
        if entry.is_dir() or self.shared is None:
            return entry if entry.exists() else None
        remote, made = self.shared / name, self.root / f"making-{uuid.uuid4().hex}"
        if (remote / _LAST).is_file():
            made.mkdir()
            for file in files_in(remote):
                copy(file, made / file.name)
            if not self._is_intact(made, entry):
                shutil.rmtree(made)
                return None
        elif remote.is_file():
            copy(remote, made)
        else:
            return None
        return self._move(made, entry)

    def put(self, made: Path, name: str) -> Path:
        """Moves a complete file or directory, which is in `root`, to the entry `name`."""
        entry = self.root / name
        if made.is_dir():
            names = [str(file.relative_to(made)) for file in files_in(made)]
            write_checked(made / _SUMS, {n: self.hash_of(made / n, entry / n) for n in names})
        if self.shared:
            files = files_in(made) if made.is_dir() else [made]
            for file in sorted(files, key=lambda file: file.name == _LAST):
                copy(file, self.shared / name / file.relative_to(made))
        return self._move(made, entry)

    def _move(self, made: Path, entry: Path) -> Path:
        entry.parent.mkdir(exist_ok=True)
        try:
            os.replace(made, entry)
        except OSError:
            if not entry.is_dir():  # another process may have made it
                raise
            shutil.rmtree(made)
        return entry

    def processes(self) -> list[int]:
        """The processes that share this cache, this one included, ascending."""
        if self.shared or dist.count() == 1:
            return list(range(dist.count()))
        mark = dist.agree(uuid.uuid4().hex)
        own = self.root / f"making-{mark}-{dist.index()}"
        own.touch()
        dist.barrier("cache")
        seen = sorted(int(f.name.rpartition("-")[2]) for f in self.root.glob(f"making-{mark}-*"))
        seen_by = dist.everyone(seen)
        own.unlink()
        return [process for process in seen if seen_by[process] == seen]
