# SPDX-License-Identifier: Apache-2.0
"""Evaluation of an objective on held-out rows, and `jaxllm eval`.

Dims: B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxllm import dist
from jaxllm.chat import load_with_tokenizer
from jaxllm.config import DataSection, MeshSection, ModelSection, Source, TrainConfig
from jaxllm.data.batch import Batch
from jaxllm.data.dataset import load_data
from jaxllm.data.loader import eval_batches
from jaxllm.data.rows import Rows
from jaxllm.errors import UserError
from jaxllm.mesh import data_parallel, local_rows, make_mesh, put
from jaxllm.monitor.meter import means
from jaxllm.monitor.progress import track
from jaxllm.objectives.lm import lm_loss
from jaxllm.peft.combine import choose
from jaxllm.rl.rewards import RewardModel, evaluate_rewards
from jaxllm.step import Models, alone, with_baseline


@dataclass(frozen=True)
class Eval:
    """The jitted functions that evaluate an objective."""

    metrics: Callable[..., Any]
    """(trainable, frozen, batch [B, T]) -> {metric: (Σ, weight)}"""
    baseline: Callable[..., Any] | None = None
    """(trainable, frozen, batch [B, T]) -> (Σ, weight) of the objective's baseline"""


def make_eval(
    models: Models, objective: Callable[..., Any], baseline: Callable[..., Any] | None = None
) -> Eval:
    """Builds the evaluation of an objective from the arguments of `make_step`."""

    def metrics(trainable, frozen, batch):
        model, reference = models(trainable, frozen)
        loss, weight, metrics = objective(model, batch, None, reference)
        metrics.pop("expert_load", None)
        learned = jnp.sum(batch.weights > 0).astype(jnp.float32)
        return {"loss": (loss, weight), "tokens": (learned, jnp.zeros(()))} | metrics

    def mean(trainable, frozen, batch):
        return baseline(*models(trainable, frozen), batch) if baseline else None

    return Eval(jax.jit(metrics), jax.jit(mean) if baseline else None)


def evaluate(
    eval_fn: Eval,
    trainable: Any,
    frozen: Any,
    sets: Sequence[Rows],
    *,
    mesh: Mesh,
    batch_size: int,
    progress: str = "",
) -> dict[str, float]:
    """{loss, tokens, …}: means over all rows of the sets, the same for any batch size.

    tokens: the number of tokens with a loss weight. The loss of a language model is in nats per
    token, weighted and without z-loss; perplexity is its exponential. A metric that counted nothing
    is left out (`means`). `batch_size` is rounded up to a multiple of the data-parallel devices.
    progress: label of a progress bar on stderr; empty for none.
    """
    parts = data_parallel(mesh)
    size = -(-batch_size // parts) * parts

    def batches() -> Iterator[Batch]:
        local = local_rows(mesh, size)
        rows = chain.from_iterable(eval_batches(rows, size, local) for rows in sets)
        if progress:
            rows = track(rows, progress, sum(-(-len(rows) // size) for rows in sets))
        return (Batch(**put(mesh, host, size)) for host in rows)

    sums: dict[str, np.ndarray] = {}
    with jax.set_mesh(mesh):
        mean = None
        if eval_fn.baseline is not None:
            pairs = [dist.gather(eval_fn.baseline(trainable, frozen, b)) for b in batches()]
            total, weight = np.sum(np.asarray(pairs, np.float64), 0)
            mean = total / max(weight, 1.0)
        for batch in batches():
            batch = batch if mean is None else with_baseline(batch, mean)
            for name, pair in dist.gather(eval_fn.metrics(trainable, frozen, batch)).items():
                sums[name] = sums.get(name, 0.0) + np.asarray(pair, np.float64)
    is_lm = "nll" in sums
    if is_lm:
        sums["loss"] = sums.pop("nll")
    values = means(sums) | {"tokens": int(sums["tokens"][0])}
    return values | ({"perplexity": math.exp(min(values["loss"], 700.0))} if is_lm else {})


def metric_names(
    eval_fn: Eval, trainable: Any, frozen: Any, rows: Rows, batch_size: int
) -> set[str]:
    """Names of the metrics that `evaluate` may return for `rows`; traces, but computes nothing."""
    batch = Batch(**next(eval_batches(rows, batch_size)))
    batch = with_baseline(batch, 0.0) if eval_fn.baseline is not None else batch
    names = set(jax.eval_shape(eval_fn.metrics, trainable, frozen, batch))
    return names - {"nll"} | {"perplexity"} if "nll" in names else names


def evaluate_files(
    model: str,
    data: Sequence[Any],
    *,
    objective: Literal["pretrain", "sft"] = "pretrain",
    max_length: int = 1024,
    batch_size: int = 8,
    dtype: str = "float32",
    template: str | None = None,
    adapter: Mapping[str, str] | None = None,
    use: Any = ...,
) -> dict[str, float]:
    """Evaluates an HF directory on files: {loss, perplexity, tokens, examples, …}.

    data: sources, or paths, datasets or lists of records, as those of `data.train`.
    objective: pretrain reads text; sft reads chats and counts only the assistant's tokens. All
    files together are one set. A reward model scores pairs or conversations (`evaluate_rewards`).
    adapter: {name: directory} of PEFT adapters to load; use: which one is active (default: the
    first). Raises UserError for a model or data that cannot be read or do not fit.
    """
    if not data:
        raise UserError("there is nothing to evaluate on; name a file")
    for name, value in (("max_length", max_length), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if TrainConfig(objective=objective).verb.data not in ("text", "chat"):
        raise UserError(f"objective is {objective!r}; an evaluation reads pretrain or sft data")
    mesh = make_mesh(MeshSection())
    options: Any = {"mesh": mesh, "compute_dtype": dtype, "adapter": adapter}
    loaded, tokenizer = load_with_tokenizer(model, template, **options)
    if use is not ...:
        choose(loaded, use)
    sources = tuple(item if isinstance(item, Source) else Source(item) for item in data)
    max_length = min(max_length, loaded.cfg.max_positions - loaded.peft.length)
    if loaded.cfg.scores:
        reward_model = RewardModel.of(loaded, tokenizer, mesh)
        return evaluate_rewards(reward_model, sources, max_length=max_length, batch_size=batch_size)
    cfg = TrainConfig(
        objective=objective,
        model=ModelSection(path=model),
        data=DataSection(eval=sources, max_length=max_length),
    )
    held_out = load_data(cfg, tokenizer)
    graph, weights = nnx.split(loaded)
    eval_fn, params = make_eval(alone(graph), lm_loss), nnx.to_pure_dict(weights)
    options = {"mesh": mesh, "batch_size": batch_size, "progress": "evaluating"}
    out = evaluate(eval_fn, params, {}, list(held_out.evals.values()), **options)
    shown = {key: out[key] for key in ("loss", "perplexity", "tokens", "accuracy") if key in out}
    return shown | {"examples": sum(e["examples"] for e in held_out.manifest["eval"].values())}
