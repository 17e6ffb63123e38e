# SPDX-License-Identifier: Apache-2.0
"""Held-out losses and rewards: sums over a whole set, divided once, whatever the batch size."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxllm.config import DataSection, EvalSection, MeshSection, ModelSection, Source, TrainConfig
from jaxllm.data.batch import Batch
from jaxllm.data.loader import Rows, eval_batches, load_data, summarize
from jaxllm.data.sources import locate, read, records
from jaxllm.data.template import chat_tokenizer
from jaxllm.errors import UserError
from jaxllm.mesh import data_parallel, make_mesh, put
from jaxllm.model.decoder import Decoder
from jaxllm.monitor.metrics import track
from jaxllm.objectives.lm import lm_loss
from jaxllm.step import Models, alone, with_baseline

LOWER = ("loss", "perplexity")  # ends of names of metrics that are better when lower


@dataclass(frozen=True)
class Eval:
    """An objective's jitted `(trainable, frozen, batch [B, T]) -> {metric: (Σ, weight)}`, and for
    one with a baseline, what that is the mean of."""

    metrics: Callable[..., Any]
    baseline: Callable[..., Any] | None = None


def make_eval(
    models: Models, objective: Callable[..., Any], baseline: Callable[..., Any] | None = None
) -> Eval:
    """The evaluation of an objective; arguments are those of `make_step`."""

    def metrics(trainable, frozen, batch):
        model, reference = models(trainable, frozen)
        loss, weight, metrics = objective(model, batch, None, reference)
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
    """{loss, tokens, …} over all rows of the sets: sums, divided once.

    tokens is how many have a weight. Of a language model loss is nats per learned token (without
    z-loss, a token counting by its weight) and perplexity its exponential. `batch_size` is rounded
    up to the devices and only bounds memory. `progress` names a bar on stderr (none: no bar).
    """
    parts = data_parallel(mesh)
    size = -(-batch_size // parts) * parts

    def batches() -> Iterator[Batch]:
        found = chain.from_iterable(eval_batches(rows, size) for rows in sets)
        if progress:
            found = track(found, progress, sum(-(-len(rows) // size) for rows in sets))
        return (Batch(**put(mesh, host)) for host in found)

    sums: dict[str, np.ndarray] = {}
    with jax.set_mesh(mesh):
        mean = None
        if eval_fn.baseline is not None:
            pairs = [jax.device_get(eval_fn.baseline(trainable, frozen, b)) for b in batches()]
            found, weight = np.sum(np.asarray(pairs, np.float64), 0)
            mean = found / max(weight, 1.0)
        for batch in batches():
            batch = batch if mean is None else with_baseline(batch, mean)
            out = jax.device_get(eval_fn.metrics(trainable, frozen, batch))
            for name, pair in out.items():
                sums[name] = sums.get(name, 0.0) + np.asarray(pair, np.float64)
    means = {k: float(a / w) if w else 0.0 for k, (a, w) in sums.items()}
    means["tokens"] = int(sums["tokens"][0])
    if "nll" in means:
        means["loss"] = means.pop("nll")
        means["perplexity"] = math.exp(min(means["loss"], 700.0))
    return means


def metric_names(
    eval_fn: Eval, trainable: Any, frozen: Any, rows: Rows, batch_size: int
) -> set[str]:
    """The names of what `evaluate` returns of `rows`, from shapes: nothing is computed."""
    batch = Batch(**next(eval_batches(rows, batch_size)))
    batch = with_baseline(batch, 0.0) if eval_fn.baseline is not None else batch
    names = set(jax.eval_shape(eval_fn.metrics, trainable, frozen, batch))
    return names - {"nll"} | {"perplexity"} if "nll" in names else names


@dataclass(frozen=True)
class Best:
    """The best evaluation so far. A run's checkpoints hold it, so that a resumed run goes on."""

    step: int | None = None
    """None before the first evaluation"""
    value: float | None = None
    """its metric"""
    waited: int = 0
    """evaluations since the last improvement of more than min_delta"""
    loss: float | None = None
    """its loss, whatever the metric"""

    def after_evals(
        self, step: int, evals: dict[str, dict[str, float]], section: EvalSection
    ) -> Best:
        """With the evaluations {set: {metric: value}} of `step`, by eval.metric (`judged`)."""
        if not evals:
            return self
        best = self.after(step, judged(evals, section), section)
        return replace(best, loss=judged(evals, EvalSection())) if best.step == step else best

    def after(self, step: int, value: float, section: EvalSection) -> Best:
        """With the evaluation of `step`. The earlier of two equal ones stays the best; one that is
        not finite is never better."""
        sign = 1 if is_greater(section) else -1
        gain = math.inf if self.value is None else sign * (value - self.value)
        if not (math.isfinite(value) and gain > 0):
            return replace(self, waited=self.waited + 1)
        return Best(step, value, 0 if gain > section.min_delta else self.waited + 1)

    def is_over(self, section: EvalSection) -> bool:
        """True once `patience` evaluations brought no improvement."""
        return 0 < section.patience <= self.waited


def is_greater(section: EvalSection) -> bool:
    """Whether a higher value of eval.metric is better."""
    by_name = not section.metric.endswith(LOWER)
    return by_name if section.greater is None else section.greater


def judged(evals: dict[str, dict[str, float]], section: EvalSection) -> float:
    """eval.metric of the evaluations {set: {metric: value}}: its mean over the sets, or with a
    set's name before it (`NAME_METRIC`), that set's. transformers' prefix eval_ may precede both.

    Raises ValueError naming the metrics there are.
    """
    for metric in (section.metric, section.metric.removeprefix("eval_")):
        each = [values[metric] for values in evals.values() if metric in values]
        if each:
            return sum(each) / len(each)
        for name, values in evals.items():
            if metric.startswith(f"{name}_") and metric.removeprefix(f"{name}_") in values:
                return values[metric.removeprefix(f"{name}_")]
    known = sorted({metric for values in evals.values() for metric in values})
    raise UserError(
        f"eval.metric {section.metric!r} is not logged by evaluations; there are "
        f"{', '.join(known)}, and NAME_METRIC for one of {', '.join(evals)}"
    )


def _pairs(source: Source) -> bool:
    """Whether a source holds pairs of answers, by its first record."""
    with TemporaryDirectory() as folder:
        table = read(locate(source, held_out=True), Path(folder))
        if not len(table):
            raise UserError(f"{source.path}: holds no examples")
        _, record = next(records(table[:1], [0], source.path))
    given = {name for name, value in record.items() if value is not None}
    return bool({"chosen", "rejected"} & (given | source.columns.keys()))


def _distribution(scores: np.ndarray, name: str) -> dict[str, float]:
    """Mean, standard deviation, extremes and quartiles."""
    marks = np.quantile(scores, (0, 0.25, 0.5, 0.75, 1))
    named = zip(("min", "q1", "median", "q3", "max"), marks.tolist(), strict=True)
    found = {"mean": float(scores.mean()), "std": float(scores.std()), **dict(named)}
    return {f"{name}_{k}": v for k, v in found.items()}


def evaluate_rewards(
    model: Decoder,
    tokenizer: Any,
    sources: Sequence[Source],
    *,
    mesh: Mesh,
    max_length: int,
    batch_size: int,
) -> dict[str, float]:
    """A reward model on pairs: {loss, accuracy, margin, examples, tokens, reward_*}, or on
    conversations: {examples, tokens, reward_*}, where reward_* is how its scores are spread."""
    paired = _pairs(sources[0])
    cfg = TrainConfig(
        objective="reward" if paired else "sft",
        data=DataSection(eval=tuple(sources), max_length=max_length),
    )
    if not paired:
        cfg = replace(cfg, data=replace(cfg.data, train_on_prompt=True))
    data = load_data(cfg, tokenizer)
    print(*summarize(data.manifest), sep="\n", file=sys.stderr)
    graph, params = nnx.split(model)

    @jax.jit
    def scores(params: Any, batch: Batch, segments: Sequence[Any]) -> Any:
        model = nnx.merge(graph, params)
        hidden = model.hidden(batch.tokens, batch.segment_ids, batch.positions).x
        return [model.scores(hidden, batch.segment_ids, s) for s in segments]

    size = -(-batch_size // data_parallel(mesh)) * data_parallel(mesh)
    found: list[Any] = []
    tokens = most = 0  # texts in a row, as many as there were at most: few programs
    with jax.set_mesh(mesh):
        for rows in data.evals.values():
            for host in track(eval_batches(rows, size), "scoring", -(-len(rows) // size)):
                batch = Batch(**put(mesh, host))
                names = [batch.chosen_segment, batch.rejected_segment]
                if not paired:
                    most = max(most, int(host["segment_ids"].max()))
                    each = np.arange(1, most + 1) * np.ones((size, 1), np.int32)
                    here = (host["segment_ids"][:, None] == each[..., None]).any(-1)
                    names = [jnp.where(here, each, 0)]
                got = np.stack(jax.device_get(scores(params, batch, names)))
                found.append(got[:, np.asarray(names[0]) > 0])
                tokens += int((host["segment_ids"] > 0).sum())
    table = np.concatenate(found, 1).astype(np.float64)
    out: dict[str, float] = {"examples": table.shape[1], "tokens": tokens}
    if paired:
        apart = table[0] - table[1]
        out |= {"loss": float(np.logaddexp(0, -apart).mean())}
        out |= {"accuracy": float((apart > 0).mean()), "margin": float(apart.mean())}
        out |= _distribution(table[0], "chosen") | _distribution(table[1], "rejected")
    return out | _distribution(table.ravel(), "reward")


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
    files are one set. A reward model scores pairs or conversations (`evaluate_rewards`). adapter:
    {name: directory} beside the model; use: which of them (default the first; jaxllm.choose).
    Raises ValueError or FileNotFoundError for what is not there or unfit.
    """
    if not data:
        raise UserError("there is nothing to evaluate on; name a file")
    for name, value in (("max_length", max_length), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    from jaxllm.hf import load_hf
    from jaxllm.peft.combine import choose
    from jaxllm.peft.files import tokenizer_of
    from jaxllm.tokenizer import check_vocabulary

    mesh = make_mesh(MeshSection())
    tokenizer = chat_tokenizer(tokenizer_of(model), template)
    loaded = load_hf(model, mesh=mesh, compute_dtype=dtype, adapter=adapter or None)
    if use is not ...:
        choose(loaded, use)
    check_vocabulary(tokenizer, loaded.cfg.vocab_size)
    sources = tuple(Source(each) if isinstance(each, str) else each for each in data)
    room = min(max_length, loaded.cfg.max_positions - loaded.peft.length)
    if loaded.cfg.scores:
        sizes = {"max_length": room, "batch_size": batch_size}
        return evaluate_rewards(loaded, tokenizer, sources, mesh=mesh, **sizes)
    cfg = TrainConfig(
        objective=objective,
        model=ModelSection(path=model),
        data=DataSection(eval=sources, max_length=room),
    )
    held_out = load_data(cfg, tokenizer)
    graph, weights = nnx.split(loaded)
    eval_fn, params = make_eval(alone(graph), lm_loss), nnx.to_pure_dict(weights)
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
