# SPDX-License-Identifier: Apache-2.0
"""Our side: the records as rows, and the compiled step of a training command on chosen rows.

Dims: A micro-batches of an update, B rows of a micro-batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from jaxllm.config import MeshSection, TrainConfig
from jaxllm.data.batch import Batch, empty_row, make_row
from jaxllm.data.dataset import load_data
from jaxllm.mesh import make_mesh, put
from jaxllm.program import build
from jaxllm.tokenizer import load_tokenizer

ROUND = 64  # rows have a multiple of this many tokens


@dataclass(frozen=True)
class Example:
    """A text [tokens, weights], or the chosen and the rejected text of a pair.

    weights[j] is the loss weight of predicting token j.
    """

    texts: tuple[tuple[np.ndarray, np.ndarray], ...]
    margin: float = 0.0

    @property
    def length(self) -> int:
        return sum(len(tokens) for tokens, _ in self.texts)


@dataclass(frozen=True)
class Step:
    """What a step logs."""

    loss: float
    grad_norm: float
    learning_rate: float


def our_examples(cfg: TrainConfig) -> tuple[dict[int, list[Example]], float]:
    """({record: its examples}, the mean number of examples in a row)."""
    tokenizer = load_tokenizer(str(cfg.model.path))
    apart = replace(cfg, data=replace(cfg.data, packing=False))
    rows = load_data(apart, tokenizer).train
    assert rows is not None
    (part,) = rows.parts
    found: dict[int, list[Example]] = {}
    for place, index in enumerate(part.indices):
        if cfg.verb.data == "chat":
            example = Example(((part.examples.tokens(index), part.examples.learn(index)),))
        else:
            *texts, fields = part.pair(place, 0)
            example = Example(tuple(texts), float(fields["margin"]))
        found.setdefault(int(part.examples.source_record[index]), []).append(example)
    packed = load_data(cfg, tokenizer).train if cfg.data.packing else rows
    assert packed is not None
    return found, len(part.indices) / len(packed)


def batch_of(rows: Sequence[Example], length: int, micro: int, count: int) -> dict[str, np.ndarray]:
    """The fields of Batch [A, B, T], B = micro: an example a row, and empty rows up to `count`."""
    made = []
    for example in rows:
        row = make_row([*example.texts], length)
        if len(example.texts) > 1:
            row["chosen_segment"] = np.array([1], np.int32)
            row["rejected_segment"] = np.array([2], np.int32)
            row["margin"] = np.array([example.margin], np.float32)
        made.append(row)
    fields = {name: np.zeros_like(value) for name, value in made[0].items()}
    made += [fields | empty_row(length)] * (count - len(made))
    return {
        name: np.stack([row[name] for row in made]).reshape(-1, micro, *made[0][name].shape)
        for name in fields
    }


def trained(cfg: TrainConfig, updates: Sequence[Sequence[Example]], micro: int) -> list[Step]:
    """Train `cfg`, which is resolved, on the examples of each update, on one CPU device."""
    mesh = make_mesh(MeshSection(), jax.devices("cpu")[:1])
    program = build(cfg, mesh)
    longest = max(example.length for update in updates for example in update)
    length = -(-longest // ROUND) * ROUND
    count = -(-max(map(len, updates)) // micro) * micro
    steps = []
    with jax.set_mesh(mesh):
        trainable, frozen = program.load()
        frozen = program.with_reference(trainable, frozen)
        state = program.begin(trainable)
        step = program.step(len(updates))
        for update in updates:
            batch = Batch(**put(mesh, batch_of(update, length, micro, count), micro))
            state, metrics = step(state, frozen, batch)
            names = ("loss", "grad_norm", "learning_rate")
            values = [float(metrics[n][0]) / max(float(metrics[n][1]), 1e-30) for n in names]
            steps.append(Step(*values))
    return steps
