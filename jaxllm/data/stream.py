# SPDX-License-Identifier: Apache-2.0
"""Rows of documents that are tokenised one file at a time, for data that the disk does not hold.

Row i is a function of the seed alone: each pass takes the files in an order of its own, and the
rows of each file in one of their own. What comes before it matters only by its number of rows,
which is kept in the cache for each file, so a resumed run tokenises the file it stopped in and none
before it.
"""

from __future__ import annotations

import bisect
import json
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Any

import fsspec
import numpy as np
import xxhash

from jaxllm.config import Source, TrainConfig
from jaxllm.data.examples import Examples, cache_key, cache_root, tokenized
from jaxllm.data.sources import Located, locate
from jaxllm.errors import UserError

ENDLESS = 2**40  # rows of a stream: as good as endless, and within what len() and grain count


class Stream:
    """The rows of a source, pass after pass, by their place in the run: endless, random access.

    A file is tokenised when a row of it is read, into a file that has no name in any folder: at
    most HELD of them, and the one that is being made, take room on the disk, and none is left when
    the process ends. lay_out: Examples of one file -> its rows. Raises ValueError for a file that
    cannot be read, and where no file fills a row.
    """

    HELD = 3

    def __init__(
        self,
        source: Source,
        cfg: TrainConfig,
        tokenizer: Any,
        tokenizer_hash: str,
        lay_out: Callable[[Examples], Any],
        seed: Sequence[int],
    ) -> None:
        self.source, self._tokenizer, self._lay_out = source, tokenizer, lay_out
        # One process: the run goes on meanwhile, and JAX does not like to be forked.
        data = replace(cfg.data, workers=1)
        self._cfg = replace(cfg, data=data, log=replace(cfg.log, progress=False))
        self._seed, self.length = tuple(seed), cfg.data.max_length
        self._located = locate(source)
        self.files = self._located.remote or tuple(map(str, self._located.files))
        if self._located.format in ("dataset", "tfds"):
            raise UserError(
                f"{source.path}: streaming reads files (Parquet, JSON lines, text, …), one after "
                "another; this is one dataset"
            )
        self.split = self._located.split
        self._ids = [_identity(file) for file in self.files]
        settings = {"columns": source.columns, "tokenizer": tokenizer_hash, "length": self.length}
        self.content = xxhash.xxh3_128_hexdigest(json.dumps(self._ids).encode())
        self.fingerprint = cache_key(settings | {"streaming": self._located.format})
        self._index = cache_root(cfg) / f"rows-{self.fingerprint}.json"
        self._counts = _read(self._index)
        self._starts = [0]  # the place of the first row of each stretch, a file in a pass, …
        self._stretches: list[tuple[int, int]] = []  # … and its (pass, file)
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._lock = RLock()
        self._shuffled = lru_cache(self.HELD + 1)(self._permutation)
        self._stretch(0)  # what is wrong with the first file is said before anything compiles

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, place: int) -> dict[str, np.ndarray]:
        with self._lock:
            at = self._stretch(place)
            epoch, file = self._stretches[at]
            rows = self._rows(file)
            if len(rows) != self._counts[self._ids[file]]:
                raise UserError(
                    f"{self.files[file]}: has {len(rows):,} rows and had others when "
                    f"{self._index} counted them; delete that file to count them again"
                )
            order = self._shuffled(epoch, file + 1, len(rows))
        return rows[int(order[place - self._starts[at]])]

    def _stretch(self, place: int) -> int:
        """Which stretch has the row at `place`; the number of rows of those before is found out."""
        while self._starts[-1] <= place:
            epoch, at = divmod(len(self._stretches), len(self.files))
            file = int(self._shuffled(epoch, 0, len(self.files))[at])
            self._stretches.append((epoch, file))
            self._starts.append(self._starts[-1] + self._count(file))
            if at + 1 == len(self.files) and not self._starts[-1]:
                raise UserError(
                    f"{self.source.path}: no file has the {self.length + 1} tokens that fill a "
                    "row; give larger files or a smaller data.max_length"
                )
        return bisect.bisect_right(self._starts, place) - 1

    def _permutation(self, epoch: int, what: int, count: int) -> np.ndarray:
        """The order in a pass of the files (what = 0) or of the rows of file what - 1."""
        return np.random.default_rng((*self._seed, epoch, what)).permutation(count)

    def _count(self, file: int) -> int:
        """Rows of a file, from the index where another run, or this one, has met it."""
        name = self._ids[file]
        if name not in self._counts:
            self._counts = _read(self._index) | self._counts | {name: len(self._rows(file))}
            with tempfile.NamedTemporaryFile(
                "w", dir=self._index.parent, prefix="making-", delete=False
            ) as part:
                json.dump(self._counts, part)
            os.replace(part.name, self._index)
        return self._counts[name]

    def _rows(self, file: int) -> Any:
        """The rows of a file, tokenised now unless it is among the last HELD."""
        if file in self._held:
            self._held.move_to_end(file)
            return self._held[file]
        while len(self._held) >= self.HELD:
            self._held.popitem(last=False)
        name = self.files[file]
        with tempfile.TemporaryDirectory(dir=cache_root(self._cfg), prefix="making-") as folder:
            path = _fetched(name, Path(folder))
            located = Located(self._located.format, (path,))
            source = replace(self.source, path=name)
            table = tokenized(source, self._cfg, self._tokenizer, located, Path(folder))
        # The folder is gone; what is mapped stays until it is let go.
        examples = Examples(table, name=name, split=None, content="", fingerprint="")
        self._held[file] = self._lay_out(examples)
        return self._held[file]


def _identity(file: str) -> str:
    """What tells a file from another: its address; of one on the disk its size and two ends."""
    if "://" in file:
        return file
    size, ends = os.path.getsize(file), xxhash.xxh3_128()
    with open(file, "rb") as stream:
        for start in (0, max(size - (1 << 16), 0)):
            stream.seek(start)
            ends.update(stream.read(1 << 16))
    return f"{size}-{ends.hexdigest()}"


def _fetched(file: str, folder: Path) -> Path:
    """A file on the disk: itself, or a copy of what an address names."""
    if "://" not in file:
        return Path(file)
    path = folder / file.rpartition("/")[2]
    try:
        with fsspec.open(file, "rb") as stream, open(path, "wb") as out:
            shutil.copyfileobj(stream, out, 1 << 22)  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(f"{file}: could not be read: {error}") from error
    return path


def _read(index: Path) -> dict[str, int]:
    return json.loads(index.read_text()) if index.is_file() else {}
