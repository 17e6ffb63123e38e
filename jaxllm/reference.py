# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of answers under the reference model, computed once and read with the rows.

The reference is the policy at the start of the run (program.Program.reference).

Dims: P answers of a row at most.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import numpy as np
import xxhash
from flax import nnx
from jax.sharding import Mesh

from jaxllm import dist
from jaxllm.config import TrainConfig
from jaxllm.data.batch import Batch
from jaxllm.data.cache import Cache
from jaxllm.data.dataset import Data
from jaxllm.data.loader import eval_batches
from jaxllm.data.rows import Origin, Rows
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

    def origins(self, row: int, epoch: int) -> list[list[Origin]]:
        """The examples in each segment of a row, which is that of pass 0."""
        return self.part.origins(row, 0)


def precomputed(cfg: TrainConfig, data: Data, reference: Decoder, origin: Any, mesh: Mesh) -> Data:
    """`data` with the log-probabilities under the reference in its rows.

    They are cached in data.cache_dir, in one file for each `origin` of the weights (a JSON value),
    dtype and quantization. The key of an answer is a hash of its tokens, so another packing, or
    data with more examples, reuses the cached values.
    """
    assert data.train is not None
    fields = [name for name in LOGPS if name in data.train.parts[0][0]]
    graph, weights = nnx.split(reference)

    @jax.jit
    def logps_of(weights: Any, batch: Batch) -> jax.Array:
        segments = [getattr(batch, name) for name in fields]
        model = nnx.merge(graph, weights)
        return answer_logps(model, batch, segments, chunk=cfg.model.loss_chunk)[0]

    size = cfg.micro_batch_size * data_parallel(mesh)
    dtypes = [cfg.peft.quantize_base, cfg.model.weight_dtype, cfg.model.compute_dtype]
    digest = xxhash.xxh3_128_hexdigest(json.dumps([origin, *dtypes]).encode())
    files, name = Cache(cfg.data.cache_dir), f"reference-{digest}.npz"
    cache, writes = _load(files.get(name)), files.processes()[0] == dist.index()

    def compute(part: Any, rows: np.ndarray) -> np.ndarray:
        """float32 [fields, rows, P] for some rows of a source."""
        starts: Any = range(0, len(rows), size)
        if cfg.log.progress:
            starts = track(starts, "reference", len(starts))
        logps = []
        for start in starts:
            some = [part[row] for row in rows[start : start + size]]
            batch = Batch(**put(mesh, next(eval_batches(Rows((some,), None, part.length), size))))
            logps.append(np.stack(dist.gather(logps_of(weights, batch)))[:, : len(some)])
        return np.concatenate(logps, 1)

    def add_logps(part: Any) -> RowsWithLogps:
        keys = _answer_keys(part, fields)
        is_new = [not cache.keys() >= set(row.ravel().tolist()) for row in keys.swapaxes(0, 1)]
        missing = dist.everyone(np.flatnonzero(is_new).tolist())  # hosts may have own caches
        rows = np.array(sorted(set().union(*missing)), int)
        if len(rows):
            with jax.set_mesh(mesh):
                values = compute(part, rows)
            for key, value in zip(keys[:, rows].flat, values.flat, strict=True):
                cache[int(key)] = float(value)
            if writes:
                _save(files, name, cache)
        logps = np.asarray([cache[key] for key in keys.ravel().tolist()], np.float32)
        names = [LOGPS[field] for field in fields]
        return RowsWithLogps(part, dict(zip(names, logps.reshape(keys.shape), strict=True)))

    def with_logps(rows: Rows) -> Rows:
        return replace(rows, parts=tuple(map(add_logps, rows.parts)))

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


def _load(file: Path | None) -> dict[int, float]:
    """The cached log-probabilities {key of an answer: log p}; those of no answer, key 0, are 0.

    A damaged file counts as empty; the checksums are those of zip.
    """
    if file is None:
        return {0: 0.0}
    try:
        with np.load(file, allow_pickle=False) as arrays:
            pairs = zip(arrays["keys"].tolist(), arrays["logps"].tolist(), strict=True)
            return dict(pairs) | {0: 0.0}
    except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
        print(f"jaxllm: {file} is damaged, so it is made again: {error}", file=sys.stderr)
        return {0: 0.0}


def _save(files: Cache, name: str, cache: dict[int, float]) -> None:
    keys, logps = np.asarray(list(cache), np.uint64), np.asarray(list(cache.values()), np.float32)
    with tempfile.NamedTemporaryFile(
        dir=files.root, prefix="making-", suffix=".npz", delete=False
    ) as part:
        np.savez(part, keys=keys, logps=logps)
    files.put(Path(part.name), name)
