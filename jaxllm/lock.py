# SPDX-License-Identifier: Apache-2.0
"""The lock of a run folder, which the process that trains in it holds."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from pathlib import Path
from weakref import WeakValueDictionary

from jaxllm.errors import UserError
from jaxllm.paths import is_bucket

LOCK = ".lock"  # in a run folder: locked by the process that trains in it
FLOCK = "hhqqi4x"  # struct flock of Linux: type, whence, start, length, process


class Lock:
    """A run folder in which no other process can train, until the lock is deleted or the process
    ends, however it ends. All locks of one folder in one process are the same."""

    _held: WeakValueDictionary[Path, Lock] = WeakValueDictionary()

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / LOCK).open("a+")
        try:
            # Of this process alone: a child that outlives it would keep an flock.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.file.seek(0)
            holder = self.file.read(200).strip() or "another process"
            raise UserError(
                f"{holder} is training in {folder}; wait until it ends, or change output_dir"
            ) from None
        except OSError:  # a file system without locks
            return
        self.file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=self.file, flush=True)

    @classmethod
    def of(cls, folder: Path) -> Lock | None:
        """The lock of a folder; None if nothing can be written there. Raises UserError if another
        process has it."""
        lock = cls._held.get(folder.resolve())
        if lock is None:
            try:
                lock = cls._held[folder.resolve()] = cls(folder)
            except OSError:
                return None
        return lock

    @classmethod
    def is_held(cls, folder: Path) -> bool | None:
        """True if a process trains in the folder; None if that is unknown, as in a bucket and on a
        file system without locks. Takes no lock, so that a run may start meanwhile."""
        if is_bucket(folder):
            return None
        if folder.resolve() in cls._held:  # to open and close the file would release the lock
            return True
        if sys.platform != "linux":
            return None
        try:
            with (folder / LOCK).open("rb") as file:
                asked = struct.pack(FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
                kind = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))[0]
                # One that never could be locked is empty.
                return kind != fcntl.F_UNLCK or (False if file.read(1) else None)
        except OSError:
            return None
