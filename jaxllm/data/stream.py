# SPDX-License-Identifier: Apache-2.0
"""Rows of documents that are tokenized file by file, for data that does not fit on the disk.

Row i is a function of the seed: each pass shuffles the files, and the rows in each file. To find
row i, only the numbers of rows of earlier files are needed. They are cached, so a resumed run
tokenizes the file in which it stopped, but no earlier ones.
"""

from __future__ import annotations

import bisect
import json
import shutil
import sys
import tempfile
import uuid
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Any

import fsspec
import numpy as np
import xxhash

from jaxllm.config import Source, TrainConfig
from jaxllm.data.cache import Cache
from jaxllm.data.examples import Examples, cache_key, tokenize_table
from jaxllm.data.rows import Origin, Row, Windows
from jaxllm.data.sources import Located, content_hash, file_ids, locate, read
from jaxllm.errors import UserError
from jaxllm.paths import as_path, is_bucket, local_copy, read_checked, write_checked

ENDLESS = 2**40  # rows of a stream: endless in practice, and within the limits of len() and Grain


class Stream:
    """The endless sequence of a source's rows in all passes, with random access.

    A file is tokenized when one of its rows is read, into an unlinked temporary file. At most
    CACHED of these, and the one being written, use space on the disk, until the process ends.
    The tail of a file that does not fill a row is dropped. Raises UserError for a file that cannot
    be read, and if no file fills a row.
    """

    CACHED = 3

    def __init__(
        self,
        source: Source,
        cfg: TrainConfig,
        tokenizer: Any,
        tokenizer_hash: str,
        seed: tuple[int, ...],
    ) -> None:
        self.source, self._tokenizer = source, tokenizer
        # One process, since forking during training is not safe with JAX.
        data = replace(cfg.data, workers=1)
        self._cfg = replace(cfg, data=data, log=replace(cfg.log, progress=False))
        self._seed, self.length = seed, cfg.data.length
        self._located = locate(source)
        self.files = self._located.urls or tuple(map(str, self._located.files))
        if self._located.format in ("dataset", "tfds"):
            raise UserError(
                f"{source.path}: streaming needs files (Parquet, JSON lines, text, …), but this is "
                "a dataset; remove streaming"
            )
        self.split = self._located.split
        self._ids = file_ids(self.files)
        settings = {"columns": source.columns, "tokenizer": tokenizer_hash, "length": self.length}
        settings["rows"] = content_hash([Path(__file__).with_name("rows.py")])  # they count rows
        self.content = xxhash.xxh3_128_hexdigest(json.dumps(self._ids).encode())
        self.fingerprint = cache_key(settings | {"streaming": self._located.format})
        self._cache = Cache(cfg.data.cache_dir)
        self._index = f"rows-{self.fingerprint}.json"
        self._counts = self._read_counts()
        self._starts = [0]  # first row of each segment (a file in a pass), …
        self._segments: list[tuple[int, int]] = []  # … and its (pass, file)
        self._rows = lru_cache(self.CACHED)(self._load)
        self._lock = RLock()
        self._shuffled = lru_cache(self.CACHED + 1)(self._permutation)
        self._segment_of(0)  # report errors in the first file before anything compiles

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, row: int) -> Row:
        windows, index = self._window(row)
        return windows[index]

    def origins(self, row: int, epoch: int) -> list[list[Origin]]:
        """The examples in each segment of a row."""
        windows, index = self._window(row)
        return windows.origins(index, epoch)

    def _window(self, row: int) -> tuple[Windows, int]:
        """(the rows of the file that has row `row`, its index among them)."""
        with self._lock:
            segment = self._segment_of(row)
            epoch, file = self._segments[segment]
            rows = self._rows(file)
            if len(rows) != self._counts[self._ids[file]]:
                raise UserError(
                    f"{self.files[file]}: has {len(rows):,} rows, but {self._index} in "
                    "data.cache_dir has another number for it; delete that file to count again"
                )
            order = self._shuffled(epoch, file + 1, len(rows))
        return rows, int(order[row - self._starts[segment]])

    def _segment_of(self, row: int) -> int:
        """The index of the segment that has row `row`; counts the rows of earlier files."""
        while self._starts[-1] <= row:
            epoch, position = divmod(len(self._segments), len(self.files))
            file = int(self._shuffled(epoch, 0, len(self.files))[position])
            self._segments.append((epoch, file))
            self._starts.append(self._starts[-1] + self._count(file))
            if position + 1 == len(self.files) and not self._starts[-1]:
                raise UserError(
                    f"{self.source.path}: no file has the {self.length + 1} tokens of a row; give "
                    "larger files or a smaller data.max_length"
                )
        return bisect.bisect_right(self._starts, row) - 1

    def _permutation(self, epoch: int, kind: int, count: int) -> np.ndarray:
        """The order in a pass of the files (kind = 0) or of the rows of file kind - 1."""
        return np.random.default_rng((*self._seed, epoch, kind)).permutation(count)

    def _count(self, file: int) -> int:
        """The number of rows of a file, from the index if it was counted before."""
        name = self._ids[file]
        if name not in self._counts:
            self._counts |= self._read_counts() | {name: len(self._rows(file))}
            made = self._cache.root / f"making-{uuid.uuid4().hex}"
            write_checked(made, self._counts)
            self._cache.put(made, self._index)
        return self._counts[name]

    def _read_counts(self) -> dict[str, int]:
        index = self._cache.get(self._index)
        try:
            return read_checked(index) if index else {}
        except ValueError as error:
            print(f"jaxllm: {error}; the rows are counted again", file=sys.stderr)
            return {}

    def _load(self, file: int) -> Windows:
        """Tokenize a file and divide it into rows."""
        name = self.files[file]
        with tempfile.TemporaryDirectory(dir=self._cache.root, prefix="making-") as folder:
            path = _fetch(name, Path(folder))
            located = Located(self._located.format, (path,))
            source = replace(self.source, path=name)
            raw = read(located, Path(folder))
            table = tokenize_table(source, self._cfg, self._tokenizer, raw, Path(folder))
        # The folder is deleted; mapped files exist until they are unmapped.
        examples = Examples(table, source)
        if not len(examples):
            raise UserError(f"{name}: has no records")
        indices, segment = np.flatnonzero(examples.lengths), self._cfg.data.segment
        return Windows(examples, indices, self.length, segment=segment, tail=False)


def _fetch(file: str, folder: Path) -> Path:
    """The path of a local file, or of a downloaded copy of an object or a URL."""
    path = folder / file.rpartition("/")[2]
    try:
        if "://" not in file or is_bucket(file):
            return local_copy(as_path(file), folder)
        with fsspec.open(file, "rb") as stream, open(path, "wb") as out:
            shutil.copyfileobj(stream, out, 1 << 22)  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(f"{file}: cannot be downloaded: {error}") from error
    return path
