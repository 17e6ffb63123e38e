# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of answers under the reference model, computed once and read with the rows.

The reference is the policy at the start of the run (program.Program.reference).

Dims: P answers of a row at most.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from jax.sharding import Mesh

from jaxllm import dist
from jaxllm.config import TrainConfig
from jaxllm.data.batch import Batch
from jaxllm.data.dataset import Data
from jaxllm.data.examples import cache_root
from jaxllm.data.loader import eval_batches
from jaxllm.data.rows import Rows
from jaxllm.mesh import data_parallel, put
from jaxllm.model.decoder import Decoder
from jaxllm.monitor.progress import track
from jaxllm.objectives.dpo import answer_logps

# A batch's field with the segments of answers -> the field with their log-probabilities.
LOGPS = {
    "chosen_segment": "chosen_logps",
    "rejected_segment": "rejected_logps",
    "unpaired_segment": "unpaired_logps",
}


@dataclass(frozen=True)
class RowsWithLogps:
    """The rows of a source with the reference's log-probabilities of their answers."""

    part: Any
    logps: dict[str, np.ndarray]
    """fields of `Batch`, float32 [rows, P] each"""

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return self.part[row] | {name: logps[row] for name, logps in self.logps.items()}


def precomputed(
    cfg: TrainConfig,
    data: Data,
    reference: Callable[[Any, Any], Decoder],
    origin: Any,
    trainable: Any,
    frozen: Any,
    mesh: Mesh,
) -> Data:
    """`data` with the log-probabilities under `reference(trainable, frozen)` in its rows.

    They are cached in data.cache_dir, in one file for each `origin` of the weights (a JSON value),
    dtype and quantisation. The key of an answer is a hash of its tokens, so another packing, or
    data with more examples, reuses what is there.
    """
    assert data.train is not None
    fields = [name for name in LOGPS if name in data.train.parts[0][0]]

    def logps_of(trainable: Any, frozen: Any, batch: Batch) -> list[jax.Array]:
        segments = [getattr(batch, name) for name in fields]
        model = reference(trainable, frozen)
        return answer_logps(model, batch, segments, chunk=cfg.model.loss_chunk)[0]

    jitted = jax.jit(logps_of)
    size = cfg.micro_batch_size * data_parallel(mesh)
    dtypes = [cfg.peft.quantize_base, cfg.model.weight_dtype, cfg.model.compute_dtype]
    model_key = xxhash.xxh3_128_hexdigest(json.dumps([origin, *dtypes]).encode())
    file = cache_root(cfg) / f"reference-{model_key}.npz"
    cache = _Cache.load(file)

    def compute(part: Any, rows: np.ndarray) -> np.ndarray:
        """float32 [fields, rows, P] of some rows of a source."""
        starts: Any = range(0, len(rows), size)
        if cfg.log.progress:
            starts = track(starts, "reference", len(starts))
        found = []
        for start in starts:
            some = [part[row] for row in rows[start : start + size]]
            batch = Batch(**put(mesh, next(eval_batches(Rows((some,), None, part.length), size))))
            found.append(np.stack(dist.gather(jitted(trainable, frozen, batch)))[:, : len(some)])
        return np.concatenate(found, 1)

    def add(part: Any) -> RowsWithLogps:
        nonlocal cache
        keys = _answer_keys(part, fields)
        rows = np.flatnonzero(cache.lacks(keys).any((0, 2)))
        if len(rows):
            with jax.set_mesh(mesh):
                cache = cache.extended(keys[:, rows], compute(part, rows))
            if dist.is_main():
                cache.save(file)
        return RowsWithLogps(part, dict(zip([LOGPS[f] for f in fields], cache[keys], strict=True)))

    def with_logps(rows: Rows) -> Rows:
        return replace(rows, parts=tuple(add(part) for part in rows.parts))

    evals = {name: with_logps(rows) for name, rows in data.evals.items()}
    return replace(data, train=with_logps(data.train), evals=evals)


def _answer_keys(part: Any, fields: list[str]) -> np.ndarray:
    """uint64 [fields, rows, P]: a hash of each answer's tokens, its prompt's, and which of them are
    learned; 0 where a slot has no answer."""

    def key(row: dict[str, np.ndarray], segment: int) -> int:
        if segment == 0:
            return 0
        here = row["segment_ids"] == segment
        hasher = xxhash.xxh3_64(row["tokens"][here].tobytes())
        hasher.update((row["weights"][here] > 0).tobytes())
        return hasher.intdigest()

    rows = (part[index] for index in range(len(part)))
    keys = [[[key(row, segment) for segment in row[f]] for f in fields] for row in rows]
    return np.asarray(keys, np.uint64).swapaxes(0, 1)


@dataclass(frozen=True)
class _Cache:
    """Log-probabilities of answers by key."""

    keys: np.ndarray  # uint64 [N], ascending
    logps: np.ndarray  # float32 [N]

    @staticmethod
    def load(file: Path) -> _Cache:
        if not file.is_file():
            return _Cache(np.zeros(0, np.uint64), np.zeros(0, np.float32))
        with np.load(file, allow_pickle=False) as arrays:
            return _Cache(arrays["keys"], arrays["logps"])

    def lacks(self, keys: np.ndarray) -> np.ndarray:
        """bool: True for the answers that are not cached."""
        return (keys > 0) & ~np.isin(keys, self.keys)

    def extended(self, keys: np.ndarray, logps: np.ndarray) -> _Cache:
        """With further answers; those that are cached already stay as they are."""
        new = self.lacks(keys)
        unique, first = np.unique(np.concatenate([self.keys, keys[new]]), return_index=True)
        return _Cache(unique, np.concatenate([self.logps, logps[new]])[first])

    def __getitem__(self, keys: np.ndarray) -> np.ndarray:
        """float32 of the shape of `keys`, which are all cached; 0 for no answer."""
        return np.where(keys > 0, self.logps[np.searchsorted(self.keys, keys)], np.float32(0))

    def save(self, file: Path) -> None:
        """Writes the file atomically."""
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".npz", delete=False) as part:
            np.savez(part, keys=self.keys, logps=self.logps)
        os.replace(part.name, file)
