# SPDX-License-Identifier: Apache-2.0
"""Held-out loss: Σ nll / Σ tokens over a whole set, whatever the batch size."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxllm.config import DataSection, MeshSection, ModelSection, Source, TrainConfig
from jaxllm.data.batch import Batch
from jaxllm.data.loader import eval_batches, load_data
from jaxllm.mesh import data_parallel, make_mesh, put
from jaxllm.model.decoder import merge
from jaxllm.monitor.metrics import track
from jaxllm.objectives.lm import lm_loss


def make_eval(graph: Any, objective: Callable[..., Any]) -> Callable[..., Any]:
    """Jitted `(trainable, frozen, batch [B, T]) -> {metric: (sum, weight)}` of an objective."""

    def run(trainable, frozen, batch):
        loss, weight, metrics = objective(merge(graph, trainable, frozen), batch, None, None)
        return {"loss": (loss, weight)} | metrics

    return jax.jit(run)


def evaluate(
    eval_fn: Callable[..., Any],
    trainable: Any,
    frozen: Any,
    rows: Any,
    *,
    mesh: Mesh,
    batch_size: int,
    progress: str = "",
) -> dict[str, float]:
    """{loss, perplexity, tokens, …}: sums over all of `rows`, divided once.

    loss is nats per learned token (without z-loss), perplexity its exponential, tokens how many
    were counted. `batch_size` is rounded up to the devices and only bounds memory. `progress`
    names a bar on stderr (none: no bar).
    """
    parts = data_parallel(mesh)
    size = -(-batch_size // parts) * parts
    sums: dict[str, np.ndarray] = {}
    with jax.set_mesh(mesh):
        batches = eval_batches(rows, size)
        if progress:
            batches = track(batches, progress, -(-len(rows) // size))
        for host in batches:
            out = jax.device_get(eval_fn(trainable, frozen, Batch(**put(mesh, host))))
            for name, pair in out.items():
                sums[name] = sums.get(name, 0.0) + np.asarray(pair, np.float64)
    means = {k: float(a / w) if w else 0.0 for k, (a, w) in sums.items()}
    loss = means.pop("nll")
    tokens = int(sums["loss"][1])
    return means | {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}


def evaluate_files(
    model: str,
    data: list[str],
    *,
    objective: Literal["pretrain", "sft"] = "pretrain",
    max_length: int = 1024,
    batch_size: int = 8,
    dtype: str = "float32",
    template: str | None = None,
) -> dict[str, float]:
    """Evaluates a HF directory on files: {loss, perplexity, tokens, examples, …}.

    `objective` sft reads chats and counts the assistant's tokens only; pretrain reads text.
    """
    from jaxllm.hf import load_hf
    from jaxllm.tokenizer import check_vocabulary, load_tokenizer

    mesh = make_mesh(MeshSection())
    tokenizer = load_tokenizer(model)
    loaded = load_hf(model, mesh=mesh, compute_dtype=dtype)
    check_vocabulary(tokenizer, loaded.cfg.vocab_size)
    cfg = TrainConfig(
        objective=objective,
        model=ModelSection(path=model),
        data=DataSection(
            eval=tuple(Source(path) for path in data),
            max_length=min(max_length, loaded.cfg.max_positions),
            template=template,
        ),
    )
    held_out = load_data(cfg, tokenizer)
    graph, weights = nnx.split(loaded, nnx.Param)
    eval_fn, params = make_eval(graph, lm_loss), nnx.to_pure_dict(weights)
    run = partial(evaluate, eval_fn, params, {}, mesh=mesh, batch_size=batch_size)
    sums: dict[str, float] = {"tokens": 0, "examples": 0}
    nll = correct = 0.0
    for name, rows in held_out.evals.items():
        out = run(rows, progress=f"evaluating {name}")
        nll += out["loss"] * out["tokens"]
        correct += out["accuracy"] * out["tokens"]
        sums["tokens"] += out["tokens"]
        sums["examples"] += held_out.manifest["eval"][name]["examples"]
    loss = nll / max(sums["tokens"], 1)
    return (
        {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        | sums
        | {"accuracy": correct / max(sums["tokens"], 1)}
    )
