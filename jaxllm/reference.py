# SPDX-License-Identifier: Apache-2.0
"""The log-probabilities of the reference model, computed once and read with the rows.

The reference is the model that the policy starts as (program.Program.reference).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from jax.sharding import Mesh

from jaxllm.config import TrainConfig
from jaxllm.data.batch import Batch
from jaxllm.data.examples import cache_root
from jaxllm.data.loader import Data, Rows, eval_batches
from jaxllm.mesh import data_parallel, put
from jaxllm.model.decoder import Decoder
from jaxllm.monitor.metrics import track
from jaxllm.objectives.dpo import answer_logps
from jaxllm.objectives.table import loss_chunk

# A pair's segments, and where a batch has their log-probabilities under the reference.
KEPT = {
    "chosen_segment": "chosen_logps",
    "rejected_segment": "rejected_logps",
    "unpaired_segment": "unpaired_logps",
}


# ---- computed once


@dataclass(frozen=True)
class Known:
    """Rows of pairs with what the reference thinks of them."""

    part: Any
    logps: dict[str, np.ndarray]  # float32 [rows, P] each

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return self.part[row] | {name: each[row] for name, each in self.logps.items()}


def precomputed(
    cfg: TrainConfig,
    data: Data,
    model: Callable[[Any, Any], Decoder],
    origin: Any,
    trained: Any,
    frozen: Any,
    mesh: Mesh,
) -> Data:
    """The data with the reference's log-probabilities in its rows, from the cache where it has
    them: it knows them by the rows, the model, and how that is held and computed."""
    segments = [name for name in KEPT if name in _first(data)]

    def run(trainable: Any, held: Any, batch: Batch) -> Any:
        found, _ = answer_logps(
            model(trainable, held),
            batch,
            [getattr(batch, s) for s in segments],
            chunk=loss_chunk(cfg),
        )
        return dict(zip([KEPT[s] for s in segments], found, strict=True))

    jitted = jax.jit(run)
    each = cfg.micro_batch_size * data_parallel(mesh)
    held = [cfg.peft.quantize_base, cfg.model.weight_dtype, cfg.model.compute_dtype]
    key = json.dumps([origin, *held])

    def known(rows: Rows) -> Rows:
        return replace(rows, parts=tuple(map(known_part, rows.parts)))

    def known_part(part: Any) -> Known:
        digest = _key(part, key)
        file = cache_root(cfg) / f"reference-{digest}.npz"
        if not file.is_file():
            one = Rows((part,), None, part.length)
            with jax.set_mesh(mesh):
                batches = eval_batches(one, each)
                if cfg.log.progress:
                    batches = track(batches, "reference", -(-len(part) // each))
                made = [
                    jax.device_get(jitted(trained, frozen, Batch(**put(mesh, b)))) for b in batches
                ]
            _save(file, {n: np.concatenate([m[n] for m in made])[: len(part)] for n in made[0]})
        with np.load(file, allow_pickle=False) as found:
            return Known(part, dict(found))

    evals = {name: known(rows) for name, rows in data.evals.items()}
    return replace(data, train=None if data.train is None else known(data.train), evals=evals)


def _first(data: Data) -> dict[str, np.ndarray]:
    assert data.train is not None
    return data.train.parts[0][0]


def _key(part: Any, model: str) -> str:
    hasher = xxhash.xxh3_128(model.encode())
    for row in _rows(part):
        for name in sorted(row):
            hasher.update(name.encode() + np.ascontiguousarray(row[name]).tobytes())
    return hasher.hexdigest()


def _rows(part: Any) -> Iterator[dict[str, np.ndarray]]:
    return (part[row] for row in range(len(part)))


def _save(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz that appears whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".npz", delete=False) as part:
        np.savez(part, **arrays)  # type: ignore[arg-type]
    os.replace(part.name, file)
