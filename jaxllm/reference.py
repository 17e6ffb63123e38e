# SPDX-License-Identifier: Apache-2.0
"""The model that a policy is compared with: the one it began as.

Beside new LoRA branches that is the frozen base without them, the same buffers in a plain model. In
every other case what is trained is copied before the first update, sharded as the weights are. Or
its log-probabilities are computed once and read with the rows.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from flax import nnx
from jax.sharding import Mesh

from jaxllm import hf
from jaxllm.config import TrainConfig
from jaxllm.data.batch import Batch
from jaxllm.data.examples import cache_root
from jaxllm.data.loader import Data, Rows, eval_batches
from jaxllm.mesh import data_parallel, put
from jaxllm.model.adapter import PLAIN, Peft
from jaxllm.model.decoder import Decoder, merge
from jaxllm.monitor.progress import track
from jaxllm.objectives.dpo import answer_logps
from jaxllm.objectives.table import loss_chunk
from jaxllm.step import Models

# A pair's segments, and where a batch has their log-probabilities under the reference.
KEPT = {
    "chosen_segment": "chosen_logps",
    "rejected_segment": "rejected_logps",
    "unpaired_segment": "unpaired_logps",
}


def beside(
    cfg: TrainConfig, model: Decoder, graph: Any, trained: Any, frozen: Any, layout: Any
) -> tuple[Models, dict[str, Any]]:
    """(models, frozen) of steps that compare the model with what it is now.

    graph, trained, frozen: nnx.split of the model, the latter two as nested dicts of arrays;
    layout: the NamedShardings of a copy of what is trained.
    """
    plan = model.peft
    fresh = plan.frozen and not plan.saved and not cfg.peft.path
    other, like = _bare(model, PLAIN if fresh else plan)
    own: Any = {}
    if not fresh:
        copied = _common(layout, like)
        own = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=copied)(_common(trained, like))

    def models(trainable: Any, held: Any) -> tuple[Any, Any]:
        shared = held["weights"]
        policy = merge(graph, trainable, shared)
        return policy, merge(other, held["reference"], _common(shared, like))

    return models, {"weights": frozen, "reference": own}


def _bare(model: Decoder, plan: Peft) -> tuple[Any, Any]:
    """The graph of the model with what `plan` adds and nothing else, and its variables' shapes."""

    def make() -> Decoder:
        keys: dict[str, Any] = {"compute_dtype": model.compute_dtype, "remat": model.remat}
        keys["peft"] = plan
        return Decoder(model.cfg, rngs=nnx.Rngs(0), scan_unroll=model.scan_unroll, **keys)

    graph, state = nnx.split(nnx.eval_shape(make))
    return graph, nnx.to_pure_dict(state)


def _common(tree: Any, like: Any) -> Any:
    """Those leaves of a nested dict that `like` has too."""
    both = {k: (tree[k], v) for k, v in like.items() if k in tree}
    return {k: _common(t, v) if isinstance(v, dict) else t for k, (t, v) in both.items()}


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
    cfg: TrainConfig, data: Data, models: Models, trained: Any, frozen: Any, mesh: Mesh
) -> Data:
    """The data with the reference's log-probabilities in its rows, from the cache where it has
    them: it knows them by the rows, the model, and how that is held and computed."""
    segments = [name for name in KEPT if name in _first(data)]

    def run(trainable: Any, held: Any, batch: Batch) -> Any:
        _, reference = models(trainable, held)
        found, _ = answer_logps(
            reference, batch, [getattr(batch, s) for s in segments], chunk=loss_chunk(cfg)
        )
        return dict(zip([KEPT[s] for s in segments], found, strict=True))

    jitted = jax.jit(run)
    each = cfg.micro_batch_size * data_parallel(mesh)
    held = [cfg.peft.quantize_base, cfg.model.weight_dtype, cfg.model.compute_dtype]
    model = json.dumps([hf.beginning(cfg), hf.model_config(cfg)[1], *held])

    def known(rows: Rows) -> Rows:
        return replace(rows, parts=tuple(map(known_part, rows.parts)))

    def known_part(part: Any) -> Known:
        key = _key(part, model)
        file = cache_root(cfg) / f"reference-{key}.npz"
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
