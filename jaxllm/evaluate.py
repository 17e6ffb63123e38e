# SPDX-License-Identifier: Apache-2.0
"""Held-out loss: Σ nll / Σ tokens over a whole set, whatever the batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxllm.config import DataSection, MeshSection, ModelSection, Source, TrainConfig
from jaxllm.data.batch import Batch
from jaxllm.data.loader import Rows, eval_batches, load_data
from jaxllm.mesh import data_parallel, make_mesh, put
from jaxllm.model.decoder import merge
from jaxllm.monitor.metrics import track
from jaxllm.objectives.lm import lm_loss


def make_eval(graph: Any, objective: Callable[..., Any]) -> Callable[..., Any]:
    """Jitted `(trainable, frozen, batch [B, T]) -> {metric: (sum, weight)}` of an objective."""

    def run(trainable, frozen, batch):
        loss, weight, metrics = objective(merge(graph, trainable, frozen), batch, None, None)
        learned = jnp.sum(batch.weights > 0).astype(jnp.float32)
        return {"loss": (loss, weight), "tokens": (learned, jnp.zeros(()))} | metrics

    return jax.jit(run)


def evaluate(
    eval_fn: Callable[..., Any],
    trainable: Any,
    frozen: Any,
    sets: Sequence[Rows],
    *,
    mesh: Mesh,
    batch_size: int,
    progress: str = "",
) -> dict[str, float]:
    """{loss, perplexity, tokens, …}: sums over all rows of the sets, divided once.

    loss is nats per learned token (without z-loss, a token counting by its weight), perplexity its
    exponential, tokens how many have a weight. `batch_size` is rounded up to the devices and only
    bounds memory. `progress` names a bar on stderr (none: no bar).
    """
    parts = data_parallel(mesh)
    size = -(-batch_size // parts) * parts
    sums: dict[str, np.ndarray] = {}
    with jax.set_mesh(mesh):
        batches = chain.from_iterable(eval_batches(rows, size) for rows in sets)
        if progress:
            batches = track(batches, progress, sum(-(-len(rows) // size) for rows in sets))
        for host in batches:
            out = jax.device_get(eval_fn(trainable, frozen, Batch(**put(mesh, host))))
            for name, pair in out.items():
                sums[name] = sums.get(name, 0.0) + np.asarray(pair, np.float64)
    means = {k: float(a / w) if w else 0.0 for k, (a, w) in sums.items()}
    loss = means.pop("nll")
    tokens = int(sums["tokens"][0])
    return means | {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}


def evaluate_files(
    model: str,
    data: Sequence[str | Source],
    *,
    objective: Literal["pretrain", "sft"] = "pretrain",
    max_length: int = 1024,
    batch_size: int = 8,
    dtype: str = "float32",
    template: str | None = None,
    adapter: Mapping[str, str] | None = None,
    use: Any = ...,
) -> dict[str, float]:
    """Evaluates a HF directory on files: {loss, perplexity, tokens, examples, …}.

    `objective` sft reads chats and counts the assistant's tokens only; pretrain reads text. All
    files are one set. adapter: {name: directory} beside the model; use: which of them (default the
    first; interop.choose). Raises ValueError or FileNotFoundError for what is not there or unfit.
    """
    if not data:
        raise ValueError("there is nothing to evaluate on; name a file")
    for name, value in (("max_length", max_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    from jaxllm.hf import load_hf
    from jaxllm.peft.interop import choose, tokenizer_of
    from jaxllm.tokenizer import check_vocabulary, load_tokenizer

    mesh = make_mesh(MeshSection())
    tokenizer = load_tokenizer(tokenizer_of(model))
    loaded = load_hf(model, mesh=mesh, compute_dtype=dtype, adapter=adapter or None)
    if use is not ...:
        choose(loaded, use)
    check_vocabulary(tokenizer, loaded.cfg.vocab_size)
    cfg = TrainConfig(
        objective=objective,
        model=ModelSection(path=model),
        data=DataSection(
            eval=tuple(Source(each) if isinstance(each, str) else each for each in data),
            max_length=min(max_length, loaded.cfg.max_positions - loaded.peft.length),
            template=template,
        ),
    )
    held_out = load_data(cfg, tokenizer)
    graph, weights = nnx.split(loaded)
    eval_fn, params = make_eval(graph, lm_loss), nnx.to_pure_dict(weights)
    out = evaluate(
        eval_fn,
        params,
        {},
        list(held_out.evals.values()),
        mesh=mesh,
        batch_size=batch_size,
        progress="evaluating",
    )
    shown = {key: out[key] for key in ("loss", "perplexity", "tokens", "accuracy")}
    return shown | {"examples": sum(e["examples"] for e in held_out.manifest["eval"].values())}
